"""Reads pprof messages with protobuf's own decoder, over the part of the schema that Silo writes."""

import functools
from dataclasses import dataclass
from typing import Any  # Messages made at run time are untyped.

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_FIELD = descriptor_pb2.FieldDescriptorProto
_KINDS = {"int64": _FIELD.TYPE_INT64, "uint64": _FIELD.TYPE_UINT64, "string": _FIELD.TYPE_STRING}
# From profile.proto of google/pprof: name, number, type; `[]` marks what is repeated.
_SCHEMA = {
    "ValueType": [("type", 1, "int64"), ("unit", 2, "int64")],
    "Label": [("key", 1, "int64"), ("str", 2, "int64")],
    "Sample": [("location_id", 1, "uint64[]"), ("value", 2, "int64[]"), ("label", 3, "Label[]")],
    "Line": [("function_id", 1, "uint64"), ("line", 2, "int64")],
    "Location": [("id", 1, "uint64"), ("line", 4, "Line[]")],
    "Function": [
        ("id", 1, "uint64"),
        ("name", 2, "int64"),
        ("system_name", 3, "int64"),
        ("filename", 4, "int64"),
    ],
    "Profile": [
        ("sample_type", 1, "ValueType[]"),
        ("sample", 2, "Sample[]"),
        ("location", 4, "Location[]"),
        ("function", 5, "Function[]"),
        ("string_table", 6, "string[]"),
        ("duration_nanos", 10, "int64"),
        ("period_type", 11, "ValueType"),
        ("period", 12, "int64"),
        ("comment", 13, "int64[]"),
    ],
}


@dataclass(frozen=True)
class Stack:
    """One sample: (function, file, line) from the innermost frame on, and its values."""

    frames: tuple[tuple[str, str, int], ...]
    values: tuple[int, ...]
    thread: str | None

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(function for function, _, _ in self.frames)


@dataclass(frozen=True)
class ReadProfile:
    types: list[tuple[str, str]]
    stacks: list[Stack]
    duration_ns: int
    period: int
    comment: str


def read(data: bytes) -> ReadProfile:
    """The profile in `data`; unknown fields and dangling references are errors."""
    raw = _message()()
    raw.ParseFromString(data)
    unknown = type(raw)()
    unknown.CopyFrom(raw)
    unknown.DiscardUnknownFields()
    assert unknown.ByteSize() == raw.ByteSize(), "fields that the schema does not know"
    text = raw.string_table
    assert text[0] == ""
    functions = {each.id: (text[each.name], text[each.filename]) for each in raw.function}
    frames = {}
    for location in raw.location:
        [line] = location.line
        frames[location.id] = (*functions[line.function_id], line.line)
    return ReadProfile(
        types=[(text[kind.type], text[kind.unit]) for kind in raw.sample_type],
        stacks=[
            Stack(
                tuple(frames[number] for number in sample.location_id),
                tuple(sample.value),
                {text[label.key]: text[label.str] for label in sample.label}.get("thread"),
            )
            for sample in raw.sample
        ],
        duration_ns=raw.duration_nanos,
        period=raw.period,
        comment=" ".join(text[number] for number in raw.comment),
    )


@functools.cache
def _message() -> Any:
    file = descriptor_pb2.FileDescriptorProto(name="profile.proto", package="test", syntax="proto3")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field, number, kind in fields:
            base = kind.removesuffix("[]")
            made = message.field.add(name=field, number=number)
            made.label = _FIELD.LABEL_REPEATED if kind.endswith("[]") else _FIELD.LABEL_OPTIONAL
            if base in _KINDS:
                made.type = _KINDS[base]
            else:
                made.type, made.type_name = _FIELD.TYPE_MESSAGE, f".test.{base}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Profile"))
