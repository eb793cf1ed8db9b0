"""An event loop in virtual time whose order of events is drawn from a seed, and processes that can be killed.

Nothing waits for real: when nothing is ready, time jumps to the next timer. Callbacks that are ready at
the same time run in a random order. Each task belongs to the process in whose context it was made; a
killed process never runs again, not even its `finally` blocks, as with kill -9.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Coroutine
from random import Random
from typing import Any, TypeVar

from silo.clock import SystemClock

EPOCH_MS = 1_700_000_000_000
T = TypeVar("T")


class Process:
    """What lives and dies together."""

    deaths = 0  # Of all processes.

    def __init__(self, name: str) -> None:
        self.name = name
        self.is_dead = False
        self.tasks: list[asyncio.Task[Any]] = []

    def __repr__(self) -> str:
        return f"Process({self.name}{', dead' if self.is_dead else ''})"

    def kill(self) -> None:
        """From now on none of its code runs."""
        self.is_dead = True
        Process.deaths += 1
        for task in self.tasks:
            # Keep the frame of the dead: collecting it would run its `finally` blocks.
            task._log_destroy_pending = False  # type: ignore[attr-defined]
            _GRAVEYARD.append(task)


_GRAVEYARD: list[Any] = []
_PROCESS: contextvars.ContextVar[Process | None] = contextvars.ContextVar("process", default=None)


def start(process: Process, work: Coroutine[Any, Any, T], *, name: str) -> "asyncio.Task[T]":
    """Run `work` as part of `process`; all that it starts belongs to it, too."""
    context = contextvars.copy_context()
    context.run(_PROCESS.set, process)
    return asyncio.get_running_loop().create_task(work, name=f"{process.name}: {name}", context=context)


def outside(work: Coroutine[Any, Any, T], *, name: str) -> "asyncio.Task[T]":
    """Run `work` as part of no process: none that dies takes it along."""
    return asyncio.get_running_loop().create_task(work, name=name, context=contextvars.Context())


def current_process() -> Process | None:
    return _PROCESS.get()


class Stuck(AssertionError):
    """Nothing is ready and nothing is scheduled: whoever waits, waits for ever."""


class _NoSelector:
    """Stands where a loop waits for sockets; here waiting is moving the clock."""

    def __init__(self, loop: "SimulatedLoop") -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise Stuck("nothing is ready and nothing is scheduled")
        self._loop.now += timeout
        return []

    def close(self) -> None:
        pass


class SimulatedLoop(asyncio.BaseEventLoop):
    """Runs callbacks in virtual time."""

    def __init__(self, rng: Random) -> None:
        super().__init__()
        self.now = 0.0
        self.events = 0
        self._rng = rng
        self._deaths = Process.deaths
        self._scheduled: list[Any] = []
        self._selector = _NoSelector(self)
        self._clock_resolution = 1e-9
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self.now

    def _process_events(self, event_list: list[Any]) -> None:
        pass

    def _write_to_self(self) -> None:
        pass

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> "asyncio.Task[Any]":
        task = asyncio.Task(work, loop=loop, **options)
        context = options.get("context")
        process = _PROCESS.get() if context is None else context.get(_PROCESS)
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) % 256 == 0:
                process.tasks = [task for task in process.tasks if not task.done()]
        return task

    def _run_once(self) -> None:
        if self._deaths != Process.deaths:
            self._deaths = Process.deaths
            self._scheduled = [timer for timer in self._scheduled if not _is_dead(timer)]
            heapq.heapify(self._scheduled)
        ready = [handle for handle in self._ready if not _is_dead(handle)]
        if len(ready) > 1:
            self._rng.shuffle(ready)
        self._ready: deque[Any] = deque(ready)
        self.events += len(ready)
        super()._run_once()  # type: ignore[misc]  # The loop's own turn, which is not public.


def _is_dead(handle: Any) -> bool:
    process = handle._context.get(_PROCESS)
    if process is None or not process.is_dead:
        return False
    _GRAVEYARD.append(handle)
    return True


class SimulatedClock(SystemClock):
    """The wall clock of the simulated machines."""

    def __init__(self, loop: SimulatedLoop) -> None:
        self._loop = loop

    def now_ms(self) -> int:
        return EPOCH_MS + int(self._loop.now * 1000 + 1e-6)


def run(work: Coroutine[Any, Any, T], *, seed: str) -> T:
    """Run `work` to its end in a loop of its own."""
    loop = SimulatedLoop(Random(f"{seed}/schedule"))
    asyncio.set_event_loop(loop)
    try:
        return loop.run_until_complete(work)
    finally:
        asyncio.set_event_loop(None)
        _GRAVEYARD.append(loop)
