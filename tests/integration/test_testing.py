"""The server for tests, as tests meet it."""

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import silo.testing
from silo import (
    App,
    ConcurrencyLimit,
    JobAttempt,
    JobHandle,
    RateLimit,
    RetryPolicy,
    SiloGRPCClient,
    SiloWorker,
    Success,
    TaskContext,
)
from silo.testing import NotIdle, Ran, Server
from tests.builders import until

GROUP = "g"
START = datetime(2030, 1, 1, tzinfo=UTC)
SLOWLY = RetryPolicy(retry_count=3, initial_interval_ms=60_000, backoff_factor=2, max_interval_ms=3_600_000,
                      randomize_interval=False)  # fmt: skip

Context = TaskContext[Any, dict[str, str]]


class Recorder:
    """A handler that notes what it ran, and at what time."""

    def __init__(self, server: Server, *, fails: bool = False) -> None:
        self._server = server
        self._fails = fails
        self.ran: list[tuple[Any, int]] = []

    async def __call__(self, ctx: Context) -> Any:
        self.ran.append((ctx.task.payload, self._server.now_ms()))
        if self._fails:
            raise RuntimeError("no luck")
        return ctx.task.payload

    @property
    def payloads(self) -> list[Any]:
        return [payload for payload, _ in self.ran]

    @property
    def seconds(self) -> list[float]:
        """When they ran, after the start."""
        start_ms = round(START.timestamp() * 1000)
        return [(at_ms - start_ms) / 1000 for _, at_ms in self.ran]


class Blocked:
    """A handler that ends when the test says so."""

    def __init__(self) -> None:
        self.release = asyncio.Event()
        self.runs = 0

    async def __call__(self, ctx: Context) -> Any:
        self.runs += 1
        await self.release.wait()
        return "done"


def a_worker(client: SiloGRPCClient, handler: Any, **options: Any) -> SiloWorker[Any, Any, Any]:
    return SiloWorker(
        **{"client": client, "worker_id": "w", "task_group": GROUP, "handler": handler} | options
    )


async def attempts(job: JobHandle) -> tuple[JobAttempt, ...]:
    return (await job.job(include_attempts=True)).attempts or ()


# Time


async def test_a_delay_passes_with_the_servers_clock() -> None:
    async with silo.testing.server() as s:
        worker = a_worker(s.client, Recorder(s))
        job = await s.client.enqueue(payload=1, task_group=GROUP, delay=300)
        await s.advance(minutes=4, seconds=59, milliseconds=999)
        assert await s.run_until_idle(worker) == Ran(ended=0, waiting=1)
        await s.advance(timedelta(milliseconds=1))
        assert await s.run_until_idle(worker) == Ran(ended=1, waiting=0)
        assert await job.status() == "Succeeded"


async def test_a_delay_counts_from_the_servers_time_also_after_it_was_moved() -> None:
    async with silo.testing.server() as s:
        await s.advance(days=400)
        job = await s.client.enqueue(payload=1, task_group=GROUP, delay=60)
        await s.advance(seconds=59.9)
        assert not (await s.client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP)).tasks
        await s.advance(seconds=0.1)
        [task] = (await s.client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP)).tasks
        assert task.job_id == job.id


async def test_the_clock_stands_still_until_it_is_moved() -> None:
    async with silo.testing.server(start_at=START) as s:
        job = await s.client.enqueue(payload=1, task_group=GROUP)
        await s.run_until_idle(a_worker(s.client, Recorder(s)))
        assert s.now() == START
        [attempt] = await attempts(job)
        assert attempt.started_at_ms == attempt.finished_at_ms == s.now_ms()
        await s.advance(hours=1.5)
        assert s.now() == START + timedelta(hours=1.5)


async def test_a_poll_of_an_empty_group_ends_although_the_clock_stands_still() -> None:
    async with silo.testing.server() as s:
        polling = s.client.lease_tasks(worker_id="w", max_tasks=1, task_group="empty", wait_ms=30)
        assert not (await polling).tasks


