"""What must hold of every durable snapshot of a shard, and between two of them.

Numbers in comments are those of the list of invariants in the specification of the engine.
"""

from collections import Counter
from collections.abc import Mapping

import msgspec

from silo.engine import rate
from silo.engine.limit_chain import RATE_LIMIT_EXCEEDED
from silo.engine.outcomes import WORKER_CRASHED
from silo.model.attempt import Attempt, AttemptStatus, Failure
from silo.model.counts import QueueCounts, ShardTotals, TenantCounts
from silo.model.floating import FloatingState, RefreshDue
from silo.model.job import MOVES, Delayed, Job, JobState, JobStatus, Ready, Throttled, Waiting
from silo.model.limit import FLOATING_LINE, BucketRecord, FloatingLimit, Holder, RateLimit
from silo.storage import codec, keys
from silo.storage.batch import copy_rows, index_row, queue_row, refresh_row

Rows = Mapping[bytes, bytes]
Name = tuple[str, str]  # Tenant and job id.


class Stored(msgspec.Struct):
    """All that a snapshot holds of one job."""

    state: JobState
    job: Job
    attempts: list[Attempt]


def jobs_in(rows: Rows) -> dict[Name, Stored]:
    """Every job of a snapshot; each has its description, its state and its attempts in order."""
    states: dict[Name, JobState] = {}
    jobs: dict[Name, Job] = {}
    attempts: dict[Name, list[Attempt]] = {}
    for key in sorted(row for row in rows if row.startswith(b"j")):
        tenant, at = keys.read_text(key, 1)
        job_id, at = keys.read_text(key, at)
        name = (tenant, job_id)
        match key[at]:
            case 0:
                states[name] = codec.decode(JobState, rows[key])
            case 1:
                jobs[name] = codec.decode(Job, rows[key])
            case _:
                attempts.setdefault(name, []).append(codec.decode(Attempt, rows[key]))
    assert states.keys() == jobs.keys(), "a job without its description, or the other way round"
    assert attempts.keys() <= states.keys(), "attempts of a job that does not exist"  # 59
    return {name: Stored(state, jobs[name], attempts.get(name, [])) for name, state in states.items()}


def check_snapshot(
    rows: Rows, *, now_ms: int | None = None, were_dropped: bool = False
) -> dict[Name, Stored]:
    """Hold one snapshot against what must always be true; the jobs in it.

    `now_ms`: the time of the snapshot, to see that nobody waits for what is free. `were_dropped`: tickets
    were taken away by force at some time, so that jobs run without.
    """
    jobs = jobs_in(rows)
    for (tenant, job_id), stored in jobs.items():
        assert (stored.state.tenant, stored.state.job_id) == (tenant, job_id)
        assert (stored.job.tenant, stored.job.id) == (tenant, job_id)
        _check_locus(stored.state)
        _check_attempts(stored)
    _check_task_ids(jobs)
    _check_derived_rows(rows, jobs)
    _check_counts(rows, jobs)
    _check_floors(rows)
    _check_limits(rows, jobs, now_ms=now_ms, were_dropped=were_dropped)
    return jobs


def _check_locus(state: JobState) -> None:
    """Where a job is follows from its status (3, 7, 8, 9, 35)."""
    assert (state.pending is not None) == (state.status is JobStatus.SCHEDULED)
    assert (state.lease is not None) == (state.status is JobStatus.RUNNING)
    assert state.status is not JobStatus.SCHEDULED or state.cancelled_at_ms is None
    assert (state.status is JobStatus.SCHEDULED) <= (state.next_start_ms is not None)


def _check_attempts(stored: Stored) -> None:
    """History is whole, in order, within its budget, and agrees with the status (4, 25, 36, 37)."""
    state, attempts = stored.state, stored.attempts
    assert [attempt.attempt_number for attempt in attempts] == list(range(1, state.attempts_ended + 1))
    budget = (state.retry_policy.retry_count if state.retry_policy else 0) + 1
    unbounded = _unbounded_attempts(attempts)
    previous = 0
    for attempt in attempts:
        assert attempt.status is not AttemptStatus.RUNNING
        assert attempt.finished_at_ms is not None
        relative = attempt.relative_attempt_number
        assert relative in (previous + 1, 1) or (_is_imported(attempt) and relative == attempt.attempt_number)
        assert relative <= budget or attempt.attempt_number <= unbounded
        previous = relative
    assert state.relative_attempt_number <= state.next_attempt_number
    assert state.relative_attempt_number <= budget or state.attempts_ended <= unbounded
    successes = [attempt for attempt in attempts if attempt.status is AttemptStatus.SUCCEEDED]
    assert len(successes) == (state.status is JobStatus.SUCCEEDED), "a job succeeds once, or has not"
    if state.status is JobStatus.SUCCEEDED:
        assert attempts[-1] is successes[0]
    if state.status is JobStatus.FAILED:
        assert attempts[-1].status is AttemptStatus.FAILED


