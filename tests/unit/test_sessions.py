"""Sessions: leases that live as long as a stream does, who is told what and when, and coming back."""

import asyncio

import pytest

from silo.errors import InvalidRequest, LeaseNotFound, ShardClosed
from silo.model.attempt import HandedBack, Postponed
from silo.model.floating import RefreshSucceeded
from silo.model.job import DEFAULT_TENANT, LEASE_MS, JobStatus
from silo.node.session import MESSAGE_BYTES, UNREAD_MAX, WINDOW_MAX
from silo.shard.shard import ShardOptions
from silo.storage.memory import Fault
from tests.builders import DONE, a_job, a_policy, at_most, floating, until
from tests.one_node import SHARDS, OneNode, Worker, one_node
from tests.one_shard import BROKEN
from tests.property.machine import tiny_memory

AT_ONCE = a_policy(9, initial_interval_ms=0)
HASTY = ShardOptions(store_timeout_s=0.2)  # A hung write fails soon, so that the test can end.
SCHEDULED, RUNNING, SUCCEEDED, FAILED, CANCELLED = JobStatus


async def working(node: OneNode, *job_ids: str, session_id: str = "s", window: int = 10) -> Worker:
    """A worker that has these jobs, new ones."""
    worker = node.join(session_id, window=window, slots=window)
    await node.enqueue(*(a_job(job_id, retry_policy=AT_ONCE) for job_id in job_ids))
    await node.settle()
    assert set(worker.read().tasks) == set(job_ids)
    return worker


async def cancel(node: OneNode, job_id: str = "j") -> None:
    await node.shard().cancel(tenant=DEFAULT_TENANT, job_id=job_id)


# What is sent


async def test_a_task_is_sent_when_its_lease_is_durable_and_not_before() -> None:
    async with one_node(options=HASTY) as node:
        worker = node.join()
        node.storage.faults.plan("write", Fault.HANG, call=node.storage.faults.calls["write"] + 2)
        await node.enqueue(a_job("j"))
        await asyncio.sleep(0.02)
        assert worker.read().tasks == {}
        assert worker.session.room == 0


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_task_whose_lease_was_not_written_is_sent_after_the_shard_has_opened_again(
    fault: Fault,
) -> None:
    async with one_node() as node:
        worker = node.join()
        node.storage.faults.plan("write", fault, call=node.storage.faults.calls["write"] + 2)
        await node.enqueue(a_job("j"))
        await asyncio.wait_for(node.shard().wait_closed(), 5)
        await node.close()
        await node.settle()
        assert worker.read().tasks == {}
        await node.open()
        await node.settle()
        assert list(worker.read().tasks) == ["j"]
        await worker.report("j")
        assert (node.status("j"), node.attempts("j")) == (SUCCEEDED, 1)


async def test_a_session_whose_lease_was_not_written_gets_other_work() -> None:
    """Its room was given back by nobody but the failed write."""
    async with one_node(shards=2) as node:
        worker = node.join()
        node.storage.faults.plan("write", Fault.FAIL_BEFORE, call=node.storage.faults.calls["write"] + 2)
        await node.enqueue(a_job("lost"))
        await asyncio.wait_for(node.shard().wait_closed(), 5)
        await node.enqueue(a_job("j"), shard_id=SHARDS[1])
        await node.settle()
        assert list(worker.read().tasks) == ["j"]


async def test_a_task_whose_lease_was_lost_before_it_was_written_is_never_sent() -> None:
    async with one_node() as node:
        worker = await working(node, window=0)
        await node.enqueue(a_job("j", retry_policy=AT_ONCE))
        worker.session.set_window(1)
        await node.settle()
        await node.wait(LEASE_MS)  # Nothing was read of the stream, and nobody renewed.
        worker.session.set_window(0)
        assert [type(error) for _, error in worker.read().answers] == []
        assert worker.lost == []
        assert len(worker.tasks) == 1, "the attempt that came after it"
        assert node.attempts("j") == 1


