"""Named values of declared types: as the plain map that travels, and back.

What a type means is decided here, the same way on both sides. An annotation that names types of pydantic is
pydantic's to judge; any other one is msgspec's, with the pydantic models inside it handed over. A value is
good if the map made of it can be made into values again: so whoever enqueues checks exactly what the worker
will do.
"""

import datetime as dt
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any  # A value is whatever its annotation says.

import msgspec

from silo.tasks.pydantic_models import Adapter, adapter_for, is_model, model_from_plain, model_to_plain

# MessagePack has these itself; everything else becomes maps, arrays, numbers and text.
_PASSED_ON = (bytes, bytearray, memoryview, dt.datetime)
_NO_VALUE = object()
_SAID = re.compile(r"(?P<reason>.*?)( - at (?P<place>(`key` in )?`\$[^`]*`))?", re.DOTALL)
_QUOTES = re.compile(r"Invalid (enum )?value\b")  # Texts of msgspec that go on with the value.
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_FIELD = re.compile(r"\$\.(\w+)")


class Misfit(Exception):
    """A value does not fit. `reason` says how, and never has the value; `field` is None if it is no one's."""

    def __init__(self, field: str | None, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason


class Record:
    """A set of fields, each with a name and a type.

    Args:
        types: the annotation of each field.
        optional: fields that may be left out.

    Raises:
        TypeError: a type has no plain form; the text names it and its field.
    """

    def __init__(self, types: Mapping[str, object], *, optional: Collection[str] = ()) -> None:
        self._adapters: dict[str, Adapter] = {}
        fields: list[tuple[str, Any, Any]] = []
        for name, annotation in types.items():
            adapter = adapter_for(annotation)
            if adapter is not None:
                self._adapters[name] = adapter
            else:
                _check(name, annotation)
            default = _NO_VALUE if name in optional else msgspec.NODEFAULT
            fields.append((name, annotation if adapter is None else Any, default))
        self._struct = msgspec.defstruct("Record", fields, kw_only=True, forbid_unknown_fields=True)

    def to_plain(self, values: Mapping[str, object]) -> dict[str, object]:
        """The map of these values.

        Raises:
            Misfit: one of them has no plain form. Whether they fit, only `from_plain` finds out.
        """
        return {name: self._field_to_plain(name, value) for name, value in values.items()}

    def _field_to_plain(self, name: str, value: object) -> object:
        adapter = self._adapters.get(name)
        try:
            return _to_plain(value) if adapter is None else adapter.to_plain(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise Misfit(name, str(error)) from None

    def from_plain(self, plain: object) -> dict[str, Any]:
        """The values that `to_plain` was given; fields that were left out are left out.

        Raises:
            Misfit: one does not fit its type, is missing or is not known.
        """
        try:
            record = msgspec.convert(plain, self._struct, dec_hook=_from_plain)
        except msgspec.ValidationError as error:
            raise _misfit(str(error)) from None  # The text of the cause has the value.
        values = {
            name: value
            for name in self._struct.__struct_fields__
            if (value := getattr(record, name)) is not _NO_VALUE
        }
        for name, adapter in self._adapters.items():
            if name in values:
                try:
                    values[name] = adapter.from_plain(values[name])
                except ValueError as error:
                    raise Misfit(name, str(error).replace("`$", f"`$.{name}", 1)) from None
        return values


def _to_plain(value: object) -> object:
    return msgspec.to_builtins(value, builtin_types=_PASSED_ON, enc_hook=_encode)


def _encode(value: object) -> object:
    if is_model(type(value)):
        return model_to_plain(value)
    kind = type(value)
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} has no form in MessagePack")


def _from_plain(kind: Any, plain: object) -> object:
    return plain if kind is object else model_from_plain(kind, plain)  # `_check` let nothing else pass.


def _misfit(text: str) -> Misfit:
    """What msgspec says, without the values that it quotes. Names of unknown fields may be data as well."""
    said = _SAID.fullmatch(text)
    assert said is not None  # It fits everything.
    reason, place = said["reason"], said["place"]
    if place is None and (missing := _MISSING.fullmatch(reason)):
        return Misfit(missing[1], "it is missing")
    if unknown := _UNKNOWN.fullmatch(reason):
        if place is None:
            return Misfit(None, f"there is no parameter {unknown[1]!r}")
        reason = "Object contains an unknown field"
    elif _QUOTES.match(reason):
        reason = "not one of the values that are allowed"
    field = _FIELD.search(place or "")
    return Misfit(field[1] if field else None, reason if place is None else f"{reason} - at {place}")


def _check(name: str, annotation: object) -> None:
    """Refuse what nobody could rebuild, before the first value is there."""
    try:
        described = msgspec.inspect.type_info(annotation)
    except TypeError as error:
        raise TypeError(f"{name!r}: {error}") from error
    for kind in _classes(described, set()):
        if kind is not object and not is_model(kind):
            raise TypeError(
                f"{name!r}: {kind.__module__}.{kind.__qualname__} has no form in MessagePack; "
                "use plain values, dataclasses, msgspec structs or pydantic models"
            )


def _classes(described: object, seen: set[int]) -> Iterator[type]:
    """The classes in a type that msgspec does not know."""
    if isinstance(described, msgspec.inspect.CustomType):
        yield described.cls
    elif isinstance(described, tuple):
        for part in described:
            yield from _classes(part, seen)
    elif isinstance(described, msgspec.Struct) and id(described) not in seen:
        seen.add(id(described))  # A dataclass may refer to itself.
        yield from _classes(msgspec.structs.astuple(described), seen)