def _unbounded_attempts(attempts: list[Attempt]) -> int:
    """How many attempts, from the first one, need not be within the budget.

    Those before an import and the imported ones ran under other policies. The one after them has the
    next number, but only failures count when an import asks whether there is one: it may exceed too.
    """
    last = max((attempt.attempt_number for attempt in attempts if _is_imported(attempt)), default=0)
    return last + 1 if last else 0


def _is_imported(attempt: Attempt) -> bool:
    """Nobody here worked on it, and restarts do not count for its relative number."""
    if isinstance(attempt.outcome, Failure) and attempt.outcome.code == RATE_LIMIT_EXCEEDED:
        return False  # It never ran, here or elsewhere.
    return not attempt.worker_id and attempt.relative_attempt_number == attempt.attempt_number


def _check_task_ids(jobs: Mapping[Name, Stored]) -> None:
    """A task id belongs to one attempt (1, 2, 54)."""
    used: Counter[str] = Counter()
    for stored in jobs.values():
        used.update(attempt.task_id for attempt in stored.attempts)
        if stored.state.lease is not None:
            used[stored.state.lease.task_id] += 1
    assert all(count == 1 for count in used.values()), used.most_common(3)


def _check_derived_rows(rows: Rows, jobs: Mapping[Name, Stored]) -> None:
    """Queues, timers, leases and indexes are exactly what the jobs say (1, 2, 3, 8, 9, 35, 46)."""
    expected: dict[bytes, bytes] = {}
    for (tenant, job_id), stored in jobs.items():
        expected[index_row(stored.state)] = b""
        expected |= dict.fromkeys(copy_rows(stored.state), codec.encode(stored.state))
        for name, value in stored.job.metadata:
            expected[keys.metadata_index_key(tenant, name, value, job_id)] = b""
        if stored.state.expires_at_ms is not None:
            assert stored.state.status.is_terminal  # 61
            expected[keys.expiry_key(stored.state.expires_at_ms, tenant, job_id)] = b""
        for holder in stored.state.held:
            expected[keys.holder_key(tenant, holder.key, job_id)] = codec.encode(holder.granted_at_ms)
    for floating in _floating(rows).values():
        if floating.refresh is not None:
            expected[refresh_row(floating)] = codec.encode_refresh(floating)
    families = (b"i", b"m", b"t", b"l", b"h", b"r", b"v", b"x", b"e")
    found = {key: value for key, value in rows.items() if key[:1] in families}
    for key in (row for row in rows if row.startswith(b"q")):
        task, job = codec.decode_queued(rows[key])
        found[key] = rows[key] if isinstance(task, FloatingState) else codec.encode(task)
        assert job is None or (isinstance(task, JobState) and job == jobs[task.tenant, task.job_id].job)
    assert found == expected


def _floating(rows: Rows) -> dict[Name, FloatingState]:
    """Every floating limit of a snapshot, by tenant and key."""
    found = [codec.decode(FloatingState, value) for key, value in rows.items() if key.startswith(b"f")]
    return {(state.tenant, state.key): state for state in found}


class _Queue(msgspec.Struct):
    """A concurrency queue as the jobs say."""

    holders: int = 0
    waiting: dict[int, list[JobState]] = {}


def _check_limits(rows: Rows, jobs: Mapping[Name, Stored], *, now_ms: int | None, were_dropped: bool) -> None:
    """Counts agree with the jobs, limits hold, and nobody waits for what is free without an alarm."""
    floating = _floating(rows)
    queues: dict[Name, _Queue] = {}
    buckets: dict[tuple[str, str, str], list[JobState]] = {}
    for (tenant, _), stored in jobs.items():
        state = stored.state
        _check_tickets(state, were_dropped=were_dropped)
        if now_ms is not None and state.pending is not None and not isinstance(state.pending, Delayed):
            assert (state.next_start_ms or 0) <= now_ms, f"{state.job_id} is looked at before its time"  # 39
        for holder in state.held:
            queues.setdefault((tenant, holder.key), _Queue()).holders += 1
        if isinstance(state.pending, Waiting):
            lines = queues.setdefault((tenant, state.pending.key), _Queue()).waiting
            lines.setdefault(state.pending.line, []).append(state)
        if isinstance(state.pending, Throttled):
            limit = state.rate_limit
            buckets.setdefault((tenant, limit.name, limit.unique_key), []).append(state)
    alarms = {key for key in rows if key.startswith(keys.ALARMS)}
    _check_queues(rows, queues, floating, alarms, now_ms)
    _check_buckets(rows, buckets, alarms, now_ms)
    _check_refreshes(floating, queues, alarms, now_ms)
    assert not alarms, "an alarm without a record that has it"


