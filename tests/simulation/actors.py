"""Clients that ask for things, workers that run jobs, and whoever makes trouble."""

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any  # Messages of grpc are untyped.

import grpc
import msgspec

from silo.model.job import DEFAULT_TENANT
from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.simulation.loop import Process, start
from tests.simulation.network import Failed, WorkStream
from tests.simulation.world import BUSY, UNKNOWN, World

HEARTBEAT_S = 5.0
_TRIES = 30  # Of an enqueue, before its client gives up.
GROUPS = ("g1", "g2")


class Mix(msgspec.Struct, frozen=True, kw_only=True):
    """What jobs look like, and what is done to them. Probabilities are for each job."""

    limits: Sequence[Sequence[pb.Limit]] = ((),)
    groups: Sequence[str] = ("g1",)
    retries: float = 0.3
    delayed: float = 0.2
    cancel: float = 0.1
    restart: float = 0.3  # Of those that were cancelled.
    expedite: float = 0.1
    delete: float = 0.0
    lease_one: float = 0.0
    reimport: float = 0.0
    drop_holders: float = 0.0
    pause_ms: tuple[float, float] = (0, 1_500)  # Between two jobs of one client.


class Client:
    """Enqueues jobs and then does things to them."""

    def __init__(self, world: World, name: str, mix: Mix, jobs: int) -> None:
        self._world = world
        self.name = name
        self._mix = mix
        self._jobs = jobs
        self._rng = world.rng(name)
        self.acked: set[tuple[str, str]] = set()  # Jobs that exist, as the server said.
        self.deleted: set[tuple[str, str]] = set()  # Jobs that may be gone.

    async def run(self) -> None:
        for number in range(self._jobs):
            tenant = self._rng.choice(self._world.tenants)
            await self._live(tenant, f"{self.name}-{number}")
            await self._pause()

    async def _pause(self) -> None:
        await asyncio.sleep(self._rng.uniform(*self._mix.pause_ms) / 1000)

    async def _live(self, tenant: str, job_id: str) -> None:
        """One job's life, as far as its client has a hand in it."""
        if not await self._enqueue(tenant, job_id):
            return
        mix, chance = self._mix, self._rng.random
        if chance() < mix.expedite:
            await self._pause()
            await self._try("ExpediteJob", tenant, job_id)
        if chance() < mix.lease_one:
            self._world.were_dropped = True  # Such a job runs without its tickets.
            await self._try("LeaseTask", tenant, job_id, worker_id=self.name)
        if chance() < mix.cancel:
            await self._pause()
            if await self._try("CancelJob", tenant, job_id):
                await self._check_cancelled(tenant, job_id)
                if chance() < mix.restart:
                    await self._pause()
                    await self._try("RestartJob", tenant, job_id)
        if chance() < mix.reimport:
            await self._reimport(tenant, job_id)
        if chance() < mix.drop_holders:
            self._world.were_dropped = True
            await self._try("DropTenantHolders", tenant, "")
        if chance() < mix.delete:
            await self._pause()
            self.deleted.add((tenant, job_id))
            await self._try("DeleteJob", tenant, job_id)

    async def _enqueue(self, tenant: str, job_id: str) -> bool:
        mix, rng = self._mix, self._rng
        request = pb.EnqueueRequest(
            shard=self._world.shard_of(tenant),
            id=job_id,
            tenant=self._tenant(tenant),
            priority=rng.choice([0, 10, 50]),
            task_group=rng.choice(list(mix.groups)),
            payload=pb.SerializedBytes(msgpack=payload_of(job_id)),
            limits=rng.choice(list(mix.limits)),
        )
        if rng.random() < mix.retries:
            request.retry_policy.CopyFrom(
                pb.RetryPolicy(
                    retry_count=rng.choice([1, 2, 5]),
                    initial_interval_ms=rng.choice([0, 50, 1_000]),
                    max_interval_ms=5_000,
                    randomize_interval=rng.random() < 0.5,
                    backoff_factor=2.0,
                )
            )
        if rng.random() < mix.delayed:
            request.start_at_ms = self._world.clock.now_ms() + rng.choice([-1_000, 200, 3_000, 20_000])
        for _ in range(_TRIES):
            try:
                await self._world.call(self.name, "Enqueue", request)
            except Failed as failure:
                if failure.code is grpc.StatusCode.ALREADY_EXISTS:
                    break  # An earlier try was kept after all.
                await self._pause()
            else:
                break
        else:
            return False
        self.acked.add((tenant, job_id))
        await self._look(tenant, job_id)
        return True

    async def _look(self, tenant: str, job_id: str) -> Any:
        """The job as a lookup shows it; None if nobody answers."""
        request = pb.GetJobRequest(
            shard=self._world.shard_of(tenant),
            id=job_id,
            tenant=self._tenant(tenant),
            include_attempts=True,
        )
        try:
            job = await self._world.call(self.name, "GetJob", request)
        except Failed as failure:
            known = (tenant, job_id) in self.acked - self.deleted
            gone = known and failure.code is grpc.StatusCode.NOT_FOUND
            self._world.require(not gone, f"{job_id} was acknowledged and is not found")  # 63
            return None
        running = [a for a in job.attempts if a.status == pb.ATTEMPT_STATUS_RUNNING]
        is_running = job.status == pb.JOB_STATUS_RUNNING
        self._world.require(
            len(running) == is_running, f"{job_id} shows {len(running)} running attempts"
        )  # 30
        self._world.require(job.payload.msgpack == payload_of(job_id), f"{job_id} has another payload")
        return job

    async def _check_cancelled(self, tenant: str, job_id: str) -> None:
        job = await self._look(tenant, job_id)
        if job is not None:
            waits = job.status == pb.JOB_STATUS_SCHEDULED
            self._world.require(not waits, f"{job_id} was cancelled and still waits")

    async def _try(self, method: str, tenant: str, job_id: str, **fields: Any) -> bool:
        """Whether a call was answered with success."""
        request = getattr(pb, f"{method}Request")(
            shard=self._world.shard_of(tenant), tenant=self._tenant(tenant), **fields
        )
        if job_id:
            request.id = job_id
        try:
            await self._world.call(self.name, method, request)
        except Failed:
            return False
        return True

    async def _reimport(self, tenant: str, job_id: str) -> None:
        """Tell the server of one more attempt that failed elsewhere."""
        job = await self._look(tenant, job_id)
        if job is None:
            return
        past = [
            pb.ImportAttempt(
                status=attempt.status,
                started_at_ms=attempt.started_at_ms,
                finished_at_ms=attempt.finished_at_ms,
                result=attempt.result if attempt.HasField("result") else None,
                error_code=attempt.error_code if attempt.HasField("error_code") else None,
                error_data=attempt.error_data if attempt.HasField("error_data") else None,
            )
            for attempt in job.attempts
            if attempt.status != pb.ATTEMPT_STATUS_RUNNING
        ]
        more = pb.ImportAttempt(
            status=pb.ATTEMPT_STATUS_FAILED, started_at_ms=1, finished_at_ms=2, error_code="ELSEWHERE"
        )
        given = pb.ImportJobRequest(
            shard=self._world.shard_of(tenant),
            id=job_id,
            tenant=self._tenant(tenant),
            task_group="g1",
            retry_policy=pb.RetryPolicy(retry_count=9, max_interval_ms=10),
            attempts=[*past, more],
        )
        try:
            await self._world.call(self.name, "ImportJobs", pb.ImportJobsRequest(jobs=[given]))
        except Failed:
            return

    def _tenant(self, tenant: str) -> str | None:
        return tenant if self._world.has_tenancy() else None


