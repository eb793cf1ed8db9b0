"""What a worker says of a task, as messages of either protocol."""

from silo.client.messages import Outcome, refresh_success
from silo.client.outcome import Cancelled, Failure, Retry, Success
from silo.wire.payload import PayloadError, encode
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2 as v1
from silo.wire.validate import PAYLOAD_BYTES_MAX
from silo.worker.held import HeldTask

RETRY = "RETRY"  # The failure that stands for a postponement where there is none.


def report_of(held: HeldTask, outcome: Outcome | Retry) -> pb.Report:
    """The report of a job's attempt.

    Raises:
        PayloadError: the result or the error data cannot be encoded, or is larger than a message may be.
    """
    report = pb.Report(task_id=held.id, shard=held.shard, tenant_id=held.tenant)
    match outcome:
        case Success(result=result):
            report.success.msgpack = _fitting(encode(result))
        case Failure(code=code, data=data, is_final=is_final):
            report.failure.code = code
            report.failure.data.msgpack = _fitting(data if isinstance(data, bytes) else encode(data))
            report.failure.is_final = is_final
        case Cancelled():
            report.cancelled.SetInParent()
        case Retry(after_s=after_s):
            report.postponed.delay_ms = round(after_s * 1000)
    return report


def _fitting(packed: bytes) -> bytes:
    # Beyond that the whole stream would break, again and again, and not only this report.
    if len(packed) > PAYLOAD_BYTES_MAX:
        raise PayloadError(f"too large: {len(packed)} bytes, at most {PAYLOAD_BYTES_MAX}")
    return packed


def refresh_succeeded(held: HeldTask, new_max_concurrency: int) -> pb.Report:
    """The report of a floating limit's new maximum.

    Raises:
        ValueError: it is no number that a limit can have.
    """
    return pb.Report(
        task_id=held.id,
        shard=held.shard,
        tenant_id=held.tenant,
        refresh_success=refresh_success(new_max_concurrency),
    )


def refresh_failed(held: HeldTask, code: str, message: str) -> pb.Report:
    """The report that there is no new maximum."""
    return pb.Report(
        task_id=held.id,
        shard=held.shard,
        tenant_id=held.tenant,
        refresh_failure=v1.RefreshFailure(code=code, message=message),
    )


def handed_back(held: HeldTask) -> pb.Report:
    """The report that a task was not begun."""
    report = pb.Report(task_id=held.id, shard=held.shard, tenant_id=held.tenant)
    report.handed_back.SetInParent()
    return report


def report_to_v1(report: pb.Report) -> v1.ReportOutcomeRequest | v1.ReportRefreshOutcomeRequest | None:
    """The nearest that `silo.v1` can say; None for a task that was not begun, whose lease has to run out.

    A final failure is a failure, and a postponement a failure `RETRY`: both follow the job's retry policy.
    """
    tenant = report.tenant_id if report.HasField("tenant_id") else None
    outcome = v1.ReportOutcomeRequest(task_id=report.task_id, tenant_id=tenant)
    match report.WhichOneof("outcome"):
        case "success":
            outcome.success.CopyFrom(report.success)
        case "failure":
            outcome.failure.code = report.failure.code
            outcome.failure.data.CopyFrom(report.failure.data)
        case "cancelled":
            outcome.cancelled.SetInParent()
        case "postponed":
            outcome.failure.code = RETRY
            outcome.failure.data.msgpack = encode({"after_ms": report.postponed.delay_ms})
        case "refresh_success":
            return v1.ReportRefreshOutcomeRequest(
                task_id=report.task_id, tenant_id=tenant, success=report.refresh_success
            )
        case "refresh_failure":
            return v1.ReportRefreshOutcomeRequest(
                task_id=report.task_id, tenant_id=tenant, failure=report.refresh_failure
            )
        case _:
            return None
    return outcome
