"""Plain handlers that compute, each in a child process.

Children are made anew, never forked off the worker: what gRPC and other threads hold would not survive
that. They start when they are first needed, stay, and run one job at a time. A child has a place
of the pool from its start until it is dead, so there are never more than were asked for.

Whatever ends a child costs the job that it ran and nothing else. The worker ends it when a job has run out of
time, when a cancelled job does not end by itself, and when the caller of `run` is cancelled.

Payload, result and exception cross the border as pickles, written and read on the event loop: 64 MB of
bytes hold it up for some 70 ms on their way in and 35 ms on their way back, many small objects for longer.
"""

import asyncio
import pickle
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from silo.worker.context import CancellationSignal, TaskContext
from silo.worker.errors import error_message
from silo.worker.execution.answer import Answer
from silo.worker.execution.errors import HandlerCrashed, HandlerTimeout
from silo.worker.execution.execution import Handler
from silo.worker.execution.fitting import name_of, require_plain
from silo.worker.execution.frames import Kind, Setup, frame
from silo.worker.execution.main_module import main_module, refuse_during_import
from silo.worker.execution.places import Places
from silo.worker.execution.process import Child, ChildEnded

P = TypeVar("P")
M = TypeVar("M", bound=Mapping[str, object])

_PROBLEM_CHARS = 1000  # What goes through a pipe at once, whatever the system.
_TOO_LATE = "the handler has ended"
_CLOSE_S = 15.0  # Children are killed long before. Only one stuck in the kernel takes longer.


