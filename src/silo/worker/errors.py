"""What goes wrong around handlers: how it is told, and what is stored of an exception."""

import asyncio
import logging
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from silo.client.outcome import Failure
from silo.worker.execution.errors import HandlerCrashed, HandlerTimeout, RemoteTraceback

log = logging.getLogger(__name__)

_TEXT_CHARS_MAX = 1 << 20


@dataclass(frozen=True)
class ErrorContext:
    """What an error was about."""

    task_id: str | None = None


class ErrorReports:
    """Tells the application of errors, or the log if it does not listen. Never raises."""

    def __init__(self, on_error: Callable[[BaseException, ErrorContext], None] | None) -> None:
        self._on_error = on_error

    def __call__(self, error: BaseException, task_id: str | None = None) -> None:
        if self._on_error is None:
            log.error("[SiloWorker] Error%s: %s", f" (task {task_id})" if task_id else "", error)
            return
        try:
            self._on_error(error, ErrorContext(task_id))
        except Exception:  # The edge around user code: it must not stop the worker.
            log.exception("on_error raised")


def failure_of(error: BaseException, *, is_final: bool = False) -> Failure:
    """The failure that a handler's exception amounts to."""
    match error:
        case HandlerTimeout():
            code = "TIMEOUT"
        case HandlerCrashed():
            code = "HANDLER_CRASHED"
        case _:
            code = "HANDLER_ERROR"
    return Failure(code, error_data(error), is_final=is_final)


def error_data(error: BaseException) -> dict[str, str]:
    """What is stored of an exception: its name, message, stack, and code if it has a text of that name."""
    if isinstance(error.__cause__, RemoteTraceback):
        return dict(error.__cause__.data)  # It was raised in another process, which knows more of it.
    data = {
        "name": type(error).__name__,
        "message": error_message(error),
        "stack": "".join(traceback.format_exception(error)),
    }
    with suppress(Exception):  # The edge around user code: `code` may be a property.
        code = getattr(error, "code", None)
        if isinstance(code, str):
            data["code"] = code
    return {key: _encodable(text) for key, text in data.items()}


def error_message(error: BaseException) -> str:
    """The text of an exception, in a form that can be stored."""
    try:
        return _encodable(str(error))
    except Exception:  # The edge around user code.
        return "<the text of the exception raised an exception>"


def _encodable(text: str) -> str:
    # Lone surrogates have no UTF-8 form.
    return text[:_TEXT_CHARS_MAX].encode(errors="backslashreplace").decode()


def is_being_cancelled() -> bool:
    """Whether somebody cancelled this task, so that a CancelledError must pass through."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
