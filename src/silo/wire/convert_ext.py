"""Between the messages of `silo.ext.v1` and the values of the model."""

from collections.abc import Iterable

from silo.errors import InvalidRequest
from silo.model.attempt import Cancelled, Failure, FinalFailure, HandedBack, Postponed, Report, Success
from silo.model.floating import FloatingState, RefreshFailed, RefreshOutcome, RefreshSucceeded
from silo.model.task import Leased
from silo.wire import convert
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

_DELAY_MS_MAX = 2**62


def report_from_pb(report: pb.Report) -> Report | RefreshOutcome:
    """What was reported.

    Raises:
        InvalidRequest: nothing is set.
    """
    match report.WhichOneof("outcome"):
        case "success":
            return Success(report.success.msgpack)
        case "failure":
            failure = Failure(report.failure.code, report.failure.data.msgpack)
            return FinalFailure(failure) if report.failure.is_final else failure
        case "cancelled":
            return Cancelled()
        case "postponed":
            return Postponed(min(report.postponed.delay_ms, _DELAY_MS_MAX))
        case "handed_back":
            return HandedBack()
        case "refresh_success":
            return RefreshSucceeded(report.refresh_success.new_max_concurrency)
        case "refresh_failure":
            return RefreshFailed(report.refresh_failure.code, report.refresh_failure.message)
        case _:
            raise InvalidRequest("missing outcome")


def add_tasks(response: pb.WorkResponse, tasks: Iterable[tuple[str, Leased]]) -> None:
    """Put tasks, each with the id of its shard, into a message."""
    for shard, task in tasks:
        if isinstance(task, FloatingState):
            response.refresh_tasks.append(convert.refresh_task_to_pb(task, shard=shard))
        else:
            convert.task_to_pb(task, shard=shard, make=response.tasks.add)
