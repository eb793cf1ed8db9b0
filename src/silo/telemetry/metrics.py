"""Metrics in the Prometheus text format, over HTTP, at `GET /metrics`.

Nothing is counted ahead: at each scrape the values are read from whoever has them, on the event loop,
where they cannot change meanwhile. A scrape is a stranger's request, so that everything about it has a
bound: its size, its time, and how many there are at once.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Literal

import msgspec
from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from silo.errors import SiloError
from silo.telemetry.logging import Log

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SCRAPES_MAX = 8  # At once; more are turned away.
SCRAPE_TIMEOUT_S = 5.0
_HEAD_BYTES_MAX = 16 << 10
_STATUS = {200: "OK", 404: "Not Found", 405: "Method Not Allowed", 500: "Internal Server Error"}

log = Log("silo.telemetry.metrics")


class MetricsNotServed(SiloError):
    """The address for metrics is taken or not ours."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One metric as it stands: a value for each combination of its labels."""

    name: str
    kind: Literal["gauge", "counter"]
    help: str
    labels: tuple[str, ...] = ()
    values: Mapping[tuple[str, ...], float]


Read = Callable[[], Iterable[Reading]]


class _Readings(Collector):
    """What the library asks at each scrape."""

    def __init__(self, read: Read) -> None:
        self._read = read

    def describe(self) -> Iterable[Metric]:
        return ()  # Otherwise the library would read all values once to learn their names.

    def collect(self) -> Iterator[Metric]:
        for reading in self._read():
            family = (GaugeMetricFamily if reading.kind == "gauge" else CounterMetricFamily)(
                reading.name, reading.help, labels=reading.labels
            )
            for labels, value in reading.values.items():
                family.add_metric(labels, value)
            yield family


class _Endpoint:
    """Answers scrapes, one on each connection."""

    def __init__(self, read: Read) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Readings(read))
        ProcessCollector(registry=self._registry)
        self.scrapes: set[asyncio.Task[None]] = set()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection, and close it."""
        task = asyncio.current_task()
        assert task is not None, "the event loop serves connections in tasks"
        try:
            if len(self.scrapes) >= SCRAPES_MAX:
                return
            self.scrapes.add(task)
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._response(request.partition(b"\r\n")[0].decode("latin-1")))
                await writer.drain()
                writer.close()
                await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # Whoever it was speaks no HTTP, is too slow, or went away.
        finally:
            self.scrapes.discard(task)
            writer.transport.abort()

    def _response(self, line: str) -> bytes:
        method, _, rest = line.partition(" ")
        path = rest.partition(" ")[0].partition("?")[0]
        if path != "/metrics":
            return _http(404, "metrics are at /metrics\n")
        if method != "GET":
            return _http(405, "use GET\n")
        try:
            return _http(200, generate_latest(self._registry).decode())
        except Exception as error:  # The outermost edge of a scrape: the server goes on.
            log.error("metrics not collected", reason=repr(error), exc_info=error)
            return _http(500, "metrics could not be collected; the log says why\n")


def _http(status: int, text: str) -> bytes:
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} {_STATUS[status]}",
        f"Content-Type: {CONTENT_TYPE}",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode() + body


@asynccontextmanager
async def metrics_served(host: str, port: int, read: Read) -> AsyncIterator[str]:
    """Serve what `read` says, and facts of this process, while the block runs; the address with its port.

    Raises:
        OSError: the address cannot be bound.
    """
    endpoint = _Endpoint(read)
    server = await asyncio.start_server(endpoint.answer, host, port, limit=_HEAD_BYTES_MAX)
    try:
        shown = f"[{host}]" if ":" in host else host
        yield f"{shown}:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        scrapes = list(endpoint.scrapes)
        for task in scrapes:
            task.cancel()
        if scrapes:
            await asyncio.wait(scrapes)
