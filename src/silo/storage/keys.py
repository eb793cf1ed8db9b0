"""The key of every record and index row. Encoding preserves order.

A key is a family byte followed by parts. Text is UTF-8 with 0x00 escaped as
`00 FF` and closed by `00 00`, so that shorter text sorts before longer text with
the same start and no part runs into the next one. Times are eight bytes, big
endian; negative times are kept as 0. Families:

    j  tenant, job id, kind       job description, state, ended attempts
    i  tenant, status, time ↓, job id      status index, newest first
    m  tenant, key, value, job id          metadata index
    q  task group, tenant, deadline, priority, job id      due work
    t  due time, tenant, job id            work that is looked at later
    l  task id                             leases
    h  tenant, key, job id                 tickets of concurrency queues, each with its holder
    r  tenant, key, line, start, priority, job id      jobs that wait for a ticket
    n  tenant, key                         how many tickets are held, and how many jobs wait
    f  tenant, key                         floating limits
    b  tenant, name, unique key            buckets of rate limits
    v  tenant, name, unique key, start, priority, job id      jobs that wait for a bucket
    x  since, tenant, job id               jobs whose rate limit is being asked for outside
    y  due time, kind, names               alarms: queues, floating limits and buckets to look at
    e  due time, tenant, job id            jobs that have ended, to be deleted
    c  tenant                              job counts by status
    w  range prefix                        floor: no live row of the range lies before it
    s  name                                facts about the shard
    J  number                              groups whose rows are written later
"""

import struct
from collections.abc import Callable
from functools import lru_cache

_TIME = struct.Struct(">Q")
_NUMBER = struct.Struct(">I")
_TIME_MAX = (1 << 63) - 1

_NAME_CHARS_MAX = 128  # Longer texts are values, not names: they would fill the cache's memory.
_NAMES_MAX = 16_384  # A lifecycle encodes the same few names over and over.

_STATE = b"\x00"
_JOB = b"\x01"
_ATTEMPT = b"\x02"

TIMERS = b"t"
LEASES = b"l"
ASKING = b"x"
ALARMS = b"y"
EXPIRIES = b"e"
FLOORS = b"w"
CREATED_AT = b"screated_at"
TOTALS = b"stotals"
NEWEST_ID = b"snewest_id"
JOURNAL = b"J"


def _text(value: str) -> bytes:
    return _encoded_name(value) if len(value) <= _NAME_CHARS_MAX else _encoded(value)


@lru_cache(maxsize=_NAMES_MAX)
def _encoded_name(value: str) -> bytes:
    return _encoded(value)


def _encoded(value: str) -> bytes:
    raw = value.encode()
    if b"\0" in raw:
        raw = raw.replace(b"\0", b"\0\xff")
    return raw + b"\0\0"


def _of_names(build: Callable[[str, str], bytes]) -> Callable[[str, str], bytes]:
    """Remember what is built from two names, unless one is long."""
    remembered = lru_cache(maxsize=_NAMES_MAX)(build)

    def built(first: str, second: str) -> bytes:
        if len(first) <= _NAME_CHARS_MAX and len(second) <= _NAME_CHARS_MAX:
            return remembered(first, second)
        return build(first, second)

    return built


def _time(at_ms: int) -> bytes:
    return _TIME.pack(at_ms if 0 <= at_ms <= _TIME_MAX else 0 if at_ms < 0 else _TIME_MAX)


@_of_names
def _job_prefix(tenant: str, job_id: str) -> bytes:
    return b"j" + _text(tenant) + _text(job_id)


def state_key(tenant: str, job_id: str) -> bytes:
    return _job_prefix(tenant, job_id) + _STATE


def job_key(tenant: str, job_id: str) -> bytes:
    return _job_prefix(tenant, job_id) + _JOB


def attempt_key(tenant: str, job_id: str, attempt_number: int) -> bytes:
    return _job_prefix(tenant, job_id) + _ATTEMPT + _NUMBER.pack(attempt_number)


def status_index_prefix(tenant: str) -> bytes:
    """What comes before the status in the index rows of a tenant."""
    return b"i" + _text(tenant)


def status_index_key(tenant: str, status: int, at_ms: int, job_id: str) -> bytes:
    newest_first = _time(_TIME_MAX - at_ms if at_ms > 0 else _TIME_MAX)
    return _status_prefix(tenant, status) + newest_first + _text(job_id)


@lru_cache(maxsize=_NAMES_MAX)
def _status_prefix(tenant: str, status: int) -> bytes:
    return status_index_prefix(tenant) + bytes((status,))


def metadata_index_key(tenant: str, name: str, value: str, job_id: str) -> bytes:
    return b"m" + _text(tenant) + _text(name) + _text(value) + _text(job_id)


def queue_group_prefix(task_group: str) -> bytes:
    return b"q" + _text(task_group)


@_of_names
def queue_prefix(task_group: str, tenant: str) -> bytes:
    return b"q" + _text(task_group) + _text(tenant)


def queue_key(task_group: str, tenant: str, deadline_ms: int, priority: int, job_id: str) -> bytes:
    return queue_prefix(task_group, tenant) + _time(deadline_ms) + bytes((priority,)) + _text(job_id)


def refresh_key(task_group: str, tenant: str, scheduled_at_ms: int, limit_key: str) -> bytes:
    """Where the refresh of a floating limit waits: like a job of priority 0, and yet no job's row."""
    return queue_key(task_group, tenant, scheduled_at_ms, 0, f"floating_refresh:{limit_key}") + b"\1"


