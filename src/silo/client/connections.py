"""Channels to servers: at most one per address."""

import asyncio
import json
from collections.abc import Iterable, Mapping
from typing import Any  # The grpc stub is untyped.

import grpc

from silo.wire.pb.silo.v1 import silo_pb2_grpc

_CLOSE_GRACE_S = 30.0

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
    "grpc.keepalive_permit_without_calls": 1,
    "grpc.http2.max_pings_without_data": 0,
    "grpc.max_send_message_length": 128 << 20,
    "grpc.max_receive_message_length": 128 << 20,
    "grpc.max_metadata_size": 64 << 10,
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.min_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
    "grpc.enable_retries": 1,
    "grpc.service_config": json.dumps(_RETRY_EXHAUSTED),
}


class Connections:
    """Open channels in the order in which their addresses were learned."""

    def __init__(self, *, use_tls: bool, options: Mapping[str, object]) -> None:
        self._use_tls = use_tls
        self._options = list({**CHANNEL_DEFAULTS, **options}.items())
        self._open: dict[str, tuple[Any, Any]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._next = 0

    def addresses(self) -> list[str]:
        return list(self._open)

    def stub(self, address: str) -> Any:
        """The stub for an address, connecting lazily."""
        if address not in self._open:
            if self._use_tls:
                channel = grpc.aio.secure_channel(
                    address, grpc.ssl_channel_credentials(), options=self._options
                )
            else:
                channel = grpc.aio.insecure_channel(address, options=self._options)
            self._open[address] = (channel, silo_pb2_grpc.SiloStub(channel))
        return self._open[address][1]

    def any_address(self) -> str | None:
        """The next address in turn."""
        known = self.addresses()
        if not known:
            return None
        self._next += 1
        return known[(self._next - 1) % len(known)]

    def keep(self, addresses: Iterable[str]) -> None:
        """Close all others; calls that run on them may finish."""
        for address in set(self._open) - set(addresses):
            channel, _ = self._open.pop(address)
            task = asyncio.get_running_loop().create_task(channel.close(_CLOSE_GRACE_S))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        channels = [channel for channel, _ in self._open.values()]
        self._open.clear()
        for task in list(self._closing):
            task.cancel()
        await asyncio.gather(*(channel.close() for channel in channels))
