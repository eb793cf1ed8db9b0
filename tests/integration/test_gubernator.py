"""The external rate limiter: how checks travel to it, what its answers do, and the start with it."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any  # Requests and answers are untyped.

import grpc
import pytest

from silo.cli.server_process import free_port
from silo.config import GubernatorConfig, load_config
from silo.model.limit import RateAlgorithm
from silo.rpc.gubernator import (
    BATCH_BYTES_MAX,
    CALLS_MAX,
    WAITING_MAX,
    GubernatorClient,
    LimiterUnreachable,
    limiter,
)
from silo.rpc.tls import server_credentials
from silo.shard.limiter import Answer, LimiterFailed
from silo.storage.memory import Fault
from silo.wire.pb.gubernator import gubernator_pb2
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.builders import a_rate, until
from tests.integration.child import failure, silo, stub_of
from tests.integration.fake_gubernator import FakeGubernator, Status, fake_gubernator, over, under, wrong
from tests.integration.fake_silo import nobody
from tests.integration.rpc_server import GROUP, RpcServer, rpc_server
from tests.integration.test_tls import Authority, tls_of

UNDER = Answer(is_under=True, reset_at_ms=0)
FOREVER_MS = 3_600_000
SECRET = "a-key-of-a-tenant"


@asynccontextmanager
async def a_client(fake: FakeGubernator, **settings: Any) -> AsyncIterator[GubernatorClient]:
    """A client of this limiter, closed at the end."""
    async with GubernatorClient(GubernatorConfig(address=f"http://{fake.address}", **settings)) as client:
        yield client


def check(client: GubernatorClient, key: str = "u", **fields: Any) -> asyncio.Task[Answer]:
    return asyncio.ensure_future(client.check(a_rate(1, unique_key=key, **fields)))


async def failed(task: asyncio.Task[Answer]) -> str:
    """What a check says that failed."""
    with pytest.raises(LimiterFailed) as caught:
        await task
    return str(caught.value)


def by_number(request: Any) -> Any:
    """Over the limit for odd keys; the reset is the key."""
    number = int(request.unique_key)
    status = gubernator_pb2.OVER_LIMIT if number % 2 else gubernator_pb2.UNDER_LIMIT
    return gubernator_pb2.RateLimitResp(status=status, reset_time=number)


# Batches


@pytest.mark.spec("W-CC-97")
async def test_twenty_checks_at_once_are_one_call_and_each_gets_the_answer_in_its_place() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        fake.judge = by_number
        answers = await asyncio.gather(*(check(client, str(number)) for number in range(20)))
        assert fake.asked == [str(number) for number in range(20)]
        assert len(fake.calls) == 1
        assert answers == [Answer(is_under=not number % 2, reset_at_ms=number) for number in range(20)]


async def test_a_check_says_what_the_limit_says_and_nothing_else() -> None:
    limit = a_rate(7, 8, name="n", unique_key="u", hits=3, algorithm=RateAlgorithm.LEAKY_BUCKET, behavior=17)
    async with fake_gubernator() as fake, a_client(fake) as client:
        await client.check(limit)
        [[request]] = fake.calls
        assert request == gubernator_pb2.RateLimitReq(
            name="n", unique_key="u", hits=3, limit=7, duration=8, algorithm=1, behavior=17
        )


async def test_a_full_batch_leaves_before_its_time() -> None:
    async with (
        fake_gubernator() as fake,
        a_client(fake, coalesce_interval_ms=FOREVER_MS, max_batch_size=10) as client,
    ):
        checks = [check(client, str(number)) for number in range(25)]
        await asyncio.gather(*checks[:20])
        assert [len(call) for call in fake.calls] == [10, 10]
        assert not any(task.done() for task in checks[20:])
        more = [check(client, str(number)) for number in range(25, 30)]
        await asyncio.gather(*checks[20:], *more)
        assert [len(call) for call in fake.calls] == [10, 10, 10]
        assert client._window is None, "what was sent needs no window"  # Nothing public tells.


async def test_the_window_belongs_to_the_first_check_in_it() -> None:
    async with fake_gubernator() as fake, a_client(fake, coalesce_interval_ms=FOREVER_MS) as client:
        first = check(client, "1")
        await until(lambda: client._window is not None)  # Nothing public tells.
        window = client._window
        second = check(client, "2")
        await asyncio.sleep(0)
        assert client._window is window
        client._window_ended()
        await asyncio.gather(first, second)
        assert [len(call) for call in fake.calls] == [2]


async def test_a_window_of_nothing_still_collects_what_comes_at_the_same_moment() -> None:
    async with fake_gubernator() as fake, a_client(fake, coalesce_interval_ms=0) as client:
        await asyncio.gather(*(check(client) for _ in range(20)))
        assert [len(call) for call in fake.calls] == [20]


async def test_a_call_under_way_does_not_hold_up_the_next() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        fake.hold()
        checks = [check(client, "1")]
        await until(lambda: fake.in_flight == 1)
        checks.append(check(client, "2"))
        await until(lambda: fake.in_flight == 2)
        fake.release()
        assert await asyncio.gather(*checks) == [UNDER, UNDER]


async def test_beyond_the_calls_checks_wait_and_beyond_those_they_fail_at_once() -> None:
    async with fake_gubernator() as fake, a_client(fake, max_batch_size=1) as client:
        fake.hold()
        checks = [check(client, str(number)) for number in range(CALLS_MAX + WAITING_MAX)]
        await until(lambda: fake.in_flight == CALLS_MAX)
        assert repr(client).endswith(f"{WAITING_MAX} waiting, {CALLS_MAX} calls)")
        assert "too many checks wait" in await failed(check(client))
        gone = checks.pop()
        gone.cancel()
        await asyncio.wait({gone})
        checks.append(check(client))  # Whoever leaves makes room.
        fake.release()
        assert set(await asyncio.gather(*checks)) == {UNDER}
        assert fake.in_flight == 0


async def test_a_batch_is_no_larger_than_the_service_takes() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        keys = [str(number) + "x" * (BATCH_BYTES_MAX // 3) for number in range(5)]
        await asyncio.gather(*(check(client, key) for key in keys))
        assert [len(call) for call in fake.calls] == [2, 2, 1]
        assert fake.asked == keys
        other = check(client)
        assert "too long" in await failed(check(client, "x" * BATCH_BYTES_MAX))
        assert await other == UNDER


# Failures


async def test_a_failed_call_fails_every_check_in_it_and_no_other() -> None:
    async with fake_gubernator() as fake, a_client(fake, max_batch_size=10) as client:
        fake.answer(Status(grpc.StatusCode.RESOURCE_EXHAUSTED, "not now"), under)
        checks = [check(client, str(number)) for number in range(100, 120)]
        for task in checks[:10]:
            text = await failed(task)
            assert "RESOURCE_EXHAUSTED" in text
            assert "not now" in text
        assert await asyncio.gather(*checks[10:]) == [UNDER] * 10


async def test_a_limiter_that_does_not_answer_in_time_fails_the_checks_of_that_call() -> None:
    async with fake_gubernator() as fake, a_client(fake, request_timeout_ms=100) as client:
        fake.hold()
        checks = [check(client, str(number)) for number in range(3)]
        for task in checks:
            assert "DEADLINE_EXCEEDED" in await failed(task)
        fake.release()
        assert await check(client) == UNDER


async def test_an_answer_with_an_error_counts_as_one_for_its_check_only() -> None:
    def judge(request: Any) -> Any:
        return wrong("the peer is away")(request) if request.unique_key == "bad" else under()

    async with fake_gubernator() as fake, a_client(fake) as client:
        fake.judge = judge
        good, bad, fine = check(client, "good"), check(client, "bad"), check(client, "fine")
        assert "the peer is away" in await failed(bad)
        assert await good == await fine == UNDER


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_answers_that_are_too_few_or_too_many_belong_to_nobody(count: int) -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        fake.answer(gubernator_pb2.GetRateLimitsResp(responses=[under()] * count))
        checks = [check(client, "1"), check(client, "2")]
        for task in checks:
            assert f"asked=2, answered={count}" in await failed(task)


@pytest.mark.parametrize("key", [SECRET, "ключ", 'quo"ted'])
async def test_what_the_service_says_is_not_repeated_when_it_may_name_a_tenants_limit(key: str) -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        said = key.encode("unicode_escape").decode()
        for answer in (wrong(f"no peer for {said}"), Status(grpc.StatusCode.INTERNAL, f"bad: {said}")):
            fake.answer(answer)
            text = await failed(check(client, key))
            assert said not in text
            assert key not in text
            assert "hidden" in text


async def test_a_limiter_that_comes_back_is_asked_again() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        assert await check(client, "1") == UNDER
        await fake.stop()
        assert "UNAVAILABLE" in await failed(check(client, "2"))
        await fake.start()
        async with asyncio.timeout(10):
            while True:
                try:
                    assert await check(client, "3") == UNDER
                    break
                except LimiterFailed:
                    await asyncio.sleep(0.01)


async def test_a_caller_that_goes_away_disturbs_nobody_else() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        fake.judge = by_number
        fake.hold()
        checks = [check(client, str(number)) for number in range(4)]
        await until(lambda: fake.in_flight == 1)
        checks[1].cancel()
        await asyncio.wait({checks[1]})
        fake.release()
        kept = await asyncio.gather(checks[0], checks[2], checks[3])
        assert [answer.reset_at_ms for answer in kept] == [0, 2, 3]


async def test_a_caller_that_goes_away_before_its_check_was_sent_spends_nothing() -> None:
    async with fake_gubernator() as fake, a_client(fake) as client:
        checks = [check(client, str(number)) for number in range(3)]
        await asyncio.sleep(0)
        checks[1].cancel()
        await asyncio.gather(checks[0], checks[2])
        assert fake.asked == ["0", "2"]


async def test_closing_fails_who_waits() -> None:
    async with fake_gubernator() as fake, a_client(fake, coalesce_interval_ms=FOREVER_MS) as client:
        fake.hold()
        sent = check(client)
        await asyncio.sleep(0)
        client._window_ended()
        await until(lambda: fake.in_flight == 1)
        unsent = check(client)
        await asyncio.sleep(0)
        await client.close()
        for task in (sent, unsent, check(client)):
            assert "the server stops" in await failed(task)
        assert repr(client).endswith("0 waiting, 0 calls)")


# The start


async def test_without_an_address_there_is_no_limiter() -> None:
    assert limiter(load_config(None, {"HOME": "/"})) is None


@pytest.mark.parametrize("scheme", ["", "http://"])
async def test_the_address_may_be_a_url_or_bare(scheme: str) -> None:
    async with (
        fake_gubernator() as fake,
        GubernatorClient(GubernatorConfig(address=scheme + fake.address)) as client,
    ):
        assert await check(client) == UNDER


@pytest.mark.parametrize("scheme", ["http://", "https://"])
async def test_what_does_not_speak_the_protocol_is_no_limiter(scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # Takes connections, and says nothing.
        address = f"{scheme}127.0.0.1:{silent.getsockname()[1]}"
        client = GubernatorClient(GubernatorConfig(address=address, connect_timeout_ms=100))
        with pytest.raises(LimiterUnreachable, match=f"no rate limiter answers at {address} within 100 ms"):
            await client.open()


async def test_who_gives_up_while_it_connects_leaves_nothing_open() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        client = GubernatorClient(GubernatorConfig(address=f"127.0.0.1:{silent.getsockname()[1]}"))
        opening = asyncio.create_task(client.open())
        await until(lambda: client._channel is not None)  # Nothing public tells.
        opening.cancel()
        await asyncio.wait({opening})
        assert "the server stops" in await failed(check(client))


def a_file(folder: Path, address: str, *, more: str = "") -> str:
    path = folder / "silo.toml"
    path.write_text(
        f'[server]\ngrpc_addr = "127.0.0.1:{free_port()}"\n[coordination]\ninitial_shard_count = 1\n'
        f'[gubernator]\naddress = "{address}"\n{more}'
    )
    return str(path)


async def test_a_server_does_not_start_without_the_limiter_that_is_configured(tmp_path: Path) -> None:
    address = f"http://{nobody()}"
    file = a_file(tmp_path, address, more="connect_timeout_ms = 100")
    assert await failure(tmp_path, "server", "-c", file) == (
        f"Error: no rate limiter answers at {address} within 100 ms; start it, correct gubernator.address, "
        "or leave that out and have Silo judge rate limits itself"
    )
    assert not list((tmp_path / "home").glob("**/silo")), "it left no trace"


async def test_a_server_asks_the_limiter_that_is_configured_over_tls_too(tmp_path: Path) -> None:
    authority = Authority(tmp_path, "authority")
    credentials = server_credentials(tls_of(authority))
    roots = {"GRPC_DEFAULT_SSL_ROOTS_FILE_PATH": str(authority.path)}
    async with fake_gubernator(credentials=credentials) as fake:
        file = a_file(tmp_path, f"https://{fake.address}")
        async with silo(tmp_path, "server", "-c", file, env=roots) as server:
            await server.says("Ctrl-C")
            address = server.out.split()[4]
            async with stub_of(address) as stub:
                info = await stub.GetClusterInfo(pb.GetClusterInfoRequest())
                shard = info.shard_owners[0].shard_id
                request = pb.EnqueueRequest(
                    shard=shard, id="j", task_group=GROUP, limits=[rate("k")], payload=pb.SerializedBytes()
                )
                await stub.Enqueue(request)
                tasks: list[Any] = []
                async with asyncio.timeout(10):
                    while not tasks:
                        lease = pb.LeaseTasksRequest(worker_id="w", max_tasks=1, task_group=GROUP)
                        tasks = list((await stub.LeaseTasks(lease)).tasks)
                assert fake.asked == ["k"]
                fake.hold()
                request.id = "k"
                await stub.Enqueue(request)
                await until(lambda: fake.in_flight == 1)
            assert await server.stop() == 0, "a limiter that hangs keeps it from nothing"
            assert "Traceback" not in server.err


# Jobs


def rate(key: str = "u", **policy: Any) -> pb.Limit:
    """A rate limit; further names are those of its retry policy."""
    values = {"initial_backoff_ms": 100, "max_backoff_ms": 30_000, "backoff_multiplier": 2.0} | policy
    return pb.Limit(
        rate_limit=pb.GubernatorRateLimit(
            name="rate",
            unique_key=key,
            limit=1,
            duration_ms=1_000,
            hits=1,
            retry_policy=pb.RateLimitRetryPolicy(**values),
        )
    )


@asynccontextmanager
async def a_server() -> AsyncIterator[tuple[RpcServer, FakeGubernator]]:
    """A server in memory, with a clock that stands still, and the limiter that it asks."""
    async with (
        fake_gubernator() as fake,
        a_client(fake) as client,
        rpc_server(limiter=client) as server,
    ):
        yield server, fake


async def settled(server: RpcServer, fake: FakeGubernator, *, calls: int) -> None:
    """Wait until the limiter was asked so often, and what follows from its answers is stored."""
    await until(lambda: len(fake.calls) >= calls and not any(row[:1] == b"x" for row in rows_of(server)))
    assert len(fake.calls) == calls


def rows_of(server: RpcServer) -> list[bytes]:
    return list(server.rows()[server.shard])


async def advance(server: RpcServer, duration_ms: int) -> None:
    server.clock.advance_ms(duration_ms)
    await server.node.shard(server.shard).tick()


async def test_a_job_under_its_limit_runs_and_each_attempt_asks_again() -> None:
    async with a_server() as (server, fake):
        policy = pb.RetryPolicy(retry_count=1, backoff_factor=1.0)
        await server.enqueue("j", limits=[rate()], retry_policy=policy)
        await settled(server, fake, calls=1)
        task = await server.lease_one()
        await server.report(task, failure=pb.Failure(code="BROKEN", data=pb.SerializedBytes()))
        await settled(server, fake, calls=2)
        assert (await server.lease_one()).attempt_number == 2


async def test_many_jobs_at_once_share_calls() -> None:
    async with a_server() as (server, fake):
        await asyncio.gather(*(server.enqueue(f"j{n}", limits=[rate(f"{n}")]) for n in range(60)))
        await until(lambda: not any(row[:1] == b"x" for row in rows_of(server)) and len(fake.asked) == 60)
        assert len(fake.calls) < 30
        assert len(await server.lease(100)) == 60


async def test_a_job_over_its_limit_asks_again_at_the_reset() -> None:
    async with a_server() as (server, fake):
        fake.answer(over(server.clock.now_ms() + 700))
        await server.enqueue("j", limits=[rate()])
        await settled(server, fake, calls=1)
        await advance(server, 699)
        assert await server.lease() == []
        assert len(fake.calls) == 1
        await advance(server, 1)
        await settled(server, fake, calls=2)
        assert (await server.lease_one()).job_id == "j"


async def test_a_reset_that_is_past_or_too_far_gives_way_to_the_backoff() -> None:
    async with a_server() as (server, fake):
        now_ms = server.clock.now_ms()
        fake.answer(over(now_ms), over(now_ms + 10_000_000))
        await server.enqueue("j", limits=[rate()])
        await settled(server, fake, calls=1)
        await advance(server, 100)
        await settled(server, fake, calls=2)
        await advance(server, 199)
        assert await server.lease() == []
        await advance(server, 1)
        await settled(server, fake, calls=3)
        assert (await server.lease_one()).job_id == "j"


async def test_a_limiter_that_fails_is_asked_again_without_end_and_fails_no_job() -> None:
    async with a_server() as (server, fake):
        no, answers = Status(grpc.StatusCode.INTERNAL, "no"), 12
        few = gubernator_pb2.GetRateLimitsResp()
        fake.answer(*[no, wrong("no"), few] * (answers // 3))
        await server.enqueue("j", limits=[rate(max_retries=2)])
        for calls in range(1, answers + 1):
            await settled(server, fake, calls=calls)
            assert await server.lease() == []
            assert (await server.job()).status == pb.JOB_STATUS_SCHEDULED
            await advance(server, 100)
        await settled(server, fake, calls=answers + 1)
        assert (await server.lease_one()).job_id == "j"


async def test_a_job_that_is_over_its_limit_too_often_fails_and_says_so() -> None:
    async with a_server() as (server, fake):
        fake.judge = over()
        await server.enqueue("j", limits=[rate(max_retries=2)])
        for calls, wait_ms in enumerate((100, 200), start=1):
            await settled(server, fake, calls=calls)
            await advance(server, wait_ms)
        await settled(server, fake, calls=3)
        result = await server.result()
        assert result.status == pb.JOB_STATUS_FAILED
        assert result.failure.error_code == "RATE_LIMIT_EXCEEDED"
        await advance(server, FOREVER_MS)
        assert len(fake.calls) == 3


async def test_a_job_that_is_cancelled_while_the_limiter_is_asked_does_not_run() -> None:
    async with a_server() as (server, fake):
        fake.hold()
        await server.enqueue("j", limits=[rate()])
        await until(lambda: fake.in_flight == 1)
        await server.cancel()
        fake.release()
        await server.enqueue("other", limits=[rate()])
        await settled(server, fake, calls=2)
        assert [task.job_id for task in await server.lease(10)] == ["other"]
        assert (await server.job()).status == pb.JOB_STATUS_CANCELLED


async def test_a_shard_that_dies_before_an_answer_is_stored_asks_once_more() -> None:
    async with a_server() as (server, fake):
        fake.hold()
        await server.enqueue("j", limits=[rate()])
        await until(lambda: fake.in_flight == 1)
        before = server.node.shard(server.shard)
        server.storage.faults.plan("write", Fault.FAIL_BEFORE)
        fake.release()
        assert await before.wait_closed() is not None
        await settled(server, fake, calls=2)
        assert fake.asked == ["u", "u"]
        await until(lambda: bool(server.node.open_shards()))
        assert (await server.lease_one()).job_id == "j"


async def test_no_log_names_a_limit(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with a_server() as (server, fake):
        fake.answer(wrong(f"bad {SECRET}"), Status(grpc.StatusCode.INTERNAL, f"bad {SECRET}"))
        await server.enqueue("j", limits=[rate(SECRET)])
        for calls in (1, 2):
            await settled(server, fake, calls=calls)
            await advance(server, 100)
        await settled(server, fake, calls=3)
    said = [f"{record.getMessage()} {vars(record)}" for record in caplog.records]
    assert any("rate limiter failed" in line for line in said)
    assert not any(SECRET in line for line in said)
