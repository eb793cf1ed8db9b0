"""What goes wrong between a typed call and its task."""

from silo.errors import ErrorKind, SiloError


class TaskArgumentError(SiloError):
    """Arguments do not fit the parameters of a task; nothing was sent.

    The text names task, parameter and what is wrong, and never has the value.
    `parameter` is None when no single one is to blame.
    """

    kind = ErrorKind.INVALID

    def __init__(self, task: str, parameter: str | None, reason: str) -> None:
        place = "" if parameter is None else f", parameter {parameter!r}"
        super().__init__(f"task {task!r}{place}: {reason}")
        self.task = task
        self.parameter = parameter
        self.reason = reason


class TaskResultError(SiloError):
    """A stored result is not of the type that the task returns, perhaps because that was changed since.

    `handle.job()` has the result as it is.
    """

    kind = ErrorKind.DATA

    def __init__(self, task: str, job_id: str, reason: str) -> None:
        super().__init__(f"task {task!r}, job {job_id!r}: the result does not fit: {reason}")
        self.task = task
        self.job_id = job_id
        self.reason = reason
