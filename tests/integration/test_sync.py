"""The client without `await`, as blocking code meets it."""

import asyncio
import inspect
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any

import pytest

import silo
from silo import (
    ClientClosed,
    JobAlreadyExistsError,
    JobNotFoundError,
    JobTimeoutError,
    NewJob,
    SiloGRPCClient,
)
from silo.client.enqueue_many import UNDER_WAY_MAX
from silo.client.types import RpcOptions
from silo.errors import ConfigError
from silo.rpc.auth import EVERYTHING, Tokens
from silo.rpc.server import Security
from silo.sync import JobHandle, SiloClient
from silo.sync.loop_thread import LoopThread
from silo.testing import SyncServer, sync_server
from tests.integration.real_silo import real_silo

GROUP = "g"
TOKEN = "token-0123456789abcdef"
OF_WORKERS = {
    *("heartbeat", "lease_task", "lease_tasks", "report_outcome", "report_refresh_outcome"),
    *("send_refresh_report", "send_report"),
}
INTERNAL = {"router", "wait_for_result", "wrong_shard_retries"}  # Not for applications, or of one process.


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with sync_server() as running:
        yield running


@pytest.fixture
def client(server: SyncServer) -> Iterator[SiloClient]:
    with SiloClient(servers=[server.address]) as client:
        yield client


