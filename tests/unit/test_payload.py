"""Application values survive the trip through MessagePack, and what has no form there is refused."""

import datetime as dt
import enum
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import pytest

from silo.wire.payload import PayloadError, decode, decode_tolerant, encode


class Point(NamedTuple):
    x: int
    y: int


class Colour(enum.StrEnum):
    RED = "red"


class Inner(msgspec.Struct):
    n: int


@dataclass
class Outer:
    name: str
    inner: Inner
    points: list[Point]


@pytest.mark.parametrize(
    "plain",
    [
        None,
        True,
        False,
        0,
        -1,
        2**31,
        2**32,
        2**53 + 1,
        2**64 - 1,
        -(2**63),
        1.5,
        float("inf"),
        "",
        "größe 日本 🚀",
        b"\x00\xff",
        [],
        {},
        {"a": [1, {"b": None}], "c": b"x"},
        {1: "one", None: "none", b"k": 2.5},
        dt.datetime(2024, 5, 6, 7, 8, 9, 123456, tzinfo=dt.UTC),
        dt.datetime(1950, 1, 1, tzinfo=dt.UTC),
    ],
    ids=repr,
)
def test_a_value_comes_back_as_it_was(plain: Any) -> None:
    back = decode(encode(plain), field="payload")
    assert back == plain
    assert type(back) is type(plain)


@pytest.mark.parametrize(
    ("number", "size"),
    [(127, 1), (-32, 1), (255, 2), (-128, 2), (65535, 3), (2**32 - 1, 5), (2**32, 9), (-(2**31), 5)],
)
def test_an_integer_takes_the_smallest_form(number: int, size: int) -> None:
    assert len(encode(number)) == size


def test_text_travels_as_str_and_bytes_as_bin() -> None:
    assert encode("a") == b"\xa1a"
    assert encode(b"a") == encode(bytearray(b"a")) == b"\xc4\x01a"


def test_no_value_travels_as_nil() -> None:
    assert encode(None) == b"\xc0"


@pytest.mark.parametrize(
    ("plain", "read"),
    [
        ((1, 2), [1, 2]),
        (Point(1, 2), [1, 2]),
        (Colour.RED, "red"),
        (Inner(3), {"n": 3}),
        (
            Outer("o", Inner(1), [Point(0, 1)]),
            {"name": "o", "inner": {"n": 1}, "points": [[0, 1]]},
        ),
    ],
    ids=repr,
)
def test_python_types_with_an_obvious_form_are_accepted(plain: Any, read: Any) -> None:
    assert decode(encode(plain), field="payload") == read


def _endless() -> list[Any]:
    turns: list[Any] = []
    turns.append(turns)
    return turns


@pytest.mark.parametrize(
    "plain",
    [
        object(),
        {1, 2},
        2**64,
        -(2**63) - 1,
        1j,
        Outer,
        lambda: None,
        {"deep": [{"er": object()}]},
        dt.datetime(2024, 1, 1),  # Without a zone is the point.
        dt.date(2024, 1, 1),
        "\ud800",
        _endless(),
    ],
    ids=lambda plain: type(plain).__name__,
)
def test_a_value_without_a_form_is_refused(plain: Any) -> None:
    with pytest.raises(PayloadError):
        encode(plain)


def test_the_refusal_names_the_type() -> None:
    with pytest.raises(PayloadError, match="set"):
        encode({"tags": {1}})


@pytest.mark.parametrize("packed", [b"\xd4\x00\x00", b"\x81\xa1a\xd4\x00\x00", b"\x91\xd4\x00\x00"])
def test_the_absent_value_of_other_clients_reads_as_none_anywhere(packed: bytes) -> None:
    assert decode(packed, field="payload") in (None, {"a": None}, [None])


@pytest.mark.parametrize(
    ("packed", "read"),
    [
        (b"\xd3" + (5).to_bytes(8, "big"), 5),
        (b"\xcf" + (5).to_bytes(8, "big"), 5),
        (b"\xcd\x00\x01", 1),
        (b"\xde\x00\x01\xa1a\x01", {"a": 1}),
        (b"\xca\x3f\xc0\x00\x00", 1.5),
        (b"\xa2\xc3\x28", "\ufffd("),
    ],
)
def test_forms_that_only_others_write_are_read(packed: bytes, read: Any) -> None:
    assert decode(packed, field="payload") == read


@pytest.mark.parametrize(
    "packed",
    [
        b"\xc1",
        b"\x01\x02",
        b"\x92\x01",
        b"\xd4\x05\x00",
        b"\xd4\xff\xff",
        b"\x81\x90\x01",
        b"\x91" * 2000 + b"\x01",
        b"\xc7\x0c\xff\x00\x00\x00\x00" + (2**62).to_bytes(8, "big"),  # A time beyond all calendars.
    ],
    ids=lambda packed: packed[:8].hex(),
)
def test_bytes_that_are_no_value_are_refused_with_the_name_of_the_field(packed: bytes) -> None:
    with pytest.raises(PayloadError, match=r"payload|extension"):
        decode(packed, field="payload")


def test_no_bytes_at_all_are_refused_in_the_words_of_the_protocol() -> None:
    with pytest.raises(PayloadError, match=r"^No bytes to decode for field row\[0\]$"):
        decode(b"", field="row[0]")


@pytest.mark.parametrize(
    ("packed", "read"),
    [
        (b"", None),
        (b"boom", "boom"),
        (b"b", 98),  # One sign is a small number: nobody can tell.
        (b"\xd4\x00\x00", None),
        (b"\xff\xfe\xfd", "\ufffd\ufffd\ufffd"),
        (b"\x81\xa1a\x01", {"a": 1}),
    ],
)
def test_reading_tolerantly_never_fails(packed: bytes, read: Any) -> None:
    assert decode_tolerant(packed) == read
