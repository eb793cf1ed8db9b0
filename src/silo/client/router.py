"""From a call to the server that can answer it: topology, redirects, retries, tokens."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import Context
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, cast  # The grpc stub is untyped.

import grpc

from silo.client import tracing
from silo.client.backoff import Backoff
from silo.client.batching import Batcher
from silo.client.connections import Connections
from silo.client.errors import (
    ClientClosed,
    ClusterUnreachable,
    SiloClientError,
    TlsError,
    from_status,
    is_connectivity_error,
    is_wrong_shard,
)
from silo.client.tls import Tls, TlsOptions, is_loopback, plaintext_objection
from silo.client.topology import ShardLocation, Topology, bare_address, split_scheme
from silo.client.types import RpcOptions, ShardRouting
from silo.errors import ConfigError
from silo.wire.pb.silo.v1 import silo_pb2 as pb

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

log = logging.getLogger(__name__)

Token = str | Callable[[], Awaitable[str]]
Server = str | tuple[str, int]
EveryRpc = RpcOptions | Callable[[], RpcOptions | None]
_AS_USUAL = RpcOptions()
_PLAIN_S = 60.0  # Until a server that did not know the extension is asked again.
_EXTENSION = frozenset({"EnqueueMany", "WatchJob"})
_OWNER_KEY = "x-silo-shard-owner-addr"
_UNREACHABLE = "Failed to refresh cluster topology from any server"


class Call:
    """One operation, through all of its tries."""

    def __init__(
        self,
        method: str,
        request: Any,
        *,
        job_id: str | None = None,
        task_id: str | None = None,
        tenant: str | None = None,
        shard: str | None = None,
        server_index: int | None = None,
        is_tenant_routed: bool = True,
        is_enqueue: bool = False,
        parts: Sequence[Any] | None = None,
    ) -> None:
        """`parts`: the messages that name the shard, if it is not the request itself."""
        self.method = method
        self.request = request
        self.job_id = job_id
        self.task_id = task_id
        self.tenant = tenant
        self.shard = shard
        self.server_index = server_index
        self.is_tenant_routed = is_tenant_routed
        self.is_enqueue = is_enqueue
        self._parts = (request,) if parts is None else parts
        self.metadata: tuple[tuple[str, str], ...] = ()
        self.wait_s = 0.0  # How long the server may take beyond the usual.
        self.is_ambiguous = False  # A try was not answered: it may have taken effect.
        self.give_up: asyncio.Event | None = None
        self.was_insecure = False  # A try failed because of TLS, and the topology was asked for since.

    @property
    def gives_up(self) -> bool:
        return self.give_up is not None and self.give_up.is_set()

    def name_shard(self, shard_id: str) -> None:
        self.shard = shard_id
        for part in self._parts:
            part.shard = shard_id

    def error_from(self, error: grpc.aio.AioRpcError) -> SiloClientError:
        mapped = from_status(
            error, job_id=self.job_id, task_id=self.task_id, tenant=self.tenant, is_enqueue=self.is_enqueue
        )
        mapped.after_retry = self.is_ambiguous
        return mapped


class Router:
    """Sends calls to the servers of one cluster. Its arguments are those of `SiloGRPCClient`."""

    def __init__(
        self,
        servers: Server | Sequence[Server],
        *,
        token: Token | None,
        tls: bool | TlsOptions | None,
        routing: ShardRouting,
        channel_options: Mapping[str, object],
        rpc_timeout_ms: int,
        rpc_options: EveryRpc | None,
        address_map: Mapping[str, str],
        meter: "Meter | None",
    ) -> None:
        given = _addresses(servers)
        if not given:
            raise ValueError("servers names no server")
        self.servers = [bare_address(address) for address in given]
        if rpc_timeout_ms <= 0:
            raise ValueError(f"rpc_timeout_ms must be positive, not {rpc_timeout_ms}")
        self._token = token
        self._routing = routing
        self._address_map = dict(address_map)
        options = _tls_options(tls, [*given, *self._address_map.values()])
        self._tls = None if options is None else Tls(options)
        self._connections = Connections(tls=self._tls, options=channel_options)
        self._is_token_safe_at: set[str] = set()
        self._warned_of_token = False
        self._timeout_s = rpc_timeout_ms / 1000
        self._rpc_options = rpc_options
        self._rng = Random()
        self._topology = Topology()
        self._redirects: dict[str, str] = {}
        self._batchers: dict[str, Batcher] = {}
        self._plain_until: dict[str, float] = {}  # Servers that only speak `silo.v1`, as of a while ago.
        self._watchers: dict[Callable[[], None], None] = {}
        self._first_refresh: asyncio.Task[None] | None = None
        self._refresh: asyncio.Task[None] | None = None
        self._background: asyncio.Task[None] | None = None
        self._is_closed = False
        self.wrong_shard_retries = 0  # Calls repeated because a server did not have the shard any more.
        self._count_wrong_shard = tracing.wrong_shard_counter(meter)

    def __repr__(self) -> str:
        return f"Router({self.servers}, {len(self._topology.shards)} shards known)"

    @property
    def topology(self) -> Topology:
        """The shards known at the moment."""
        return self._topology

    async def close(self) -> None:
        """Close all connections; calls that run and later ones raise ClientClosed."""
        self._is_closed = True
        for task in (self._background, self._first_refresh, self._refresh):
            if task is not None:
                task.cancel()
                await asyncio.wait({task})
        await self._connections.close()

    async def reset_shards(self) -> None:
        """Delete everything on every server, which must be in development mode."""
        await self.ensure_topology()
        for address in self._topology.addresses():
            try:
                await self._invoke(address, "ResetShards", pb.ResetShardsRequest())
            except grpc.aio.AioRpcError as error:
                raise from_status(error) from error
        self._topology = Topology()
        self._redirects.clear()

    async def refresh_topology(self) -> None:
        """Ask the servers, one after another, who owns which shard.

        Raises:
            ClusterUnreachable: none answered; what was known stays in use.
            TlsError: none answered, because of TLS.
        """
        known = self._connections.addresses()
        failures: list[tuple[str, Exception]] = []
        for address in [*known, *(server for server in self.servers if server not in known)]:
            try:
                response = await self._invoke(
                    address,
                    "GetClusterInfo",
                    pb.GetClusterInfoRequest(),
                    timeout_s=self._routing.topology_refresh_timeout_ms / 1000,
                )
            except ClientClosed:
                raise
            except Exception as error:  # Whatever is wrong with this server: the next one may be well.
                failures.append((address, error))
                if address not in known:
                    self._connections.keep(kept for kept in self._connections.addresses() if kept != address)
                continue
            self.check_open()
            self._adopt(response)
            return
        address, failure = max(reversed(failures), key=_weight)
        if isinstance(failure, TlsError) and all(isinstance(error, TlsError) for _, error in failures):
            before = f"{_UNREACHABLE}: "
            raise TlsError(address, failure.reason, before=before, may_recover=False) from failure
        raise ClusterUnreachable(
            f"{_UNREACHABLE}: {address}: {_summary(failure)}", may_recover=not _is_final((address, failure))
        ) from failure

    def _adopt(self, response: pb.GetClusterInfoResponse) -> None:
        self._topology = Topology.of(
            ShardLocation(owner.shard_id, self._mapped(owner.grpc_addr), owner.range_start, owner.range_end)
            for owner in response.shard_owners
        )
        self._redirects.clear()
        addresses = self._topology.addresses()
        for address in addresses:
            self._connections.add(address)
        self._connections.keep(addresses)
        self._batchers = {name: kept for name, kept in self._batchers.items() if name in addresses}
        for callback in list(self._watchers):
            callback()
        if self._background is None and self._routing.topology_refresh_interval_ms:
            # In no context: the call that happens to be the first is not what later refreshes are for.
            self._background = asyncio.get_running_loop().create_task(
                self._refresh_forever(), context=Context()
            )

    def watch_topology(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call `callback` whenever servers told who owns what; returns how to stop it."""
        self._watchers[callback] = None
        return lambda: self._watchers.pop(callback, None) and None

    def _mapped(self, address: str) -> str:
        return bare_address(self._address_map.get(address, address))

    async def _refresh_forever(self) -> None:
        intervals = 1  # Two, once a look has found what was known: a thousand idle clients are a load.
        while True:
            await asyncio.sleep(intervals * self._routing.topology_refresh_interval_ms / 1000)
            before = self._topology
            try:
                await self.refresh_topology()
            except ClusterUnreachable as error:
                log.warning("[SiloGRPCClient] Failed to refresh topology: %s", error)
            intervals = 2 if self._topology == before and self._topology.is_known else 1

    async def ensure_topology(self) -> None:
        """Load the topology once; callers that come meanwhile share the call."""
        if self._topology.is_known:
            return
        if self._first_refresh is None or self._first_refresh.done():
            self._first_refresh = asyncio.get_running_loop().create_task(self.refresh_topology())
            self._first_refresh.add_done_callback(_note_exception)
        await self._shared(self._first_refresh)

    async def _shared(self, refresh: asyncio.Task[None]) -> None:
        """Wait for a refresh that others wait for, too."""
        try:
            await asyncio.shield(refresh)
        except asyncio.CancelledError:
            if not _is_being_cancelled():
                self.check_open()
            raise

    def check_open(self) -> None:
        if self._is_closed:
            raise ClientClosed("the client is closed")

    # One call

    async def send(self, call: Call) -> Any:
        """Send until it is answered, following redirects and topology changes."""
        backoff = self.backoff()
        unreachable: ClusterUnreachable | None = None
        while True:
            try:
                return await self._send_once(call)
            except grpc.aio.AioRpcError as error:
                is_lost = is_connectivity_error(error)
                failure: SiloClientError = call.error_from(error)
                if is_lost and unreachable is not None:
                    failure = ClusterUnreachable(f"{_UNREACHABLE}: {_summary(error)}")
                failure.__cause__ = error
                if not (is_lost or is_wrong_shard(error)) or backoff.is_used_up or call.gives_up:
                    raise failure from error
                self.check_open()
                call.is_ambiguous |= is_lost
                if not is_lost:
                    self._note_wrong_shard()
                unreachable = None if self._follow_redirect(call, error) else await self._try_to_refresh()
            except ClusterUnreachable as error:
                failure = error
                if backoff.is_used_up or not error.may_recover or call.was_insecure:
                    raise
                if isinstance(error, TlsError):
                    # The address may be another's by now, and the shard somewhere else: look once.
                    call.was_insecure = call.is_ambiguous = True
                    await self.refresh_topology()
            wait_s = backoff.next_wait_s()
            if wait_s is None:
                raise failure
            await self._pause(call, wait_s)
            if call.gives_up:
                raise failure

    def backoff(self) -> Backoff:
        """The waits of a call that begins now."""
        return Backoff(self._routing, self._rng)

    async def looked_again(self, backoff: Backoff) -> bool:
        """Look for owners, and wait, before what a server refused inside of its answer is sent again.

        False, and at once, when `backoff` has no try left.
        """
        if backoff.is_used_up:
            return False
        self._note_wrong_shard()
        await self._try_to_refresh()
        wait_s = backoff.next_wait_s()
        if wait_s is None:
            return False
        await asyncio.sleep(wait_s)
        return True

    def _note_wrong_shard(self) -> None:
        self.wrong_shard_retries += 1
        self._count_wrong_shard()

    async def _pause(self, call: Call, seconds: float) -> None:
        """Wait before the next try: less when its server comes back, or when nobody wants it any more."""
        sooner: list[asyncio.Task[Any]] = []
        sooner.append(asyncio.ensure_future(self._connections.reconnected(self._address_for(call))))
        if call.give_up is not None:
            sooner.append(asyncio.ensure_future(call.give_up.wait()))
        try:
            await asyncio.wait(sooner, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in sooner:
                task.cancel()
                task.add_done_callback(_note_exception)

    async def _try_to_refresh(self) -> ClusterUnreachable | None:
        # Calls that lost the same server at the same time ask once: thousands may have been under way.
        if self._refresh is None or self._refresh.done():
            self._refresh = asyncio.get_running_loop().create_task(self.refresh_topology())
            self._refresh.add_done_callback(_note_exception)
        try:
            await self._shared(self._refresh)
        except ClusterUnreachable as error:
            if not error.may_recover:
                raise
            return error
        return None

    async def _send_once(self, call: Call) -> Any:
        self.check_open()
        if call.is_tenant_routed or call.shard is None:
            await self.ensure_topology()
        if call.is_tenant_routed:
            call.name_shard(self._topology.locate(call.tenant).shard_id)
        elif call.shard is not None:
            call.name_shard(call.shard)
        address = self._address_for(call)
        if call.method == "Enqueue" and self._may_batch(address):
            try:
                return await self._batcher(address).enqueue(call.request)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                    self.note_plain(address)
                elif error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise  # What is too much at the moment is sent again by the channel, one by one.
        return await self._invoke(
            address, call.method, call.request, wait_s=call.wait_s, metadata=call.metadata
        )

    def _may_batch(self, address: str) -> bool:
        """Whether enqueues may travel together: not those that each bring metadata of their own."""
        return self._rpc_options is None and not self.is_plain(address)

    def _batcher(self, address: str) -> Batcher:
        batcher = self._batchers.get(address)
        if batcher is None:
            batcher = self._batchers[address] = Batcher(partial(self._invoke, address, "EnqueueMany"))
        return batcher

    async def _invoke(
        self,
        address: str,
        method: str,
        request: Any,
        *,
        timeout_s: float | None = None,
        wait_s: float = 0.0,
        metadata: tuple[tuple[str, str], ...] = (),
    ) -> Any:
        """One try at one server, with `timeout_s`, or with the usual deadline and `wait_s` on top."""
        options = self._options_now()
        if timeout_s is None:
            usual_s = self._timeout_s if options.timeout_ms is None else options.timeout_ms / 1000
            timeout_s = usual_s + wait_s
        headers = await self._headers(address, options, metadata)
        self.check_open()
        with self._connections.use(address) as connection:
            stub = connection.extension if method in _EXTENSION else connection.stub
            try:
                return await getattr(stub, method)(request, timeout=timeout_s, metadata=headers)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    await self._check_tls(address, error)
                raise
            except (asyncio.CancelledError, grpc.aio.UsageError):
                # A channel that is closed under a call cancels it, although nobody cancelled the caller.
                if not _is_being_cancelled():
                    self.check_open()
                raise

    def _options_now(self) -> RpcOptions:
        given = self._rpc_options
        return (given() if callable(given) else given) or _AS_USUAL

    @asynccontextmanager
    async def stream(self, address: str, method: str) -> AsyncIterator[Any]:
        """A streaming call of the extension at one server. It ends with the block."""
        headers = await self._headers(address, self._options_now(), ())
        self.check_open()
        with self._connections.use(address) as connection:
            call = getattr(connection.extension, method)(metadata=headers)
            try:
                yield call
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    await self._check_tls(address, error)
                raise
            except (asyncio.CancelledError, grpc.aio.UsageError):
                if not _is_being_cancelled():
                    self.check_open()
                raise
            finally:
                call.cancel()
                await call.code()  # Until it has ended: a loop that closes first would be told of it.

    def is_plain(self, address: str) -> bool:
        """Whether a server only speaks `silo.v1`, as far as is known; it is asked again now and then."""
        until_s = self._plain_until.get(address)
        return until_s is not None and until_s > asyncio.get_running_loop().time()

    def note_plain(self, address: str) -> None:
        """A server did not know a call of the extension."""
        self._plain_until[address] = asyncio.get_running_loop().time() + _PLAIN_S

    def owner_of(self, shard_id: str) -> str | None:
        """The address of the server that has a shard, as far as is known."""
        return self._redirects.get(shard_id) or self._topology.address_of(shard_id)

    async def _headers(
        self, address: str, options: RpcOptions, metadata: tuple[tuple[str, str], ...]
    ) -> tuple[tuple[str, str | bytes], ...]:
        """All that goes along with one try: made anew each time, because it speaks of one moment."""
        headers = {key.lower(): value for key, value in options.metadata.items()}
        tracing.inject(headers)
        headers.update(metadata)
        token = await self._current_token()
        if token:
            headers["authorization"] = f"Bearer {token}"
            if self._tls is None:
                self._note_plaintext_token(address)
        return tuple(headers.items())

    async def _check_tls(self, address: str, error: grpc.aio.AioRpcError) -> None:
        """Raise TlsError if a call was not answered because of TLS."""
        ask = plaintext_objection if self._tls is None else self._tls.objection
        objection = await ask(address, error.details() or "")
        if objection is not None:
            raise TlsError(address, objection) from error

    def _note_plaintext_token(self, address: str) -> None:
        """Warn, once, before a token goes over a network in the clear. Existing clients do it, too."""
        if self._warned_of_token or address in self._is_token_safe_at:
            return
        if is_loopback(address):
            self._is_token_safe_at.add(address)
            return
        self._warned_of_token = True
        log.warning(
            "[SiloGRPCClient] The token is sent to %s without TLS, readable by everyone on the way; "
            "write https:// before the address, or give tls",
            address,
        )

    def _address_for(self, call: Call) -> str:
        if call.shard is not None:
            owner = self.owner_of(call.shard)
            if owner is not None:
                return owner
        elif call.server_index is not None:
            known = self._connections.addresses()
            if known:
                return known[call.server_index % len(known)]
        return self._connections.any_address() or self.servers[0]

    def _follow_redirect(self, call: Call, error: grpc.aio.AioRpcError) -> bool:
        if call.shard is None or not is_wrong_shard(error):
            return False
        for key, value in error.trailing_metadata() or ():
            if key == _OWNER_KEY and value:
                self._redirects[call.shard] = self._mapped(str(value))
                return True
        return False

    async def _current_token(self) -> str | None:
        if isinstance(self._token, str | None):
            return self._token
        try:
            async with asyncio.timeout(self._timeout_s) as scope:
                return await self._token()
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise SiloClientError(f"the token function did not return within {self._timeout_s} s") from error


def _addresses(servers: Server | Sequence[Server]) -> list[str]:
    if isinstance(servers, str) or (len(servers) == 2 and isinstance(servers[1], int)):
        servers = [cast(Server, servers)]  # One server, not a list of them.
    return [
        server if isinstance(server, str) else f"{server[0]}:{server[1]}"
        for server in cast(Sequence[Server], servers)
    ]


def _tls_options(tls: bool | TlsOptions | None, addresses: Sequence[str]) -> TlsOptions | None:
    """What `tls` and the schemes of the addresses come to; None is plaintext.

    Raises:
        ConfigError: they contradict each other.
    """
    schemes = {address: split_scheme(address)[1] for address in addresses}
    secure = next((address for address, asks_for_tls in schemes.items() if asks_for_tls), None)
    plain = next((address for address, asks_for_tls in schemes.items() if asks_for_tls is False), None)
    if secure is not None and plain is not None:
        raise ConfigError(f"{secure} asks for TLS and {plain} for none; a client has one way for all servers")
    if secure is not None and tls is False:
        raise ConfigError(f"{secure} asks for TLS, but tls is off; leave one of them out")
    if plain is not None and tls:
        raise ConfigError(f"{plain} asks for plaintext, but tls is given; write https://, or no scheme")
    if isinstance(tls, TlsOptions):
        return tls
    return TlsOptions() if tls or secure is not None else None


def _is_final(failure: tuple[str, Exception]) -> bool:
    """Whether waiting cannot help: the cluster is there and refuses us, or no call was made at all."""
    _, error = failure
    if isinstance(error, TlsError):
        return False  # It says nothing of the other servers.
    if not isinstance(error, grpc.aio.AioRpcError):
        return True
    return error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)


def _weight(failure: tuple[str, Exception]) -> int:
    """How much one of several failures says about why no server answered."""
    return 2 if _is_final(failure) else isinstance(failure[1], TlsError)


def _summary(error: Exception) -> str:
    if isinstance(error, TlsError):
        return error.reason
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return f"{type(error).__name__}: {error}"


def _is_being_cancelled() -> bool:
    """Whether somebody cancelled this task, so that a CancelledError must pass through."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _note_exception(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()  # Every caller that still waits gets it; none may be left.