async def test_tasks_are_sent_in_messages_of_a_bounded_size_and_a_large_one_alone() -> None:
    async with one_node() as node:
        worker = node.join(window=10, slots=10)
        sizes = [10, MESSAGE_BYTES // 2, MESSAGE_BYTES // 2, MESSAGE_BYTES * 2, 10]
        await node.enqueue(*(a_job(f"j{n}", payload=b"x" * size) for n, size in enumerate(sizes)))
        await node.settle()
        messages = []
        while worker.session.outbox:
            messages.append(worker.session.take_outbox())
            worker.take(messages[-1])
        assert [len(message.tasks) for message in messages] == [2, 1, 1, 1]
        assert worker.order == [f"j{n}" for n in range(5)]


async def test_what_else_there_is_to_say_does_not_wait_for_large_tasks_and_does_not_go_with_them() -> None:
    async with one_node() as node:
        worker = await working(node, "done", "cancelled")
        await node.enqueue(*(a_job(f"large{n}", payload=b"x" * MESSAGE_BYTES) for n in range(2)))
        await node.settle()
        await cancel(node, "cancelled")
        worker.session.acknowledge([(worker.tasks["done"], InvalidRequest("no"))])
        await node.settle()
        first = worker.session.take_outbox()
        assert (len(first.acknowledged), list(first.cancelled), len(first.tasks)) == (
            1,
            [worker.tasks["cancelled"]],
            0,
        )


async def test_acknowledgements_are_split_into_messages_too() -> None:
    async with one_node() as node:
        worker = node.join()
        long = "t" * (MESSAGE_BYTES // 4)
        worker.session.acknowledge([(f"{n}{long}", None) for n in range(10)])
        counts = []
        while worker.session.outbox:
            counts.append(len(worker.session.take_outbox().acknowledged))
        assert counts == [4, 4, 2]


async def test_a_worker_that_does_not_read_its_acknowledgements_is_not_read_either() -> None:
    async with one_node() as node:
        worker = node.join()
        for number in range(UNREAD_MAX):
            assert worker.session.drained.is_set()
            worker.session.acknowledge([(f"t{number}", None)])
        assert not worker.session.drained.is_set()
        worker.read()
        assert worker.session.drained.is_set()


async def test_a_window_has_a_bound() -> None:
    async with one_node() as node:
        worker = node.join(window=2**32 - 1)
        assert worker.session.room == WINDOW_MAX


# Leases


async def test_leases_last_as_long_as_they_are_renewed() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        for _ in range(5):
            await node.wait(LEASE_MS - 1)
            node.sessions.renew()
        assert node.status("j") is RUNNING
        await worker.report("j")
        assert (node.status("j"), node.attempts("j")) == (SUCCEEDED, 1)


async def test_a_lease_outlives_its_stream_by_one_lease_time_and_not_more() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        await node.wait(LEASE_MS - 1)
        node.sessions.renew()
        node.sessions.leave(worker.session)
        node.sessions.renew()
        await node.wait(LEASE_MS - 1)
        assert node.status("j") is RUNNING
        await node.wait(1)
        assert (node.status("j"), node.attempts("j")) == (SCHEDULED, 1)


async def test_sessions_are_renewed_by_a_timer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("silo.node.sessions.RENEW_S", 0.001)
    async with one_node() as node:
        task_id = (await working(node, "j")).tasks["j"]
        leases = node.shard()._state.leases  # Nothing public tells.
        for _ in range(3):
            await until(lambda: leases.expiry_ms(task_id) == node.clock.now_ms() + LEASE_MS)
            await node.wait(LEASE_MS - 1)
        assert node.status("j") is RUNNING


async def test_a_refresh_is_renewed_like_a_job() -> None:
    async with one_node() as node:
        worker = node.join()
        await node.enqueue(a_job("waits", task_group="other", limits=[floating(0)]))
        node.sessions.leave(worker.session)
        worker = node.join(task_groups=["other"])
        await node.settle()
        assert list(worker.read().tasks) == ["k"]
        for _ in range(3):
            await node.wait(LEASE_MS - 1)
            node.sessions.renew()
        await worker.report("k", what=RefreshSucceeded(1))
        assert worker.answers == [(worker.tasks["k"], None)]
        await node.settle()
        assert list(worker.read().tasks) == ["k", "waits"]


# Who is told


async def test_a_cancellation_is_told_once_it_is_durable() -> None:
    async with one_node(options=HASTY) as node:
        worker = await working(node, "j")
        node.storage.faults.plan("write", Fault.HANG)
        cancelling = asyncio.ensure_future(cancel(node))
        await asyncio.sleep(0.02)
        node.sessions.renew()
        await asyncio.sleep(0.02)
        assert worker.read().cancelled == []
        cancelling.cancel()


async def test_a_cancellation_that_was_not_kept_is_told_to_nobody() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        node.storage.faults.plan("write", Fault.FAIL_BEFORE)
        with pytest.raises(ShardClosed):
            await cancel(node)
        await node.close()
        await node.open()
        await node.settle()
        assert worker.read().cancelled == []
        await cancel(node)
        await node.settle()
        assert worker.read().cancelled == [worker.tasks["j"]]


async def test_a_cancellation_is_told_once_whatever_else_happens_to_the_job() -> None:
    async with one_node() as node:
        worker = node.join()
        await node.enqueue(a_job("j", limits=[at_most(1)]))
        await node.settle()
        await cancel(node)
        await node.settle()
        worker.read()
        await node.shard().drop_holders(tenant=DEFAULT_TENANT)
        node.sessions.renew()
        await node.settle()
        assert worker.read().cancelled == [worker.tasks["j"]]


async def test_a_cancellation_never_comes_before_its_task() -> None:
    """`Worker.take` looks."""
    for large in (False, True):
        async with one_node() as node:
            worker = node.join(window=10, slots=10)
            payload = b"x" * (MESSAGE_BYTES if large else 1)
            await node.enqueue(*(a_job(f"j{n}", payload=payload) for n in range(3)))
            await node.settle()
            for number in range(3):
                await cancel(node, f"j{number}")
            await node.settle()
            assert sorted(worker.read().cancelled) == sorted(worker.tasks.values())


async def test_a_job_that_was_cancelled_while_its_lease_was_written_is_told_as_cancelled() -> None:
    for steps in range(8):
        async with one_node() as node:
            worker = node.join(window=0)
            await node.enqueue(a_job("j"))
            worker.session.set_window(1)
            for _ in range(steps):
                await asyncio.sleep(0)
            await cancel(node)
            await node.settle()
            assert worker.read().cancelled == list(worker.tasks.values())
            assert node.status("j") is (RUNNING if worker.tasks else CANCELLED)


async def test_a_cancellation_while_its_worker_was_away_is_told_when_it_comes_back() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        node.sessions.leave(worker.session)
        await cancel(node)
        again = node.join(held=worker.held)
        await node.settle()
        assert list(again.session.take_outbox().cancelled) == [worker.tasks["j"]]


async def test_a_lease_that_ran_out_is_told_once() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=1)
        worker.session.set_window(0)
        await node.wait(LEASE_MS)
        node.sessions.renew()
        await node.settle()
        assert worker.read().lost == [worker.tasks["j"]]
        assert worker.session.held == {}


async def test_a_lease_that_is_lost_gives_its_place_back() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=1)
        first = worker.tasks["j"]
        await node.wait(LEASE_MS)
        assert worker.read().lost == [first]
        assert worker.order == ["j", "j"]
        assert worker.tasks["j"] != first