async def test_it_begins_now_unless_told_when() -> None:
    async with silo.testing.server() as s:
        assert abs(s.now() - datetime.now(UTC)) < timedelta(minutes=1)
    with pytest.raises(ValueError, match="time zone"):
        async with silo.testing.server(start_at=datetime(2030, 1, 1)):
            pass


async def test_time_does_not_go_back() -> None:
    async with silo.testing.server() as s:
        with pytest.raises(ValueError, match="forward only"):
            await s.advance(timedelta(seconds=-1))


async def test_a_retry_waits_for_its_backoff() -> None:
    async with silo.testing.server(start_at=START) as s:
        handler = Recorder(s, fails=True)
        worker = a_worker(s.client, handler)
        job = await s.client.enqueue(payload=1, task_group=GROUP, retry_policy=SLOWLY)
        for minutes in (2, 4, 8):
            await s.run_until_idle(worker)
            assert await job.status() == "Scheduled"
            await s.advance(minutes=minutes)
        await s.run_until_idle(worker)
        assert await job.status() == "Failed"
        assert handler.seconds == [0, 120, 360, 840]


async def test_with_a_running_worker_everything_happens_at_its_own_time() -> None:
    async with silo.testing.server(start_at=START) as s:
        handler = Recorder(s)
        for seconds in (30, 10, 20):
            await s.client.enqueue(payload=seconds, task_group=GROUP, delay=seconds)
        async with s.running(a_worker(s.client, handler)):
            await s.advance(minutes=1)
        assert handler.payloads == handler.seconds == [10, 20, 30]


async def test_a_chain_of_jobs_runs_as_if_time_had_passed() -> None:
    async with silo.testing.server(start_at=START) as s:
        times: list[datetime] = []

        async def again(ctx: Context) -> None:
            times.append(s.now())
            await s.client.enqueue(payload=None, task_group=GROUP, delay=3600)

        await s.client.enqueue(payload=None, task_group=GROUP)
        async with s.running(a_worker(s.client, again)):
            await s.advance(days=1)
        assert times == [START + timedelta(hours=hour) for hour in range(25)]


async def test_rate_limits_go_by_the_servers_clock() -> None:
    async with silo.testing.server(start_at=START) as s:
        handler = Recorder(s)
        limit = RateLimit(name="mails", unique_key="all", limit=2, duration_ms=60_000)
        for number in range(4):
            await s.client.enqueue(payload=number, task_group=GROUP, limits=[limit])
        worker = a_worker(s.client, handler)
        await s.run_until_idle(worker)
        assert handler.payloads == [0, 1]
        async with s.running(worker):
            await s.advance(minutes=2)
        assert handler.payloads == [0, 1, 2, 3]


async def test_a_limit_holds_a_job_back_and_idle_does_not_wait_for_it() -> None:
    async with silo.testing.server() as s:
        limit = ConcurrencyLimit(key="one", max_concurrency=1)
        for _ in range(2):
            await s.client.enqueue(payload=1, task_group="other", limits=[limit])
        [task] = (await s.client.lease_tasks(worker_id="by hand", max_tasks=2, task_group="other")).tasks
        await s.client.enqueue(payload=1, task_group=GROUP)
        assert await s.run_until_idle(a_worker(s.client, Recorder(s))) == Ran(ended=1, waiting=2)
        await s.client.report_outcome(task_id=task.id, shard=task.shard, outcome=Success(1))
        idle = await s.run_until_idle(a_worker(s.client, Recorder(s), task_group="other"))
        assert idle == Ran(ended=1, waiting=0)


# Leases


async def test_a_task_that_runs_keeps_its_lease_however_far_the_clock_is_moved() -> None:
    async with silo.testing.server() as s:
        handler = Blocked()
        job = await s.client.enqueue(payload=1, task_group=GROUP)
        async with a_worker(s.client, handler):
            await until(lambda: handler.runs == 1)
            await s.advance(hours=12)
            handler.release.set()
            assert (await job.result(timeout=10)).status == "Succeeded"
        assert len(await attempts(job)) == handler.runs == 1


