"""Where this process spends its time, what it keeps in memory, and what its tasks wait for.

Profiles are in pprof's format. They and the dump name files, functions, lines and threads, and
hold no values, so nothing of a job is in them. The work is done by a thread of its own: the event
loop goes on, a little slower. Frames and allocations are the process's, and so is the turn: one profile
at a time.
"""

import asyncio
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType
from typing import Any  # Coroutines of several makes, and memray, which is not for every platform.

from silo.errors import ErrorKind, Overloaded, SiloError
from silo.telemetry import pprof

memray: Any
try:
    import memray
except ImportError:
    memray = None

DURATION_DEFAULT_S = 30
DURATION_MAX_S = 300
FREQUENCY_DEFAULT_HZ = 100
FREQUENCY_MAX_HZ = 1000
TASKS_MAX = 2000  # In one dump; the rest is counted.
_FRAMES_MAX = 128
_STACKS_MAX = 5000  # Different ones in a profile; what comes after counts as `_OTHER`.

_OTHER = pprof.Frame("(other stacks)", "", 0)
_NATIVE = pprof.Frame("(threads without Python)", "", 0)
_COUNT = pprof.ValueType("samples", "count")
_CPU = pprof.ValueType("cpu", "nanoseconds")

_turn = threading.Lock()

_Stack = tuple[tuple[CodeType, int], ...]


class ProfileRunning(Overloaded):
    """Another profile is being taken; try again when it is done."""


class HeapProfilingMissing(SiloError):
    """This installation cannot do it. The text says what is missing."""

    kind = ErrorKind.CONFLICT


@dataclass(frozen=True)
class Profile:
    """A profile as a pprof message, not compressed."""

    data: bytes
    duration_s: int
    samples: int


def clamped(value: int, default: int, highest: int) -> int:
    """`value` within 1 and `highest`; the default for 0."""
    return min(max(value or default, 1), highest)


async def cpu_profile(*, duration_s: int = 0, frequency_hz: int = 0) -> Profile:
    """Where CPU time goes, by stack and thread; 0 stands for the defaults, and too much for the most.

    Each sample weighs what its thread has used since the one before, so waiting costs nothing
    and a late sample distorts nothing. Threads without Python are summed up. Where the system
    does not tell (it does on Linux), waiting counts like working. A caller that goes away ends it.

    Raises:
        ProfileRunning: one is being taken already.
    """
    seconds = clamped(duration_s, DURATION_DEFAULT_S, DURATION_MAX_S)
    frequency = clamped(frequency_hz, FREQUENCY_DEFAULT_HZ, FREQUENCY_MAX_HZ)
    return await _in_own_thread(lambda stop: _CpuSampler(frequency).run(seconds, stop))


async def heap_profile(*, duration_s: int = 0) -> Profile:
    """What is allocated from now on and still there at the end, by stack.

    Allocating is slower meanwhile. Memory of threads without Python, such as the store's, is summed up.
    A caller that goes away ends it.

    Python's own tracemalloc is not for us: before Python 3.12.9 its end crashes a process that has threads
    which allocate while they wait for the interpreter, as the store's do.

    Raises:
        ProfileRunning: one is being taken already.
        HeapProfilingMissing: memray is not installed.
    """
    seconds = clamped(duration_s, DURATION_DEFAULT_S, DURATION_MAX_S)
    return await _in_own_thread(lambda stop: _trace_heap(seconds, stop))


async def _in_own_thread(work: Callable[[threading.Event], Profile]) -> Profile:
    if not _turn.acquire(blocking=False):
        raise ProfileRunning("a profile is being taken already; try again when it is done")
    stop = threading.Event()
    answer: Future[Profile] = Future()
    answer.set_running_or_notify_cancel()  # Whoever waits may give up; the thread ends by itself.

    def run() -> None:
        try:
            profile = work(stop)
        except BaseException as error:
            _turn.release()
            answer.set_exception(error)
        else:
            _turn.release()
            answer.set_result(profile)

    try:
        threading.Thread(target=run, name="silo-profile", daemon=True).start()
    except RuntimeError:  # No more threads.
        _turn.release()
        raise
    try:
        return await asyncio.wrap_future(answer)
    finally:
        stop.set()


