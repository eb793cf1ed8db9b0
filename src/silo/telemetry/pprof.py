"""Writes profiles in pprof's format, which `go tool pprof`, speedscope, Perfetto and others open.

The message is small and settled, so it is encoded here by hand; see `profile.proto` of google/pprof.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Frame:
    function: str
    file: str
    line: int


@dataclass(frozen=True)
class Sample:
    """What was measured at one stack, whose innermost frame comes first: one value for each type."""

    stack: Sequence[Frame]
    values: Sequence[int]
    thread: str | None = None


@dataclass(frozen=True)
class ValueType:
    """What a number means: its name and its unit, such as cpu in nanoseconds."""

    name: str
    unit: str


def encoded(
    samples: Iterable[Sample],
    *,
    types: Sequence[ValueType],
    duration_ns: int,
    period_type: ValueType | None = None,
    period: int = 0,
    comment: str = "",
) -> bytes:
    """A `perftools.profiles.Profile`, not compressed. Viewers show the last of `types` first."""
    strings = _Numbers()
    strings.of("")  # The first string is always empty.
    functions, locations = _Numbers(), _Numbers()
    message = bytearray()

    def value_type(kind: ValueType) -> bytes:
        return _number(1, strings.of(kind.name)) + _number(2, strings.of(kind.unit))

    for kind in types:
        message += _bytes(1, value_type(kind))
    for sample in samples:
        body = _packed(1, [locations.of(frame) + 1 for frame in sample.stack]) + _packed(2, sample.values)
        if sample.thread is not None:
            body += _bytes(3, _number(1, strings.of("thread")) + _number(2, strings.of(sample.thread)))
        message += _bytes(2, body)
    for number, frame in enumerate(locations, start=1):
        assert isinstance(frame, Frame)
        function = functions.of((frame.function, frame.file)) + 1
        line = _number(1, function) + _number(2, frame.line)
        message += _bytes(4, _number(1, number) + _bytes(4, line))
    for number, (name, file) in enumerate(functions, start=1):
        text = strings.of(name)
        message += _bytes(
            5, _number(1, number) + _number(2, text) + _number(3, text) + _number(4, strings.of(file))
        )
    message += _number(10, duration_ns)
    if period_type is not None:
        message += _bytes(11, value_type(period_type)) + _number(12, period)
    message += _packed(13, [strings.of(comment)])
    for text in strings:
        message += _bytes(6, str(text).encode(errors="replace"))
    return bytes(message)


class _Numbers(dict):  # type: ignore[type-arg]  # Keys of several kinds, each a number from 0.
    """Gives each value its number, in the order in which they come."""

    def of(self, value: object) -> int:
        number: int = self.setdefault(value, len(self))
        return number


def _varint(value: int) -> bytes:
    assert value >= 0
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _packed(field: int, values: Iterable[int]) -> bytes:
    return _bytes(field, b"".join(map(_varint, values)))