async def test_a_lease_that_another_call_ended_is_told_as_lost() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        await node.shard().report(worker.tasks["j"], DONE)
        await node.settle()
        assert worker.read().lost == [worker.tasks["j"]]
        await worker.report("j")
        assert [type(error) for _, error in worker.answers] == [LeaseNotFound]


@pytest.mark.parametrize("fault", [Fault.FAIL_BEFORE, Fault.FAIL_AFTER])
async def test_a_lease_is_told_as_lost_when_that_is_durable_and_not_before(fault: Fault) -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        node.storage.faults.plan("write", fault)
        with pytest.raises(ShardClosed):
            await node.shard().report(worker.tasks["j"], DONE)
        assert worker.read().lost == []
        await node.close()
        await node.open()
        await node.settle()
        assert worker.read().lost == ([] if fault is Fault.FAIL_BEFORE else [worker.tasks["j"]])


async def test_a_renewal_tells_nothing_of_what_is_not_durable() -> None:
    async with one_node(options=HASTY) as node:
        worker = await working(node, "j")
        node.storage.faults.plan("write", Fault.HANG)
        reporting = asyncio.ensure_future(node.shard().report(worker.tasks["j"], DONE))
        await asyncio.sleep(0.02)
        node.sessions.renew()
        await asyncio.sleep(0.02)
        assert worker.read().lost == []
        reporting.cancel()


