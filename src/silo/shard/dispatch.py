"""Which due work goes next.

Within one tenant, work goes by virtual deadline, then priority, then job id: the
order of its queue rows. Tenants of a task group take turns, one task each, so a new
tenant's first task waits behind at most one task of every other tenant.

Only heads are in memory: of each tenant a `Window`, and of the tenants with work a
bounded number, the residents. `beyond` is the cursor that finds the others: tenants
after it in key order may have work in the store. Residents that had their turn make
room for them. Everything here can be dropped and read again.
"""

from collections.abc import Callable
from itertools import islice

from silo.model.job import JobState
from silo.model.task import Task
from silo.shard.window import RowTally, Window
from silo.storage import keys

LEASE_COUNT_MAX = 4096  # Tasks and payload bytes handed out by one call.
LEASE_BYTES_MAX = 32 << 20
RESIDENTS_MAX = 10_000
_WINDOW_MIN, _WINDOW_MAX, _ROWS_MAX = 16, 8_192, 100_000


class Room:
    """What one answer may still hold. The first task may be of any size: a large one goes alone.

    Refreshes of floating limits come on top of the tasks that were asked for, up to as many again;
    or among them, without `refreshes_on_top`.
    """

    def __init__(self, tasks: int, *, refreshes_on_top: bool = True) -> None:
        self.tasks = min(tasks, LEASE_COUNT_MAX)
        self._refreshes = self.tasks if refreshes_on_top else None
        self._bytes = LEASE_BYTES_MAX
        self._is_empty = True

    @property
    def is_full(self) -> bool:
        return self.tasks <= 0 or self._bytes <= 0

    def fits(self, task: Task) -> bool:
        if self.is_full or (self._refreshes == 0 and not isinstance(task, JobState)):
            return False
        return self._is_empty or task.payload_bytes <= self._bytes

    def use(self, task: Task) -> None:
        if self._refreshes is None or isinstance(task, JobState):
            self.tasks -= 1
        else:
            self._refreshes -= 1
        self._bytes -= task.payload_bytes
        self._is_empty = False

    def close(self) -> None:
        """The next task does not fit: whoever looks further would only overtake it."""
        self.tasks = 0