async def test_time_goes_on_when_a_handler_of_a_running_worker_is_stuck() -> None:
    async with silo.testing.server(start_at=START) as s:
        handler = Blocked()
        stuck = await s.client.enqueue(payload=1, task_group=GROUP)
        later = await s.client.enqueue(payload=2, task_group="other", delay=1800)
        recorder = Recorder(s)
        began = time.monotonic()
        async with s.running(
            a_worker(s.client, handler), a_worker(s.client, recorder, worker_id="v", task_group="other")
        ):
            await s.advance(hours=1)
            assert recorder.seconds == [1800]
            assert await stuck.status() == "Running"
            handler.release.set()
        assert time.monotonic() - began < 20
        assert await later.status() == await stuck.status() == "Succeeded"


async def test_a_task_leased_by_hand_runs_out() -> None:
    async with silo.testing.server() as s:
        job = await s.client.enqueue(payload=1, task_group=GROUP, retry_policy=SLOWLY)
        [task] = (await s.client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP)).tasks
        await s.advance(seconds=9)
        await s.client.heartbeat("w", task.id, task.shard)
        await s.advance(seconds=9.999)
        assert await job.status() == "Running"
        await s.advance(milliseconds=1)
        assert await job.status() == "Scheduled"
        [attempt] = await attempts(job)
        assert attempt.error_code == "WORKER_CRASHED"


async def test_a_poll_waits_in_real_time() -> None:
    async with silo.testing.server(shards=2) as s:
        began = time.monotonic()
        leased = await s.client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=50)
        assert not leased.tasks
        assert 0.04 < time.monotonic() - began < 5
        poll = asyncio.create_task(
            s.client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP, wait_ms=20_000)
        )
        job = await s.client.enqueue(payload=1, task_group=GROUP)
        async with asyncio.timeout(10):
            [task] = (await poll).tasks
        assert task.job_id == job.id


# Idle


async def test_what_is_not_idle_in_time_is_named() -> None:
    async with silo.testing.server() as s:
        handler = Blocked()
        for number in range(3):
            await s.client.enqueue(payload=1, task_group=GROUP, id=f"job-{number}")
        with pytest.raises(
            NotIdle, match=r"not idle after 0.2 s: g: 1 leased, 2 due \(job job-1, job job-2\)"
        ):
            await s.run_until_idle(a_worker(s.client, handler, max_concurrent_tasks=1), timeout=0.2)
        handler.release.set()


async def test_retries_without_a_pause_belong_to_the_run() -> None:
    async with silo.testing.server() as s:
        handler = Recorder(s, fails=True)
        policy = RetryPolicy(retry_count=4, initial_interval_ms=0, max_interval_ms=0)
        await s.client.enqueue(payload=1, task_group=GROUP, retry_policy=policy)
        assert await s.run_until_idle(a_worker(s.client, handler)) == Ran(ended=1, waiting=0)
        assert len(handler.ran) == 5


async def test_jobs_that_handlers_enqueue_belong_to_the_run() -> None:
    async with silo.testing.server(shards=3) as s:

        async def split(ctx: Context) -> None:
            for _ in range(2):
                if ctx.task.payload:
                    await s.client.enqueue(payload=ctx.task.payload - 1, task_group=GROUP)

        await s.client.enqueue(payload=6, task_group=GROUP)
        assert await s.run_until_idle(a_worker(s.client, split)) == Ran(ended=127, waiting=0)


async def test_running_workers_can_be_waited_for() -> None:
    async with silo.testing.server() as s:
        with pytest.raises(ValueError, match="name a worker"):
            await s.run_until_idle()
        async with s.running(a_worker(s.client, Recorder(s))):
            job = await s.client.enqueue(payload=1, task_group=GROUP)
            assert (await s.run_until_idle()).waiting == 0
            assert await job.status() == "Succeeded"