@pytest.mark.parametrize("what", [DONE, BROKEN, HandedBack(), Postponed(5)], ids=str)
async def test_a_worker_is_not_told_of_the_loss_of_what_it_reports_itself(what: object) -> None:
    async with one_node(options=HASTY) as node:
        worker = await working(node, "j")
        worker.session.set_window(0)
        write = node.storage.faults.calls["write"] + 1
        node.storage.faults.plan("write", Fault.HANG, call=write)
        reporting = asyncio.ensure_future(worker.report("j", what=what))
        await asyncio.sleep(0.02)
        node.sessions.renew()  # As it happens every few seconds.
        await asyncio.sleep(0.02)
        assert (worker.read().lost, worker.answers) == ([], [])
        reporting.cancel()
    async with one_node(options=HASTY) as node:
        worker = await working(node, "j")
        worker.session.set_window(0)
        reporting = asyncio.ensure_future(worker.report("j", what=what))
        for _ in range(20):
            await asyncio.sleep(0)
            node.sessions.renew()
        await reporting
        await node.settle()
        assert (worker.read().lost, worker.answers) == ([], [(worker.tasks["j"], None)])


async def test_a_worker_that_let_go_is_told_nothing_more() -> None:
    async with one_node() as node:
        worker = await working(node, "a", "b")
        node.sessions.leave(worker.session)
        await cancel(node, "a")
        await node.wait(LEASE_MS)
        assert worker.read().cancelled == worker.lost == []
        assert not node.shard()._state.leases.holders  # Nothing public tells.


async def test_a_cancellation_that_became_durable_after_the_stream_had_ended_is_told_on_the_next() -> None:
    for steps in range(6):
        async with one_node() as node:
            worker = await working(node, "j")
            cancelling = asyncio.ensure_future(cancel(node))
            for _ in range(steps):
                await asyncio.sleep(0)
            node.sessions.leave(worker.session)
            again = node.join(held=worker.held)
            await cancelling
            await node.settle()
            assert list(again.session.take_outbox().cancelled) == [worker.tasks["j"]]


# Reports


async def test_a_report_gives_its_place_back_when_it_is_acknowledged() -> None:
    async with one_node() as node:
        worker = await working(node, "a", window=1)
        await node.enqueue(a_job("b"))
        await node.settle()
        assert worker.read().order == ["a"]
        reporting = asyncio.ensure_future(worker.report("a"))
        await asyncio.sleep(0)
        assert worker.session.room == 0
        await reporting
        await node.settle()
        assert worker.read().order == ["a", "b"]


async def test_a_report_that_does_not_count_gives_its_place_back_too() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=1)
        await worker.report("j", what=RefreshSucceeded(1))
        assert worker.answers[-1][1] is not None
        assert worker.session.room == 1
        assert node.status("j") is RUNNING
        await worker.report("j")
        assert worker.answers[-1] == (worker.tasks["j"], None)


async def test_a_report_that_a_closing_shard_did_not_answer_keeps_its_lease() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=1)
        node.storage.faults.plan("write", Fault.FAIL_BEFORE)
        await worker.report("j")
        [(_, error)] = worker.answers
        assert isinstance(error, ShardClosed)
        await node.close()
        await node.open()
        for _ in range(3):
            await node.wait(LEASE_MS - 1)
            node.sessions.renew()
        assert (worker.read().lost, worker.session.room, worker.order) == ([], 0, ["j"])
        await worker.report("j")
        assert worker.answers[-1] == (worker.tasks["j"], None)


async def test_a_renewal_while_reports_are_looked_at_loses_none_of_them() -> None:
    """With next to no memory each has to wait for what it looks at."""
    with tiny_memory():
        async with one_node() as node:
            worker = node.join(window=0, slots=9)
            names = [f"j{number}" for number in range(5)]
            await node.enqueue(*(a_job(name, tenant=name, limits=[at_most(1, name)]) for name in names))
            worker.session.set_window(5)
            while len(worker.read().tasks) < 5:
                await node.settle()
            worker.session.set_window(0)
            reporting = asyncio.ensure_future(worker.report(*names))
            while not reporting.done():
                node.sessions.renew()
                await asyncio.sleep(0)
            assert worker.lost == []
            assert sorted(worker.answers) == sorted((task_id, None) for task_id in worker.tasks.values())


