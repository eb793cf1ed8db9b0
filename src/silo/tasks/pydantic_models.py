"""Pydantic models as plain values and back, where an application uses them. Nothing here imports pydantic."""

import sys
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Annotated, Any, get_args, get_origin  # Pydantic may be missing: its objects are untyped.

import msgspec

_MARKS = ("__get_pydantic_core_schema__", "__pydantic_validator__")
_DUMP = {"mode": "json", "by_alias": True, "round_trip": True}  # What validation takes back as it is.


def is_model(kind: object) -> bool:
    """Whether this class is a pydantic model."""
    pydantic = _pydantic()
    return pydantic is not None and isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def model_to_plain(model: Any) -> object:
    """The model, for whose class `is_model` holds, as JSON has it.

    Raises:
        ValueError: a field holds what it should not.
    """
    return model.model_dump(**_DUMP)


def model_from_plain(kind: Any, plain: object) -> object:
    """The model that `model_to_plain` was given.

    Raises:
        ValueError: the plain value does not fit; the text says where, without the value.
    """
    pydantic = _pydantic()
    assert pydantic is not None  # `is_model(kind)` holds.
    try:
        return kind.model_validate_json(msgspec.json.encode(plain))
    except pydantic.ValidationError as error:
        raise ValueError(_explain(error, kind.model_json_schema)) from None


class Adapter:
    """Values of any type that pydantic can hold."""

    def __init__(self, type_adapter: Any) -> None:
        self._type_adapter = type_adapter

    def to_plain(self, value: object) -> object:
        """The value as JSON has it. One of another type may pass: `from_plain` finds out.

        Raises:
            ValueError: it has no such form.
        """
        return self._type_adapter.dump_python(value, warnings=False, **_DUMP)

    def from_plain(self, plain: object) -> object:
        """The value that `to_plain` was given.

        Raises:
            ValueError: the plain value does not fit; the text says where, without the value.
        """
        pydantic = _pydantic()
        assert pydantic is not None  # It made the adapter.
        try:
            return self._type_adapter.validate_json(msgspec.json.encode(plain))
        except pydantic.ValidationError as error:
            raise ValueError(_explain(error, self._type_adapter.json_schema)) from None


def adapter_for(annotation: object) -> Adapter | None:
    """An adapter, if the annotation names types or constraints of pydantic and it can hold all of them."""
    pydantic = _pydantic()
    if pydantic is None or not _names_pydantic(annotation):
        return None
    try:
        return Adapter(pydantic.TypeAdapter(annotation))
    except pydantic.errors.PydanticSchemaGenerationError:
        return None  # For example a msgspec struct beside a model.


def _pydantic() -> ModuleType | None:
    return sys.modules.get("pydantic")


def _names_pydantic(annotation: object) -> bool:
    if isinstance(annotation, type):
        return any(hasattr(annotation, mark) for mark in _MARKS)
    inner = get_args(annotation)
    if get_origin(annotation) is Annotated:
        constraints = (type(constraint) for constraint in inner[1:])
        if any(kind.__module__.startswith(("pydantic", "annotated_types")) for kind in constraints):
            return True
        inner = inner[:1]
    return any(map(_names_pydantic, inner))


def _explain(error: Any, json_schema: Any) -> str:
    """The first thing that is wrong. Keys of maps are left out, since they are data as well."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    try:
        known = set(_properties(json_schema()))
    except Exception:  # There are types without a schema: then no name is known to be no data.
        known = set()
    path = "".join(
        f"[{step}]" if isinstance(step, int) else f".{step}" if step in known else "[...]"
        for step in first["loc"]
    )
    # This one quotes what it was given.
    message = "unknown tag" if first["type"] == "union_tag_invalid" else first["msg"]
    return f"{message} - at `${path}`"


def _properties(schema: object) -> Iterable[str]:
    if isinstance(schema, Mapping):
        properties = schema.get("properties")
        if isinstance(properties, Mapping):
            yield from properties
        schema = list(schema.values())
    if isinstance(schema, list):
        for part in schema:
            yield from _properties(part)
