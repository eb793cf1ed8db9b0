"""Importing: jobs that began elsewhere go on here."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal  # Payloads and results are the application's.

from silo.client.limits import Limit, limits_to_pb
from silo.client.messages import job_status, retry_policy_to_pb
from silo.client.router import Call, Router
from silo.client.types import ATTEMPT_STATUSES, JobStatus, RetryPolicy
from silo.errors import SHARD_NOT_FOUND
from silo.wire.payload import encode
from silo.wire.pb.silo.v1 import silo_pb2 as pb


@dataclass(frozen=True, kw_only=True)
class ImportAttempt:
    """A run of a job that ended elsewhere. Times are epoch milliseconds."""

    status: Literal["Succeeded", "Failed", "Cancelled"]
    started_at_ms: int
    finished_at_ms: int
    result: Any = None  # When it succeeded.
    error_code: str | None = None  # When it failed.
    error_data: Any = None


@dataclass(frozen=True, kw_only=True)
class ImportJob:
    """A job with the attempts that it had elsewhere, oldest first.

    All attempts but the last failed. The last one and the retry policy decide what the job is now: it has
    ended, or waits for its next attempt. Times are epoch milliseconds; 0 means now.
    """

    id: str
    payload: Any
    task_group: str
    priority: int = 50
    enqueue_time_ms: int = 0
    start_at_ms: int = 0  # For a job that still has to run.
    retry_policy: RetryPolicy | None = None
    limits: Sequence[Limit] = ()
    tenant: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    attempts: Sequence[ImportAttempt] = ()


@dataclass(frozen=True, kw_only=True)
class ImportJobResult:
    """What became of one job: imported, durably, with its status; or not, with the reason."""

    id: str
    success: bool
    status: JobStatus
    error: str | None = None


class _Pending:
    """One job on its way."""

    def __init__(self, job: ImportJob) -> None:
        self.tenant = job.tenant or None
        self.request = _job_to_pb(job)
        self.result = ImportJobResult(
            id=job.id,
            success=False,
            status="Scheduled",
            error=f"No result returned from server for job {job.id}",
        )

    @property
    def found_no_shard(self) -> bool:
        return SHARD_NOT_FOUND in (self.result.error or "")

    def note(self, result: pb.ImportJobResult | None) -> None:
        """Take the result at this job's place. One that names another job tells nothing about this one."""
        if result is None or result.id not in ("", self.request.id):
            return
        self.result = ImportJobResult(
            id=self.request.id,  # Some servers leave it out when a whole group failed.
            success=result.success,
            status=job_status(result.status),
            error=result.error if result.HasField("error") else None,
        )


async def import_jobs(router: Router, jobs: Iterable[ImportJob]) -> list[ImportJobResult]:
    """The results, in the order of the jobs. See `SiloGRPCClient.import_jobs`."""
    all_pending = [_Pending(job) for job in jobs]  # Encoded before anything is sent.
    groups: dict[str | None, list[_Pending]] = {}
    for pending in all_pending:
        groups.setdefault(pending.tenant, []).append(pending)
    for tenant, group in groups.items():
        await _import_group(router, tenant, group)
    return [pending.result for pending in all_pending]


async def _import_group(router: Router, tenant: str | None, group: list[_Pending]) -> None:
    """Import the jobs of one tenant; those that found no shard are sent again, to where it is now."""
    backoff = router.backoff()
    while True:
        request = pb.ImportJobsRequest(jobs=[pending.request for pending in group])
        response = await router.send(Call("ImportJobs", request, tenant=tenant, parts=request.jobs))
        for pending, result in zip_longest(group, response.results[: len(group)]):
            pending.note(result)
        group = [pending for pending in group if pending.found_no_shard]
        if not group or not await router.looked_again(backoff):
            return


def _job_to_pb(job: ImportJob) -> pb.ImportJobRequest:
    """The job; its shard is filled in when it is sent.

    Raises:
        PayloadError: its payload, or what an attempt left behind, cannot be encoded.
        ValueError: a number is out of the range that the wire has for it.
        TypeError: a value is of another type.
    """
    return pb.ImportJobRequest(
        id=job.id,
        priority=job.priority,
        enqueue_time_ms=job.enqueue_time_ms,
        start_at_ms=job.start_at_ms,
        retry_policy=None if job.retry_policy is None else retry_policy_to_pb(job.retry_policy),
        payload=pb.SerializedBytes(msgpack=encode(job.payload)),
        limits=limits_to_pb(job.limits),
        tenant=job.tenant or None,
        metadata=job.metadata,
        task_group=job.task_group,
        attempts=map(_attempt_to_pb, job.attempts),
    )


def _attempt_to_pb(attempt: ImportAttempt) -> pb.ImportAttempt:
    def value(plain: Any) -> pb.SerializedBytes | None:
        return None if plain is None else pb.SerializedBytes(msgpack=encode(plain))

    return pb.ImportAttempt(
        status=pb.AttemptStatus.Name(ATTEMPT_STATUSES.index(attempt.status)),
        started_at_ms=attempt.started_at_ms,
        finished_at_ms=attempt.finished_at_ms,
        result=value(attempt.result),
        error_code=attempt.error_code,
        error_data=value(attempt.error_data),
    )
