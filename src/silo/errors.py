"""What Silo raises on purpose, by what the caller can do about it.

Servers and clients of every language tell some errors apart by their texts. Those stand here as constants,
and nowhere else: the server makes its errors of them, and our client looks for them. They never change.
"""

import enum
from typing import ClassVar

SHARD_NOT_FOUND = "shard not found"  # With NOT_FOUND: another node has it, so read the shard map again.
JOB_NOT_FOUND = "job not found"
LEASE_NOT_FOUND = "lease not found"  # With NOT_FOUND: forget the task.
LEASE_OWNER_MISMATCH = "lease owner mismatch"  # With FAILED_PRECONDITION: the same.
JOB_EXISTS = "job already exists"  # With ALREADY_EXISTS, or with INTERNAL from other servers.
TERMINAL_STATE = "job is already in terminal state"  # With FAILED_PRECONDITION.
NOT_WITHIN_SHARD = "is not within shard"  # With FAILED_PRECONDITION: the shard map is out of date.
CONNECTION_RESET = "RST_STREAM"  # With INTERNAL, from gRPC itself: try again. No error of ours has it.


class ErrorKind(enum.Enum):
    """What the caller can do. Each kind is one gRPC status, mapped in rpc/status.py."""

    INVALID = "invalid"  # the request is wrong: correct it
    NOT_FOUND = "not_found"
    EXISTS = "exists"  # the id is taken: the thing is already there
    CONFLICT = "conflict"  # the state forbids it: read again, then decide
    NOT_OWNER = "not_owner"  # another node has the shard: refresh the shard map
    UNSUPPORTED = "unsupported"  # this server cannot do it
    EXHAUSTED = "exhausted"  # too much at once: back off
    UNAVAILABLE = "unavailable"  # try again
    UNAUTHENTICATED = "unauthenticated"  # we do not know the caller: bring a token
    DENIED = "denied"  # not allowed here
    DATA = "data"  # stored bytes do not decode: a person must look
    INTERNAL = "internal"


class SiloError(Exception):
    """Base of what Silo raises on purpose. Branch on `kind`; the text is for people.

    `message` is the bare text, which travels over the wire where clients match
    on it; `str()` adds the fields, for logs.
    """

    kind: ClassVar[ErrorKind] = ErrorKind.INTERNAL

    def __init__(self, message: str, **fields: object) -> None:
        facts = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        super().__init__(f"{message} ({facts})" if facts else message)
        self.message = message
        self.fields = fields


def describe(error: BaseException) -> str:
    """What an error says of itself; its name when it says nothing."""
    return str(error) or type(error).__name__


class InvalidRequest(SiloError):
    """A value in the request is wrong; the text names it."""

    kind = ErrorKind.INVALID


class JobNotFound(SiloError):
    kind = ErrorKind.NOT_FOUND

    def __init__(self, **fields: object) -> None:
        super().__init__(JOB_NOT_FOUND, **fields)


class JobExists(SiloError):
    kind = ErrorKind.EXISTS

    def __init__(self, job_id: str) -> None:
        super().__init__(f"{JOB_EXISTS} with id {job_id}")


class LeaseNotFound(SiloError):
    """The lease ran out, was reported, or never was: forget the task."""

    kind = ErrorKind.NOT_FOUND

    def __init__(self, **fields: object) -> None:
        super().__init__(LEASE_NOT_FOUND, **fields)


class LeaseOwnerMismatch(SiloError):
    kind = ErrorKind.CONFLICT

    def __init__(self, **fields: object) -> None:
        super().__init__(LEASE_OWNER_MISMATCH, **fields)


class WrongTask(SiloError):
    """A job's task was reported as the refresh of a floating limit. The text is part of the protocol."""

    kind = ErrorKind.INTERNAL

    def __init__(self, **fields: object) -> None:
        super().__init__("codec error: task is not a RefreshFloatingLimit", **fields)


class StateForbids(SiloError):
    """The job's status does not allow the operation; nothing was changed."""

    kind = ErrorKind.CONFLICT


class ShardNotFound(SiloError):
    """No such shard here: read the shard map again."""

    kind = ErrorKind.NOT_OWNER

    def __init__(self, shard_id: str) -> None:
        super().__init__(SHARD_NOT_FOUND, shard=shard_id)


class TenantNotInRange(StateForbids):
    """The tenant belongs to another shard: read the shard map again."""

    def __init__(self, tenant: str, *, shard: str, hash_range: object) -> None:
        super().__init__(
            f"tenant '{tenant}' {NOT_WITHIN_SHARD} {shard} range {hash_range}; refresh topology and retry"
        )


class ShardClosed(SiloError):
    """The shard stopped. What was not answered yet may or may not be kept."""

    kind = ErrorKind.UNAVAILABLE


class Overloaded(SiloError):
    """A bound was reached. Back off and try again."""

    kind = ErrorKind.EXHAUSTED


class QuotaReached(SiloError):
    """The tenant has as much as it may have. Nothing was changed; try again when it has less."""

    kind = ErrorKind.EXHAUSTED


class StoreError(SiloError):
    """Base of what a `Store` raises."""


class StoreFenced(StoreError):
    """Another writer opened this store. Close; do not retry."""

    kind = ErrorKind.UNAVAILABLE


class StoreUnavailable(StoreError):
    """The store failed; the outcome of a write is unknown. Reopen to learn it."""

    kind = ErrorKind.UNAVAILABLE


class StoreCorrupt(StoreError):
    """Stored bytes do not decode. A person must look."""

    kind = ErrorKind.DATA


class ConfigError(SiloError):
    """The configuration is wrong; the text names the key and the fix."""

    kind = ErrorKind.INVALID
