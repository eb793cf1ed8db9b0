"""What a child process answers, as its worker reads it."""

import pickle
from dataclasses import dataclass

from silo.worker.execution.errors import RemoteError, RemoteTraceback
from silo.worker.execution.exceptions import read_exception
from silo.worker.execution.execution import Handler
from silo.worker.execution.fitting import name_of
from silo.worker.execution.frames import Kind


@dataclass(frozen=True)
class Answer:
    """What came of a job, or of importing its handler.

    `is_spent`: the child wants to be replaced.
    """

    is_spent: bool
    value: object = None
    error: Exception | None = None

    @classmethod
    def read(cls, kind: Kind, body: memoryview, handler: Handler) -> "Answer":
        if kind is Kind.READY:
            return cls(is_spent=False)
        if kind is Kind.RAISED:
            is_spent, data, written = pickle.loads(body)
            return cls(is_spent, error=_error(data, written))
        assert kind is Kind.RETURNED
        try:
            is_spent, value = pickle.loads(body)
        except Exception as error:  # Objects bring their own ways of not being read again.
            problem = TypeError(f"what {name_of(handler)} returned cannot be read by its worker: {error}")
            problem.__cause__ = error
            return cls(is_spent=True, error=problem)
        return cls(is_spent, value)


def _error(data: dict[str, str], written: bytes | None) -> Exception:
    """What a handler raised; itself, if possible."""
    error = (written and read_exception(written)) or RemoteError(data)
    error.__cause__ = RemoteTraceback(data)
    return error
