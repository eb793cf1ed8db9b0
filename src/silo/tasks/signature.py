"""What a task takes and returns, as its function declares it."""

import inspect
import re
from collections.abc import Callable, Mapping
from functools import reduce
from operator import or_
from types import GenericAlias, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints  # An annotation may be anything.

from silo.client.outcome import Cancelled, Failure
from silo.tasks.errors import TaskArgumentError
from silo.tasks.handle import RESULT
from silo.tasks.record import Misfit, Record
from silo.wire.payload import PayloadError, encode

_UNIONS = (Union, UnionType)
_NAMED = re.compile(r"'(\w+)'$")


class Signature:
    """The parameters and the result of one function.

    Arguments travel under the names of their parameters, and only those that were given: defaults are those
    of the worker. Extra ones lie under the names of `*args` and `**kwargs`.

    Raises:
        TypeError: an annotation cannot be resolved, or its values have no plain form.
    """

    def __init__(self, task: str, function: Callable[..., Any]) -> None:
        self._task = task
        self._signature = inspect.signature(function)
        try:
            hints = get_type_hints(function, include_extras=True)
        except Exception as error:  # The edge around user code: an annotation may be any expression.
            raise TypeError(f"task {task!r}: an annotation cannot be resolved: {error}") from error
        parameters = self._signature.parameters.values()
        try:
            self._arguments = Record(
                {parameter.name: _type_of(parameter, hints) for parameter in parameters},
                optional={parameter.name for parameter in parameters if _may_be_left_out(parameter)},
            )
            self.result = Record({RESULT: _value_type(hints.get("return", Any))})
        except TypeError as error:
            raise TypeError(f"task {task!r}: {error}") from error

    def arguments_to_plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, object]:
        """The map of these arguments, checked as the worker will check it.

        Raises:
            TaskArgumentError: they do not fit.
        """
        try:
            # What is missing is found below, with the name of the parameter.
            given = self._signature.bind_partial(*args, **kwargs).arguments
        except TypeError as error:
            named = _NAMED.search(str(error))
            raise TaskArgumentError(self._task, named[1] if named else None, str(error)) from None
        try:
            plain = self._arguments.to_plain(given)
            self._arguments.from_plain(plain)
        except Misfit as misfit:
            raise TaskArgumentError(self._task, misfit.field, misfit.reason) from None
        return plain

    def blame(self, plain: Mapping[str, object], error: PayloadError) -> TaskArgumentError:
        """The error for a map that does not become MessagePack: a number or a time is out of its range."""
        for name, value in plain.items():
            try:
                encode(value)
            except PayloadError as its_error:
                return TaskArgumentError(self._task, name, str(its_error))
        return TaskArgumentError(self._task, None, str(error))

    def arguments_from_plain(self, plain: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for the function.

        Raises:
            TaskArgumentError: they do not fit.
        """
        try:
            values = self._arguments.from_plain(plain)
        except Misfit as misfit:
            raise TaskArgumentError(self._task, misfit.field, misfit.reason) from None
        bound = inspect.BoundArguments(self._signature, values)
        return bound.args, bound.kwargs

    def result_to_plain(self, value: object) -> object:
        """What is stored of a value that the function returned.

        Raises:
            TypeError: it has no plain form.
        """
        try:
            return self.result.to_plain({RESULT: value})[RESULT]
        except Misfit as misfit:
            raise TypeError(f"task {self._task!r}: the result cannot be stored: {misfit.reason}") from None


def _type_of(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> object:
    annotation = hints.get(parameter.name, Any)
    match parameter.kind:
        case inspect.Parameter.VAR_POSITIONAL:
            return GenericAlias(tuple, (annotation, ...))
        case inspect.Parameter.VAR_KEYWORD:
            return GenericAlias(dict, (str, annotation))
        case _:
            return annotation


def _may_be_left_out(parameter: inspect.Parameter) -> bool:
    return parameter.default is not parameter.empty or parameter.kind in (
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.VAR_KEYWORD,
    )


def _value_type(returned: object) -> object:
    """The type of the values among what a task returns: a `Failure` and `Cancelled` are none."""
    if returned is None:
        return type(None)
    kinds = get_args(returned) if get_origin(returned) in _UNIONS else (returned,)
    values = [kind for kind in kinds if kind not in (Failure, Cancelled)]
    return reduce(or_, values) if values else type(None)