async def test_two_reports_of_one_task_are_both_answered_and_one_counts() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=1)
        task_id = worker.tasks["j"]
        await asyncio.gather(worker.report("j"), worker.report("j", what=BROKEN))
        answers = [error for id, error in worker.answers if id == task_id]
        assert sorted(type(error).__name__ for error in answers) == ["LeaseNotFound", "NoneType"]
        assert (node.attempts("j"), worker.session.room, worker.session.idle_slots) == (1, 1, 1)


# Coming back


async def test_what_a_worker_names_goes_on_and_what_it_does_not_goes_back_and_was_no_attempt() -> None:
    async with one_node() as node:
        worker = await working(node, "mine", "unknown")
        held = worker.held
        del held[worker.tasks["unknown"]]
        node.sessions.leave(worker.session)
        await node.wait(LEASE_MS - 1)
        again = node.join(held=held, window=0)
        await node.settle()
        assert (node.status("mine"), node.status("unknown")) == (RUNNING, SCHEDULED)
        assert (again.read().lost, node.attempts("unknown")) == ([], 0)
        for _ in range(3):
            await node.wait(LEASE_MS - 1)
            node.sessions.renew()
        assert node.status("mine") is RUNNING


async def test_what_a_worker_names_takes_its_place_in_the_window() -> None:
    async with one_node() as node:
        worker = await working(node, "a", "b")
        node.sessions.leave(worker.session)
        again = node.join(held=worker.held, window=3, slots=3)
        assert (again.session.room, again.session.idle_slots) == (1, 1)
        less = node.join(held=worker.held, window=1, slots=1)
        assert less.session.room < 0
        await node.enqueue(a_job("c"))
        await node.settle()
        assert less.read().tasks == {}


async def test_what_is_not_leased_any_more_is_told_as_lost_when_its_worker_comes_back() -> None:
    async with one_node() as node:
        worker = await working(node, "gone", "ended")
        node.sessions.leave(worker.session)
        await node.shard().report(worker.tasks["ended"], DONE)
        await node.wait(LEASE_MS)
        again = node.join(held=worker.held | {"nonsense": SHARDS[0], "elsewhere": "no such shard"}, window=0)
        await node.settle()
        expected = {worker.tasks["gone"], worker.tasks["ended"], "nonsense", "elsewhere"}
        assert set(again.session.take_outbox().lost) == expected
        assert again.session.held == {}


async def test_leases_of_another_session_and_those_of_polls_are_left_alone() -> None:
    async with one_node() as node:
        other = await working(node, "theirs", session_id="other")
        await node.enqueue(a_job("polled", task_group="polls"))
        [polled] = await node.shard().lease_tasks(worker_id="w", task_group="polls", max_tasks=1)
        assert polled.state.lease is not None
        claimed = other.held | {polled.state.lease.task_id: SHARDS[0]}
        worker = node.join("s", held=claimed, window=0)
        await node.settle()
        assert set(worker.session.take_outbox().lost) == set(claimed)
        assert (node.status("theirs"), node.status("polled")) == (RUNNING, RUNNING)
        await other.report("theirs")
        assert node.status("theirs") is SUCCEEDED


async def test_a_second_stream_of_a_session_ends_the_first_and_takes_over_its_leases() -> None:
    async with one_node() as node:
        first = await working(node, "j")
        second = node.join(held=first.held)
        assert (first.session.is_closed, first.session.held) == (True, {})
        assert len(node.sessions) == 1
        node.sessions.leave(first.session)  # As its stream does when it has ended.
        assert len(node.sessions) == 1
        await cancel(node)
        await node.settle()
        assert first.read().cancelled == []
        assert list(second.session.take_outbox().cancelled) == [first.tasks["j"]]


async def test_tasks_that_wait_to_be_sent_on_a_replaced_stream_are_not_sent_on_it_any_more() -> None:
    async with one_node() as node:
        first = node.join(window=5, slots=5)
        await node.enqueue(*(a_job(f"j{n}") for n in range(5)))
        await node.settle()
        assert len(first.session.outbox.tasks) == 5
        second = node.join(window=5, slots=5)
        await node.settle()
        assert first.read().tasks == {}
        assert len(second.read().tasks) == 5
        assert node.attempts("j0") == 0


