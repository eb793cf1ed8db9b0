"""What a request is about: its shard, tenant and job. The order of the checks is part of the protocol."""

from typing import Any  # Requests of different methods have the same fields.

from silo.model.attempt import Failure, Success
from silo.model.job import NewJob
from silo.model.view import JobView
from silo.node.node import Node
from silo.rpc.auth import Access
from silo.shard.shard import Shard
from silo.wire import convert, validate
from silo.wire.pb.silo.v1 import silo_pb2 as pb


def job_scope(node: Node, request: Any) -> tuple[Shard, str]:
    """The shard and the tenant of a job call."""
    shard = node.shard(validate.shard_id(request.shard))
    tenant = validate.job_tenant(request.tenant, tenancy_enabled=node.tenancy_enabled)
    # With tenancy off a client may hash wrongly just as well: work must not land where nobody looks.
    validate.tenant_in_range(tenant, shard=shard.shard_id, hash_range=shard.range)
    return shard, tenant


def new_job(node: Node, request: pb.EnqueueRequest) -> tuple[Shard, NewJob]:
    """The shard and the job that is to be enqueued."""
    shard, tenant = job_scope(node, request)
    validate.priority(request.priority)
    validate.metadata(request.metadata)
    validate.task_group(request.task_group, is_new=True)
    new = convert.new_job_from_pb(request, tenant=tenant)
    validate.limits(new.limits)
    validate.payload(new.payload)
    return shard, new


def worker_scope(node: Node, access: Access, request: Any) -> Shard:
    """The shard of a worker's call."""
    shard = node.shard(validate.shard_id(request.shard))
    tenant = validate.worker_tenant(request.tenant_id, tenancy_enabled=node.tenancy_enabled)
    if tenant is not None:
        validate.tenant_in_range(tenant, shard=shard.shard_id, hash_range=shard.range)
    task = shard.leased(request.task_id)
    if task is not None:  # Otherwise the lease is gone, and that is what the caller will hear.
        access.check_task(task.task_group)
    return shard


def view_bytes(view: JobView) -> int:
    """About how many bytes the parts of a job take that can be large."""
    size = len(view.job.payload)
    for outcome in (view.last_outcome, *(attempt.outcome for attempt in view.attempts)):
        match outcome:
            case Success(result=data) | Failure(data=data):
                size += len(data)
    return size
