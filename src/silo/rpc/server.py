"""The gRPC server of a node."""

import functools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import grpc
import msgspec
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from silo.config import Config, ServerConfig
from silo.errors import SiloError
from silo.node.node import Node
from silo.rpc import ext_handlers, handlers
from silo.rpc.auth import Tokens, tokens_from
from silo.rpc.intake import all_handlers
from silo.rpc.tls import server_credentials

MESSAGE_BYTES_MAX = 128 << 20
DRAIN_S = 5.0
_REFLECTION = "grpc.reflection.v1.ServerReflection"
CALLS_WAITING_MAX = 1 << 16

HANDSHAKE_MS = 10_000
PING_MS = 6_000  # After that long without a word. Clients ping every 5 s: then there is nothing to do.
PING_TIMEOUT_MS = 3_500

_OPTIONS = (
    ("grpc.max_send_message_length", MESSAGE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_BYTES_MAX),
    # Existing clients ping every five seconds, idle or not; by default the server would hang up on them.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    # A worker's leases live as long as its stream, and that as long as its connection answers.
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.so_reuseport", 0),
    # By default calls beyond a thousand that were not begun are reset, not refused.
    ("grpc.server.max_pending_requests", CALLS_WAITING_MAX),
    ("grpc.server.max_pending_requests_hard_limit", CALLS_WAITING_MAX),
    # Who connects and says nothing must not keep the place for the two minutes that are the default.
    ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
)


class CannotListen(SiloError):
    """The address is taken or not ours."""


class Security(msgspec.Struct, frozen=True, kw_only=True):
    """Who may connect, who may call, and how much of it at a time."""

    tokens: Tokens | None = None  # None: everyone may do everything.
    credentials: grpc.ServerCredentials | None = None  # None: plaintext.
    max_connections: int = ServerConfig().max_connections
    max_streams_per_connection: int = ServerConfig().max_streams_per_connection


OPEN = Security()


def listener(config: Config) -> Callable[[str, Node], AbstractAsyncContextManager[str]]:
    """`listen`, as the configuration says.

    Raises:
        ConfigError: a file with a certificate or a key is missing or unusable.
    """
    security = Security(
        tokens=tokens_from(config),
        credentials=server_credentials(config.tls),
        max_connections=config.server.max_connections,
        max_streams_per_connection=config.server.max_streams_per_connection,
    )
    return functools.partial(listen, security=security)


def _add_reflection(server: grpc.aio.Server, services: tuple[str, ...]) -> None:
    """Serve reflection v1. The library has only v1alpha, whose messages are the same on the wire."""
    servicer = reflection.aio.ReflectionServicer(service_names=services)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    methods = {"ServerReflectionInfo": handler}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(_REFLECTION, methods),))


@asynccontextmanager
async def listen(
    addr: str, node: Node, *, security: Security = OPEN, extension: bool = True
) -> AsyncIterator[str]:
    """Serve `node` on `addr` while the block runs; yields the address with its real port.

    At the end new calls are refused at once, and running ones have `DRAIN_S` seconds. Without
    `extension` only `silo.v1` is served, as other servers do.

    Raises:
        CannotListen: the text names the address and the setting.
    """
    limits = (
        ("grpc.max_allowed_incoming_connections", security.max_connections),
        ("grpc.max_concurrent_streams", security.max_streams_per_connection),
    )
    server = grpc.aio.server(options=(*_OPTIONS, *limits))
    server.add_generic_rpc_handlers((all_handlers(node, security.tokens, extension=extension),))
    services = (handlers.SERVICE.full_name, ext_handlers.SERVICE.full_name)
    checks = health.aio.HealthServicer()
    for name in ("", *services):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    _add_reflection(server, (*services, health.SERVICE_NAME, _REFLECTION))
    try:
        if security.credentials is None:
            port = server.add_insecure_port(addr)
        else:
            port = server.add_secure_port(addr, security.credentials)
    except RuntimeError as error:
        raise CannotListen(
            f"cannot listen on {addr}: the address is in use or not available; "
            "choose another with server.grpc_addr"
        ) from error
    await server.start()
    try:
        yield f"{addr.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(DRAIN_S)
