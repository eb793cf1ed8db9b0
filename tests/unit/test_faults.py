"""Whatever call to the store fails, before or after it took effect or never: nothing acknowledged is lost."""

import asyncio
from collections.abc import Awaitable, Callable
from random import Random
from typing import TypeVar

import pytest

from silo.clock import VirtualClock
from silo.errors import JobExists, LeaseNotFound, ShardClosed, StateForbids, StoreError
from silo.model.attempt import Failure
from silo.model.job import LEASE_MS, JobStatus, LeasedTask
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import Fault, MemoryStorage
from tests.builders import DONE, GROUP, SHARD, a_job, a_policy, reopened
from tests.invariants import check_snapshot, check_step

T = TypeVar("T")
TENANT = "-"


class Story:
    """A user who repeats what was not answered, and a node that opens the shard again."""

    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.storage = MemoryStorage()
        self.rng = Random(3)
        self.shard: Shard | None = None
        self.acknowledged: set[str] = set()
        self.seen = check_snapshot({})
        self.reopened = 0

    async def opened(self) -> Shard:
        while self.shard is None:
            try:
                self.shard = await reopened(
                    self.storage,
                    clock=self.clock,
                    rng=self.rng,
                    options=ShardOptions(store_timeout_s=0.02),
                )
            except StoreError:
                self.reopened += 1
        return self.shard

    async def close(self) -> None:
        if self.shard is not None:
            shard, self.shard = self.shard, None
            try:
                await shard.close()
            except StoreError:
                await shard.close()

    async def persist(self, command: Callable[[Shard], Awaitable[T]]) -> T:
        """Repeat the command until the shard answers."""
        while True:
            shard = await self.opened()
            try:
                async with asyncio.timeout(5):
                    return await command(shard)
            except (ShardClosed, StoreError):
                self.reopened += 1
                async with asyncio.timeout(5):
                    await shard.wait_closed()
                await self.close()
            finally:
                self.check()

    def check(self) -> None:
        stored = check_snapshot(self.storage.snapshot(SHARD))
        check_step(self.seen, stored)
        self.seen = stored

    async def enqueue(self, job_id: str, *, start_at_ms: int = 0) -> None:
        job = a_job(job_id, start_at_ms=start_at_ms, retry_policy=a_policy(50, initial_interval_ms=100))
        try:
            await self.persist(lambda shard: shard.enqueue(job))
        except JobExists:
            assert self.reopened, "our own first try was kept"
        self.acknowledged.add(job_id)

    async def lease(self, count: int) -> list[LeasedTask]:
        return await self.persist(
            lambda shard: shard.lease_tasks(worker_id="w", task_group=GROUP, max_tasks=count)
        )

    async def report(self, task: LeasedTask, outcome: Failure | None = None) -> None:
        lease = task.state.lease
        assert lease is not None
        try:
            await self.persist(lambda shard: shard.report(lease.task_id, outcome or DONE))
        except LeaseNotFound:
            assert self.reopened, "our own first try was kept"

    async def control(self, command: Callable[[Shard], Awaitable[None]]) -> None:
        try:
            await self.persist(command)
        except StateForbids:
            assert self.reopened, "our own first try was kept"

    async def wait(self, duration_ms: int) -> None:
        self.clock.advance_ms(duration_ms)
        await self.persist(lambda shard: shard.tick())

    async def drain(self) -> None:
        """Run everything to its end; lost leases run out on the way."""
        while any(not stored.state.status.is_terminal for stored in self.seen.values()):
            for task in await self.lease(10):
                await self.report(task)
            await self.wait(LEASE_MS)

    async def play(self) -> None:
        for number in range(6):
            await self.enqueue(f"j{number}")
        await self.enqueue("late", start_at_ms=self.clock.now_ms() + 5_000)
        tasks = await self.lease(3)
        await self.control(lambda shard: shard.cancel(tenant=TENANT, job_id="j5"))
        for task, outcome in zip(tasks, (None, Failure("BROKEN", b"\xc0"), None), strict=False):
            await self.report(task, outcome)
        await self.control(lambda shard: shard.expedite(tenant=TENANT, job_id="late"))
        await self.control(lambda shard: shard.restart(tenant=TENANT, job_id="j5"))
        await self.wait(200)
        await self.drain()
        await self.control(lambda shard: shard.delete(tenant=TENANT, job_id="j0"))
        await self.close()


async def played(operation: str | None = None, call: int = 0, fault: Fault = Fault.FAIL_BEFORE) -> Story:
    story = Story()
    if operation is not None:
        story.storage.faults.plan(operation, fault, call=call)
    await story.play()
    return story


def statuses(story: Story) -> dict[str, str]:
    return {name[1]: stored.state.status.label for name, stored in story.seen.items()}


async def test_without_faults_everything_ends_well() -> None:
    story = await played()
    assert statuses(story) == {f"j{n}": "Succeeded" for n in range(1, 6)} | {"late": "Succeeded"}
    assert not story.reopened


@pytest.mark.parametrize("fault", list(Fault))
@pytest.mark.parametrize("operation", ["get", "scan", "write", "close"])
async def test_a_fault_at_any_call_loses_nothing(operation: str, fault: Fault) -> None:
    calls = (await played()).storage.faults.calls[operation]
    assert calls, "the story makes such calls"
    for call in range(1, calls + 1):
        story = await played(operation, call, fault)
        assert story.storage.faults.calls[operation] >= call
        expected = story.acknowledged - {"j0"}
        assert {name for name, status in statuses(story).items() if status == "Succeeded"} == expected
        assert all(stored.state.status is JobStatus.SUCCEEDED for stored in story.seen.values())
