"""Middleware runs around a handler, the first one outermost, and decides what comes of it."""

from collections.abc import Awaitable, Callable

import pytest

from silo.worker.middleware import compose

Next = Callable[[list[str]], Awaitable[object]]


def noting(name: str) -> Callable[[list[str], Next], Awaitable[object]]:
    async def middleware(notes: list[str], call_next: Next) -> object:
        notes.append(f"{name} before")
        try:
            return await call_next(notes)
        finally:
            notes.append(f"{name} after")

    return middleware


async def handler(notes: list[str]) -> object:
    notes.append("handler")
    return len(notes)


async def failing(notes: list[str]) -> object:
    notes.append("handler")
    raise ValueError("on purpose")


async def test_the_first_middleware_is_outermost() -> None:
    notes: list[str] = []
    assert await compose([noting("a"), noting("b")], handler)(notes) == 3
    assert notes == ["a before", "b before", "handler", "b after", "a after"]


async def test_without_middleware_the_handler_is_what_it_was() -> None:
    assert compose([], handler) is handler


async def test_an_exception_passes_through_all_of_them() -> None:
    notes: list[str] = []
    with pytest.raises(ValueError, match="on purpose"):
        await compose([noting("a"), noting("b")], failing)(notes)
    assert notes == ["a before", "b before", "handler", "b after", "a after"]


async def test_a_middleware_may_answer_by_itself_and_change_the_context() -> None:
    async def other_notes(notes: list[str], call_next: Next) -> object:
        return await call_next([*notes, "changed"])

    async def nothing(notes: list[str], call_next: Next) -> object:
        return notes

    notes: list[str] = []
    assert await compose([other_notes, nothing, noting("a")], handler)(notes) == ["changed"]
    assert notes == []
