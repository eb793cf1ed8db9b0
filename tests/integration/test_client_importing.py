"""Imports travel tenant by tenant, come back in the order of the call, and follow their shard."""

from typing import Any

import grpc
import pytest

from silo import (
    ClusterUnreachable,
    ConcurrencyLimit,
    ImportAttempt,
    ImportJob,
    ImportJobResult,
    PayloadError,
    RetryPolicy,
    ShardRouting,
    SiloFailedPreconditionError,
    SiloNotFoundError,
)
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.fake_silo import (
    GROUP,
    SHARD,
    Status,
    a_client,
    an_import_result,
    fake_silo,
    not_found,
    unavailable,
    value,
    wrong_shard,
)
from tests.integration.real_silo import real_silo

OTHER_SHARD = "22222222-2222-4222-8222-222222222222"
LOW, HIGH = "customer-123", "env-0"  # Their hashes: 0bb6…, 9aae….
NOWHERE = 'status: NotFound, message: "shard not found", details: [], metadata: MetadataMap { headers: {} }'


def a_job(id: str = "j", **fields: Any) -> ImportJob:
    return ImportJob(**({"id": id, "payload": id, "task_group": GROUP} | fields))


def taken(id: str) -> ImportJobResult:
    return ImportJobResult(id=id, success=True, status="Scheduled")


def answered(*results: pb.ImportJobResult) -> pb.ImportJobsResponse:
    return pb.ImportJobsResponse(results=results)


async def test_to_import_nothing_sends_nothing() -> None:
    async with fake_silo() as server, a_client(server) as client:
        assert await client.import_jobs([]) == []
        assert server.received == []


async def test_a_job_is_sent_with_all_that_is_known_of_it() -> None:
    job = a_job(
        tenant=LOW,
        payload={"a": 1},
        priority=0,
        enqueue_time_ms=1,
        start_at_ms=2,
        retry_policy=RetryPolicy(retry_count=3),
        limits=[ConcurrencyLimit(key="c", max_concurrency=1)],
        metadata={"k": "v"},
        attempts=[
            ImportAttempt(
                status="Failed", started_at_ms=3, finished_at_ms=4, error_code="X", error_data="why"
            ),
            ImportAttempt(status="Succeeded", started_at_ms=5, finished_at_ms=6, result=[1]),
        ],
    )
    async with fake_silo() as server, a_client(server) as client:
        assert await client.import_jobs([job]) == [taken("j")]
        [sent] = server.calls("ImportJobs")
        assert list(sent.jobs) == [
            pb.ImportJobRequest(
                shard=SHARD,
                id="j",
                priority=0,
                enqueue_time_ms=1,
                start_at_ms=2,
                retry_policy=pb.RetryPolicy(
                    retry_count=3,
                    initial_interval_ms=1000,
                    max_interval_ms=60_000,
                    randomize_interval=True,
                    backoff_factor=2,
                ),
                payload=value({"a": 1}),
                limits=[pb.Limit(concurrency=pb.ConcurrencyLimit(key="c", max_concurrency=1))],
                tenant=LOW,
                metadata={"k": "v"},
                task_group=GROUP,
                attempts=[
                    pb.ImportAttempt(
                        status="ATTEMPT_STATUS_FAILED",
                        started_at_ms=3,
                        finished_at_ms=4,
                        error_code="X",
                        error_data=value("why"),
                    ),
                    pb.ImportAttempt(
                        status="ATTEMPT_STATUS_SUCCEEDED",
                        started_at_ms=5,
                        finished_at_ms=6,
                        result=value([1]),
                    ),
                ],
            )
        ]


async def test_a_job_that_says_little_is_sent_with_the_defaults() -> None:
    async with fake_silo() as server, a_client(server) as client:
        await client.import_jobs(
            [a_job(attempts=[ImportAttempt(status="Cancelled", started_at_ms=1, finished_at_ms=2)])]
        )
        [sent] = server.calls("ImportJobs")[0].jobs
        assert (sent.priority, sent.enqueue_time_ms, sent.start_at_ms) == (50, 0, 0)
        assert not sent.HasField("tenant")
        assert not sent.HasField("retry_policy")
        [attempt] = sent.attempts
        assert not any(attempt.HasField(name) for name in ("result", "error_code", "error_data"))


