"""The execution that a worker asks for by name."""

from typing import Literal

from silo.worker.execution.execution import Execution, Handler
from silo.worker.execution.inline import AsyncExecution
from silo.worker.execution.processes import ProcessExecution
from silo.worker.execution.threads import ThreadExecution

ExecutionKind = Literal["async", "thread", "process"]


def execution_for(
    kind: ExecutionKind,
    handler: Handler,
    *,
    concurrency: int,
    interrupts: bool = False,
    recycle_after_jobs: int | None = None,
    recycle_above_mb: int | None = None,
    cancel_grace_s: float = 5.0,
) -> Execution:
    """The execution of this kind, which can run the handler.

    Args:
        concurrency: how many threads or processes. Async handlers all run at once.
        interrupts: whether async handlers get a CancelledError when their job is cancelled.
        recycle_after_jobs: see ProcessExecution, also for the next two.

    Raises:
        TypeError: the handler is of another kind, or an option of one.
        ValueError: other processes cannot import the handler, or a number is out of range.
    """
    execution = _execution(
        kind,
        concurrency=concurrency,
        interrupts=interrupts,
        recycle_after_jobs=recycle_after_jobs,
        recycle_above_mb=recycle_above_mb,
        cancel_grace_s=cancel_grace_s,
    )
    execution.check(handler)
    return execution


def _execution(
    kind: ExecutionKind,
    *,
    concurrency: int,
    interrupts: bool,
    recycle_after_jobs: int | None,
    recycle_above_mb: int | None,
    cancel_grace_s: float,
) -> Execution:
    if kind != "async" and interrupts:
        raise TypeError(f"only execution='async' can interrupt a handler, not {kind!r}: leave interrupts out")
    if kind != "process" and (recycle_after_jobs is not None or recycle_above_mb is not None):
        raise TypeError(f"only execution='process' recycles processes, not {kind!r}: leave it out")
    match kind:
        case "async":
            return AsyncExecution(interrupts=interrupts)
        case "thread":
            return ThreadExecution(concurrency)
        case "process":
            return ProcessExecution(
                concurrency,
                recycle_after_jobs=recycle_after_jobs,
                recycle_above_mb=recycle_above_mb,
                cancel_grace_s=cancel_grace_s,
            )
        case _:
            raise ValueError(f"execution must be 'async', 'thread' or 'process', not {kind!r}")