def _check_tickets(state: JobState, *, were_dropped: bool) -> None:
    """A job holds what it has passed, and nothing when it has ended or is not due (10, 12, 13, 40, 44)."""
    held = [holder.key for holder in state.held]
    assert len(held) == len(set(held))
    if state.status.is_terminal:
        assert not held and not state.passed
    passed = {limit.key for limit in state.limits[: state.passed] if not isinstance(limit, RateLimit)}
    if isinstance(state.pending, Waiting):  # In key order it may hold a part of what it is about to pass.
        assert state.pending.key not in held
        run = {limit.key for limit in state.limits[state.passed :] if not isinstance(limit, RateLimit)}
        assert set(held) <= passed | run
    else:
        assert set(held) <= passed
    assert were_dropped or passed <= set(held)
    if isinstance(state.pending, Ready):
        assert state.passed == len(state.limits)


def _check_queues(
    rows: Rows,
    queues: dict[Name, _Queue],
    floating: Mapping[Name, FloatingState],
    alarms: set[bytes],
    now_ms: int | None,
) -> None:
    stored = {
        keys.read_names(key): codec.decode(QueueCounts, value)
        for key, value in rows.items()
        if key.startswith(b"n")
    }
    for name, counts in stored.items():
        queue = queues.get((name[0], name[1]), _Queue())
        assert counts.holders == queue.holders, name  # 45
        assert dict(counts.lines) == {line: len(jobs) for line, jobs in queue.waiting.items()}, name
        is_awaited = _take_alarm(alarms, counts.alarm_at_ms, keys.queue_counts_key(name[0], name[1]))
        if is_awaited or now_ms is None:
            continue
        for line, waiting in queue.waiting.items():  # 66, 73, 74
            capacity = floating[name[0], name[1]].max_concurrency if line == FLOATING_LINE else line
            assert queue.holders >= capacity, (name, "has a free ticket for", [job.job_id for job in waiting])
    assert queues.keys() <= stored.keys(), "a queue without its counts"


def _check_buckets(
    rows: Rows,
    buckets: dict[tuple[str, str, str], list[JobState]],
    alarms: set[bytes],
    now_ms: int | None,
) -> None:
    stored = {
        keys.read_names(key): codec.decode(BucketRecord, value)
        for key, value in rows.items()
        if key.startswith(b"b")
    }
    for name, record in stored.items():
        waiting = buckets.get((name[0], name[1], name[2]), [])
        assert record.waiters == len(waiting), name
        assert record.alarm_at_ms is not None, "a bucket that nobody will look at"
        assert _take_alarm(alarms, record.alarm_at_ms, keys.bucket_key(name[0], name[1], name[2]))
        if waiting and now_ms is not None:  # 71
            head = min(waiting, key=lambda job: job.rank)
            fits_at_ms = rate.fits_at_ms(record.bucket, head.rate_limit, tenant=name[0], now_ms=now_ms)
            assert record.alarm_at_ms <= max(now_ms, fits_at_ms), name
    assert buckets.keys() <= stored.keys(), "a line without its bucket"


def _check_refreshes(
    floating: Mapping[Name, FloatingState],
    queues: Mapping[Name, _Queue],
    alarms: set[bytes],
    now_ms: int | None,
) -> None:
    """Who waits for a floating limit has a refresh under way or to come (55, 72)."""
    for name, state in floating.items():
        is_awaited = _take_alarm(alarms, state.alarm_at_ms, keys.floating_key(*name))
        if isinstance(state.refresh, RefreshDue):
            assert queue_row(state) == refresh_row(state)
        if FLOATING_LINE in queues.get(name, _Queue()).waiting and now_ms is not None:
            assert is_awaited or state.refresh is not None, (
                name,
                "has jobs that wait and no refresh to come",
            )


def _take_alarm(alarms: set[bytes], at_ms: int | None, record: bytes) -> bool:
    """Whether the record has an alarm, which must be there then."""
    if at_ms is None:
        return False
    alarms.remove(keys.alarm_key(at_ms, record))
    return True


def _check_counts(rows: Rows, jobs: Mapping[Name, Stored]) -> None:
    """Counters are exact at every commit (45)."""
    counts: dict[str, TenantCounts] = {}
    for (tenant, _), stored in jobs.items():
        counts[tenant] = counts.get(tenant, TenantCounts()).moved(None, stored.state.status)
    found = {
        keys.read_text(key, 1)[0]: codec.decode(TenantCounts, value)
        for key, value in rows.items()
        if key[:1] == b"c"
    }
    assert found == counts
    ended = sum(stored.state.status.is_terminal for stored in jobs.values())
    totals = codec.decode(ShardTotals, rows[keys.TOTALS]) if keys.TOTALS in rows else ShardTotals()
    assert totals == ShardTotals(len(jobs), ended)


