"""The order in which an external limiter is asked: tenants take turns.

Every question gets a number when it comes up, and the smallest is asked first. It is one more than
the last of its tenant, but not less than that which is being asked now (start-time fair queueing).
So ten thousand jobs of one tenant get ten thousand numbers in a row, and the first job of another
tenant one that is among the next. Numbers start from the time in milliseconds, so that they go on
rising after a restart; beyond that they have nothing to do with it.

Who has what number is in the rows of the questions; only the last one of each tenant is kept here, in
memory. A restart forgets those, which favours the jobs that come first after it, once.
"""

from silo.model.job import JobState
from silo.shard.agenda import Agenda
from silo.storage import keys

TENANTS_MAX = 10_000  # Those whose last question is the oldest are forgotten.


class Turns:
    """The turns of one shard."""

    def __init__(self, asking: Agenda[JobState]) -> None:
        self._asking = asking
        self._last: dict[str, int] = {}
        self._largest = 0

    def __repr__(self) -> str:
        return f"Turns({len(self._last)} tenants)"

    def next(self, tenant: str, *, now_ms: int) -> int:
        """The number of this tenant's next question."""
        first = self._asking.window.first_key
        # With nobody waiting all tenants are even, whatever they had before.
        served = max(now_ms, self._largest + 1) if first is None else keys.read_time(first)
        return max(served, self._last.get(tenant, 0) + 1)

    def take(self, tenant: str, turn: int) -> None:
        """A question with this number was written."""
        self._last.pop(tenant, None)
        self._last[tenant] = turn
        self._largest = max(self._largest, turn)
        if len(self._last) > TENANTS_MAX:
            del self._last[next(iter(self._last))]
