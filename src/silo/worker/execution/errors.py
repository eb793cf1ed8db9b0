"""How the run of a handler fails, other than by what the handler raises."""

from collections.abc import Mapping

from silo.errors import SiloError


class HandlerTimeout(SiloError, TimeoutError):
    """The handler did not end within its time."""

    def __init__(self, timeout_s: float) -> None:
        super().__init__(f"the handler did not end within {timeout_s:g} s")
        self.timeout_s = timeout_s


class HandlerCrashed(SiloError):
    """The handler neither returned nor raised an error: its process died, or it left its thread.

    `exit_code`: of its process; below zero it is the number of the signal that ended it.
    """

    def __init__(self, message: str, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class RemoteTraceback(Exception):
    """Where an error was raised in another process. It is the cause of every error that came from there.

    `data`: what is stored of the error, as `error_data` saw it in that process.
    """

    def __init__(self, data: Mapping[str, str]) -> None:
        super().__init__(data["stack"])
        self.data = data

    def __str__(self) -> str:
        return f"\n{self.data['stack']}"


class RemoteError(Exception):
    """Stands for an error of another process that could not come here itself.

    Most come as they are, if the worker has imported their class.
    """

    def __init__(self, data: Mapping[str, str]) -> None:
        super().__init__(f"{data['name']}: {data['message']}")
        self.name = data["name"]
        self.message = data["message"]
        self.code = data.get("code")
