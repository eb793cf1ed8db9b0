"""Asks gubernator, or what speaks its protocol, to judge rate limits.

Checks that come at about the same time travel together: the first one opens a window, and when
that ends, or a batch is full, the batch leaves as one call. Several calls may be under way; beyond
`CALLS_MAX` checks wait in line, and beyond `WAITING_MAX` they fail at once.

Guarantees:
    POSITION   a check gets the answer in its own place; an answer for fewer or more fails them all.
    ALONE      a caller that goes away changes nothing for the others. If its check was not sent
               yet it spends nothing.
    BOUNDED    every check ends within the time of two or three calls, each of which has a deadline.
    DISCREET   no error repeats names or keys of limits, which are tenants' own: errors are logged.
"""

import asyncio
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self  # Channels, stubs and messages of grpc are untyped.

import grpc

from silo.config import Config, GubernatorConfig, parse_url
from silo.errors import ErrorKind, SiloError
from silo.model.limit import RateLimit
from silo.shard.limiter import Answer, LimiterFailed
from silo.telemetry.logging import Log
from silo.wire.pb.gubernator import gubernator_pb2 as pb
from silo.wire.pb.gubernator import gubernator_pb2_grpc

CALLS_MAX = 16  # Under way at a time.
WAITING_MAX = 1_000  # Checks that were not sent yet.
BATCH_BYTES_MAX = 512 << 10  # Gubernator takes 1 MiB in one message.
_NUMBERS_BYTES = 64  # Of a check in a message, beside the texts.
_TOLD_CHARS_MAX = 200

log = Log("silo.rpc.gubernator")


class LimiterUnreachable(SiloError):
    """The rate limiter that is configured did not answer when the server started."""

    kind = ErrorKind.UNAVAILABLE


@dataclass(eq=False, slots=True)
class _Check:
    limit: RateLimit
    bytes: int  # About what it takes of a message.
    answer: asyncio.Future[Answer]


def limiter(config: Config) -> "Callable[[], GubernatorClient] | None":
    """How to open the rate limiter that is configured; None without one."""
    if config.gubernator.address is None:
        return None
    return functools.partial(GubernatorClient, config.gubernator)


