"""Test what uses Silo: a real server in the test's own process, with a clock that the test moves.

    async with silo.testing.server() as s:
        job = await s.client.enqueue(payload="…", task_group="reports", delay=300)
        await s.advance(minutes=5)
        await s.run_until_idle(worker)
        assert await job.status() == "Succeeded"

With pytest the fixtures `silo_server`, `silo_client` and `silo_sync` are there by themselves.
"""

from silo.testing.blocking import SyncServer, sync_server
from silo.testing.server import NotIdle, Ran, Server, Worker, server, started

__all__ = ["NotIdle", "Ran", "Server", "SyncServer", "Worker", "server", "started", "sync_server"]
