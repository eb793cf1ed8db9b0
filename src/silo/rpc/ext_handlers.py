"""The calls of `silo.ext.v1.SiloExt`: check, convert, call, convert."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any  # grpc is untyped: contexts are Any here.

from silo.errors import InvalidRequest, SiloError
from silo.model.job import NewJob
from silo.node.node import Node
from silo.rpc.answering import answering, status_of
from silo.rpc.auth import EVERYTHING, Access
from silo.rpc.scope import job_scope, new_job
from silo.rpc.watching import WatchStream, ended_job
from silo.rpc.work import WorkStream
from silo.shard.shard import Shard
from silo.wire import convert
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

SERVICE = pb.DESCRIPTOR.services_by_name["SiloExt"]

JOBS_MAX = 10_000
_JOBS_AT_ONCE = 256  # Looked at before others have their turn.


class SiloExtServicer:
    """Answers for one node, to callers with one access."""

    def __init__(self, node: Node, access: Access = EVERYTHING) -> None:
        self._node = node
        self._access = access

    @answering
    async def EnqueueMany(self, request: pb.EnqueueManyRequest, context: Any) -> pb.EnqueueManyResponse:
        if len(request.jobs) > JOBS_MAX:
            raise InvalidRequest(f"too many jobs in one call: {len(request.jobs)}, at most {JOBS_MAX}")
        answers: dict[int, str | SiloError] = {}
        groups: dict[Shard, dict[int, NewJob]] = {}
        for number, job in enumerate(request.jobs):
            if number % _JOBS_AT_ONCE == 0:
                await asyncio.sleep(0)
            try:
                self._access.check_call("Enqueue", job)
                shard, new = new_job(self._node, job)
            except SiloError as refusal:
                refusal.__traceback__ = None  # It has the request in it.
                answers[number] = refusal
            else:
                groups.setdefault(shard, {})[number] = new
        done = await asyncio.gather(*(_enqueued(shard, jobs) for shard, jobs in groups.items()))
        for group in done:
            answers |= group
        response = pb.EnqueueManyResponse()
        for number in range(len(request.jobs)):
            _add_result(response, answers[number])
        return response

    @answering
    async def Work(self, requests: AsyncIterator[pb.WorkRequest], context: Any) -> None:
        await WorkStream(self._node, self._access, context).run(requests)

    @answering
    async def WatchJob(self, request: pb.WatchJobRequest, context: Any) -> pb.WatchJobResponse:
        shard, tenant = job_scope(self._node, request)
        view = await ended_job(self._node, shard, tenant=tenant, job_id=request.id)
        return pb.WatchJobResponse(result=convert.job_result_to_pb(view))

    @answering
    async def WatchJobs(self, requests: AsyncIterator[pb.WatchJobsRequest], context: Any) -> None:
        await WatchStream(self._node, self._access, context).run(requests)


async def _enqueued(shard: Shard, jobs: dict[int, NewJob]) -> dict[int, str | SiloError]:
    try:
        answers = await shard.enqueue_many(list(jobs.values()))
    except SiloError as error:
        return dict.fromkeys(jobs, error)
    return dict(zip(jobs, answers, strict=True))


def _add_result(response: pb.EnqueueManyResponse, answer: str | SiloError) -> None:
    if isinstance(answer, SiloError):
        response.results.add(error=status_of(answer))
    else:
        response.results.add(id=answer)
