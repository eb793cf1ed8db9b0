"""Who waits for work of a task group. Each piece of work wakes one of them, not all.

Whoever was woken and goes away, with the work or without it, wakes the next one while there is
work left. So a thousand idle workers cost no more than one, and no piece of work is
forgotten because the worker that was woken for it had just hung up.
"""

from collections.abc import Callable


class Listener:
    """One who waits."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.was_woken = False


class Listeners:
    """Those who wait, by task group; the longest waiting first."""

    def __init__(self, has_work: Callable[[str], bool]) -> None:
        """`has_work`: whether a task group has, or may have, work that nobody took yet."""
        self._has_work = has_work
        self._waiting: dict[str, dict[Listener, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __contains__(self, task_group: str) -> bool:
        return task_group in self._waiting

    def add(self, task_group: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` when there is work, or may be; returns how to stop it."""
        listener = Listener(callback)
        self._waiting.setdefault(task_group, {})[listener] = None

        def stop() -> None:
            waiting = self._waiting.get(task_group, {})
            waiting.pop(listener, None)
            if not waiting:
                self._waiting.pop(task_group, None)
            elif listener.was_woken and self._has_work(task_group):
                self.wake_one(task_group)
            listener.was_woken = False

        return stop

    def wake_one(self, task_group: str) -> None:
        """There is a piece of work more: wake the one who waits longest."""
        waiting = self._waiting.get(task_group)
        if waiting:
            listener = next(iter(waiting))
            del waiting[listener]
            waiting[listener] = None  # Woken once, it is the last to be woken again.
            listener.was_woken = True
            listener.callback()

    def wake_all(self) -> None:
        for waiting in list(self._waiting.values()):
            for listener in list(waiting):
                listener.callback()
