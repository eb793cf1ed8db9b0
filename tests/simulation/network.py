"""A network between clients and one server: it delays, loses and repeats messages, and is cut at times.

Requests and answers travel as the bytes of their protobuf messages, and the real handlers answer them.
"""

import asyncio
from collections.abc import AsyncIterator
from random import Random
from typing import Any  # Messages and contexts of grpc are untyped.

import grpc
import msgspec

from silo.rpc.ext_handlers import SiloExtServicer
from silo.rpc.handlers import SiloServicer
from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.simulation.loop import Process, current_process, outside, start

_PING_S = 9.5  # A connection that is silent for so long is given up, at both ends.
_RESEND_S = 0.2


class Weather(msgspec.Struct, frozen=True, kw_only=True):
    """How bad the network is. Probabilities are for each message."""

    latency_ms: tuple[float, float] = (0.1, 3.0)
    loss: float = 0.0
    repeats: float = 0.0


class Failed(Exception):
    """A call that was not answered as wished."""

    def __init__(self, code: grpc.StatusCode, text: str) -> None:
        super().__init__(f"{code.name}: {text}")
        self.code = code
        self.text = text


class _Context:
    """What a handler sees of its call."""

    def __init__(self, metadata: tuple[tuple[str, str], ...]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def done(self) -> bool:
        return False

    async def abort(self, code: grpc.StatusCode, text: str) -> None:
        raise Failed(code, text)


class Server:
    """A server process as the network sees it."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.servicer: SiloServicer | None = None
        self.extension: SiloExtServicer | None = None
        self.died = asyncio.get_running_loop().create_future()

    async def answer(self, method: str, request: bytes, metadata: tuple[tuple[str, str], ...]) -> bytes:
        if self.servicer is None:
            raise Failed(grpc.StatusCode.UNAVAILABLE, "connection refused")
        message = getattr(pb, f"{method}Request").FromString(request)
        response = await getattr(self.servicer, method)(message, _Context(metadata))
        return bytes(response.SerializeToString())


class Network:
    """Carries calls to whichever server is up."""

    def __init__(self, rng: Random, weather: Weather) -> None:
        self._rng = rng
        self.weather = weather
        self.server: Server | None = None
        self.cut_off: set[str] = set()  # Callers that are behind a partition.

    async def call(
        self,
        caller: str,
        method: str,
        request: Any,
        *,
        timeout_s: float = 4.0,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """The answer to a call.

        Raises:
            Failed: it was refused, or nobody knows what became of it.
        """
        try:
            async with asyncio.timeout(timeout_s):
                data = await self._exchange(caller, method, request.SerializeToString(), metadata)
        except TimeoutError:
            raise Failed(grpc.StatusCode.DEADLINE_EXCEEDED, "deadline exceeded") from None
        return getattr(pb, f"{method}Response").FromString(data)

    async def work(self, caller: str) -> "WorkStream":
        """A stream of tasks.

        Raises:
            Failed: there is no server.
        """
        await asyncio.sleep(self._latency_s())
        server = self.server
        if server is None or server.process.is_dead or server.extension is None or caller in self.cut_off:
            raise Failed(grpc.StatusCode.UNAVAILABLE, "connection refused")
        return WorkStream(self, caller, server, server.extension)

    async def delay(self, caller: str) -> None:
        """How long a message of a connection takes: nothing is lost, but late."""
        await asyncio.sleep(self._latency_s())
        if self._rng.random() < self.weather.loss:
            await asyncio.sleep(_RESEND_S)
        while caller in self.cut_off:  # noqa: ASYNC110  # There is no event for it, and time costs nothing.
            await asyncio.sleep(_RESEND_S)

    async def _exchange(
        self, caller: str, method: str, request: bytes, metadata: tuple[tuple[str, str], ...]
    ) -> bytes:
        await self._travel(caller)
        server = self.server
        if server is None or server.process.is_dead:
            raise Failed(grpc.StatusCode.UNAVAILABLE, "connection refused")
        if self._rng.random() < self.weather.repeats:
            start(server.process, _ignored(server.answer(method, request, metadata)), name=f"repeat {method}")
        handler = start(server.process, server.answer(method, request, metadata), name=method)
        try:
            await asyncio.wait({handler, server.died}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not handler.done():  # The caller hung up: the server is told a little later.
                delay_s = self._latency_s()
                asyncio.get_running_loop().call_later(delay_s, handler.cancel)
        if not handler.done():
            raise Failed(grpc.StatusCode.UNAVAILABLE, "connection lost")
        try:
            answer: bytes | Failed = handler.result()
        except Failed as refusal:
            answer = refusal
        await self._travel(caller)
        if isinstance(answer, Failed):
            raise answer
        return answer

    async def _travel(self, caller: str) -> None:
        await asyncio.sleep(self._latency_s())
        if caller in self.cut_off or self._rng.random() < self.weather.loss:
            await asyncio.get_running_loop().create_future()  # It never arrives.

    def _latency_s(self) -> float:
        least, most = self.weather.latency_ms
        return self._rng.uniform(least, most) / 1000


async def _ignored(work: Any) -> None:
    try:
        await work
    except Failed:
        return


class WorkStream:
    """A stream of tasks as its worker sees it."""

    def __init__(self, network: Network, caller: str, server: Server, extension: SiloExtServicer) -> None:
        self._network = network
        self._caller = caller
        self._server = server
        self._client = current_process()
        self._sent_up: asyncio.Queue[bytes] = asyncio.Queue()
        self._up: asyncio.Queue[bytes] = asyncio.Queue()
        self._sent_down: asyncio.Queue[bytes | Failed] = asyncio.Queue()
        self._down: asyncio.Queue[bytes | Failed] = asyncio.Queue()
        self._handler = start(server.process, self._serve(extension), name="Work")
        self._tasks = [
            outside(self._carry(self._sent_up, self._up), name="up"),
            outside(self._carry(self._sent_down, self._down), name="down"),
            outside(self._watch(), name="pings"),
        ]

    def write(self, request: ext.WorkRequest) -> None:
        self._sent_up.put_nowait(request.SerializeToString())

    async def read(self) -> ext.WorkResponse:
        """The next message.

        Raises:
            Failed: the stream has ended.
        """
        found = await self._down.get()
        if isinstance(found, Failed):
            self._down.put_nowait(found)
            raise found
        return ext.WorkResponse.FromString(found)

    async def _serve(self, extension: SiloExtServicer) -> None:
        try:
            await extension.Work(self._requests(), _StreamContext(self._sent_down))
        except Failed as refusal:
            self._sent_down.put_nowait(refusal)
        else:
            self._sent_down.put_nowait(Failed(grpc.StatusCode.OK, "the stream has ended"))

    async def _requests(self) -> AsyncIterator[ext.WorkRequest]:
        while True:
            yield ext.WorkRequest.FromString(await self._up.get())

    async def _carry(self, sent: "asyncio.Queue[Any]", received: "asyncio.Queue[Any]") -> None:
        while True:
            message = await sent.get()
            await self._network.delay(self._caller)
            received.put_nowait(message)

    async def _watch(self) -> None:
        """Break the connection when one of its ends is gone, or too long silent."""
        silent_s = 0.0
        while not self._handler.done() and silent_s < _PING_S:
            await asyncio.sleep(0.1)
            silent_s = silent_s + 0.1 if self._caller in self._network.cut_off else 0.0
            if self._server.process.is_dead or (self._client is not None and self._client.is_dead):
                break
        if self._handler.done():
            await asyncio.sleep(1.0)  # Its last words are on their way.
        self._handler.cancel()
        self._down.put_nowait(Failed(grpc.StatusCode.UNAVAILABLE, "connection lost"))
        for task in self._tasks:
            task.cancel()


class _StreamContext(_Context):
    """What the handler of a stream sees of its call."""

    def __init__(self, sent: "asyncio.Queue[bytes | Failed]") -> None:
        super().__init__(())
        self._sent = sent

    async def send_initial_metadata(self, metadata: object) -> None:
        pass

    async def write(self, response: ext.WorkResponse) -> None:
        self._sent.put_nowait(response.SerializeToString())
