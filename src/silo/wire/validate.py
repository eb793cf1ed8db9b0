"""What a request must look like. Codes and texts are part of the protocol: clients match on them."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from uuid import UUID

from silo.errors import InvalidRequest, StateForbids, TenantNotInRange
from silo.model.job import DEFAULT_TENANT, PRIORITY_MAX
from silo.model.limit import CalendarWindow, Limit, RateBehavior, RateLimit
from silo.model.shards import HashRange, hash_tenant

TENANT_CHARS_MAX = 64
TASK_GROUP_CHARS_MAX = 64
METADATA_ENTRIES_MAX = 16
METADATA_KEY_CHARS_MAX = 63
METADATA_VALUE_BYTES_MAX = 65_534
LIMITS_MAX = 256  # Of one job: each costs a look at its state whenever the job moves on.
PAYLOAD_BYTES_MAX = 126 << 20  # A task with its payload and metadata must fit into a message of 128 MiB.


@lru_cache(maxsize=1024)  # Every request of every worker names one of a few.
def shard_id(text: str) -> str:
    """The canonical form of a shard id: hyphenated, bare, braced or as URN, in any case.

    Raises:
        InvalidRequest: it is no UUID.
    """
    bare = text
    if bare.startswith("{") and bare.endswith("}"):
        bare = bare[1:-1]
    elif bare[:9].lower() == "urn:uuid:":
        bare = bare[9:]
    shape = [len(part) for part in bare.split("-")]
    if shape in ([32], [8, 4, 4, 4, 12]) and all(c in "0123456789abcdefABCDEF-" for c in bare):
        return str(UUID(bare))
    raise InvalidRequest(f"invalid shard ID: {text}")


def job_tenant(tenant: str, *, tenancy_enabled: bool) -> str:
    """The tenant that a job call is about; an empty text is the same as none.

    Raises:
        InvalidRequest: it is missing or too long.
        StateForbids: tenancy is off and one was given.
    """
    if not tenancy_enabled:
        if tenant:
            raise StateForbids("tenant must not be provided when tenancy is disabled on the server")
        return DEFAULT_TENANT
    if not tenant:
        raise InvalidRequest("tenant id required")
    if len(tenant) > TENANT_CHARS_MAX:
        raise InvalidRequest("invalid tenant id")
    return tenant


def worker_tenant(tenant: str, *, tenancy_enabled: bool) -> str | None:
    """The tenant that a worker's call is about; None with tenancy off, where it is ignored.

    Raises:
        InvalidRequest: it is missing.
    """
    if not tenancy_enabled:
        return None
    if not tenant:
        raise InvalidRequest("tenant_id is required for worker operations when tenancy is enabled")
    return tenant


def tenant_in_range(tenant: str, *, shard: str, hash_range: HashRange) -> None:
    """A shard takes only tenants of its range.

    Raises:
        TenantNotInRange: the caller's shard map is out of date.
    """
    if not hash_range.contains(hash_tenant(tenant)):
        raise TenantNotInRange(tenant, shard=shard, hash_range=hash_range)


def priority(value: int) -> None:
    if value > PRIORITY_MAX:
        raise InvalidRequest("priority must be between 0 and 99")


def metadata(entries: Mapping[str, str]) -> None:
    if len(entries) > METADATA_ENTRIES_MAX:
        raise InvalidRequest("metadata has too many entries (max 16)")
    for name, value in entries.items():
        if len(name) > METADATA_KEY_CHARS_MAX:
            raise InvalidRequest("metadata key too long (must be < 64 chars)")
        if len(value.encode()) > METADATA_VALUE_BYTES_MAX:
            raise InvalidRequest("metadata value too long (must be < u16::MAX bytes)")


def payload(data: bytes) -> None:
    """What was taken in must be possible to hand out: a task that cannot be sent would never run."""
    if len(data) > PAYLOAD_BYTES_MAX:
        raise InvalidRequest(f"payload too large (must be <= {PAYLOAD_BYTES_MAX} bytes)")


def imported_id(value: str) -> None:
    if not value:
        raise InvalidRequest("job id is required for import")


def task_group(name: str, *, is_new: bool) -> None:
    """`is_new`: the call introduces it, so its length counts; imports bring what exists elsewhere."""
    if not name:
        raise InvalidRequest("task_group is required")
    if is_new and len(name) > TASK_GROUP_CHARS_MAX:
        raise InvalidRequest("task_group too long (must be <= 64 chars)")


def worker_id(value: str) -> None:
    if not value:
        raise InvalidRequest("worker_id is required")


def limits(given: Sequence[Limit]) -> None:
    """Numbers and keys are taken as they are; only what no limiter can make sense of is refused."""
    if len(given) > LIMITS_MAX:
        raise InvalidRequest(f"too many limits (max {LIMITS_MAX})")
    for limit in given:
        if not isinstance(limit, RateLimit) or not limit.behavior & RateBehavior.DURATION_IS_GREGORIAN:
            continue
        if limit.duration_ms not in set(CalendarWindow):
            raise InvalidRequest(
                f"duration_ms of rate limit '{limit.name}' must be 0 to {max(CalendarWindow)} "
                "(minute, hour, day, week, month, year) with DURATION_IS_GREGORIAN"
            )
