"""Admit a job."""

from silo.engine.schedule import pending_at
from silo.model.change import Change
from silo.model.job import Job, JobState, JobStatus, NewJob, task_bytes


def admit(new: NewJob, *, job_id: str, now_ms: int, priority_step_ms: int) -> Change:
    """The job as Scheduled, due at its start time, its limits ahead of it. Its id must be free."""
    start_at_ms = new.start_at_ms if new.start_at_ms > 0 else now_ms
    state = JobState(
        tenant=new.tenant,
        job_id=job_id,
        task_group=new.task_group,
        priority=new.priority,
        retry_policy=new.retry_policy,
        status=JobStatus.SCHEDULED,
        changed_at_ms=now_ms,
        attempts_ended=0,
        relative_attempt_number=1,
        payload_bytes=task_bytes(job_id, new.payload, new.metadata, new.limits),
        next_start_ms=start_at_ms,
        pending=pending_at(
            start_at_ms, new.priority, new.limits, now_ms=now_ms, priority_step_ms=priority_step_ms
        ),
        limits=new.limits,
    )
    job = Job(
        tenant=new.tenant,
        id=job_id,
        enqueue_time_ms=new.start_at_ms,
        created_at_ms=now_ms,
        payload=new.payload,
        metadata=new.metadata,
    )
    return Change(before=None, after=state, job=job)
