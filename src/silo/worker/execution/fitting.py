"""Whether a handler fits the way it is to be run, and what to do if not."""

import functools
import inspect
from types import FunctionType, MethodType

from silo.worker.execution.execution import Handler

_AWAITABLES = ("Awaitable", "Coroutine", "Future", "Task[")  # In an annotation, which may be a text.


def name_of(handler: Handler) -> str:
    """The name of a handler for people, such as `myapp.images.resize`."""
    while isinstance(handler, functools.partial) and not hasattr(handler, "__qualname__"):
        handler = handler.func
    named = handler if hasattr(handler, "__qualname__") else type(handler)
    return f"{named.__module__}.{named.__qualname__}"


def require_async(handler: Handler) -> None:
    """Refuse what surely blocks the event loop.

    What returns an awaitable is as good as an async function, but from outside that shows at most in
    a return annotation. So lambdas and callables that are no functions are taken at their word.

    Raises:
        TypeError: it is a plain function.
    """
    _refuse_generators(handler)
    function = _function_of(handler)
    if not isinstance(function, FunctionType) or function.__name__ == "<lambda>":
        return
    returns = str(function.__annotations__.get("return"))
    if not inspect.iscoroutinefunction(function) and not any(name in returns for name in _AWAITABLES):
        raise TypeError(
            f"{name_of(handler)} is no async function: write `async def`, or choose execution='thread' "
            "for one that waits and execution='process' for one that computes"
        )


def require_plain(handler: Handler, *, kind: str) -> None:
    """Refuse what would only make a coroutine.

    Raises:
        TypeError: it is an async function.
    """
    _refuse_generators(handler)
    if inspect.iscoroutinefunction(_function_of(handler)):
        raise TypeError(
            f"{name_of(handler)} is an async function, which execution={kind!r} cannot run: "
            "choose execution='async', or write it with plain `def`"
        )


def _refuse_generators(handler: Handler) -> None:
    if not callable(handler):
        raise TypeError(f"a handler is a function, not a {type(handler).__name__}")
    function = _function_of(handler)
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(
            f"{name_of(handler)} is a generator, whose body would never run: use no `yield` in it"
        )


def _function_of(handler: Handler) -> object:
    """What is called in the end, without the layers around it."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    function: object = inspect.unwrap(handler)
    if not isinstance(function, FunctionType | MethodType | type):
        function = getattr(type(function), "__call__", function)  # noqa: B004  # The method, not a test.
    return function.__func__ if isinstance(function, MethodType) else function
