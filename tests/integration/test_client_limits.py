"""Limits are given with a job, and seen wherever the job is seen."""

from typing import Any

import pytest

from silo import (
    ConcurrencyLimit,
    FloatingConcurrencyLimit,
    GubernatorAlgorithm,
    Limit,
    RateLimit,
    RateLimitRetryPolicy,
)
from silo.client.limits import limits_to_pb
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.fake_silo import GROUP, SHARD, a_client, a_task, fake_silo
from tests.integration.real_silo import real_silo

POLICY = RateLimitRetryPolicy(initial_backoff_ms=1, max_backoff_ms=2)
LIMITS: list[Limit] = [
    RateLimit(
        name="api",
        unique_key="u",
        limit=10,
        duration_ms=1000,
        algorithm=GubernatorAlgorithm.LEAKY_BUCKET,
        retry_policy=POLICY,
    ),
    ConcurrencyLimit(key="c", max_concurrency=2),
    FloatingConcurrencyLimit(
        key="f", default_max_concurrency=5, refresh_interval_ms=60_000, metadata={"api": "mail"}
    ),
]


async def test_limits_are_sent_in_their_order() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.enqueue(payload=1, task_group=GROUP, limits=LIMITS)
        await client.enqueue(payload=1, task_group=GROUP)
        limited, free = server.calls("Enqueue")
        assert [limit.WhichOneof("limit") for limit in limited.limits] == [
            "rate_limit",
            "concurrency",
            "floating_concurrency",
        ]
        assert list(limited.limits) == limits_to_pb(LIMITS)
        assert not free.limits


async def test_a_limit_that_does_not_fit_into_a_message_is_refused_before_anything_is_sent() -> None:
    async with fake_silo() as server, a_client(server) as client:
        for too_many in (-1, 2**32):
            with pytest.raises(ValueError, match=str(too_many)):
                await client.enqueue(
                    payload=1, task_group=GROUP, limits=[ConcurrencyLimit(key="c", max_concurrency=too_many)]
                )
        assert server.received == []


async def test_limits_are_read_with_a_job_and_with_a_task() -> None:
    sent = limits_to_pb(LIMITS)
    async with fake_silo() as server, a_client(server) as client:
        server.answer("GetJob", pb.GetJobResponse(id="j", limits=sent), pb.GetJobResponse(id="j"))
        server.answer("LeaseTask", pb.LeaseTaskResponse(task=a_task("t", limits=sent)))
        server.deliver(a_task("t", limits=sent))
        assert (await client.get_job("j")).limits == tuple(LIMITS)
        assert (await client.get_job("j")).limits == ()
        assert (await client.lease_task("j", worker_id="w")).limits == tuple(LIMITS)
        leased = await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP)
        assert [task.limits for task in leased.tasks] == [tuple(LIMITS)]


async def test_limits_of_a_task_of_an_unknown_kind_do_not_spoil_the_task() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.deliver(a_task("t", limits=[pb.Limit(), *limits_to_pb(LIMITS)]))
        leased = await client.lease_tasks(worker_id="w", max_tasks=1, task_group=GROUP)
        assert [task.limits for task in leased.tasks] == [tuple(LIMITS)]


async def test_a_server_keeps_limits_as_they_were_given() -> None:
    async with real_silo() as address, a_client(address) as client:
        handle = await client.enqueue(payload=1, task_group=GROUP, limits=LIMITS)
        assert (await handle.job()).limits == tuple(LIMITS)


async def test_a_concurrency_limit_holds() -> None:
    async with real_silo() as address, a_client(address) as client:
        one: dict[str, Any] = {"task_group": GROUP, "limits": [ConcurrencyLimit(key="k", max_concurrency=1)]}
        for number in range(3):
            await client.enqueue(payload=number, **one)
        leased = await client.lease_tasks(worker_id="w", max_tasks=10, task_group=GROUP)
        assert len(leased.tasks) == 1


async def test_a_leased_task_shows_its_payload() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("LeaseTask", pb.LeaseTaskResponse(task=a_task("t", payload={"a": 1}, shard=SHARD)))
        assert (await client.lease_task("j", worker_id="w")).payload == {"a": 1}