# CPU


class _CpuSampler:
    def __init__(self, frequency_hz: int) -> None:
        self._period_ns = 1_000_000_000 // frequency_hz
        self._used: dict[int, int] = {}  # By thread.
        self._names: dict[int, str] = {}
        self._found: dict[tuple[int, _Stack], list[int]] = {}
        self._samples = 0
        self._cpu_ns = 0

    def run(self, seconds: int, stop: threading.Event) -> Profile:
        began_ns = next_ns = time.monotonic_ns()
        end_ns = began_ns + seconds * 1_000_000_000
        process_ns = time.process_time_ns() - time.thread_time_ns()
        self._look(is_first=True)
        while (now_ns := time.monotonic_ns()) < end_ns and not stop.is_set():
            next_ns = max(next_ns + self._period_ns, now_ns)  # A sample that was missed is not made up for.
            stop.wait((min(next_ns, end_ns) - now_ns) / 1e9)
            self._look(is_first=False)
        process_ns = time.process_time_ns() - time.thread_time_ns() - process_ns
        samples = [
            pprof.Sample(
                [_frame(code, line) for code, line in stack] or [_OTHER], values, self._names[thread]
            )
            for (thread, stack), values in self._found.items()
        ]
        native_ns = process_ns - self._cpu_ns
        if _TELLS_CPU and native_ns > 0:
            samples.append(pprof.Sample([_NATIVE], [native_ns // self._period_ns, native_ns]))
        data = pprof.encoded(
            samples,
            types=[_COUNT, _CPU],
            duration_ns=now_ns - began_ns,
            period_type=_CPU,
            period=self._period_ns,
            comment="Silo CPU profile" if _TELLS_CPU else "Silo wall-clock profile: waiting counts, too",
        )
        return Profile(data, seconds, self._samples)

    def _look(self, *, is_first: bool) -> None:
        own = threading.get_ident()
        threads = {thread.ident: thread for thread in threading.enumerate()}
        for ident, frame in sys._current_frames().items():
            thread = threads.get(ident)
            if ident == own or thread is None or thread.native_id is None:
                continue
            used = _cpu_ns(thread.native_id)
            if used is None:
                continue  # It has just ended.
            if not _TELLS_CPU:
                used = self._used.get(ident, 0) + self._period_ns
            # A thread that began after we did has used all it has used in our time.
            spent = max(0, used - self._used.get(ident, used if is_first else 0))
            self._used[ident] = used
            self._names.setdefault(ident, thread.name)
            if spent and not is_first:
                self._add(ident, _stack(frame), spent)

    def _add(self, ident: int, stack: _Stack, spent_ns: int) -> None:
        key = (ident, stack)
        if key not in self._found and len(self._found) >= _STACKS_MAX:
            key = (ident, ())
        values = self._found.setdefault(key, [0, 0])
        values[0] += 1
        values[1] += spent_ns
        self._samples += 1
        self._cpu_ns += spent_ns


def _stack(frame: FrameType | None) -> _Stack:
    """The innermost frames."""
    found: list[tuple[CodeType, int]] = []
    while frame is not None and len(found) < _FRAMES_MAX:
        found.append((frame.f_code, frame.f_lineno or 0))
        frame = frame.f_back
    return tuple(found)


def _frame(code: CodeType, line: int) -> pprof.Frame:
    return pprof.Frame(code.co_qualname, code.co_filename, line)


_TELLS_CPU = sys.platform == "linux"


def _cpu_ns(native_id: int) -> int | None:
    """CPU time of a thread; None when there is no such thread, 0 when the system does not tell."""
    if not _TELLS_CPU:
        return 0
    try:
        # How Linux numbers the clocks of threads. `time.pthread_getcpuclockid` is not for us: it
        # crashes the process when the thread has ended.
        return time.clock_gettime_ns((~native_id << 3) | 6)
    except OSError:
        return None


# Memory


def _trace_heap(seconds: int, stop: threading.Event) -> Profile:
    if memray is None:
        raise HeapProfilingMissing(
            "heap profiling is not enabled in the allocator: "
            "install silo-queue[profiling] and start the server anew"
        )
    with tempfile.TemporaryDirectory(prefix="silo-heap-") as folder:
        path = Path(folder) / "allocations"
        began_ns = time.monotonic_ns()
        with memray.Tracker(
            destination=memray.FileDestination(path, overwrite=True),
            file_format=memray.FileFormat.AGGREGATED_ALLOCATIONS,
        ):
            stop.wait(seconds)
        duration_ns = time.monotonic_ns() - began_ns
        if stop.is_set():
            return Profile(b"", 0, 0)  # Nobody waits for it any more.
        with memray.FileReader(path) as reader:
            samples = _heap_samples(reader.get_leaked_allocation_records(merge_threads=True))
    data = pprof.encoded(
        samples,
        types=[pprof.ValueType("inuse_objects", "count"), pprof.ValueType("inuse_space", "bytes")],
        duration_ns=duration_ns,
        comment="Silo heap profile: allocated since its start and still in use",
    )
    return Profile(data, max(1, round(duration_ns / 1e9)), len(samples))


def _heap_samples(records: Iterable[Any]) -> list[pprof.Sample]:
    """The largest first; what has no Python stack was allocated by the store's or gRPC's own threads."""
    found: dict[tuple[tuple[str, str, int], ...], list[int]] = {}
    for record in records:
        values = found.setdefault(tuple(record.stack_trace(_FRAMES_MAX)), [0, 0])
        values[0] += record.n_allocations
        values[1] += record.size
    largest = sorted(found.items(), key=lambda each: each[1][1], reverse=True)
    samples = [
        pprof.Sample(
            [pprof.Frame(function, file, line) for function, file, line in stack] or [_NATIVE], values
        )
        for stack, values in largest[:_STACKS_MAX]
    ]
    if rest := largest[_STACKS_MAX:]:
        totals = [sum(values[0] for _, values in rest), sum(values[1] for _, values in rest)]
        samples.append(pprof.Sample([_OTHER], totals))
    return samples


# Tasks


def dump_tasks() -> tuple[str, int]:
    """What every task of this event loop waits for, and where every thread is, as text; how many tasks.

    Outermost frame first, like a traceback.
    """
    tasks = sorted(asyncio.all_tasks(), key=lambda task: task.get_name())
    parts = [f"{len(tasks)} tasks, {threading.active_count()} threads\n"]
    for task in tasks[:TASKS_MAX]:
        parts.append(f'\ntask "{task.get_name()}"\n')
        parts += [_line(code, line) for code, line in _awaited(task.get_coro())]
    if len(tasks) > TASKS_MAX:
        parts.append(f"\n… and {len(tasks) - TASKS_MAX} more tasks\n")
    frames = sys._current_frames()
    for thread in threading.enumerate():
        parts.append(f'\nthread "{thread.name}"\n')
        parts += [_line(code, line) for code, line in reversed(_stack(frames.get(thread.ident or 0)))]
    return "".join(parts), len(tasks)


def _line(code: CodeType, line: int) -> str:
    return f'  File "{code.co_filename}", line {line}, in {code.co_qualname}\n'


def _awaited(waiting: Any) -> _Stack:
    """Where a coroutine stands, and what it awaits, and so on. Task.get_stack knows the first only."""
    found: list[tuple[CodeType, int]] = []
    while waiting is not None and len(found) < _FRAMES_MAX:
        for prefix in ("cr", "gi", "ag"):
            code, frame = getattr(waiting, f"{prefix}_code", None), getattr(waiting, f"{prefix}_frame", None)
            if isinstance(code, CodeType):
                found.append((code, (frame.f_lineno if frame is not None else None) or code.co_firstlineno))
                waiting = getattr(waiting, "gi_yieldfrom" if prefix == "gi" else f"{prefix}_await", None)
                break
        else:
            break
    return tuple(found)