class GubernatorClient:
    """A `RateLimiter`. Use it as a context, or `open` and `close` it."""

    def __init__(self, config: GubernatorConfig) -> None:
        assert config.address is not None, "without an address there is nobody to ask"
        self.address = config.address
        self._config = config
        self._channel: Any = None
        self._stub: Any = None
        self._line: dict[_Check, None] = {}  # Not sent yet, the first one first.
        self._window: asyncio.TimerHandle | None = None
        self._is_due = False  # The window has ended: only a free call is missing.
        self._calls: set[asyncio.Task[None]] = set()
        self._is_closed = False

    def __repr__(self) -> str:
        return f"GubernatorClient({self.address}, {len(self._line)} waiting, {len(self._calls)} calls)"

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def open(self) -> None:
        """Connect.

        Raises:
            LimiterUnreachable: it took longer than `connect_timeout_ms`; the text says what to do.
        """
        wait_ms = self._config.connect_timeout_ms
        self._channel = self._connected(wait_ms)
        self._stub = gubernator_pb2_grpc.V1Stub(self._channel)
        try:
            async with asyncio.timeout(wait_ms / 1000):
                await self._channel.channel_ready()
        except TimeoutError as error:
            await self.close()
            raise LimiterUnreachable(
                f"no rate limiter answers at {self.address} within {wait_ms} ms; start it, correct "
                "gubernator.address, or leave that out and have Silo judge rate limits itself"
            ) from error
        except BaseException:
            await self.close()
            raise
        log.info("rate limiter connected", limiter=self.address)

    def _connected(self, connect_timeout_ms: int) -> Any:
        address, is_tls = parse_url("gubernator.address", self.address)
        options = (
            # A limiter that comes back is found soon.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1_000),
            ("grpc.min_reconnect_backoff_ms", connect_timeout_ms),  # What one attempt to connect may take.
            # Notices a machine that vanished. Only while calls wait, or the service would hang up on us.
            ("grpc.keepalive_time_ms", 20_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.use_local_subchannel_pool", 1),
        )
        if is_tls:
            return grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(), options=options)
        return grpc.aio.insecure_channel(address, options=options)

    async def check(self, limit: RateLimit) -> Answer:
        """Spend `limit.hits` if they fit; see `RateLimiter`."""
        if self._is_closed:
            raise _closed()
        if len(self._line) >= WAITING_MAX:
            raise LimiterFailed("too many checks wait for the rate limiter", waiting=WAITING_MAX)
        size = len(limit.name.encode()) + len(limit.unique_key.encode()) + _NUMBERS_BYTES
        if size > BATCH_BYTES_MAX:
            raise LimiterFailed("name and key of a rate limit are too long to ask for it", bytes=size)
        check = _Check(limit, size, asyncio.get_running_loop().create_future())
        self._line[check] = None
        self._send()
        try:
            return await check.answer
        finally:
            self._line.pop(check, None)

    async def close(self) -> None:
        """Fail whoever waits, and hang up. Closing twice is harmless."""
        self._is_closed = True
        self._end_window()
        for check in self._line:
            _fail(check, _closed())
        self._line.clear()
        calls = list(self._calls)
        for call in calls:
            call.cancel()
        if calls:
            await asyncio.wait(calls)
        if self._channel is not None:
            await self._channel.close()

    # Batches

    def _send(self) -> None:
        """Send what is due and what fills a batch, as long as a call is free."""
        size_max = self._config.max_batch_size
        while self._line and len(self._calls) < CALLS_MAX and (self._is_due or len(self._line) >= size_max):
            self._call(self._next_batch())
        if not self._line:
            self._is_due = False
            self._end_window()
        elif self._window is None and not self._is_due:
            wait_s = self._config.coalesce_interval_ms / 1000
            self._window = asyncio.get_running_loop().call_later(wait_s, self._window_ended)

    def _next_batch(self) -> list[_Check]:
        batch: list[_Check] = []
        size = 0
        for check in self._line:
            size += check.bytes
            if len(batch) >= self._config.max_batch_size or (batch and size > BATCH_BYTES_MAX):
                break
            batch.append(check)
        for check in batch:
            del self._line[check]
        return batch

    def _window_ended(self) -> None:
        self._window = None
        self._is_due = True
        self._send()

    def _end_window(self) -> None:
        if self._window is not None:
            self._window.cancel()
            self._window = None

    def _call(self, batch: list[_Check]) -> None:
        task = asyncio.get_running_loop().create_task(self._ask(batch), name="check rate limits")
        self._calls.add(task)
        task.add_done_callback(self._ended)
        # Not in a `finally` of the task: one that is cancelled before it begins would skip it.
        task.add_done_callback(lambda _: _fail_all(batch, _closed))

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._calls.discard(task)
        if not self._is_closed:
            self._send()

    async def _ask(self, batch: Sequence[_Check]) -> None:
        try:
            request = pb.GetRateLimitsReq(requests=[_request(check.limit) for check in batch])
            response = await self._stub.GetRateLimits(request, timeout=self._config.request_timeout_ms / 1000)
        except grpc.aio.AioRpcError as error:
            code, told = error.code().name, _told(error.details() or "", batch)
            _fail_all(batch, lambda: LimiterFailed("the rate limiter did not answer", code=code, told=told))
            return
        except Exception as error:  # The outermost edge of this task: its callers are told.
            kind = type(error).__name__
            _fail_all(batch, lambda: LimiterFailed("the rate limiter could not be asked", error=kind))
            return
        answers = response.responses
        if len(answers) != len(batch):
            counts = {"asked": len(batch), "answered": len(answers)}
            _fail_all(batch, lambda: LimiterFailed("the rate limiter answered another question", **counts))
            return
        for check, answer in zip(batch, answers, strict=True):
            _answer(check, answer)


def _request(limit: RateLimit) -> Any:
    return pb.RateLimitReq(
        name=limit.name,
        unique_key=limit.unique_key,
        hits=limit.hits,
        limit=limit.limit,
        duration=limit.duration_ms,
        algorithm=limit.algorithm.name,
        behavior=limit.behavior,
    )


def _answer(check: _Check, answer: Any) -> None:
    if answer.error:
        told = _told(answer.error, [check])
        _fail(check, LimiterFailed("the rate limiter answered with an error", told=told))
    elif not check.answer.done():
        check.answer.set_result(Answer(answer.status == pb.UNDER_LIMIT, answer.reset_time))


def _fail(check: _Check, error: LimiterFailed) -> None:
    if not check.answer.done():
        check.answer.set_exception(error)


def _fail_all(batch: Sequence[_Check], error: Callable[[], LimiterFailed]) -> None:
    for check in batch:  # Each gets an error of its own, because raising one adds to it.
        _fail(check, error())


def _closed() -> LimiterFailed:
    return LimiterFailed("the rate limiter is not asked any more: the server stops")


def _told(text: str, batch: Sequence[_Check]) -> str:
    """What the service said, unless it may repeat a name or a key, plainly or in some quoted form."""
    words = {word for check in batch for word in (check.limit.name, check.limit.unique_key)}
    if any(word and (word in text or not _is_plain(word)) for word in words):
        return "(hidden: it may name a limit)"
    return text if len(text) <= _TOLD_CHARS_MAX else text[:_TOLD_CHARS_MAX] + "…"


def _is_plain(word: str) -> bool:
    return word.isascii() and word.isprintable() and not set(word) & set("\"'\\")
