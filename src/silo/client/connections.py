"""Channels to servers: at most one per address.

A channel that is no longer wanted is closed when its last call has ended, never under a call:
to close a channel cancels what runs on it, which would look as if the caller had been cancelled.
Every call has a deadline, so an unwanted channel does not stay for long.
"""

import asyncio
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any  # The grpc stub is untyped.

import grpc

from silo.client.tls import Tls
from silo.wire.pb.silo.ext.v1 import ext_pb2_grpc
from silo.wire.pb.silo.v1 import silo_pb2_grpc

_RETRY_EXHAUSTED = {
    "methodConfig": [
        {
            "name": [{"service": "silo.v1.Silo"}],
            "retryPolicy": {
                "maxAttempts": 5,
                "initialBackoff": "0.1s",
                "maxBackoff": "5s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["RESOURCE_EXHAUSTED"],
            },
        }
    ]
}

CHANNEL_DEFAULTS: Mapping[str, object] = {
    "grpc.keepalive_time_ms": 5000,
    "grpc.keepalive_timeout_ms": 1000,
    # What counts in newer versions of gRPC, which look at the line above no more: without this one a
    # server that vanished is not noticed, and calls to it wait for their deadlines.
    "grpc.http2.ping_timeout_ms": 5000,
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.max_send_message_length": 128 << 20,
    "grpc.max_receive_message_length": 128 << 20,
    "grpc.max_metadata_size": 64 << 10,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 5000,  # How long one try to connect may take, whatever its name says.
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.enable_retries": 1,
    "grpc.service_config": json.dumps(_RETRY_EXHAUSTED),
}


class _Connection:
    """One channel and the calls that run on it."""

    def __init__(self, channel: Any) -> None:
        self.channel = channel
        self.stub = silo_pb2_grpc.SiloStub(channel)
        self.extension = ext_pb2_grpc.SiloExtStub(channel)
        self.calls = 0


class Connections:
    """Open channels in the order in which their addresses were learned."""

    def __init__(self, *, tls: Tls | None, options: Mapping[str, object]) -> None:
        """Without `tls` they speak plaintext."""
        self._tls = tls
        of_tls = tls.channel_options if tls is not None else {}
        self._options = list({**CHANNEL_DEFAULTS, **of_tls, **options}.items())
        self._open: dict[str, _Connection] = {}
        self._unwanted: set[_Connection] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._next = 0

    def addresses(self) -> list[str]:
        return list(self._open)

    def add(self, address: str) -> None:
        """Know an address from now on. The channel connects with its first call."""
        if address in self._open:
            return
        if self._tls is not None:
            channel = grpc.aio.secure_channel(address, self._tls.credentials, options=self._options)
        else:
            channel = grpc.aio.insecure_channel(address, options=self._options)
        self._open[address] = _Connection(channel)

    @contextmanager
    def use(self, address: str) -> Iterator[_Connection]:
        """The connection to an address. Its channel stays open while the block runs."""
        self.add(address)
        connection = self._open[address]
        connection.calls += 1
        try:
            yield connection
        finally:
            connection.calls -= 1
            self._close_if_done(connection)

    async def reconnected(self, address: str) -> None:
        """Return when a channel that had lost its server has it again; for any other, never."""
        connection = self._open.get(address)
        if connection is not None and connection.channel.get_state() is not grpc.ChannelConnectivity.READY:
            with self.use(address):
                state = connection.channel.get_state(try_to_connect=True)
                while state is not grpc.ChannelConnectivity.READY:
                    await connection.channel.wait_for_state_change(state)
                    state = connection.channel.get_state(try_to_connect=True)
            return
        await asyncio.get_running_loop().create_future()

    def any_address(self) -> str | None:
        """The next address in turn."""
        known = self.addresses()
        if not known:
            return None
        self._next += 1
        return known[(self._next - 1) % len(known)]

    def keep(self, addresses: Iterable[str]) -> None:
        """Forget all others; calls that run on them come to their end."""
        for address in set(self._open) - set(addresses):
            connection = self._open.pop(address)
            self._unwanted.add(connection)
            self._close_if_done(connection)

    def _close_if_done(self, connection: _Connection) -> None:
        if connection.calls or connection not in self._unwanted:
            return
        self._unwanted.discard(connection)
        task = asyncio.get_running_loop().create_task(connection.channel.close(), name="close channel")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """Close all channels. Calls that run on them raise CancelledError."""
        connections = [*self._open.values(), *self._unwanted]
        self._open.clear()
        self._unwanted.clear()
        await asyncio.gather(*self._closing, *(connection.channel.close() for connection in connections))