class TaskGroupQueue:
    """The due work of one task group. Pure: it never touches the store."""

    def __init__(
        self, task_group: str, *, residents_max: int | None = None, tally: RowTally | None = None
    ) -> None:
        self.task_group = task_group
        self.prefix = keys.queue_group_prefix(task_group)
        self.end = keys.range_end(self.prefix)
        self._residents_max = residents_max or RESIDENTS_MAX
        self._tally = tally or RowTally()
        self._residents: dict[str, Window[Task]] = {}  # In the order of turns.
        self.beyond: bytes | None = self.prefix
        self.since_fed = 0  # Tasks taken since somebody looked whether more should be read.
        self._turns = 0  # Tasks taken since the cursor last moved.
        self._has_missed = False  # Some tenant behind the cursor may have work and no window.

    def __repr__(self) -> str:
        return f"TaskGroupQueue({self.task_group!r}, {len(self._residents)} tenants)"

    def __len__(self) -> int:
        """Rows in memory."""
        return sum(map(len, self._residents.values()))

    @property
    def is_empty(self) -> bool:
        """Whether nothing is queued, in memory or in the store."""
        return not self._residents and self.beyond is None

    @property
    def is_searching(self) -> bool:
        """Whether tenants without a window should get one now: there is room, or all had a turn."""
        if self.beyond is None:
            return False
        return len(self._residents) < self._residents_max or self._turns >= len(self._residents)

    @property
    def window_limit(self) -> int:
        share = _ROWS_MAX // max(1, len(self._residents))
        return max(_WINDOW_MIN, min(_WINDOW_MAX, share))

    def window(self, tenant: str) -> Window[Task] | None:
        return self._residents.get(tenant)

    def insert(self, key: bytes, task: Task, floor: bytes) -> None:
        """Work became due. `floor`: where this tenant's rows in the store begin."""
        window = self._residents.get(task.tenant)
        if window is None:
            if len(self._residents) >= self._residents_max:
                self._miss()
                return
            # While tenants may be unread, this one may have older rows in the store.
            window = Window(None if self.beyond is None else min(floor, key), self._tally)
            self._residents[task.tenant] = window
        window.insert(key, task, limit=self.window_limit)

    def remove(self, key: bytes, tenant: str) -> None:
        """Work left its queue."""
        window = self._residents.get(tenant)
        if window is not None:
            window.remove(key)
            self._drop_if_done(tenant, window)

    def take(self, room: Room, is_loaded: Callable[[Task], bool]) -> list[Task]:
        """Take what there is room for, by turns; the caller deletes the rows in the same step.

        A tenant whose next task is not loaded is passed over.
        """
        taken: list[Task] = []
        passed = 0
        while not room.is_full and passed < len(self._residents):
            tenant, window = next(iter(self._residents.items()))
            is_ready = len(window) > 0 and is_loaded(window.first())
            if is_ready and not room.fits(window.first()):
                room.close()
                break
            del self._residents[tenant]
            self._residents[tenant] = window  # Its turn is over.
            if not is_ready:
                passed += 1
                continue
            passed = 0
            self._turns += 1  # Only work that was taken counts: the others must not make room yet.
            key = window.first_key
            assert key is not None
            task = window.first()
            room.use(task)
            taken.append(task)
            window.remove(key)
            self._drop_if_done(tenant, window)
        self.since_fed += len(taken)
        return taken

    def preview(self, count: int) -> list[Task]:
        """The next tasks in about the order of `take`, without taking them."""
        windows = list(islice(self._residents.values(), count))
        found: list[Task] = []
        index = 0
        while windows and len(found) < count:
            windows = [window for window in windows if index < len(window)]
            for window in windows[: count - len(found)]:
                task = window.state_at(index)
                assert task is not None
                found.append(task)
            index += 1
        return found

    def hungry(self, limit: int) -> list[tuple[str, Window[Task]]]:
        """Tenants whose window runs low while the store has more."""
        low = self.window_limit // 4
        found: list[tuple[str, Window[Task]]] = []
        for tenant, window in self._residents.items():
            if window.bound is not None and len(window) <= low and not window.is_refilling:
                found.append((tenant, window))
                if len(found) >= limit:
                    break
        return found

    def admit(self, tenant: str, floor: bytes) -> bool:
        """A tenant with rows in the store was found; whether it has a window now."""
        if tenant in self._residents:
            return True
        if len(self._residents) >= self._residents_max:
            return False
        self._residents[tenant] = Window(floor, self._tally)
        return True

    def make_room(self) -> None:
        """Let the tenants whose turn is farthest away go; the cursor will find them again."""
        if len(self._residents) < self._residents_max:
            return
        for tenant in list(self._residents)[self._residents_max // 2 :]:
            self._residents.pop(tenant).let_go()
        self._miss()

    def let_go(self) -> None:
        """Forget all that is in memory; whoever asks for this work next reads it again."""
        for window in self._residents.values():
            window.let_go()
        self._residents.clear()
        self._has_missed = True  # A search under way has found some of them already.
        self.beyond = self.prefix

    def reached(self, cursor: bytes | None) -> None:
        """The search for tenants got to `cursor`, or to the end of the group (None)."""
        if cursor is None and self._has_missed:
            self._has_missed = False
            cursor = self.prefix
        self._turns = 0
        self.beyond = cursor

    def settle(self, tenant: str) -> None:
        """After a refill: drop the tenant if it has nothing."""
        window = self._residents.get(tenant)
        if window is not None:
            self._drop_if_done(tenant, window)

    def _miss(self) -> None:
        self._has_missed = True
        if self.beyond is None:
            self.reached(None)

    def _drop_if_done(self, tenant: str, window: Window[Task]) -> None:
        if not len(window) and window.is_complete:
            del self._residents[tenant]