def timer_key(due_ms: int, tenant: str, job_id: str) -> bytes:
    return _by_time(TIMERS, due_ms, tenant, job_id)


def _by_time(family: bytes, at_ms: int, tenant: str, job_id: str) -> bytes:
    return family + _time(at_ms) + _text(tenant) + _text(job_id)


def asking_key(turn: int, tenant: str, job_id: str) -> bytes:
    return _by_time(ASKING, turn, tenant, job_id)


def expiry_key(at_ms: int, tenant: str, job_id: str) -> bytes:
    return _by_time(EXPIRIES, at_ms, tenant, job_id)


def journal_key(number: int) -> bytes:
    return JOURNAL + _TIME.pack(number)


def read_journal(key: bytes) -> int:
    """The number of an entry of the journal."""
    return read_time(key)


def read_time(key: bytes) -> int:
    """The time in a key whose family is ordered by time first."""
    (at_ms,) = _TIME.unpack_from(key, 1)
    return int(at_ms)


def read_expiry(key: bytes) -> tuple[str, str]:
    """The tenant and the id of a job that expires.

    Raises:
        ValueError: it is no key of this family.
    """
    tenant, at = read_text(key, 1 + _TIME.size)
    return tenant, read_text(key, at)[0]


def lease_key(task_id: str) -> bytes:
    return LEASES + task_id.encode()


def holders_prefix(tenant: str) -> bytes:
    return b"h" + _text(tenant)


def queue_holders_prefix(tenant: str, key: str) -> bytes:
    """What comes before the job id in the rows of a queue's tickets."""
    return holders_prefix(tenant) + _text(key)


def holder_key(tenant: str, key: str, job_id: str) -> bytes:
    return holders_prefix(tenant) + _text(key) + _text(job_id)


def read_holder(key: bytes) -> tuple[str, str]:
    """The limit's key and the job id of a holder's row.

    Raises:
        ValueError: it is no key of this family.
    """
    _, at = read_text(key, 1)
    limit_key, at = read_text(key, at)
    return limit_key, read_text(key, at)[0]


def queue_lines_prefix(tenant: str, key: str) -> bytes:
    """What comes before the line in the rows of those who wait in a queue."""
    return b"r" + _text(tenant) + _text(key)


def read_line(key: bytes) -> int:
    """The line in which the job of this row waits for a ticket.

    Raises:
        ValueError: it is no key of this family.
    """
    _, at = read_text(key, 1)
    _, at = read_text(key, at)
    (line,) = _TIME.unpack_from(key, at)
    return int(line)


def ticket_line_prefix(tenant: str, key: str, line: int) -> bytes:
    return queue_lines_prefix(tenant, key) + _TIME.pack(line)


def bucket_line_prefix(tenant: str, name: str, unique_key: str) -> bytes:
    return b"v" + _text(tenant) + _text(name) + _text(unique_key)


def place_in_line(prefix: bytes, start_ms: int, priority: int, job_id: str) -> bytes:
    return prefix + _time(start_ms) + bytes((priority,)) + _text(job_id)


def queue_counts_key(tenant: str, key: str) -> bytes:
    return b"n" + _text(tenant) + _text(key)


def floating_key(tenant: str, key: str) -> bytes:
    return b"f" + _text(tenant) + _text(key)


def bucket_key(tenant: str, name: str, unique_key: str) -> bytes:
    return b"b" + _text(tenant) + _text(name) + _text(unique_key)


def alarm_key(at_ms: int, row: bytes) -> bytes:
    """When to look at what the record under `row` is about. The key ends in that row's key."""
    return ALARMS + _time(at_ms) + row


def read_alarm(key: bytes) -> bytes:
    """The key of the record that an alarm is about."""
    return key[1 + _TIME.size :]


def read_names(key: bytes) -> tuple[str, ...]:
    """The parts of a key that has only texts after its family.

    Raises:
        ValueError: it has something else.
    """
    names: list[str] = []
    at = 1
    while at < len(key):
        name, at = read_text(key, at)
        names.append(name)
    return tuple(names)


def counts_key(tenant: str) -> bytes:
    return b"c" + _text(tenant)


def floor_key(prefix: bytes) -> bytes:
    return FLOORS + prefix


def range_end(prefix: bytes) -> bytes:
    """The first key after all keys that start with `prefix`.

    Raises:
        ValueError: `prefix` is empty or all 0xFF, so nothing lies after it.
    """
    trimmed = prefix.rstrip(b"\xff")
    if not trimmed:
        raise ValueError("no key lies after this prefix")
    return trimmed[:-1] + bytes((trimmed[-1] + 1,))


def after(key: bytes) -> bytes:
    """The smallest key greater than `key`."""
    return key + b"\0"


def read_text(key: bytes, at: int) -> tuple[str, int]:
    """The text part that starts at `at`, and where the next part starts.

    Raises:
        ValueError: no closed text part is there.
    """
    end = at
    while True:
        end = key.index(b"\0", end)
        if key[end + 1 : end + 2] != b"\xff":
            break
        end += 2
    if key[end + 1 : end + 2] != b"\0":
        raise ValueError("a text part is not closed")
    return key[at:end].replace(b"\0\xff", b"\0").decode(), end + 2
