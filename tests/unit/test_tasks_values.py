"""Arguments and results of tasks travel as plain values and come back as declared, or are refused."""

import datetime as dt
import decimal
import enum
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypedDict

import annotated_types
import msgspec
import pydantic
import pytest

from silo import Cancelled, Failure, PayloadError
from silo.tasks.errors import TaskArgumentError
from silo.tasks.signature import Signature
from silo.wire.payload import decode, encode

SECRET = "hunter2"


class Colour(enum.Enum):
    RED = "red"


class Size(NamedTuple):
    width: int
    height: int


class Address(TypedDict):
    city: str


class Tag(pydantic.BaseModel):
    text: str = pydantic.Field(alias="t", min_length=2)
    colour: Colour = Colour.RED
    at: dt.datetime | None = None


@dataclass
class Attachment:
    name: str
    tags: list[Tag] = field(default_factory=list)


class Point(msgspec.Struct):
    x: int
    parent: "Point | None" = None


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    x: int = 0


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    name: str = "Rex"


Pet = Annotated[Cat | Dog, pydantic.Field(discriminator="kind")]


def there_and_back(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What the function returns when a worker calls it with what was enqueued."""
    signature = Signature("t", function)
    sent = encode(signature.arguments_to_plain(args, kwargs))
    got_args, got_kwargs = signature.arguments_from_plain(decode(sent, field="payload"))
    return function(*got_args, **got_kwargs)


def wrong(function: Callable[..., Any], *args: Any, **kwargs: Any) -> TaskArgumentError:
    with pytest.raises(TaskArgumentError) as caught:
        Signature("app.t", function).arguments_to_plain(args, kwargs)
    assert caught.value.task == "app.t"
    assert "'app.t'" in str(caught.value)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    return caught.value


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 2**63),
        (float, 1.5),
        (str, "é"),
        (bool, True),
        (bytes, b"\x00\xff"),
        (bytearray, bytearray(b"x")),
        (None, None),
        (list[int], [1, 2]),
        (tuple[int, str], (1, "a")),
        (set[str], {"a"}),
        (dict[int, str], {1: "a"}),
        (dict[str, Point], {"a": Point(1, Point(2))}),
        (int | str | None, "a"),
        (Literal["a", "b"], "a"),
        (dt.datetime, dt.datetime(1815, 12, 10, 1, 2, 3, 4, tzinfo=dt.UTC)),
        (dt.date, dt.date(1815, 12, 10)),
        (dt.timedelta, dt.timedelta(days=1, microseconds=5)),
        (uuid.UUID, uuid.UUID(int=7)),
        (decimal.Decimal, decimal.Decimal("1.10")),
        (Colour, Colour.RED),
        (Size, Size(1, 2)),
        (Address, {"city": "Turin"}),
        (Attachment, Attachment("a", [Tag(t="ab", at=dt.datetime(2024, 5, 1))])),
        (list[Attachment] | None, [Attachment("a")]),
        (Point, Point(1, Point(2))),
        (Tag, Tag(t="ab")),
        (Tag | None, None),
        (dict[str, list[Tag]], {"x": [Tag(t="ab")]}),
        (Pet, Dog(name="Bo")),
        (list[Cat | Dog], [Cat(), Dog()]),
        (Annotated[int, pydantic.Field(gt=0)], 1),
        (Annotated[int, annotated_types.Gt(0)], 1),
        (Annotated[int, msgspec.Meta(gt=0)], 1),
        (tuple[Tag, Point], (Tag(t="ab"), Point(1))),
        (Any, {"a": [1, None, b"x"]}),
        (object, [1]),
    ],
)
def test_a_value_comes_back_as_it_went(annotation: Any, value: object) -> None:
    def function(value: Any) -> Any:
        return value

    function.__annotations__["value"] = annotation
    back = there_and_back(function, value)
    assert back == value
    assert type(back) is type(value)


def test_arguments_travel_by_name_and_defaults_are_those_of_the_worker() -> None:
    def function(to: str, n: int = 3, *, subject: str, tags: list[str] | None = None) -> Any:
        return to, n, subject, tags

    signature = Signature("t", function)
    plain = signature.arguments_to_plain(("ada",), {"subject": "hi"})
    assert plain == {"to": "ada", "subject": "hi"}
    assert there_and_back(function, "ada", subject="hi") == ("ada", 3, "hi", None)
    assert there_and_back(function, subject="hi", to="ada", n=4) == ("ada", 4, "hi", None)


def test_positional_only_and_extra_arguments_find_their_places() -> None:
    def function(a: int, b: int = 2, /, *rest: Size, key: str = "k", **others: Point) -> Any:
        return a, b, rest, key, others

    assert there_and_back(function, 1) == (1, 2, (), "k", {})
    assert there_and_back(function, 1, 3, Size(1, 2), key="x", p=Point(1)) == (
        1, 3, (Size(1, 2),), "x", {"p": Point(1)},
    )  # fmt: skip


def test_without_annotations_arguments_are_plain_values() -> None:
    def function(a, b=()):  # type: ignore[no-untyped-def]
        return a, b

    assert there_and_back(function, Attachment("x"), (1,)) == ({"name": "x", "tags": []}, [1])


def takes(to: str, *, n: int = 1, files: list[Attachment] | None = None, tag: Tag | None = None) -> None:
    pass


def takes_more(
    *,
    colour: Colour = Colour.RED,
    pet: Pet | None = None,
    pets: dict[str, Pet] | None = None,
    at: dt.datetime | None = None,
    big: int = 0,
    anything: Any = None,
    point: Point | None = None,
    strict: Strict | None = None,
) -> None:
    pass


def loose(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    ("arguments", "parameter", "text"),
    [
        ({}, "to", "task 'app.t', parameter 'to': it is missing"),
        ({"to": 5}, "to", "task 'app.t', parameter 'to': Expected `str`, got `int` - at `$.to`"),
        ({"to": None}, "to", "Expected `str`, got `null`"),
        ({"to": "a", "n": "1"}, "n", "Expected `int`, got `str` - at `$.n`"),
        ({"to": "a", "nn": 1}, "nn", "got an unexpected keyword argument 'nn'"),
        ({"to": "a", "files": [Attachment(5)]}, "files", "at `$.files[0].name`"),  # type: ignore[arg-type]
        ({"to": "a", "files": Attachment("x")}, "files", "Expected `array | null`, got `object`"),
        ({"to": "a", "files": [{SECRET: "x"}]}, "files", "missing required field `name` - at `$.files[0]`"),
        ({"to": "a", "tag": {"t": SECRET[:1]}}, "tag", "at least 2 characters - at `$.tag.t`"),
        ({"to": "a", "tag": {}}, "tag", "Field required - at `$.tag.t`"),
        ({"to": {SECRET: SECRET}}, "to", "Expected `str`, got `object`"),
        ({"to": Path(SECRET)}, "to", "a pathlib.PosixPath has no form in MessagePack"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(
    arguments: dict[str, Any], parameter: str, text: str
) -> None:
    error = wrong(takes, **arguments)
    assert error.parameter == parameter
    assert text in str(error)


@pytest.mark.parametrize(
    ("arguments", "parameter", "text"),
    [
        ({"colour": SECRET}, "colour", "not one of the values that are allowed - at `$.colour`"),
        ({"pet": {"kind": SECRET}}, "pet", "unknown tag - at `$.pet`"),
        ({"pet": {SECRET: 1}}, "pet", "Unable to extract tag using discriminator 'kind' - at `$.pet`"),
        ({"pets": {SECRET: {"kind": "dog", "name": 1}}}, "pets", "at `$.pets[...][...].name`"),
        ({"strict": {SECRET: 1}}, "strict", "Object contains an unknown field - at `$.strict`"),
        ({"pets": {SECRET: object()}}, "pets", "Unable to serialize unknown type"),
    ],
)
def test_no_value_and_no_key_of_a_map_appears_in_an_error(
    arguments: dict[str, Any], parameter: str, text: str
) -> None:
    error = wrong(takes_more, **arguments)
    assert error.parameter == parameter
    assert text in str(error)


def test_too_many_arguments_are_refused() -> None:
    assert "too many positional arguments" in str(wrong(takes, "a", 1))
    assert wrong(takes, "a", to="b").parameter == "to"


@pytest.mark.parametrize(
    ("parameter", "value", "text"),
    [
        ("at", dt.datetime(2024, 1, 1), "a datetime without a time zone"),
        ("big", 2**64, "cannot encode builtins.int"),
        ("anything", {"a": [2**64]}, "cannot encode builtins.int"),
    ],
)
def test_what_messagepack_cannot_hold_is_blamed_on_its_parameter(
    parameter: str, value: object, text: str
) -> None:
    signature = Signature("app.t", takes_more)
    plain = signature.arguments_to_plain((), {parameter: value})
    with pytest.raises(PayloadError) as caught:
        encode(plain)
    error = signature.blame(plain, caught.value)
    assert error.parameter == parameter
    assert text in str(error)


def test_a_worker_checks_again_what_it_gets() -> None:
    signature = Signature("app.t", takes)
    for payload, parameter in [
        ({"n": 1}, "to"),
        ({"to": 1}, "to"),
        ({"to": "a", "x": 1}, None),
        ({"to": "a", "x - at `$.to`": 1}, None),
        ([1], None),
        (None, None),
    ]:
        with pytest.raises(TaskArgumentError) as caught:
            signature.arguments_from_plain(payload)
        assert caught.value.parameter == parameter


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (Path, "pathlib.PosixPath|pathlib.Path has no form in MessagePack; use plain values"),
        (list[Path], "'value': pathlib.Path has no form"),
        (Callable[[], int], "'value': collections.abc.Callable has no form"),
        (Attachment | Point | Size | Address, "Type unions may not contain"),
        ("Nowhere", "an annotation cannot be resolved: name 'Nowhere' is not defined"),
    ],
)
def test_a_type_without_a_plain_form_is_refused_with_task_and_parameter(annotation: Any, text: str) -> None:
    def function(value: Any) -> None:
        pass

    function.__annotations__["value"] = annotation
    with pytest.raises(TypeError, match=rf"task 'app.t': .*{text}"):
        Signature("app.t", function)


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Attachment, Attachment("a", [Tag(t="ab")])),
        (Attachment | Failure, Attachment("a")),
        (Attachment | Failure | Cancelled | None, None),
        (Failure, None),
        (None, None),
        (Pet, Cat()),
        (list[Cat | Dog] | Failure, [Dog()]),
        (tuple[int, ...], (1, 2)),
        (dict[str, Any], {"a": 1}),
    ],
)
def test_a_result_comes_back_as_it_was_returned(annotation: Any, value: object) -> None:
    def function() -> Any:
        pass

    function.__annotations__["return"] = annotation
    signature = Signature("t", function)
    stored = decode(encode(signature.result_to_plain(value)), field="result")
    assert signature.result.from_plain({"result": stored}) == {"result": value}


def test_a_result_without_a_plain_form_is_an_error_that_names_the_task() -> None:
    with pytest.raises(
        TypeError, match=r"task 't': the result cannot be stored: a pathlib\.PosixPath has no"
    ):
        Signature("t", loose).result_to_plain(Path("x"))