class ProcessExecution:
    """Runs each handler in one of `processes` child processes.

    The handler gets a `BlockingTaskContext`, in the main thread of the child. It has to be importable
    there, and so have the classes of its payload and of what it returns.

    Only for systems with `fork` and `exec`, such as Linux and macOS.

    Args:
        recycle_after_jobs: a child that has run so many is replaced.
        recycle_above_mb: a child that has more memory than that after a job is replaced. In MiB, of
            resident memory.
        cancel_grace_s: how long a handler may go on after its job was cancelled.
    """

    def __init__(
        self,
        processes: int,
        *,
        recycle_after_jobs: int | None = None,
        recycle_above_mb: int | None = None,
        cancel_grace_s: float = 5.0,
    ) -> None:
        for name, value in (
            ("processes", processes),
            ("recycle_after_jobs", recycle_after_jobs),
            ("recycle_above_mb", recycle_above_mb),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not cancel_grace_s >= 0:
            raise ValueError(f"cancel_grace_s must not be negative, not {cancel_grace_s}")
        self._processes = processes
        self._recycle_after_jobs = recycle_after_jobs
        self._recycle_above_mb = recycle_above_mb
        self._cancel_grace_s = cancel_grace_s
        self._places = Places(processes)
        self._idle: list[Child] = []  # The last one used comes first: its memory is still warm.
        self._children: set[Child] = set()  # All that are not dead, idle ones too.
        self._endings: dict[Child, asyncio.Task[int]] = {}
        self._is_closing = False

    def __repr__(self) -> str:
        return (
            f"ProcessExecution({len(self._children)} of {self._processes} processes, {len(self._idle)} idle)"
        )

    def check(self, handler: Handler) -> None:
        require_plain(handler, kind="process")
        name = name_of(handler)
        try:
            pickle.dumps(handler)
        except Exception as error:  # Callable objects bring their own ways of not being pickled.
            raise ValueError(
                f"{name} cannot be imported by other processes ({error}): execution='process' needs a "
                "function that its module has under its name, so no lambda and none made in another function"
            ) from error
        if name.startswith("__main__.") and not main_module().is_importable:
            raise ValueError(
                f"{name} cannot be imported by other processes, because the main module is no script: "
                "put it into a module of its own"
            )

    async def run(self, handler: Handler, context: TaskContext[P, M], *, timeout_s: float | None) -> object:
        refuse_during_import()
        try:
            job = frame(Kind.JOB, (handler, context.task))
        except Exception as error:  # Objects bring their own ways of not being pickled.
            raise TypeError(f"the task of {name_of(handler)} cannot enter its process: {error}") from error
        async with self._lent(handler, context.cancellation_signal) as child:
            answer = await self._converse(child, job, handler, context, timeout_s)
            child.is_spent = answer.is_spent
        if answer.error is not None:
            raise answer.error
        return answer.value

    @asynccontextmanager
    async def _lent(self, handler: Handler, cancellation: CancellationSignal) -> AsyncIterator[Child]:
        """A child that has imported the handler. If the block fails, the child is ended."""
        await self._places.take(cancellation)
        child: Child | None = None
        try:
            self._refuse_while_closing()
            child = await self._idle_child()
            if child is None:
                child = await Child.start(self._setup(handler))
                self._children.add(child)
                self._refuse_while_closing()
                await self._import(child, handler)
            yield child
        except BaseException:
            if child is None:
                self._places.give_back()
            elif child in self._children:
                self._end(child, at_once=True)
            raise
        if child.is_spent or self._is_closing:
            self._end(child, at_once=False)
        else:
            self._idle.append(child)
            self._places.give_back()

    async def _idle_child(self) -> Child | None:
        while self._idle:
            child = self._idle.pop()
            if child.is_alive:
                return child
            await self._discard(child, at_once=True)
        return None

    def _setup(self, handler: Handler) -> Setup:
        return Setup(
            import_path=[folder or str(Path.cwd()) for folder in sys.path],
            arguments=sys.argv,
            main=main_module(),
            handler=pickle.dumps(handler),
            recycle_after_jobs=self._recycle_after_jobs,
            recycle_above_mb=self._recycle_above_mb,
        )

    async def _import(self, child: Child, handler: Handler) -> None:
        try:
            kind, body = await child.receive()
        except ChildEnded:
            raise await self._crash(child, handler) from None
        if (error := Answer.read(kind, body, handler).error) is not None:
            raise error

    async def _converse(
        self,
        child: Child,
        job: memoryview,
        handler: Handler,
        context: TaskContext[P, M],
        timeout_s: float | None,
    ) -> Answer:
        """Have the child run a job; meanwhile carry cancellations back and forth."""
        loop = asyncio.get_running_loop()
        number = child.begin(job)
        # Cancelled in the end and not waited for: a turn of the loop for each job would buy nothing.
        helpers = {loop.create_task(self._pass_on(context.cancellation_signal, child, number))}
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    kind, body = await child.receive()
                    if kind is not Kind.CANCEL:
                        return Answer.read(kind, body, handler)
                    if pickle.loads(body) == number:
                        cancelling = loop.create_task(_cancel(context))
                        cancelling.add_done_callback(partial(_answer_cancel, child))
                        helpers.add(cancelling)
                    else:  # From a thread that an earlier handler left behind.
                        child.tell(Kind.ANSWERED, _TOO_LATE)
        except TimeoutError:
            assert timeout_s is not None  # Nothing else here ends so.
            raise HandlerTimeout(timeout_s) from None
        except ChildEnded:
            raise await self._crash(child, handler) from None
        finally:
            for helper in helpers:
                helper.cancel()

    async def _pass_on(self, cancellation: CancellationSignal, child: Child, number: int) -> None:
        """Tell the child that its job is cancelled, and put an end to it if that does not help."""
        await cancellation.wait()
        child.tell(Kind.CANCELLED, number)
        await asyncio.sleep(self._cancel_grace_s)
        child.interrupt()

    async def _crash(self, child: Child, handler: Handler) -> HandlerCrashed:
        exit_code = await asyncio.shield(self._end(child, at_once=False))
        return HandlerCrashed(f"the process of {name_of(handler)} {_how(exit_code)}", exit_code=exit_code)

    def _end(self, child: Child, *, at_once: bool) -> asyncio.Task[int]:
        """End a child, and free its place once it is dead."""

        async def end() -> int:
            try:
                return await self._discard(child, at_once=at_once)
            finally:
                del self._endings[child]
                self._places.give_back()

        if child not in self._endings:
            self._endings[child] = asyncio.get_running_loop().create_task(end(), name=f"end {child}")
        return self._endings[child]

    async def _discard(self, child: Child, *, at_once: bool) -> int:
        try:
            return await child.end(at_once=at_once)
        finally:
            self._children.discard(child)

    def _refuse_while_closing(self) -> None:
        if self._is_closing:
            raise asyncio.CancelledError

    async def close(self) -> None:
        """Give up what runs or waits for a child, and end all children. Those that do not end are killed."""
        if self._is_closing:
            return
        self._is_closing = True
        idle, self._idle = self._idle, []
        self._places.turn_away()
        for child in self._children:
            child.interrupt()
        never = CancellationSignal()
        taken = 0
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(_CLOSE_S), asyncio.TaskGroup() as group:
                    for child in idle:
                        group.create_task(self._discard(child, at_once=False))
                    while taken < self._processes:  # When all places are ours, all children are dead.
                        await self._places.take(never)
                        taken += 1
        finally:
            for child in self._children:
                child.kill()
            for _ in range(taken):
                self._places.give_back()
            self._is_closing = False


async def _cancel(context: TaskContext[P, M]) -> None:
    await context.cancel()


def _answer_cancel(child: Child, cancelling: asyncio.Task[None]) -> None:
    """Let the handler go on that has asked for it. It is answered in any case: the next one may ask, too."""
    if cancelling.cancelled():
        child.tell(Kind.ANSWERED, _TOO_LATE)
    else:
        error = cancelling.exception()
        child.tell(Kind.ANSWERED, error and error_message(error)[:_PROBLEM_CHARS])


def _how(exit_code: int) -> str:
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    name = next((s.name for s in signal.Signals if s == -exit_code), f"signal {-exit_code}")
    hint = ", as when the system runs out of memory" if exit_code == -signal.SIGKILL else ""
    return f"died of {name}{hint}"
