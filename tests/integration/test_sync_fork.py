"""Blocking clients and forks: parent and child go on, whatever ran at that moment."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.sync.loop_thread import LoopThread
from silo.testing import SyncServer, sync_server
from tests.integration.real_silo import real_silo

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no forks here")

_PRELUDE = """
import gc, os, sys, threading, time
from silo import JobNotFoundError, SiloClientError
from silo.sync import SiloClient

client = SiloClient(servers=[sys.argv[1]])

def forked(work):
    '''Do this in a child; the child must end well, and soon.'''
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            sys.stdout.flush()
            code = 0
        finally:
            os._exit(code)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            assert status == 0, f"the child ended with {status}"
            return
        time.sleep(0.005)
    os.kill(pid, 9)
    raise AssertionError("the child hangs")

def use():
    assert client.enqueue(payload=1, task_group="g").status() == "Scheduled"
"""


@pytest.fixture
def server() -> Iterator[SyncServer]:
    with sync_server() as running:
        yield running


def run(tmp_path: Path, script: str, *arguments: str, amid_calls: bool = False) -> str:
    """What a script says that ends well."""
    path = tmp_path / "script.py"
    path.write_text(_PRELUDE + script)
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path), *arguments],
        # As the guide says: with its own support gRPC may bring children down that were forked amid calls.
        env={**os.environ, "GRPC_ENABLE_FORK_SUPPORT": "0"} if amid_calls else None,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_client_made_before_the_fork_works_in_the_child(server: SyncServer, tmp_path: Path) -> None:
    run(tmp_path, "forked(use)\nuse()\n", server.address)


def test_a_client_used_before_the_fork_works_in_parent_and_children(
    server: SyncServer, tmp_path: Path
) -> None:
    script = """
use()
for _ in range(3):
    forked(use)
    use()
forked(lambda: (use(), forked(use), use()))
use()
assert [thread.name for thread in threading.enumerate()].count("silo.sync") == 1
"""
    run(tmp_path, script, server.address)


def test_handles_from_before_the_fork_work_in_the_child(server: SyncServer, tmp_path: Path) -> None:
    script = """
job = client.enqueue(payload=1, task_group="g")

def cancel():
    job.cancel()
    assert job.result(timeout=10).status == "Cancelled"

forked(cancel)
assert job.status() == "Cancelled"
"""
    run(tmp_path, script, server.address)


def test_a_wait_in_another_thread_outlives_the_fork(server: SyncServer, tmp_path: Path) -> None:
    script = """
job = client.enqueue(payload=1, task_group="g")
ends = []
waiting = threading.Thread(target=lambda: ends.append(job.result(timeout=30).status))
waiting.start()
for _ in range(3):
    forked(use)
forked(job.cancel)
waiting.join(20)
assert ends == ["Cancelled"], ends
"""
    run(tmp_path, script, server.address)


def test_calls_of_other_threads_outlive_forks(server: SyncServer, tmp_path: Path) -> None:
    script = """
stop = threading.Event()
counts = [0] * 4

def enqueue(number):
    while not stop.is_set():
        use()
        counts[number] += 1

threads = [threading.Thread(target=enqueue, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
for _ in range(5):
    before = list(counts)
    while any(now == then for now, then in zip(counts, before)):
        time.sleep(0.001)
    forked(use)
stop.set()
for thread in threads:
    thread.join(20)
    assert not thread.is_alive()
"""
    run(tmp_path, script, server.address)


def test_errors_that_somebody_keeps_do_not_spoil_the_fork(server: SyncServer, tmp_path: Path) -> None:
    script = """
kept = []
for _ in range(3):
    try:
        client.get_job("nobody")
    except JobNotFoundError as error:
        kept.append(error)
forked(use)
"""
    run(tmp_path, script, server.address)


def test_closing_in_the_child_leaves_the_parent_alone(server: SyncServer, tmp_path: Path) -> None:
    run(tmp_path, "use()\nforked(client.close)\nuse()\n", server.address)


def test_a_child_of_a_fork_amid_a_change_refuses_calls_and_the_parent_goes_on(
    server: SyncServer, tmp_path: Path
) -> None:
    script = """
asked = threading.Event()
stuck = SiloClient(servers=[sys.argv[2]], token=lambda: asked.set() or "token")
threading.Thread(target=stuck.refresh_topology, daemon=True).start()
assert asked.wait(20)
use()

def refused():
    try:
        use()
    except SiloClientError as error:
        print(error)
    client.close()

began = time.monotonic()
forked(refused)
assert time.monotonic() - began < 10
use()
os._exit(0)
"""
    thread = LoopThread("server that does not answer", around=real_silo)
    done = threading.Event()

    async def hold_up() -> None:
        done.wait(50)

    thread.submit(hold_up())
    try:
        output = run(tmp_path, script, server.address, thread.entered, amid_calls=True)
    finally:
        done.set()
        assert thread.stop(20)
    assert "forked while its parent used gRPC" in output


def test_a_child_whose_parent_used_grpc_elsewhere_refuses_calls(server: SyncServer, tmp_path: Path) -> None:
    script = """
import asyncio
from silo import SiloGRPCClient

def refused():
    try:
        use()
    except SiloClientError as error:
        print(error)

async def main():
    async with SiloGRPCClient(servers=[sys.argv[1]]) as asynchronous:
        await asynchronous.refresh_topology()
        await asyncio.to_thread(use)
        await asyncio.to_thread(forked, refused)
        await asynchronous.refresh_topology()
        await asyncio.to_thread(use)

asyncio.run(main())
"""
    output = run(tmp_path, script, server.address, amid_calls=True)
    assert "forked while its parent used gRPC" in output


def test_processes_of_multiprocessing_work(server: SyncServer, tmp_path: Path) -> None:
    script = """
import multiprocessing

def enqueue(number):
    return client.enqueue(payload=number, task_group="g").id

use()
with multiprocessing.get_context("fork").Pool(2) as pool:
    ids = pool.map(enqueue, range(20))
assert {client.handle(id).status() for id in ids} == {"Scheduled"}
"""
    run(tmp_path, script, server.address)
