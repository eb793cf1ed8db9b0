"""Delivery: who gets which task, in which turn, how many; and that no piece of work is forgotten."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from random import Random

import pytest

from silo.errors import Overloaded
from silo.model.attempt import HandedBack, Postponed
from silo.model.floating import RefreshSucceeded
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobStatus
from silo.node import delivery, session, sessions
from silo.node.session import WINDOW_MAX
from silo.shard import shard as shard_module
from silo.shard.shard import Shard, ShardOptions
from silo.storage.memory import Fault
from tests.builders import GROUP, a_job, a_policy, floating, until
from tests.one_node import SHARDS, OneNode, Worker, one_node
from tests.property.machine import tiny_memory

AT_ONCE = a_policy(99, initial_interval_ms=0)
HASTY = ShardOptions(store_timeout_s=0.2)  # A hung read fails soon, so that the test can end.


def jobs(count: int, *, task_group: str = GROUP, name: str = "j", **fields: object) -> list[object]:
    return [a_job(f"{name}{number:03}", task_group=task_group, **fields) for number in range(count)]


def got(*workers: Worker) -> list[int]:
    """How many tasks each worker has been sent."""
    return [len(worker.read().order) for worker in workers]


# Turns


async def test_tasks_come_in_the_order_of_their_queue() -> None:
    async with one_node() as node:
        await node.enqueue(*jobs(100))
        worker = node.join(window=100, slots=100)
        await node.settle()
        assert worker.read().order == [job.id for job in jobs(100)]


async def test_work_that_is_there_and_work_that_comes_are_both_delivered() -> None:
    async with one_node() as node:
        await node.enqueue(a_job("there"))
        worker = node.join(window=2, slots=2)
        await node.settle()
        assert worker.read().order == ["there"]
        await node.enqueue(a_job("comes"))
        await node.settle()
        assert worker.read().order == ["there", "comes"]


async def test_work_that_becomes_due_is_delivered() -> None:
    async with one_node() as node:
        worker = node.join()
        await node.enqueue(a_job("later", start_at_ms=node.clock.now_ms() + 500))
        await node.wait(499)
        assert got(worker) == [0]
        await node.wait(1)
        assert got(worker) == [1]


@pytest.mark.parametrize("tasks", [12, 120])
async def test_sessions_with_idle_slots_are_served_before_those_that_would_only_keep_the_task(
    tasks: int,
) -> None:
    async with one_node() as node:
        busy = [node.join(f"busy{n}", window=100, slots=1) for n in range(3)]
        await node.enqueue(*jobs(3, name="first"))
        await node.settle()
        assert got(*busy) == [1, 1, 1]
        idle = [node.join(f"idle{n}", window=20, slots=20) for n in range(3)]
        await node.enqueue(*jobs(tasks))
        await node.settle()
        assert sum(got(*idle)) == min(tasks, 60)
        assert sum(got(*busy)) == 3 + max(0, tasks - 60)


async def test_a_slot_whose_handler_has_ended_is_idle_before_its_report_is_durable() -> None:
    async with one_node() as node:
        worker = node.join(window=2, slots=1)
        await node.enqueue(a_job("a"))
        await node.settle()
        assert (got(worker), worker.session.idle_slots, worker.session.room) == ([1], 0, 1)
        reporting = asyncio.ensure_future(worker.report("a"))
        await asyncio.sleep(0)
        assert (worker.session.idle_slots, worker.session.room) == (1, 1)
        await reporting
        assert (worker.session.idle_slots, worker.session.room) == (1, 2)


async def test_tasks_are_spread_over_many_sessions_in_turns() -> None:
    async with one_node() as node:
        workers = [node.join(f"s{n}", window=50, slots=50) for n in range(10)]
        await node.enqueue(*jobs(400))
        await node.settle()
        counts = got(*workers)
        assert sum(counts) == 400
        assert max(counts) - min(counts) <= delivery._TURN_TASKS


async def test_single_tasks_go_to_another_session_each_time() -> None:
    async with one_node() as node:
        workers = [node.join(f"s{n}", window=5, slots=5) for n in range(5)]
        for number in range(10):
            await node.enqueue(a_job(f"j{number}"))
            await node.settle()
        assert got(*workers) == [2] * 5


async def test_sessions_that_work_at_the_same_speed_get_the_same() -> None:
    async with one_node() as node:
        workers = [node.join(f"s{n}", window=3, slots=2) for n in range(4)]
        await node.enqueue(*jobs(200))
        for _ in range(40):
            await node.settle()
            for worker in workers:
                for task_id in list(worker.read().held):
                    name = next(job for job, id in worker.tasks.items() if id == task_id)
                    await worker.report(name)
        counts = got(*workers)
        assert sum(counts) == 200
        assert max(counts) - min(counts) <= 3


async def test_one_large_group_does_not_hold_up_a_small_one() -> None:
    async with one_node() as node:
        large = node.join("large", window=WINDOW_MAX, slots=WINDOW_MAX, task_groups=["large"])
        small = node.join("small", task_groups=["small"])
        await node.enqueue(*jobs(1_000, task_group="large"), a_job("s", task_group="small"))
        for _ in range(50):
            await asyncio.sleep(0)
            if got(small)[0]:
                break
        assert got(large)[0] <= 4 * delivery._ROUND_TASKS
        await node.settle()
        assert got(large) == [1_000]


@pytest.mark.parametrize("window", [1, 5, 30])
async def test_every_shard_has_its_turn(window: int) -> None:
    async with one_node(shards=2) as node:
        worker = node.join(window=window, slots=window)
        for shard_id in SHARDS:
            await node.enqueue(*jobs(20 * window, name=shard_id), shard_id=shard_id)
        for _ in range(20):
            await node.settle()
            await worker.report(*worker.read().order[-len(worker.held) :])
        shards = Counter(name[: len(SHARDS[0])] for name in worker.order)
        assert min(shards[shard_id] for shard_id in SHARDS) >= 5 * window


async def test_tenants_have_their_turns_as_with_polls() -> None:
    async with one_node() as node:
        worker = node.join(window=1, slots=10)
        await node.settle()  # The queue is in memory now.
        worker.session.set_window(0)
        await node.enqueue(*jobs(50, name="a", tenant="a"), *jobs(5, name="b", tenant="b"))
        worker.session.set_window(10)
        await node.settle()
        assert Counter(name[0] for name in worker.read().order) == {"a": 5, "b": 5}


# The window


async def test_a_window_is_never_exceeded_not_even_for_refreshes() -> None:
    async with one_node() as node:
        await node.enqueue(*(a_job(f"f{n}", limits=[floating(0, f"k{n}")]) for n in range(9)), *jobs(9))
        worker = node.join(window=4, slots=4)
        for _ in range(30):
            await node.settle()
            assert len(worker.read().held) <= 4
            name = next((job for job in worker.tasks if worker.tasks[job] in worker.held), None)
            if name is None:
                break
            await worker.report(name, what=RefreshSucceeded(1) if name.startswith("k") else HandedBack())
            if name.startswith("j"):
                await node.shard().cancel(tenant=DEFAULT_TENANT, job_id=name)
        assert {name for name in worker.order if name.startswith("k")} == {f"k{n}" for n in range(9)}


@pytest.mark.parametrize("groups", [1, 3])
async def test_all_task_groups_of_a_session_share_its_window(groups: int) -> None:
    async with one_node() as node:
        names = [f"g{n}" for n in range(groups)]
        worker = node.join(window=7, slots=3, task_groups=names)
        for name in names:
            await node.enqueue(*jobs(20, task_group=name, name=name))
        await node.settle()
        assert got(worker) == [7]


async def test_large_tasks_are_sent_ahead_up_to_a_bound_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "AHEAD_BYTES_MAX", 300_000)
    async with one_node() as node:
        await node.enqueue(*jobs(100, payload=bytes(100_000)))
        worker = node.join(window=1000, slots=5)
        await node.settle()
        sent = got(worker)[0]
        assert 5 <= sent < 100
        while sent < 100:
            await worker.report(*worker.order[-5:])
            await node.settle()
            assert sent < got(worker)[0], "reports make room"
            sent = got(worker)[0]
            assert len(worker.held) < 100


async def test_a_worker_that_comes_back_with_large_tasks_gets_no_more_of_them_than_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(session, "AHEAD_BYTES_MAX", 300_000)
    async with one_node() as node:
        await node.enqueue(*jobs(200, payload=bytes(100_000)))
        worker = node.join(window=1000, slots=5)
        await node.settle()
        held = worker.read().held
        assert len(held) < 200
        again = node.join(window=1000, slots=5, held=held)
        await node.settle()
        assert got(again) == [0]


async def test_large_tasks_fill_all_slots_whatever_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "AHEAD_BYTES_MAX", 1)
    async with one_node() as node:
        worker = node.join(window=1000, slots=5)
        for job in jobs(20, payload=bytes(100_000)):
            await node.enqueue(job)
        await node.settle()
        assert got(worker) == [5]


async def test_a_window_of_nothing_gets_nothing_and_one_that_grows_gets_more() -> None:
    async with one_node() as node:
        worker = node.join(window=0)
        await node.enqueue(*jobs(10))
        for window in (0, 3, 1, 5, 0, 9):
            before = got(worker)[0]
            worker.session.set_window(window)
            await node.settle()
            assert got(worker) == [max(before, window)]


async def test_a_task_group_that_is_named_twice_counts_once() -> None:
    async with one_node() as node:
        worker = node.join(window=2, slots=2, task_groups=[GROUP, GROUP])
        await node.enqueue(*jobs(5))
        await node.settle()
        assert got(worker) == [2]


async def room_by_report(node: OneNode, worker: Worker) -> None:
    await worker.report("j000")


async def room_by_handing_back(node: OneNode, worker: Worker) -> None:
    await worker.report("j000", what=Postponed(60_000))


async def room_by_a_lease_that_ran_out(node: OneNode, worker: Worker) -> None:
    await node.wait(LEASE_MS)


async def room_by_another_call(node: OneNode, worker: Worker) -> None:
    await node.shard().report(worker.read().tasks["j000"], Postponed(60_000))  # type: ignore[arg-type]


async def room_by_a_shard_that_is_gone(node: OneNode, worker: Worker) -> None:
    worker.read()
    worker.session.held = dict.fromkeys(worker.session.held, "no such shard")
    node.sessions.renew()


async def room_by_a_wrong_report(node: OneNode, worker: Worker) -> None:
    await worker.report("j000", what=RefreshSucceeded(1))


@pytest.mark.parametrize(
    "make_room",
    [
        room_by_report,
        room_by_handing_back,
        room_by_a_lease_that_ran_out,
        room_by_another_call,
        room_by_a_shard_that_is_gone,
        room_by_a_wrong_report,
    ],
    ids=lambda function: function.__name__,
)
async def test_whatever_gives_room_back_brings_the_next_task(
    make_room: Callable[[OneNode, Worker], Awaitable[None]],
) -> None:
    async with one_node() as node:
        worker = node.join()
        await node.enqueue(*jobs(2))
        await node.settle()
        assert worker.read().order == ["j000"]
        await make_room(node, worker)
        await node.settle()
        assert worker.read().order == ["j000", "j001"]


# Nothing is forgotten


async def test_work_of_two_task_groups_reaches_both_although_one_session_is_first_in_both_lines() -> None:
    """When its window is full by one group, whoever stands behind it in the other has its turn."""
    async with one_node() as node:
        greedy = node.join("greedy", window=1, slots=1, task_groups=["a", "b"])
        other = node.join("other", window=1, slots=1, task_groups=["b"])
        for group in ("a", "b"):  # So that both queues are in memory, and nobody waits for a read.
            await node.enqueue(a_job(f"warm {group}", task_group=group))
            await node.settle()
            for worker in (greedy, other):
                if worker.read().held:
                    await worker.report(worker.order[-1])
        greedy.order.clear()
        other.order.clear()
        await node.settle()
        await node.enqueue(a_job("a", task_group="a"), a_job("b", task_group="b"))
        await node.settle()
        assert got(greedy, other) == [1, 1]


async def test_a_session_that_is_full_by_another_group_passes_work_on_to_a_poll() -> None:
    async with one_node() as node:
        worker = node.join(window=1, task_groups=["a", "b"])
        await node.settle()
        poll = asyncio.ensure_future(
            node.shard().lease_tasks(worker_id="w", task_group="b", max_tasks=1, wait_ms=60_000)
        )
        await asyncio.sleep(0)
        await node.enqueue(a_job("a", task_group="a"), a_job("b", task_group="b"))
        [task] = await asyncio.wait_for(poll, 5)
        await node.settle()
        assert (task.job.id, worker.read().order) == ("b", ["a"])


@pytest.mark.parametrize("leaves", ["session", "poll"])
async def test_work_for_whoever_leaves_goes_to_the_other(leaves: str) -> None:
    for steps in range(25):
        async with one_node() as node:
            worker = node.join()
            poll = asyncio.ensure_future(
                node.shard().lease_tasks(worker_id="w", task_group=GROUP, max_tasks=1, wait_ms=60_000)
            )
            await node.settle()
            enqueuing = asyncio.ensure_future(node.enqueue(a_job("j", retry_policy=AT_ONCE)))
            for _ in range(steps):
                await asyncio.sleep(0)
            if leaves == "session":
                node.sessions.leave(worker.session)
            else:
                poll.cancel()
            await enqueuing
            await node.settle()
            await node.wait(LEASE_MS)  # The one who left may have had the lease already.
            if leaves == "session":
                assert poll.done()
            else:
                assert got(worker) != [0] or poll.done()


async def test_polls_and_sessions_share_the_work() -> None:
    async with one_node() as node:
        workers = [node.join(f"s{n}", window=5, slots=5) for n in range(2)]

        async def poll() -> int:
            tasks = await node.shard().lease_tasks(
                worker_id="w", task_group=GROUP, max_tasks=5, wait_ms=60_000
            )
            return len(tasks)

        polls = [asyncio.ensure_future(poll()) for _ in range(2)]
        await node.settle()
        for number in range(12):
            await node.enqueue(a_job(f"j{number}"))
        await node.settle()
        node.clock.advance_ms(60_000)
        taken = [*await asyncio.gather(*polls), *got(*workers)]
        assert sum(taken) == 12
        assert all(taken)


@pytest.mark.parametrize("seed", range(20))
async def test_in_any_order_of_coming_and_going_all_work_is_done_in_the_end(seed: int) -> None:
    """Sessions of several groups join, leave, grow and shrink; polls hang up; shards close and open."""
    rng = Random(seed)
    groups = ["a", "b", "c"]
    async with one_node(shards=2) as node:
        here: dict[str, Worker] = {}
        polls: list[asyncio.Task[object]] = []
        names = {shard_id: set[str]() for shard_id in SHARDS}
        for step in range(120):
            shard_id = rng.choice(SHARDS)
            match rng.randrange(9):
                case 0 | 1 | 2:
                    name = f"j{step}"
                    new = a_job(name, task_group=rng.choice(groups), retry_policy=AT_ONCE)
                    if shard_id in node.ids():
                        await node.enqueue(new, shard_id=shard_id)
                        names[shard_id].add(name)
                case 3:
                    session_id = f"s{rng.randrange(3)}"
                    wanted = rng.sample(groups, rng.randint(1, 3))
                    window = rng.choice([0, 1, 2, 5])
                    here[session_id] = node.join(session_id, window=window, slots=2, task_groups=wanted)
                case 4 if here:
                    here[rng.choice(sorted(here))].session.set_window(rng.choice([0, 1, 3]))
                case 5 if here:
                    node.sessions.leave(here.pop(rng.choice(sorted(here))).session)
                case 6 if here:
                    worker = here[rng.choice(sorted(here))].read()
                    held = [name for name, task_id in worker.tasks.items() if task_id in worker.held]
                    if held and set(worker.held.values()) <= node.ids():
                        await worker.report(rng.choice(held), what=rng.choice([HandedBack(), Postponed(5)]))
                case 7 if shard_id in node.ids():
                    poll = node.shard(shard_id).lease_tasks(
                        worker_id="w", task_group=rng.choice(groups), max_tasks=1, wait_ms=60_000
                    )
                    polls.append(asyncio.ensure_future(poll))
                    for gone in rng.sample(polls, len(polls) // 3):
                        gone.cancel()
                case 8:
                    if shard_id in node.ids():
                        await node.close(shard_id)
                    else:
                        await node.open(shard_id)
            for _ in range(rng.choice([0, 1, 3, 20])):
                await asyncio.sleep(0)
        for poll_left in polls:
            poll_left.cancel()
        for shard_id in SHARDS:
            if shard_id not in node.ids():
                await node.open(shard_id)
        for worker in here.values():
            node.sessions.leave(worker.session)
        last = node.join("last", window=2, slots=1, task_groups=groups)
        for _ in range(400):
            await node.wait(LEASE_MS // 10)
            node.sessions.renew()
            for name, task_id in list(last.read().tasks.items()):
                if task_id in last.held:
                    await last.report(name)
            if all(
                node.status(name, shard_id=shard_id) is JobStatus.SUCCEEDED
                for shard_id in SHARDS
                for name in names[shard_id]
            ):
                return
        raise AssertionError("some work was forgotten")


async def test_with_next_to_no_memory_all_is_delivered_too() -> None:
    with tiny_memory():
        async with one_node() as node:
            for tenant in "abcde":
                await node.enqueue(*jobs(8, name=tenant, tenant=tenant, payload="x" * 50))
            workers = [node.join(f"s{n}", window=25, slots=25) for n in range(2)]
            async with asyncio.timeout(20):
                while sum(got(*workers)) < 40:
                    await node.settle()


# Shards that come, go and are overloaded


async def test_work_of_a_shard_that_opens_is_delivered() -> None:
    async with one_node(shards=2) as node:
        await node.enqueue(a_job("j"), shard_id=SHARDS[1])
        await node.close(SHARDS[1])
        worker = node.join()
        await node.settle()
        assert got(worker) == [0]
        await node.open(SHARDS[1])
        await node.settle()
        assert got(worker) == [1]


async def test_a_shard_that_has_closed_stands_in_nobodys_way_and_hears_nothing_more() -> None:
    async with one_node(shards=2) as node:
        worker = node.join(window=5, slots=5)
        await node.settle()
        gone = node.shard(SHARDS[0])
        await node.close(SHARDS[0])
        assert GROUP not in gone._state.listeners  # Nothing public tells.
        await node.enqueue(*jobs(5), shard_id=SHARDS[1])
        await node.settle()
        assert got(worker) == [5]


async def test_a_shard_that_failed_stands_in_nobodys_way() -> None:
    async with one_node(shards=2) as node:
        worker = node.join(window=5, slots=5)
        node.storage.faults.plan("write", Fault.FAIL_BEFORE)
        with pytest.raises(Exception, match="shard closed"):
            await node.shard(SHARDS[0]).enqueue(a_job("lost"))
        await node.enqueue(*jobs(5), shard_id=SHARDS[1])
        await node.settle()
        assert got(worker) == [5]


async def test_an_overloaded_shard_is_asked_again_and_stands_in_nobodys_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with one_node(shards=2) as node:
        for shard_id in SHARDS:
            await node.enqueue(*jobs(2, name=shard_id), shard_id=shard_id)
        taken = Shard.take_loaded
        refusals = 0

        def overloaded(self: Shard, **wanted: object) -> object:
            nonlocal refusals
            if self.shard_id == SHARDS[0]:
                refusals += 1
                raise Overloaded("injected")
            return taken(self, **wanted)  # type: ignore[arg-type]

        with monkeypatch.context() as patch:
            patch.setattr(Shard, "take_loaded", overloaded)
            worker = node.join(window=5, slots=5)
            await node.settle()
            assert 0 < refusals < 10, "it is not asked over and over"
            assert worker.read().order == [f"{SHARDS[1]}000", f"{SHARDS[1]}001"]
        await until(lambda: got(worker) == [4])


async def test_while_a_shard_reads_nobody_asks_it_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one_node(options=HASTY) as node:
        asked: Counter[str] = Counter()
        monkeypatch.setattr(Shard, "take_loaded", _counted(asked, "times", Shard.take_loaded))
        node.storage.faults.plan("scan", Fault.HANG)
        node.join(window=5, slots=5)
        await node.settle()
        assert 0 < asked["times"] < 10


async def test_while_everything_waits_to_be_written_nothing_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    async with one_node() as node:
        await node.enqueue(*jobs(3))
        monkeypatch.setattr(shard_module, "GROUP_ROWS_MAX", -1)
        worker = node.join(window=5, slots=5)
        await node.settle()
        assert got(worker) == [0]
        monkeypatch.undo()
        await until(lambda: got(worker) == [3])


# Rest


def timers() -> int:
    """Timers of the event loop that were not cancelled."""
    loop = asyncio.get_running_loop()
    return sum(not handle.cancelled() for handle in loop._scheduled)  # type: ignore[attr-defined]


async def test_ten_thousand_idle_task_groups_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "RENEW_S", 3_600.0)
    async with one_node() as node:
        quiet = timers()
        rounds: Counter[str] = Counter()
        monkeypatch.setattr(
            delivery._Line, "_next_session", _counted(rounds, "rounds", delivery._Line._next_session)
        )
        workers = [
            node.join(f"s{n}", window=10, slots=10, task_groups=[f"g{n * 1_000 + g}" for g in range(1_000)])
            for n in range(10)
        ]
        reads = node.shard()._reads  # Nothing public tells.
        await until(lambda: rounds["rounds"] >= 10_000 and not reads)
        await node.settle()
        assert timers() <= quiet + 1
        calls = node.storage.faults.calls.total()
        rounds.clear()
        started = time.process_time()
        await asyncio.sleep(0.3)
        assert time.process_time() - started < 0.1
        assert (rounds["rounds"], node.storage.faults.calls.total()) == (0, calls)
        await node.enqueue(a_job("j", task_group="g4711"))
        await node.settle()
        assert got(*workers) == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
        assert rounds["rounds"] <= 3, "one piece of work wakes one line"
        for worker in workers:
            node.sessions.leave(worker.session)
        assert repr(node.sessions) == "Sessions(0, Delivery(0 task groups))"
        assert len(node.shard()._state.listeners) == 0


def _counted(counts: Counter[str], name: str, function: Callable[..., object]) -> Callable[..., object]:
    def call(*arguments: object, **named: object) -> object:
        counts[name] += 1
        return function(*arguments, **named)

    return call


async def test_a_line_without_anyone_who_has_room_is_forgotten() -> None:
    async with one_node() as node:
        worker = node.join(task_groups=["a", "b"])
        assert "2 task groups" in repr(node.sessions)
        await node.enqueue(a_job("j", task_group="a"))
        await node.settle()
        worker.session.set_window(1)
        assert "0 task groups" in repr(node.sessions)
        await worker.report("j")
        assert "2 task groups" in repr(node.sessions)


async def test_a_node_that_stops_gives_nothing_to_anyone() -> None:
    async with one_node() as node:
        worker = node.join(window=5, slots=5)
        node.sessions.close()
        await node.enqueue(*jobs(5))
        worker.session.set_window(9)
        await node.settle()
        assert got(worker) == [0]
