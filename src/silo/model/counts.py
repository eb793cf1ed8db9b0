"""How many jobs there are, by tenant and in the shard; and how many hold or want a ticket of a queue."""

import msgspec

from silo.model.job import JobStatus


class TenantCounts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Jobs of one tenant by status, in the order of `JobStatus`."""

    by_status: tuple[int, int, int, int, int] = (0, 0, 0, 0, 0)

    def moved(self, before: JobStatus | None, after: JobStatus | None) -> "TenantCounts":
        counts = list(self.by_status)
        if before is not None:
            counts[before] -= 1
        if after is not None:
            counts[after] += 1
        return TenantCounts((counts[0], counts[1], counts[2], counts[3], counts[4]))

    @property
    def is_empty(self) -> bool:
        return not any(self.by_status)


class ShardTotals(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Jobs that exist in the shard, and those of them in a terminal status."""

    total_jobs: int = 0
    completed_jobs: int = 0


class QueueCounts(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A concurrency queue of one tenant: its tickets that are held, and who waits for one."""

    holders: int = 0
    lines: tuple[tuple[int, int], ...] = ()  # Lines that are not empty, with how many wait in each.
    alarm_at_ms: int | None = None  # When it is looked at: it may have tickets for those who wait.

    @property
    def is_empty(self) -> bool:
        return not self.holders and not self.lines
