"""Middleware: functions around a handler, each of which decides whether and how the next one is called."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias, TypeVar

C = TypeVar("C")

Next: TypeAlias = Callable[[C], Awaitable[object]]
Middleware: TypeAlias = Callable[[C, Next[C]], Awaitable[object]]


def compose(middlewares: Sequence[Middleware[C]], handler: Next[C]) -> Next[C]:
    """The handler with the middlewares around it, the first one outermost.

    Each is `async def middleware(context, call_next)` and returns what `await call_next(context)` returned,
    or something else. An exception passes through them from the inside to the outside.
    """
    for middleware in reversed(middlewares):
        handler = _around(middleware, handler)
    return handler


def _around(middleware: Middleware[C], call_next: Next[C]) -> Next[C]:
    def call(context: C) -> Awaitable[object]:
        return middleware(context, call_next)

    return call
