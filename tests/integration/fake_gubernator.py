"""A server of `pb.gubernator.V1` on a real loopback socket that answers what a test tells it to."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any  # Requests, answers and servers are untyped.

import grpc

from silo.wire.pb.gubernator import gubernator_pb2 as pb
from silo.wire.pb.gubernator import gubernator_pb2_grpc


@dataclass(frozen=True)
class Status:
    """An answer to a whole call that is an error."""

    code: grpc.StatusCode
    text: str = ""


Judge = Callable[[Any], Any]
"""From a RateLimitReq to the RateLimitResp for it."""

Answer = Judge | Status | Any
"""To a whole call: a judge of each request in it, an error, or a GetRateLimitsResp as it is."""


def under(request: Any = None) -> Any:
    return pb.RateLimitResp(status=pb.UNDER_LIMIT)


def over(reset_at_ms: int = 0) -> Judge:
    return lambda _: pb.RateLimitResp(status=pb.OVER_LIMIT, reset_time=reset_at_ms)


def wrong(text: str) -> Judge:
    """An answer whose status says that all is well, and whose error does not."""
    return lambda _: pb.RateLimitResp(status=pb.UNDER_LIMIT, error=text)


@dataclass
class FakeGubernator:
    """What it was asked, and what it will answer: first what a test gave it, then as `judge` says."""

    address: str = ""
    judge: Judge = under
    calls: list[list[Any]] = field(default_factory=list)  # The requests of each call, as they came.
    in_flight: int = 0
    credentials: Any = None
    _answers: deque[Answer] = field(default_factory=deque)
    _may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    _server: Any = None

    @property
    def asked(self) -> list[str]:
        """The keys of all requests, in order."""
        return [request.unique_key for call in self.calls for request in call]

    def answer(self, *answers: Answer) -> None:
        """Answer the next calls like this, one after another."""
        self._answers.extend(answers)

    def hold(self) -> None:
        """Answer nobody until `release`."""
        self._may_answer.clear()

    def release(self) -> None:
        self._may_answer.set()

    async def GetRateLimits(self, request: Any, context: Any) -> Any:  # Named by the protocol.
        self.calls.append(list(request.requests))
        answer = self._answers.popleft() if self._answers else self.judge
        self.in_flight += 1
        try:
            await self._may_answer.wait()
        finally:
            self.in_flight -= 1
        if isinstance(answer, Status):
            await context.abort(answer.code, answer.text)
        if callable(answer):
            return pb.GetRateLimitsResp(responses=[answer(one) for one in request.requests])
        return answer

    def HealthCheck(self, request: Any, context: Any) -> Awaitable[Any]:
        raise AssertionError("nobody asks")

    async def start(self) -> None:
        """Listen, at the same address as before if it listened before."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        gubernator_pb2_grpc.add_V1Servicer_to_server(self, server)
        address = self.address or "127.0.0.1:0"
        if self.credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, self.credentials)
        self.address = f"127.0.0.1:{port}"
        self._server = server
        await server.start()

    async def stop(self) -> None:
        await self._server.stop(None)


@asynccontextmanager
async def fake_gubernator(*, credentials: Any = None) -> AsyncIterator[FakeGubernator]:
    """A fake limiter that runs while the block runs."""
    limiter = FakeGubernator(credentials=credentials)
    limiter.release()
    await limiter.start()
    try:
        yield limiter
    finally:
        await limiter.stop()
