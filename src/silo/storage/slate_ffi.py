"""The short way over the SlateDB binding's foreign-function interface.

The binding copies every byte of a key or value in Python, and crosses the event loop for every
read. Here a whole buffer goes over in one call, a read that the store answers at once
is completed at once, and scanned rows are lifted from one copy of the answer.

It relies on the generated code of exactly one version of the binding. `AVAILABLE` says at import
whether the installed one has the expected shape; if not, `SlateStore` uses the public calls.
"""

import asyncio
import ctypes
import struct
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from typing import Any  # The binding is untyped: its objects are Any throughout this module.

from slatedb.uniffi._slatedb_uniffi import slatedb as binding

_VERSION = "0.17.0"
_CALLS = (  # Their last argument is where to tell of errors.
    "ffi_slatedb_uniffi_rustbuffer_from_bytes",
    "ffi_slatedb_uniffi_rustbuffer_free",
    "uniffi_slatedb_uniffi_fn_clone_writebatch",
    "uniffi_slatedb_uniffi_fn_method_writebatch_put",
    "uniffi_slatedb_uniffi_fn_method_writebatch_delete",
    "uniffi_slatedb_uniffi_fn_clone_db",
    "uniffi_slatedb_uniffi_fn_clone_dbiterator",
)
_STARTS = (  # They answer with a future.
    "uniffi_slatedb_uniffi_fn_method_db_get",
    "uniffi_slatedb_uniffi_fn_method_dbiterator_next_batch",
)
_FUTURE_CALLS = (
    "ffi_slatedb_uniffi_rust_future_poll_rust_buffer",
    "ffi_slatedb_uniffi_rust_future_complete_rust_buffer",
    "ffi_slatedb_uniffi_rust_future_free_rust_buffer",
)

_LENGTH = struct.Struct(">i")
_frame = _LENGTH.pack
_ROW_TAIL = struct.Struct(">QqB")  # seq, create_ts, and whether an expiry follows.
_POLL_READY = 0
_GETS_AT_ONCE = 64

_library: Any = None
_status: Any = None
_status_at = 0


def _is_available() -> bool:
    if version("slatedb") != _VERSION:
        return False
    loaded = getattr(binding, "_UniffiLib", None)
    return all(hasattr(loaded, symbol) for symbol in (*_CALLS, *_STARTS, *_FUTURE_CALLS))


AVAILABLE = _is_available()

if AVAILABLE:
    # PyDLL keeps the interpreter lock: these calls never wait, and take less time than giving it up would.
    _library = ctypes.PyDLL(binding._UniffiLib._name)
    _status = binding._UniffiRustCallStatus.default()
    _status_at = ctypes.addressof(_status)
    for _symbol in (*_CALLS, *_STARTS):
        _call, _bound = getattr(_library, _symbol), getattr(binding._UniffiLib, _symbol)
        _call.argtypes, _call.restype = _bound.argtypes, _bound.restype
        if _symbol in _CALLS:  # An address costs less than a reference.
            _call.argtypes = (*_bound.argtypes[:-1], ctypes.c_void_p)

    class _Foreign(ctypes.Structure):
        """Borrowed bytes, as the binding's own structure but without a cast for each value."""

        _fields_ = (("len", ctypes.c_int32), ("data", ctypes.c_char_p))

    _foreign = _Foreign()
    _from_bytes = _library.ffi_slatedb_uniffi_rustbuffer_from_bytes
    _from_bytes.argtypes = (_Foreign, *_from_bytes.argtypes[1:])
    _clone_batch = _library.uniffi_slatedb_uniffi_fn_clone_writebatch
    _put = _library.uniffi_slatedb_uniffi_fn_method_writebatch_put
    _delete = _library.uniffi_slatedb_uniffi_fn_method_writebatch_delete
    _clone_db = _library.uniffi_slatedb_uniffi_fn_clone_db
    _get = _library.uniffi_slatedb_uniffi_fn_method_db_get
    _clone_iterator = _library.uniffi_slatedb_uniffi_fn_clone_dbiterator
    _next_batch = _library.uniffi_slatedb_uniffi_fn_method_dbiterator_next_batch
    # Not these: they take a lock that a thread of the store may hold while its callback, `_continue`,
    # waits for the interpreter lock. Called with that lock held they would wait for each other for ever.
    _poll = binding._UniffiLib.ffi_slatedb_uniffi_rust_future_poll_rust_buffer
    _complete = binding._UniffiLib.ffi_slatedb_uniffi_rust_future_complete_rust_buffer
    _free_future = binding._UniffiLib.ffi_slatedb_uniffi_rust_future_free_rust_buffer
    _free_buffer = _library.ffi_slatedb_uniffi_rustbuffer_free


def _check() -> None:
    """Raise what the last call reported, and make the shared status usable again."""
    if _status.code:
        failed = binding._UniffiRustCallStatus(code=_status.code, error_buf=_status.error_buf)
        _status.code = 0
        _status.error_buf = binding._UniffiRustBuffer.default()
        binding._uniffi_check_call_status(binding._UniffiFfiConverterTypeError, failed)


