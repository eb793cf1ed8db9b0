"""A network between clients and one server: it delays, loses and repeats messages, and is cut at times.

Requests and answers travel as the bytes of their protobuf messages, and the real handlers answer them.
"""

import asyncio
from random import Random
from typing import Any  # Messages and contexts of grpc are untyped.

import grpc
import msgspec

from silo.rpc.handlers import SiloServicer
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.simulation.loop import Process, start


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
