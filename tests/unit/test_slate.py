"""How SlateStore answers when the binding refuses a call."""

from collections.abc import Callable
from typing import Any

import pytest
from slatedb import uniffi as slatedb

from silo.errors import StoreUnavailable
from silo.storage import slate
from silo.storage.slate import SlateStorage, SlateStore

_RACE = "Invalid error: invalid clock tick, must be monotonic. last_tick=`5`, next_tick=`4`"


def _refusing(operation: Callable[..., Any], *, times: int, text: str) -> Callable[..., Any]:
    left = times

    async def call(*arguments: object) -> Any:
        nonlocal left
        if left:
            left -= 1
            raise slatedb.Error.Invalid(message=text)
        return await operation(*arguments)

    return call


async def _a_store() -> SlateStore:
    store = await SlateStorage("memory://slate").open("s")
    await store.write({b"a": b"1", b"b": None})
    return store


async def test_a_read_during_which_the_clock_seemed_to_go_back_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = await _a_store()
    for name in ("_get", "_get_many", "_scan"):
        monkeypatch.setattr(slate, name, _refusing(getattr(slate, name), times=2, text=_RACE))
    assert await store.get(b"a") == b"1"
    assert await store.get_many([b"a", b"b"]) == [b"1", None]
    assert await store.scan(b"a", b"z", limit=5) == [(b"a", b"1")]
    await store.close()


async def test_a_write_during_which_the_clock_seemed_to_go_back_is_made_again() -> None:
    store = await _a_store()

    class Database:
        write = staticmethod(_refusing(store._database.write, times=2, text=_RACE))

        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

    inner, store._database = store._database, Database()
    await store.write({b"a": b"2"})
    store._database = inner
    assert await store.get(b"a") == b"2"
    await store.close()


@pytest.mark.parametrize(("text", "tries"), [(_RACE, 5), ("Invalid error: something else", 1)])
async def test_a_refusal_that_lasts_is_an_error(
    monkeypatch: pytest.MonkeyPatch, text: str, tries: int
) -> None:
    store = await _a_store()
    monkeypatch.setattr(slate, "_get", _refusing(slate._get, times=tries, text=text))
    with pytest.raises(StoreUnavailable, match="the store failed"):
        await store.get(b"a")
    assert await store.get(b"a") == b"1"
    await store.close()