class Habits(msgspec.Struct, frozen=True, kw_only=True):
    """How workers work. Probabilities are for each task."""

    fail: float = 0.1
    cancelled: float = 0.02
    forget: float = 0.0  # Neither heartbeats nor reports, as one that is stuck.
    run_ms: tuple[float, float] = (5, 800)
    long: float = 0.02  # Runs far longer than a lease.
    slots: int = 4
    streams: float = 0.0  # Of all workers.
    back: float = 0.05  # Tasks that workers with streams give back, at once or for later.
    refresh_fail: float = 0.2
    refresh_values: Sequence[int] = (0, 1, 2, 3)


class Workers:
    """What all workers of a world know together."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.leased: dict[str, str] = {}  # Task id to job id.
        self.accepted: dict[str, str] = {}  # Task id to the outcome that the server took.
        self.processes: list[Process] = []

    def employ(self, name: str, habits: Callable[[], Habits], groups: Sequence[str] = GROUPS) -> Process:
        """A worker process more; some of them have streams, the others poll."""
        process = Process(name)
        self.processes.append(process)
        has_stream = self.world.rng(f"{name} kind").random() < habits().streams
        kind = StreamWorker if has_stream else Worker
        start(process, kind(self, name, habits, groups).run(), name="main")
        return process


class Worker:
    """Polls for tasks of some groups and runs them."""

    def __init__(
        self, workers: Workers, name: str, habits: Callable[[], Habits], groups: Sequence[str]
    ) -> None:
        self._all = workers
        self._world = workers.world
        self.name = name
        self._habits = habits
        self._groups = groups
        self._rng: Random = self._world.rng(name)
        self._busy = 0

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._poll(tasks)
        except* AssertionError as broken:
            self._world.problems.extend(broken.exceptions)

    async def _poll(self, tasks: asyncio.TaskGroup) -> None:
        free = self._habits().slots - self._busy
        if free <= 0:
            await asyncio.sleep(0.02)
            return
        group = self._rng.choice(list(self._groups))
        request = pb.LeaseTasksRequest(worker_id=self.name, max_tasks=free, task_group=group)
        try:
            answer = await self._world.call(
                self.name, "LeaseTasks", request, metadata=(("silo-wait-ms", "300"),)
            )
        except Failed:
            await asyncio.sleep(self._rng.uniform(0.01, 0.2))
            return
        self._world.require(len(answer.tasks) <= free, "more tasks than were asked for")
        self._check_queues(answer.tasks)
        for task in answer.tasks:
            self._check_new(task)
            self._busy += 1
            tasks.create_task(self._work(task))
        for refresh in answer.refresh_tasks:
            tasks.create_task(self._refresh(refresh))

    def _check_queues(self, tasks: Sequence[Any]) -> None:
        """One answer never has more tasks of a queue than the queue allows (26)."""
        if self._world.were_dropped:
            return
        found: dict[tuple[str, str], dict[str, int]] = {}
        for task in tasks:
            for limit in task.limits:
                if limit.WhichOneof("limit") == "concurrency":
                    queue = found.setdefault((task.tenant_id, limit.concurrency.key), {})
                    queue[task.id] = limit.concurrency.max_concurrency
        for name, queue in found.items():
            is_within = len(queue) <= max(queue.values())
            self._world.require(is_within, f"one answer has {len(queue)} tasks of {name}")

    def _check_new(self, task: Any) -> None:
        is_new = task.id not in self._all.leased
        self._world.require(is_new, f"task {task.id} was handed out twice")  # LSE-12
        self._world.require(task.payload.msgpack == payload_of(task.job_id), f"{task.job_id}: wrong payload")
        self._all.leased[task.id] = task.job_id
        tenant = task.tenant_id or DEFAULT_TENANT
        stored = self._world.jobs.get((tenant, task.job_id))
        if stored is not None:
            known = {attempt.task_id for attempt in stored.attempts}
            lease = stored.state.lease
            is_durable = task.id in known or (lease is not None and lease.task_id == task.id)
            self._world.require(
                is_durable, f"{task.job_id} was handed out before its lease was durable"
            )  # 64

    async def _work(self, task: Any) -> None:
        habits, chance = self._habits(), self._rng.random
        try:
            if chance() < habits.forget:
                self._world.note(self.name, f"forgets {task.job_id}")
                return
            run_s = self._rng.uniform(*habits.run_ms) / 1000
            if chance() < habits.long:
                run_s += 25
            await self._beat(task, run_s)
            request = pb.ReportOutcomeRequest(
                shard=task.shard, task_id=task.id, tenant_id=task.tenant_id or None
            )
            self._conclude(request, chance())
            await self._report("ReportOutcome", request, request.WhichOneof("outcome"))
        finally:
            self._busy -= 1

    def _conclude(self, report: Any, fate: float) -> None:
        """Fill in how a task ended."""
        habits = self._habits()
        if fate < habits.fail:
            report.failure.code = "BROKEN"
        elif fate < habits.fail + habits.cancelled:
            report.cancelled.SetInParent()
        else:
            report.success.msgpack = b"\xa4done"

    async def _beat(self, task: Any, run_s: float) -> None:
        """Work for `run_s`, with heartbeats; ends early when the lease is gone."""
        until = self._world.loop.now + run_s
        request = pb.HeartbeatRequest(
            shard=task.shard, worker_id=self.name, task_id=task.id, tenant_id=task.tenant_id or None
        )
        while (left := until - self._world.loop.now) > 0:
            await asyncio.sleep(min(left, HEARTBEAT_S))
            if self._world.loop.now >= until:
                return
            try:
                await self._world.call(self.name, "Heartbeat", request)
            except Failed as failure:
                if failure.code not in UNKNOWN:
                    return

    async def _refresh(self, task: Any) -> None:
        habits = self._habits()
        await asyncio.sleep(self._rng.uniform(*habits.run_ms) / 1000)
        request = pb.ReportRefreshOutcomeRequest(
            shard=task.shard, task_id=task.id, tenant_id=task.tenant_id or None
        )
        self._conclude_refresh(request.success, request.failure)
        await self._report("ReportRefreshOutcome", request, None)

    def _conclude_refresh(self, success: Any, failure: Any) -> None:
        """Fill in one of the two."""
        habits = self._habits()
        if self._rng.random() < habits.refresh_fail:
            failure.code = "NO_IDEA"
        else:
            success.new_max_concurrency = self._rng.choice(list(habits.refresh_values))
            success.SetInParent()  # Also when it is 0.

    async def _report(self, method: str, request: Any, outcome: str | None) -> None:
        """Report until the server has taken it, or says that the lease is gone."""
        while True:
            try:
                await self._world.call(self.name, method, request)
            except Failed as failure:
                if failure.code in UNKNOWN or failure.code is BUSY:
                    await asyncio.sleep(self._rng.uniform(0.05, 0.5))
                    continue
                return
            if outcome is not None:
                is_first = request.task_id not in self._all.accepted
                self._world.require(is_first, f"two reports of {request.task_id} were accepted")  # 25
                self._all.accepted[request.task_id] = outcome
            return


class StreamWorker(Worker):
    """Is sent tasks over a stream, and comes back to them when it breaks."""

    def __init__(
        self, workers: Workers, name: str, habits: Callable[[], Habits], groups: Sequence[str]
    ) -> None:
        super().__init__(workers, name, habits, groups)
        self._held: dict[str, str] = {}  # Task ids with their shards, until their reports are answered.
        self._unanswered: dict[str, ext.Report] = {}
        self._stream: WorkStream | None = None

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    with contextlib.suppress(Failed):
                        await self._follow(await self._world.network.work(self.name), tasks)
                    self._world.note(self.name, "has no stream")
                    self._stream = None
                    await asyncio.sleep(self._rng.uniform(0.05, 0.5))
        except* AssertionError as broken:
            self._world.problems.extend(broken.exceptions)

    async def _follow(self, stream: WorkStream, tasks: asyncio.TaskGroup) -> None:
        slots = self._habits().slots
        hello = ext.Hello(
            worker_id=self.name,
            session=f"session of {self.name}",
            task_groups=self._groups,
            slots=slots,
            held=[ext.HeldTask(task_id=task_id, shard=shard) for task_id, shard in self._held.items()],
        )
        stream.write(ext.WorkRequest(hello=hello, window=slots + 2, reports=self._unanswered.values()))
        self._stream = stream
        while True:
            response = await stream.read()
            self._check_queues(response.tasks)
            for task in response.tasks:
                self._check_new(task)
                self._held[task.id] = task.shard
                tasks.create_task(self._work(task))
            for refresh in response.refresh_tasks:
                self._held[refresh.id] = refresh.shard
                tasks.create_task(self._refresh(refresh))
            for answer in response.acknowledgements:
                self._answered(answer)
            for lost in response.lost_leases:
                self._world.note(self.name, f"has lost {lost.task_id}")
                self._held.pop(lost.task_id, None)

    async def _work(self, task: Any) -> None:
        habits, chance = self._habits(), self._rng.random
        run_s = self._rng.uniform(*habits.run_ms) / 1000
        await asyncio.sleep(run_s + 25 if chance() < habits.long else run_s)
        report = self._report_on(task)
        fate = chance()
        if fate <= 1 - habits.back:
            self._conclude(report, fate)
        elif chance() < 0.5:
            report.handed_back.SetInParent()
        else:
            report.postponed.delay_ms = 300
        self._send(report)

    async def _refresh(self, task: Any) -> None:
        habits = self._habits()
        await asyncio.sleep(self._rng.uniform(*habits.run_ms) / 1000)
        report = self._report_on(task)
        self._conclude_refresh(report.refresh_success, report.refresh_failure)
        self._send(report)

    def _report_on(self, task: Any) -> ext.Report:
        return ext.Report(task_id=task.id, shard=task.shard, tenant_id=task.tenant_id or None)

    def _send(self, report: ext.Report) -> None:
        if report.task_id not in self._held:
            return  # It was lost meanwhile.
        self._unanswered[report.task_id] = report
        if self._stream is not None:
            self._stream.write(ext.WorkRequest(reports=[report]))

    def _answered(self, answer: ext.Acknowledgement) -> None:
        report = self._unanswered[answer.task_id]
        if answer.HasField("error") and answer.error.code in _AGAIN:
            self._send(report)
            return
        del self._unanswered[answer.task_id]
        self._held.pop(answer.task_id, None)
        outcome = report.WhichOneof("outcome")
        if not answer.HasField("error") and outcome in ("success", "failure", "cancelled"):
            is_first = answer.task_id not in self._all.accepted
            self._world.require(is_first, f"two reports of {answer.task_id} were accepted")  # 25
            self._all.accepted[answer.task_id] = outcome


_AGAIN = {code.value[0] for code in (*UNKNOWN, BUSY)}


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """What goes wrong, in events a second."""

    server_kills: float = 0.0
    worker_kills: float = 0.0
    partitions: float = 0.0


async def make_trouble(
    world: World, workers: Workers, trouble: Trouble, habits: Callable[[], Habits]
) -> None:
    """Kill and cut off until the world is calm."""
    rng = world.rng("trouble")
    employed = len(workers.processes)
    total = trouble.server_kills + trouble.worker_kills + trouble.partitions
    if not total:
        return
    while True:
        await asyncio.sleep(rng.expovariate(total))
        if world.is_calm:
            return
        kind = rng.random() * total
        if kind < trouble.server_kills:
            world.kill_server()
            await asyncio.sleep(rng.uniform(0.05, 2.0))
            if world.network.server is None:
                await world.start_server()
        elif kind < trouble.server_kills + trouble.worker_kills:
            alive = [process for process in workers.processes if not process.is_dead]
            victim = rng.choice(alive)
            world.note(victim.name, "killed")
            victim.kill()
            employed += 1
            workers.employ(f"worker {employed}", habits)
        else:
            victim = rng.choice(workers.processes)
            world.note(victim.name, "cut off")
            world.network.cut_off.add(victim.name)
            await asyncio.sleep(rng.choice([0.3, 2.5, 14.0]))
            world.network.cut_off.discard(victim.name)
            world.note(victim.name, "back")


def payload_of(job_id: str) -> bytes:
    return b"\xa7payload" + job_id.encode()