def until(is_true: Callable[[], bool], *, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, "it did not become true in time"
        time.sleep(0.005)


def names_of(kind: type[Any]) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def parameters_of(function: Any) -> list[tuple[str, Any, Any]]:
    """Names, kinds and defaults; not whose method it is."""
    found = list(inspect.signature(function).parameters.values())[1:]
    return [(parameter.name, parameter.kind, parameter.default) for parameter in found]


# Names


def test_the_client_has_all_methods_of_the_asynchronous_one_but_those_of_workers() -> None:
    assert names_of(SiloGRPCClient) - names_of(SiloClient) - INTERNAL == OF_WORKERS
    assert names_of(SiloClient) - names_of(SiloGRPCClient) == {"of", "run"}


def test_methods_have_the_same_parameters() -> None:
    for name in names_of(SiloClient) & names_of(SiloGRPCClient):
        assert parameters_of(getattr(SiloClient, name)) == parameters_of(getattr(SiloGRPCClient, name)), name
    assert parameters_of(SiloClient.__init__) == parameters_of(SiloGRPCClient.__init__)


def test_the_handle_has_the_same_methods() -> None:
    assert names_of(JobHandle) == names_of(silo.JobHandle)
    for name in names_of(JobHandle):
        assert parameters_of(getattr(JobHandle, name)) == parameters_of(getattr(silo.JobHandle, name)), name


def test_what_it_does_stands_in_its_docstring() -> None:
    assert SiloClient.enqueue.__doc__ == SiloGRPCClient.enqueue.__doc__
    assert JobHandle.status.__doc__ == silo.JobHandle.status.__doc__


# Jobs


def test_a_job_is_enqueued_looked_at_and_controlled(client: SiloClient) -> None:
    job = client.enqueue(payload={"to": "ada"}, task_group=GROUP, delay=600, metadata={"k": "v"})
    assert isinstance(job, JobHandle)
    assert job.status() == "Scheduled"
    assert job.job(include_attempts=True).payload == {"to": "ada"}
    job.expedite()
    job.cancel()
    assert job.result().status == "Cancelled"
    job.restart()
    assert client.get_job_status(job.id) == "Scheduled"
    client.handle(job.id).cancel()
    job.delete()
    with pytest.raises(JobNotFoundError):
        job.status()


def test_a_result_that_does_not_come_in_time_is_an_error(client: SiloClient) -> None:
    job = client.enqueue(payload=1, task_group=GROUP)
    with pytest.raises(JobTimeoutError):
        job.result(timeout=0.05)


def test_errors_say_what_was_asked_for(client: SiloClient) -> None:
    with pytest.raises(JobNotFoundError, match="nobody"):
        client.get_job("nobody")
    with pytest.raises(ValueError, match="start_at_ms or delay"):
        client.enqueue(payload=1, task_group=GROUP, delay=1, start_at_ms=1)


def test_a_client_with_wrong_arguments_is_not_made() -> None:
    with pytest.raises(ConfigError):
        SiloClient(servers=["https://127.0.0.1:1", "http://127.0.0.1:2"])
    with pytest.raises(ValueError, match="no server"):
        SiloClient(servers=[])


def test_the_cluster_can_be_asked_for(client: SiloClient) -> None:
    client.refresh_topology()
    [shard] = client.get_topology()
    assert client.get_shard_for_tenant("anyone") == shard.shard_id


def test_anything_else_runs_with_the_asynchronous_client(client: SiloClient) -> None:
    async def twice(asynchronous: SiloGRPCClient) -> list[str]:
        jobs = [await asynchronous.enqueue(payload=n, task_group=GROUP) for n in range(2)]
        return [await job.status() for job in jobs]

    assert client.run(twice) == ["Scheduled"] * 2


# Many jobs


def test_jobs_of_an_iterable_are_enqueued_in_order(client: SiloClient) -> None:
    jobs = (NewJob(payload=n, task_group=GROUP, id=f"job-{n}") for n in range(2500))
    assert [job.id for job in client.enqueue_many(jobs)] == [f"job-{n}" for n in range(2500)]
    assert client.get_job("job-2499").payload == 2499


def test_an_iterable_is_read_no_further_than_may_be_under_way(client: SiloClient) -> None:
    read = 0

    def jobs() -> Iterator[NewJob]:
        nonlocal read
        for read in range(1, 10_000):
            assert threading.current_thread() is threading.main_thread()
            yield NewJob(payload=read, task_group=GROUP)

    handles = client.enqueue_many(jobs())
    assert read == 0
    next(handles)
    assert read == UNDER_WAY_MAX
    next(handles)
    assert read == UNDER_WAY_MAX + 1


def test_jobs_are_sent_before_the_iterable_goes_on(client: SiloClient) -> None:
    def jobs() -> Iterator[NewJob]:
        yield NewJob(payload=1, task_group=GROUP, id="first")
        until(lambda: has(client, "first"))
        yield NewJob(payload=2, task_group=GROUP, id="second")

    assert [job.id for job in client.enqueue_many(jobs())] == ["first", "second"]


def test_the_first_job_that_is_refused_ends_it(client: SiloClient) -> None:
    client.enqueue(payload=1, task_group=GROUP, id="taken")
    handles = client.enqueue_many(NewJob(payload=1, task_group=GROUP, id=id) for id in ("new", "taken", "x"))
    assert next(handles).id == "new"
    with pytest.raises(JobAlreadyExistsError):
        next(handles)


def has(client: SiloClient, id: str) -> bool:
    try:
        client.get_job(id)
    except JobNotFoundError:
        return False
    return True


# Tokens and options


@pytest.fixture
def guarded() -> Iterator[str]:
    """The address of a server that wants a token."""
    security = Security(tokens=Tokens([(TOKEN, EVERYTHING)]))
    thread = LoopThread("guarded server", around=lambda: real_silo(security=security))
    yield thread.entered
    assert thread.stop(20)


def test_a_function_for_tokens_may_block_and_does_not_hold_up_others(guarded: str) -> None:
    both = threading.Barrier(2, timeout=10)

    def token() -> str:
        both.wait()  # Passes when it is asked twice at a time.
        return TOKEN

    with SiloClient(servers=[guarded], token=token, shard_routing=silo.ShardRouting(max_retries=0)) as client:
        refresh = threading.Thread(target=client.refresh_topology)
        refresh.start()
        client.refresh_topology()
        refresh.join(10)
        assert not refresh.is_alive()


def test_a_token_is_a_text_or_a_function(guarded: str) -> None:
    for token in (TOKEN, lambda: TOKEN):
        with SiloClient(servers=[guarded], token=token) as client:
            assert client.enqueue(payload=1, task_group=GROUP).status() == "Scheduled"


def test_an_asynchronous_function_for_tokens_is_refused() -> None:
    async def token() -> str:
        return TOKEN

    of_another_kind: Any = token
    with pytest.raises(TypeError, match="without async"):
        SiloClient(servers=["127.0.0.1:1"], token=of_another_kind)


def test_calls_run_in_the_context_of_their_caller(server: SyncServer) -> None:
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: list[str] = []

    def options() -> RpcOptions:
        seen.append(who.get())
        return RpcOptions()

    with SiloClient(servers=[server.address], rpc_options=options) as client:
        client.refresh_topology()
        context = copy_context()
        context.run(who.set, "ada")
        context.run(client.refresh_topology)
    assert seen == ["nobody", "ada"]


# Threads


def test_many_threads_share_one_client_and_one_thread(client: SiloClient) -> None:
    def enqueue(number: int) -> str:
        return client.enqueue(payload=number, task_group=GROUP).id

    with ThreadPoolExecutor(16) as threads:
        ids = list(threads.map(enqueue, range(400)))
        assert len(set(ids)) == 400
        statuses = list(threads.map(lambda id: client.handle(id).status(), ids))
    assert set(statuses) == {"Scheduled"}
    assert [thread.name for thread in threading.enumerate()].count("silo.sync") == 1


def test_a_call_where_an_event_loop_runs_is_refused_at_once(client: SiloClient) -> None:
    async def handler() -> None:
        for call in (lambda: client.enqueue(payload=1, task_group=GROUP), client.get_topology, client.close):
            with pytest.raises(RuntimeError, match="use SiloGRPCClient in async code"):
                call()

    asyncio.run(handler())
    assert client.enqueue(payload=1, task_group=GROUP).status() == "Scheduled"


async def test_a_thread_of_a_process_with_an_event_loop_may_call(client: SiloClient) -> None:
    job = await asyncio.to_thread(client.enqueue, payload=1, task_group=GROUP)
    assert await asyncio.to_thread(job.status) == "Scheduled"


# The end


def test_a_closed_client_refuses_calls_and_may_be_closed_again(server: SyncServer) -> None:
    client = SiloClient(servers=[server.address])
    client.refresh_topology()
    client.close()
    client.close()
    with pytest.raises(ClientClosed):
        client.enqueue(payload=1, task_group=GROUP)
    with pytest.raises(ClientClosed):
        client.get_topology()
    assert "closed" in repr(client)


def test_closing_ends_waits_of_other_threads(server: SyncServer) -> None:
    client = SiloClient(servers=[server.address])
    job = client.enqueue(payload=1, task_group=GROUP)
    ends: list[object] = []

    def wait() -> None:
        try:
            ends.append(job.result())
        except Exception as error:
            ends.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    client.close()
    waiting.join(20)
    assert not waiting.is_alive()
    [end] = ends
    assert isinstance(end, ClientClosed)


def test_closing_one_client_leaves_the_others_alone(server: SyncServer, client: SiloClient) -> None:
    with SiloClient(servers=[server.address]) as other:
        job = other.enqueue(payload=1, task_group=GROUP)
    assert client.handle(job.id).status() == "Scheduled"


# Processes


def child(path: Path, script: str, *arguments: str) -> "subprocess.Popen[str]":
    file = path / "script.py"
    file.write_text(script)
    return subprocess.Popen(
        [sys.executable, "-W", "error", str(file), *arguments], stdout=subprocess.PIPE, text=True
    )


def said(process: "subprocess.Popen[str]") -> Iterator[str]:
    assert process.stdout is not None
    return (line.strip() for line in process.stdout)


def test_ctrl_c_interrupts_a_wait_and_nothing_else(server: SyncServer, tmp_path: Path) -> None:
    script = """
import sys
from silo.sync import SiloClient

client = SiloClient(servers=[sys.argv[1]])
job = client.enqueue(payload=1, task_group="g")
try:
    print("waiting", flush=True)
    job.result()
except KeyboardInterrupt:
    print("interrupted", job.status(), flush=True)
"""
    with child(tmp_path, script, server.address) as process:
        lines = said(process)
        assert next(lines) == "waiting"
        process.send_signal(signal.SIGINT)
        assert next(lines) == "interrupted Scheduled"
        assert process.wait(20) == 0


def test_a_process_that_closes_nothing_ends_at_once(server: SyncServer, tmp_path: Path) -> None:
    script = """
import sys
from silo.sync import SiloClient

client = SiloClient(servers=[sys.argv[1]])
print(client.enqueue(payload=1, task_group="g").status(), flush=True)
"""
    with child(tmp_path, script, server.address) as process:
        assert next(said(process)) == "Scheduled"
        began = time.monotonic()
        assert process.wait(20) == 0
        assert time.monotonic() - began < 3