def _buffer(value: bytes) -> Any:
    size = len(value)
    _foreign.data = _frame(size) + value
    _foreign.len = size + 4
    return _from_bytes(_foreign, _status_at)


def fill(batch: Any, rows: Iterable[tuple[bytes, bytes | None]]) -> None:
    """Add puts, and deletes for None, to a `WriteBatch` of the binding."""
    handle = batch._handle
    for key, value in rows:
        if value is None:
            _delete(_clone_batch(handle, _status_at), _buffer(key), _status_at)
        else:
            _put(_clone_batch(handle, _status_at), _buffer(key), _buffer(value), _status_at)
        if _status.code:
            _check()


class _Polled:
    """Continuations of futures that were not ready at the first poll."""

    def __init__(self) -> None:
        self._next = 0
        self._waiting: dict[int, tuple[asyncio.AbstractEventLoop, asyncio.Future[int]] | None] = {}
        self._codes: dict[int, int] = {}
        self.callback = binding._UNIFFI_RUST_FUTURE_CONTINUATION_CALLBACK(self._continue)

    def poll(self, rust_future: int) -> tuple[int, int | None]:
        """Poll once; the ticket, and the code if it came at once."""
        self._next += 1
        ticket = self._next
        self._waiting[ticket] = None
        _poll(rust_future, self.callback, ticket)
        code = self._codes.pop(ticket, None)
        if code is not None:
            del self._waiting[ticket]
        return ticket, code

    async def wait(self, ticket: int) -> int:
        """The code of a poll that was not answered at once."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[int] = loop.create_future()
        self._waiting[ticket] = (loop, future)
        code = self._codes.pop(ticket, None)
        if code is not None:  # It came between the poll and now, from another thread.
            self._waiting.pop(ticket, None)
            return code
        return await future

    def forget(self, ticket: int) -> None:
        """Nobody waits for this poll any more."""
        self._waiting.pop(ticket, None)
        self._codes.pop(ticket, None)

    def _continue(self, ticket: int, code: int) -> None:
        if ticket not in self._waiting:
            return
        # The code is stored before the waiter is looked up: `wait` does both in the other order.
        self._codes[ticket] = code
        waiting = self._waiting.get(ticket)
        if waiting is not None and self._codes.pop(ticket, None) is not None:
            self._waiting.pop(ticket, None)
            loop, future = waiting
            loop.call_soon_threadsafe(_resolve, future, code)


def _resolve(future: "asyncio.Future[int]", code: int) -> None:
    if not future.done():
        future.set_result(code)


_polled = _Polled() if AVAILABLE else None


class _Call:
    """A future of the binding that answers with a buffer. It runs from here on."""

    def __init__(self, rust_future: int) -> None:
        assert _polled is not None
        self._future = rust_future
        self._ticket, self._code = _polled.poll(rust_future)

    async def answer(self) -> bytes:
        """The bytes of the buffer. Ask once."""
        assert _polled is not None
        try:
            while True:
                if self._code is None:
                    self._code = await _polled.wait(self._ticket)
                if self._code == _POLL_READY:
                    break
                self._ticket, self._code = _polled.poll(self._future)
            buffer = _complete(self._future, _status)
            if _status.code:
                _check()
            data = ctypes.string_at(buffer.data, buffer.len) if buffer.len else b""
            _free_buffer(buffer, _status_at)
            return data
        finally:
            self.drop()

    def drop(self) -> None:
        """Release the future, answered or not."""
        if self._future:
            assert _polled is not None
            _polled.forget(self._ticket)
            _free_future(self._future)
            self._future = 0


async def get(db: Any, key: bytes) -> bytes | None:
    """The value of `key` in a `Db` of the binding."""
    return _value(await _Call(_get(_clone_db(db._handle, _status_at), _buffer(key))).answer())


async def get_many(db: Any, keys: Sequence[bytes]) -> list[bytes | None]:
    """The values of `keys`: the store looks for several at a time."""
    values: list[bytes | None] = []
    for start in range(0, len(keys), _GETS_AT_ONCE):
        chunk = keys[start : start + _GETS_AT_ONCE]
        calls = [_Call(_get(_clone_db(db._handle, _status_at), _buffer(key))) for key in chunk]
        try:
            for call in calls:
                values.append(_value(await call.answer()))
        finally:
            for call in calls:
                call.drop()
    return values


def _value(answer: bytes) -> bytes | None:
    return answer[5:] if answer[:1] == b"\x01" else None


async def next_batch(iterator: Any, count: int) -> list[tuple[bytes, bytes]]:
    """Up to `count` rows of a `DbIterator` of the binding; fewer when it is exhausted."""
    data = await _Call(_next_batch(_clone_iterator(iterator._handle, _status_at), count)).answer()
    (length,) = _LENGTH.unpack_from(data)
    at = 4
    rows: list[tuple[bytes, bytes]] = []
    for _ in range(length):
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4
        key = data[at : at + size]
        at += size
        (size,) = _LENGTH.unpack_from(data, at)
        at += 4
        value = data[at : at + size]
        at += size
        _, _, expires = _ROW_TAIL.unpack_from(data, at)
        at += 25 if expires else 17
        rows.append((key, value))
    return rows
