"""Logs: their two formats, their levels, and what is never in them."""

import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo import Failure, SiloGRPCClient, SiloWorker
from silo.cli.server_process import free_port
from silo.telemetry.logging import Log, parse_levels, set_up_logging
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.child import silo, stub_of

SECRET = "hunter2-the-secret-of-a-tenant"


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """The root logger as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("silo.node").setLevel(logging.NOTSET)


def logged(format: str, *, levels: str | None = None) -> tuple[Log, io.StringIO]:
    stream = io.StringIO()
    set_up_logging("json" if format == "json" else "text", levels=levels, stream=stream)
    return Log("silo.test", node_id="n"), stream


def test_a_text_line_has_time_level_message_and_fields() -> None:
    log, stream = logged("text")
    log.bind(shard_id="s").warning("shard stopped", reason='two "words"', empty="", count=3, none=None)
    at, _, rest = stream.getvalue().partition(" ")
    assert at.endswith("Z")
    fields = 'node_id=n shard_id=s reason="two \\"words\\"" empty="" count=3 none=None'
    assert rest == f"warning shard stopped {fields}\n"


def test_a_value_cannot_break_out_of_its_line() -> None:
    for format in ("text", "json"):
        log, stream = logged(format)
        log.info("event", value="a\nb\r\x1b[31m\u2028c")
        assert len(stream.getvalue().splitlines()) == 1
        assert "\x1b" not in stream.getvalue()


def test_a_json_line_is_one_object() -> None:
    log, stream = logged("json")
    log.info("event", path=Path("/x"), count=3, logger="not this one")
    event = json.loads(stream.getvalue())
    assert event.pop("at").endswith("Z")
    names = {"level": "info", "logger": "silo.test", "message": "event"}
    assert event == names | {"node_id": "n", "path": "/x", "count": 3}


@pytest.mark.parametrize("format", ["text", "json"])
def test_an_error_may_bring_its_traceback(format: str) -> None:
    log, stream = logged(format)
    log.error("shard failed", exc_info=ValueError("boom"))
    assert "ValueError: boom" in stream.getvalue()


def test_percent_signs_are_only_text() -> None:
    log, stream = logged("text")
    log.info("100 %s", value="%d")
    assert stream.getvalue().endswith("info    100 %s node_id=n value=%d\n")


@pytest.mark.parametrize(
    ("levels", "shown"),
    [
        (None, {"info", "warning", "error"}),
        ("", {"info", "warning", "error"}),
        ("debug", {"debug", "info", "warning", "error"}),
        ("WARN", {"warning", "error"}),
        ("error", {"error"}),
        ("off", set()),
        ("error,silo.test=debug", {"debug", "info", "warning", "error"}),
        ("error, silo=info", {"info", "warning", "error"}),
        ("debug,silo.test=off", set()),
    ],
)
def test_levels_decide_what_is_shown(levels: str | None, shown: set[str]) -> None:
    log, stream = logged("json", levels=levels)
    try:
        log.debug("event")
        log.info("event")
        log.warning("event")
        log.error("event")
    finally:
        for name in ("silo", "silo.test"):
            logging.getLogger(name).setLevel(logging.NOTSET)
    assert {json.loads(line)["level"] for line in stream.getvalue().splitlines()} == shown


def test_an_unknown_level_is_named() -> None:
    with pytest.raises(ValueError, match="SILO_LOG: unknown level 'loud'; known are: trace, debug"):
        parse_levels("info,silo=loud")


async def test_no_payload_result_metadata_or_token_reaches_the_log_of_a_server(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    async with silo(tmp_path, "server", "-v", "--grpc-addr", address) as server:
        await server.says("Ctrl-C")
        async with SiloGRPCClient(address, token=SECRET) as client:
            await _work(client)
        await _refused(address)
        assert await server.stop() == 0
        assert "server stopped" in server.err
        assert SECRET not in server.out + server.err
        assert "Traceback" not in server.err


async def _work(client: SiloGRPCClient) -> None:
    """One job that succeeds, one that fails and one that raises, all with secrets on them."""

    async def handler(ctx):  # type: ignore[no-untyped-def]
        match ctx.task.metadata["do"]:
            case "fail":
                return Failure("CODE", {"secret": SECRET})
            case "raise":
                raise ValueError(SECRET)
        return SECRET

    worker = SiloWorker(client=client, worker_id="w", task_group="g", handler=handler)
    async with worker:
        for do in ("succeed", "fail", "raise"):
            metadata = {"do": do, "token": SECRET}
            job = await client.enqueue(id=do, payload=SECRET, task_group="g", metadata=metadata)
            assert (await job.result(timeout=20)).status in ("Succeeded", "Failed")


async def _refused(address: str) -> None:
    """Calls that are refused, with secrets where they do not belong."""
    async with stub_of(address) as stub:
        payload = pb.SerializedBytes(msgpack=SECRET.encode())
        for request in (
            pb.EnqueueRequest(shard="nonsense", payload=payload, task_group="g"),
            pb.EnqueueRequest(shard="nonsense", payload=payload, task_group="", priority=1000),
        ):
            call = stub.Enqueue(request, metadata=(("authorization", f"Bearer {SECRET}"),))
            assert (await call.code()).name != "OK"