async def test_each_tenant_travels_by_itself_and_results_come_in_the_order_of_the_call() -> None:
    async with fake_silo() as low, fake_silo() as high, a_client(low) as client:
        low.shards = [(SHARD, "", "8", low.address), (OTHER_SHARD, "8", "", high.address)]
        jobs = [
            a_job("a", tenant=HIGH),
            a_job("b", tenant=LOW),
            a_job("a", tenant=LOW),
            a_job("c", tenant=HIGH),
            a_job("d"),
            a_job("e", tenant=""),
        ]
        assert await client.import_jobs(jobs) == [taken(id) for id in "abacde"]
        sent = [[(job.id, job.shard) for job in request.jobs] for request in low.calls("ImportJobs")]
        assert sent == [[("b", SHARD), ("a", SHARD)], [("d", SHARD), ("e", SHARD)]]
        [sent_high] = high.calls("ImportJobs")
        assert [(job.id, job.shard) for job in sent_high.jobs] == [("a", OTHER_SHARD), ("c", OTHER_SHARD)]


async def test_a_refused_job_is_a_result() -> None:
    error = "cannot reimport job: cannot reimport job b: job already succeeded (status: Succeeded)"
    async with fake_silo() as server, a_client(server) as client:
        server.answer(
            "ImportJobs",
            answered(
                an_import_result("a", status="JOB_STATUS_SUCCEEDED"),
                an_import_result("b", error, status="JOB_STATUS_FAILED"),
            ),
        )
        assert await client.import_jobs([a_job("a"), a_job("b")]) == [
            ImportJobResult(id="a", success=True, status="Succeeded"),
            ImportJobResult(id="b", success=False, status="Failed", error=error),
        ]
        assert len(server.calls("ImportJobs")) == 1


async def test_the_same_id_twice_has_two_results() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", answered(an_import_result("a"), an_import_result("a", "again")))
        first, second = await client.import_jobs([a_job("a"), a_job("a")])
        assert (first.success, second.success, second.error) == (True, False, "again")


async def test_results_without_ids_are_told_by_their_places() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", answered(an_import_result("", "disk full"), an_import_result("")))
        first, second = await client.import_jobs([a_job("a"), a_job("b")])
        assert (first.id, first.success, first.error) == ("a", False, "disk full")
        assert (second.id, second.success) == ("b", True)


async def test_a_job_without_a_result_of_its_own_was_not_imported_as_far_as_we_know() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", answered(an_import_result("a"), an_import_result("other")))
        _, *others = await client.import_jobs([a_job("a"), a_job("b"), a_job("c")])
        assert others == [
            ImportJobResult(
                id=id,
                success=False,
                status="Scheduled",
                error=f"No result returned from server for job {id}",
            )
            for id in "bc"
        ]


async def test_more_results_than_jobs_change_nothing() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", answered(an_import_result("a"), an_import_result("a", "what?")))
        assert await client.import_jobs([a_job("a")]) == [taken("a")]


async def test_jobs_whose_shard_moved_are_sent_again_and_no_others() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        await client.refresh_topology()
        old.shards = [(OTHER_SHARD, "", "", new.address)]
        old.answer(
            "ImportJobs",
            answered(
                an_import_result("a", NOWHERE),
                an_import_result("b"),
                an_import_result("c", "no"),
                an_import_result("", NOWHERE),
            ),
        )
        results = await client.import_jobs([a_job(id) for id in "abcd"])
        assert [(result.id, result.success) for result in results] == [
            ("a", True),
            ("b", True),
            ("c", False),
            ("d", True),
        ]
        [again] = new.calls("ImportJobs")
        assert [(job.id, job.shard) for job in again.jobs] == [("a", OTHER_SHARD), ("d", OTHER_SHARD)]
        assert client.wrong_shard_retries == 1


