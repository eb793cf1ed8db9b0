"""Application values as MessagePack, the way every Silo client writes and reads them."""

import datetime as dt
from dataclasses import asdict, is_dataclass
from typing import Any  # Application values are whatever the application puts in.

import msgpack
import msgspec

from silo.errors import ErrorKind, SiloError

_NO_VALUE = 0  # Extension type by which other clients write "no value".


class PayloadError(SiloError):
    """A value cannot be encoded, and nothing was sent; or bytes that came are no value."""

    kind = ErrorKind.INVALID


def encode(value: object) -> bytes:
    """One MessagePack value.

    Dataclasses and msgspec structs become maps, tuples arrays, aware datetimes timestamps.

    Raises:
        PayloadError: a type that has no form in MessagePack, or a number beyond 64 bits.
    """
    try:
        packed: bytes = msgpack.packb(value, datetime=True, default=_plain, use_bin_type=True)
    except PayloadError:
        raise
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise PayloadError(f"cannot encode {type(value).__name__}: {error}") from error
    return packed


def _plain(value: object) -> object:
    if isinstance(value, msgspec.Struct):
        return msgspec.structs.asdict(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, dt.datetime):
        raise PayloadError("cannot encode a datetime without a time zone; make it aware")
    raise PayloadError(f"cannot encode {type(value).__module__}.{type(value).__qualname__} as MessagePack")


def decode(data: bytes, *, field: str) -> Any:
    """The one value in `data`.

    Raises:
        PayloadError: there is none, or more than one.
    """
    if not data:
        raise PayloadError(f"No bytes to decode for field {field}")
    try:
        return msgpack.unpackb(
            data, timestamp=3, strict_map_key=False, ext_hook=_extension, unicode_errors="replace"
        )
    except PayloadError:
        raise
    except (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException) as error:
        raise PayloadError(f"cannot decode {field}: {type(error).__name__}") from error


def decode_tolerant(data: bytes) -> Any:
    """Like `decode`, but nothing is None and what is no value is text."""
    if not data:
        return None
    try:
        return decode(data, field="value")
    except PayloadError:
        return data.decode(errors="replace")


def _extension(code: int, data: bytes) -> None:
    if code != _NO_VALUE:
        raise PayloadError(f"cannot decode MessagePack extension type {code}")