def _check_floors(rows: Rows) -> None:
    """No live row lies below the floor of its range."""
    for key, value in rows.items():
        if key.startswith(keys.FLOORS):
            prefix, floor = key[1:], codec.decode(bytes, value)
            below = [row for row in rows if row.startswith(prefix) and row < floor]
            assert not below, (floor, below)


def check_step(before: Mapping[Name, Stored], after: Mapping[Name, Stored]) -> None:
    """Hold a later snapshot against an earlier one (5, 6, 14, 48, 59)."""
    for name, old in before.items():
        new = after.get(name)
        if new is None or new.job != old.job:
            assert old.state.status.is_terminal, f"{name} vanished while it was {old.state.status.label}"
            continue
        assert new.attempts[: len(old.attempts)] == old.attempts, "history was rewritten"
        for attempt in new.attempts[len(old.attempts) :]:
            if isinstance(attempt.outcome, Failure) and attempt.outcome.code == WORKER_CRASHED:
                lease = old.state.lease
                was_flagged = old.state.cancelled_at_ms is not None
                is_same = lease is not None and lease.task_id == attempt.task_id
                assert not (was_flagged and is_same), f"{name} was cancelled before its lease ran out"
        _check_move(old.state, new.state)


def _check_move(old: JobState, new: JobState) -> None:
    if old.status is not new.status:
        reachable = _reachable(old.status)
        assert new.status in reachable, f"{old.status.label} became {new.status.label}"
    if old.cancelled_at_ms is not None and new.cancelled_at_ms is None:
        assert old.status is not JobStatus.SUCCEEDED, "a flag disappeared from a succeeded job"
        assert new.next_attempt_number > old.attempts_ended, "a flag disappears only by restart"


def _reachable(status: JobStatus) -> set[JobStatus]:
    """What one or more moves lead to: snapshots may be several steps apart."""
    found: set[JobStatus] = set()
    todo = [status]
    while todo:
        for after in MOVES[todo.pop()]:
            if after not in found:
                found.add(after)
                todo.append(after)
    return found


def check_grants(
    before: Mapping[Name, Stored], after: Mapping[Name, Stored], rows: Rows, *, were_dropped: bool = False
) -> None:
    """Between two snapshots no queue took on more than its newest allow, and nobody overtook (11, 42)."""
    for queue in {(name[0], holder.key) for name, job in after.items() for holder in job.state.held}:
        holders = _tickets(after, queue)
        earlier = _tickets(before, queue)
        new = [after[name].state for name, ticket in holders.items() if earlier.get(name) != ticket]
        if new and not were_dropped:
            assert len(holders) <= max(_capacity(state, queue, rows) for state in new), queue
        for state in new:
            _check_not_overtaken(state, queue, rows, before, after)


def _check_not_overtaken(
    state: JobState,
    queue: Name,
    rows: Rows,
    before: Mapping[Name, Stored],
    after: Mapping[Name, Stored],
) -> None:
    """Nobody was ahead of `state` in the queue, could have had its ticket, and waits where it waited."""
    old = before.get((state.tenant, state.job_id))
    waited = old is not None and isinstance(old.state.pending, Waiting) and old.state.pending.key == queue[1]
    if old is not None and waited:
        rank = old.state.rank
    elif state.status is JobStatus.SCHEDULED:
        rank = state.rank
    else:
        return  # It is running already: when it was due is not known any more.
    for name, job in after.items():
        pending = job.state.pending
        if name[0] != queue[0] or not isinstance(pending, Waiting) or pending.key != queue[1]:
            continue
        if name in before and before[name].state.pending == pending and job.state.rank < rank:
            is_eligible = _line_capacity(pending.line, queue, rows) >= _capacity(state, queue, rows)
            assert not is_eligible, (job.state.job_id, "was overtaken by", state.job_id)


def _line_capacity(line: int, queue: Name, rows: Rows) -> int:
    if line != FLOATING_LINE:
        return line
    return codec.decode(FloatingState, rows[keys.floating_key(*queue)]).max_concurrency


def _tickets(jobs: Mapping[Name, Stored], queue: Name) -> dict[Name, tuple[Holder, int]]:
    """The queue's tickets by job, each with how many attempts had ended, since a retry takes a new one."""
    return {
        name: (holder, job.state.attempts_ended)
        for name, job in jobs.items()
        for holder in job.state.held
        if (name[0], holder.key) == queue
    }


def _capacity(state: JobState, queue: Name, rows: Rows) -> int:
    limit = next(
        limit for limit in state.limits if not isinstance(limit, RateLimit) and limit.key == queue[1]
    )
    if isinstance(limit, FloatingLimit):
        return codec.decode(FloatingState, rows[keys.floating_key(*queue)]).max_concurrency
    return limit.max_concurrency
