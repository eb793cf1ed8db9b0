"""Exceptions as bytes, so that they can be caught in another process by their class."""

import io
import pickle
import sys
from contextlib import suppress
from typing import Any  # The class behind a name may be any.


def write_exception(error: BaseException) -> bytes | None:
    """The exception in bytes; None if it would not come out of them the same.

    By itself an exception is made again by a call of its class with its `args`. Many a class takes other
    arguments than it passes on, so what does not work is tried again without its constructor.
    """
    for form in (error, _State(error)):
        with suppress(Exception):  # Classes of the application do whatever they like.
            data = pickle.dumps(form, pickle.HIGHEST_PROTOCOL)
            again = pickle.loads(data)
            if type(again) is type(error) and str(again) == str(error):
                return data
    return None


def read_exception(data: bytes) -> Exception | None:
    """What was written; None if its class is not imported here, so that nobody can look for it."""
    with suppress(Exception):  # Classes of the application do whatever they like.
        error = _Unpickler(io.BytesIO(data)).load()
        if isinstance(error, Exception):
            return error
    return None


class _State:
    """Pickles as what it holds, without its constructor."""

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def __reduce__(self) -> tuple[object, ...]:
        return _from_state, (type(self._error), self._error.args, vars(self._error))


def _from_state(
    kind: type[BaseException], args: tuple[object, ...], attributes: dict[str, object]
) -> BaseException:
    error = kind.__new__(kind, *args)
    vars(error).update(attributes)
    return error


class _Unpickler(pickle.Unpickler):
    """Imports nothing: that could take seconds, and hold up the event loop."""

    def find_class(self, module_name: str, name: str) -> Any:
        if module_name not in sys.modules:
            raise pickle.UnpicklingError(f"{module_name} is not imported")
        return super().find_class(module_name, name)