async def test_tasks_whose_lease_becomes_durable_after_their_stream_has_ended_go_back() -> None:
    for steps in range(8):
        async with one_node() as node:
            worker = node.join(window=0)
            await node.enqueue(a_job("j"))
            worker.session.set_window(1)
            for _ in range(steps):
                await asyncio.sleep(0)
            node.sessions.leave(worker.session)
            await node.settle()
            assert (node.status("j"), node.attempts("j")) == (SCHEDULED, 0)
            assert worker.read().tasks == {}


async def test_tasks_that_were_not_written_go_back_when_the_stream_ends() -> None:
    async with one_node() as node:
        worker = await working(node, "written")
        await node.enqueue(a_job("unwritten"))
        await node.settle()
        node.sessions.leave(worker.session)
        await node.settle()
        assert (node.status("written"), node.status("unwritten")) == (RUNNING, SCHEDULED)
        assert node.attempts("unwritten") == 0


async def test_a_worker_that_says_no_more_gets_no_more_and_what_was_not_written_goes_back() -> None:
    async with one_node() as node:
        worker = await working(node, "mine")
        await node.enqueue(a_job("unwritten"))
        await node.settle()
        worker.session.close()
        await node.enqueue(a_job("new"))
        await node.settle()
        assert worker.read().order == ["mine"]
        assert node.status("unwritten") is node.status("new") is SCHEDULED
        await worker.report("mine")
        assert worker.answers == [(worker.tasks["mine"], None)]


# Shards that close and open


async def test_leases_go_on_when_their_shard_has_opened_again() -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        await node.close()
        node.sessions.renew()
        assert worker.read().lost == []
        await node.open()
        for _ in range(3):
            await node.wait(LEASE_MS - 1)
            node.sessions.renew()
        assert (worker.read().lost, node.status("j")) == ([], RUNNING)


async def test_a_worker_that_comes_back_while_a_shard_is_away_goes_on_when_it_opens() -> None:
    async with one_node() as node:
        worker = await working(node, "mine", "unknown")
        node.sessions.leave(worker.session)
        await node.close()
        held = worker.held
        del held[worker.tasks["unknown"]]
        again = node.join(held=held, window=0)
        await node.open()
        await node.settle()
        assert (node.status("mine"), node.status("unknown")) == (RUNNING, SCHEDULED)
        assert (again.read().lost, node.attempts("unknown")) == ([], 0)


@pytest.mark.parametrize("comes_back", [False, True])
async def test_leases_of_a_node_that_was_killed_wait_for_their_workers(comes_back: bool) -> None:
    async with one_node() as node:
        worker = await working(node, "j")
        other = OneNode(None)  # The process after it, on the same storage.
        other.storage, other.clock = node.storage, node.clock
        await other.open()
        await other.wait(LEASE_MS - 1)
        if comes_back:
            again = other.join(held=worker.held)
            await other.wait(LEASE_MS - 1)
            assert again.read().lost == []
            assert other.status("j") is RUNNING
        else:
            assert other.status("j") is RUNNING
            await other.wait(1)
            assert other.status("j") is SCHEDULED
        other.sessions.close()
        await other.sessions.wait_closed()
        await other.close()


# The end


async def test_when_the_node_stops_what_was_not_written_goes_back_and_what_was_stays_leased() -> None:
    async with one_node() as node:
        worker = await working(node, "written")
        await node.enqueue(a_job("unwritten"))
        await node.settle()
        node.sessions.close()
        await node.sessions.wait_closed()
        assert (worker.session.is_closed, node.status("written")) == (True, RUNNING)
        assert (node.status("unwritten"), node.attempts("unwritten")) == (SCHEDULED, 0)


async def test_a_session_that_joins_a_node_that_stops_ends_at_once() -> None:
    async with one_node() as node:
        node.sessions.close()
        await node.enqueue(a_job("j"))
        worker = node.join()
        await node.settle()
        assert worker.session.is_closed
        assert node.status("j") is SCHEDULED


async def test_a_session_and_its_node_can_be_looked_at() -> None:
    async with one_node() as node:
        worker = await working(node, "j", window=3)
        assert repr(worker.session) == "Session('worker of s', 1 of 3 tasks)"
        assert repr(node.sessions) == "Sessions(1, Delivery(1 task groups))"
        assert (len(node.sessions), node.sessions.held) == (1, 1)