async def test_jobs_whose_shard_stays_away_are_refused_when_the_tries_are_used_up() -> None:
    routing = ShardRouting(retry_delay_ms=1, max_retries=2, topology_refresh_interval_ms=0)
    async with fake_silo() as server, a_client(server, shard_routing=routing) as client:
        server.answer("ImportJobs", *[answered(an_import_result("a", NOWHERE)) for _ in range(3)])
        [result] = await client.import_jobs([a_job("a")])
        assert (result.success, result.error) == (False, NOWHERE)
        assert len(server.calls("ImportJobs")) == 3


async def test_a_call_that_is_not_answered_is_repeated() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", unavailable(), wrong_shard())
        assert await client.import_jobs([a_job("a")]) == [taken("a")]
        assert len(server.calls("ImportJobs")) == 3


async def test_a_call_that_fails_fails_the_import_and_leaves_what_was_imported_before() -> None:
    running = Status(grpc.StatusCode.FAILED_PRECONDITION, "cannot reimport job b: job is currently running")
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", answered(an_import_result("a")), running)
        with pytest.raises(SiloFailedPreconditionError, match="currently running"):
            await client.import_jobs([a_job("a", tenant="a"), a_job("b", tenant="b"), a_job("c", tenant="c")])
        assert [request.jobs[0].id for request in server.calls("ImportJobs")] == ["a", "b"]


async def test_a_call_that_names_no_one_job_has_an_error_that_names_none() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("ImportJobs", not_found("nothing like that"))
        with pytest.raises(SiloNotFoundError):
            await client.import_jobs([a_job("a")])


async def test_a_cluster_that_went_away_is_reported() -> None:
    routing = ShardRouting(retry_delay_ms=1, max_retries=1, topology_refresh_interval_ms=0)
    async with fake_silo() as server, a_client(server, shard_routing=routing) as client:
        await client.refresh_topology()
        await server.stop()
        with pytest.raises(ClusterUnreachable):
            await client.import_jobs([a_job("a")])


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"payload": {1, 2}}, PayloadError),
        (
            {
                "attempts": [
                    ImportAttempt(status="Succeeded", started_at_ms=0, finished_at_ms=0, result=object())
                ]
            },
            PayloadError,
        ),
        ({"priority": -1}, ValueError),
        (
            {"attempts": [ImportAttempt(status="Lost", started_at_ms=0, finished_at_ms=0)]},
            ValueError,
        ),
    ],
)
async def test_a_job_that_cannot_be_sent_keeps_all_others_back(
    wrong: dict[str, Any], error: type[Exception]
) -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(error):
            await client.import_jobs([a_job("a", tenant="a"), a_job("b", tenant="b", **wrong)])
        assert server.received == []


async def test_imported_jobs_go_on_at_a_server() -> None:
    async with real_silo(shards=2) as address, a_client(address) as client:
        failed = ImportAttempt(
            status="Failed", started_at_ms=1, finished_at_ms=2, error_code="X", error_data={"why": "y"}
        )
        done = ImportAttempt(status="Succeeded", started_at_ms=3, finished_at_ms=4, result="done")
        results = await client.import_jobs(
            [
                a_job("waits", attempts=[failed], retry_policy=RetryPolicy(retry_count=1), start_at_ms=5),
                a_job("done", attempts=[failed, done]),
                a_job("wrong", priority=100),
            ]
        )
        assert [(result.id, result.success, result.status) for result in results] == [
            ("waits", True, "Scheduled"),
            ("done", True, "Succeeded"),
            ("wrong", False, "Failed"),
        ]
        assert results[0].error is results[1].error is None
        assert "priority must be between 0 and 99" in (results[2].error or "")
        job = await client.get_job("done", include_attempts=True)
        assert (job.status, job.result, job.payload) == ("Succeeded", "done", "done")
        first, second = job.attempts or ()
        assert (first.error_code, first.error_data, second.result) == ("X", {"why": "y"}, "done")