async def test_a_job_can_be_waited_for() -> None:
    async with silo.testing.server() as s:
        handler = Blocked()
        job = await s.client.enqueue(payload=1, task_group=GROUP)
        async with a_worker(s.client, handler):
            assert (await s.wait_for(job, "Running")).id == job.id
            with pytest.raises(TimeoutError, match=r"is Running after 0.1 s, not Succeeded or Failed"):
                await s.wait_for(job, "Succeeded", "Failed", timeout=0.1)
            handler.release.set()
            assert (await s.wait_for(job, "Succeeded")).result == "done"


async def test_the_worker_of_an_app_runs_like_any_other() -> None:
    app = App(task_group=GROUP)

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    async with silo.testing.server() as s:
        app.configure(client=s.client)
        job = await double.options(delay=60).enqueue(21)
        assert await s.run_until_idle(app.worker()) == Ran(ended=0, waiting=1)
        async with s.running(app.worker()):
            await s.advance(minutes=1)
        assert (await job.result(timeout=10)).result == 42


# The same each time


async def test_jobs_enqueued_at_the_same_time_run_in_order() -> None:
    async with silo.testing.server() as s:
        handler = Recorder(s)
        for number in range(50):
            await s.client.enqueue(payload=number, task_group=GROUP)
        await s.run_until_idle(a_worker(s.client, handler, max_concurrent_tasks=1))
        assert handler.payloads == list(range(50))


async def test_the_same_seed_gives_the_same_history() -> None:
    async def history(seed: int) -> list[object]:
        async with silo.testing.server(start_at=START, seed=seed) as s:
            worker = a_worker(s.client, Recorder(s, fails=True), max_concurrent_tasks=1)
            policy = RetryPolicy(retry_count=2)  # Its intervals are random.
            jobs = [
                await s.client.enqueue(payload=n, task_group=GROUP, retry_policy=policy) for n in range(3)
            ]
            async with s.running(worker):
                await s.advance(minutes=10)
            shards = [shard.shard_id for shard in s.client.get_topology()]
            return [shards, *[await job.job(include_attempts=True) for job in jobs]]

    assert await history(1) == await history(1)
    assert await history(1) != await history(2)


# Servers


async def test_tenants_live_on_several_shards() -> None:
    async with silo.testing.server(shards=4, tenancy=True) as s:
        handler = Recorder(s)
        for number in range(20):
            await s.client.enqueue(payload=number, task_group=GROUP, tenant=f"tenant-{number}")
        await s.run_until_idle(a_worker(s.client, handler))
        assert sorted(handler.payloads) == list(range(20))
        assert len({s.client.get_shard_for_tenant(f"tenant-{number}") for number in range(20)}) == 4


async def test_a_handler_that_blocks_the_test_does_not_block_the_server() -> None:
    async with silo.testing.server() as s:

        async def block(ctx: Context) -> None:
            time.sleep(0.2)  # noqa: ASYNC251  # That is what it is about.

        for _ in range(3):
            await s.client.enqueue(payload=1, task_group=GROUP)
        assert (await s.run_until_idle(a_worker(s.client, block))).ended == 3


async def test_several_servers_know_nothing_of_each_other() -> None:
    async with silo.testing.server() as first, silo.testing.server() as second:
        job = await first.client.enqueue(payload=1, task_group=GROUP, id="x")
        await second.client.enqueue(payload=2, task_group=GROUP, id="x")
        await first.advance(hours=1)
        assert first.now() - second.now() > timedelta(minutes=50)
        assert (await job.job()).payload == 1


async def test_another_client_goes_by_the_same_clock() -> None:
    async with silo.testing.server(start_at=START) as s, s.connect() as client:
        await s.advance(days=1)
        job = await client.enqueue(payload=1, task_group=GROUP, delay=1)
        assert (await job.job()).enqueue_time_ms == s.now_ms() + 1000


async def test_a_server_with_workers_that_nobody_stops_ends_soon() -> None:
    async with silo.testing.server() as s:
        worker = a_worker(s.client, Blocked(), on_error=lambda error, context: None)
        worker.start()
        await s.client.enqueue(payload=1, task_group=GROUP)
        await until(lambda: worker.active_tasks == 1)
        began = time.monotonic()
    assert time.monotonic() - began < 3
    await worker.stop(0)
