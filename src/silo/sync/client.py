"""SiloClient: the client for code that waits, as in Django and Flask."""

import asyncio
import functools
import inspect
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from silo.client.client import SiloGRPCClient
from silo.client.enqueue_many import UNDER_WAY_MAX, NewJob
from silo.client.handle import JobHandle as AsyncJobHandle
from silo.client.router import EveryRpc, Server
from silo.client.router import Token as AsyncToken
from silo.client.tls import TlsOptions
from silo.client.types import ShardRouting
from silo.sync.background import BACKGROUND, Operation, Source
from silo.sync.handle import JobHandle

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

P = ParamSpec("P")
R = TypeVar("R")

Token = str | Callable[[], str]


def _blocking(
    method: Callable[Concatenate[SiloGRPCClient, P], Coroutine[Any, Any, R]],
) -> Callable[Concatenate["SiloClient", P], R]:
    """The same method, which waits for what it returns."""

    @functools.wraps(method)
    def call(self: "SiloClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.run(lambda client: _own(client, method)(*args, **kwargs))

    return call


def _enqueuing(
    method: Callable[Concatenate[SiloGRPCClient, P], Coroutine[Any, Any, AsyncJobHandle]],
) -> Callable[Concatenate["SiloClient", P], JobHandle]:
    """The same method, which waits and returns a blocking handle."""

    @functools.wraps(method)
    def call(self: "SiloClient", /, *args: P.args, **kwargs: P.kwargs) -> JobHandle:
        return self._blocking_handle(self.run(lambda client: _own(client, method)(*args, **kwargs)))

    return call


def _on_loop(
    method: Callable[Concatenate[SiloGRPCClient, P], R],
) -> Callable[Concatenate["SiloClient", P], R]:
    """The same method, which does not wait, called where the client lives."""

    @functools.wraps(method)
    def call(self: "SiloClient", /, *args: P.args, **kwargs: P.kwargs) -> R:
        async def perform(client: SiloGRPCClient) -> R:
            return _own(client, method)(*args, **kwargs)

        return self.run(perform)

    return call


def _own(client: SiloGRPCClient, method: Callable[Concatenate[SiloGRPCClient, P], R]) -> Callable[P, R]:
    """A method as this client has it, which may be of a subclass."""
    own: Callable[P, R] = getattr(client, method.__name__)
    return own


class SiloClient:
    """A client of a Silo cluster for code that waits. Safe to share by all threads of a process.

    Its methods are those of `silo.SiloGRPCClient`, which says what each one does and raises; those that
    workers use are left out. All clients of a process share one thread in the background, which the first
    call starts.

    Forks: a client that was made, or used, before a fork works in the child, with connections of its own; the
    parent connects again with its next call. A fork waits up to two seconds for calls that run in other
    threads and change something. If one takes longer, or if the process uses gRPC in other ways as well,
    clients in the child raise SiloClientError.

    A method that is called where an event loop runs would block it, and raises RuntimeError instead.

    Args:
        token: bearer token, or a function asked for one before every call, in a thread of its own.

    The other arguments are those of `SiloGRPCClient`.

    Raises:
        ConfigError: a file of `tls` is missing or unusable, or `servers` and `tls` contradict each other.
        TypeError: the function for tokens is asynchronous.
    """

    def __init__(
        self,
        servers: Server | Sequence[Server],
        *,
        token: Token | None = None,
        tls: bool | TlsOptions | None = None,
        use_tls: bool = False,
        shard_routing: ShardRouting | None = None,
        grpc_client_options: Mapping[str, object] | None = None,
        rpc_timeout_ms: int = 30_000,
        rpc_options: EveryRpc | None = None,
        address_map: Mapping[str, str] | None = None,
        meter: "Meter | None" = None,
    ) -> None:
        if inspect.iscoroutinefunction(token):
            raise TypeError("the token function of a SiloClient is a plain one, without async")

        def make() -> SiloGRPCClient:
            return SiloGRPCClient(
                servers,
                token=_asked_in_thread(token) if callable(token) else token,
                tls=tls,
                use_tls=use_tls,
                shard_routing=shard_routing,
                grpc_client_options=grpc_client_options,
                rpc_timeout_ms=rpc_timeout_ms,
                rpc_options=rpc_options,
                address_map=address_map,
                meter=meter,
            )

        make()  # What is wrong with the arguments is said here, and not by the first call.
        self._source = Source(make)
        self._name = repr(servers)

    @classmethod
    def of(cls, make: Callable[[], SiloGRPCClient]) -> "SiloClient":
        """A client over the one that `make` returns, called once in each process, by its first call."""
        client = cls.__new__(cls)
        client._source = Source(make)
        client._name = f"of {make!r}"
        return client

    def __repr__(self) -> str:
        return f"SiloClient({self._name}{', closed' if self._source.is_closed else ''})"

    def __enter__(self) -> "SiloClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls that run and later ones raise ClientClosed."""
        BACKGROUND.close(self._source)

    def run(self, operation: Operation[R], *, resumes: bool = False) -> R:
        """Run something with the asynchronous client, and wait for it.

            status = client.run(lambda silo: silo.get_job_status("order-17"))

        It runs on the event loop that all clients of the process share, so it must not block.

        Args:
            resumes: it changes nothing. A fork breaks it off and begins it again, and does not wait for it.

        Raises:
            ClientClosed: the client was closed.
            RuntimeError: an event loop runs in this thread.
            SiloClientError: this process was forked at a wrong moment, see `SiloClient`.
        """
        return BACKGROUND.run(self._source, operation, resumes=resumes)

    # Jobs

    enqueue = _enqueuing(SiloGRPCClient.enqueue)
    import_jobs = _blocking(SiloGRPCClient.import_jobs)
    get_job = _blocking(SiloGRPCClient.get_job)
    get_job_status = _blocking(SiloGRPCClient.get_job_status)
    get_job_result = _blocking(SiloGRPCClient.get_job_result)
    delete_job = _blocking(SiloGRPCClient.delete_job)
    cancel_job = _blocking(SiloGRPCClient.cancel_job)
    restart_job = _blocking(SiloGRPCClient.restart_job)
    expedite_job = _blocking(SiloGRPCClient.expedite_job)

    def enqueue_many(self, jobs: Iterable[NewJob]) -> Iterator[JobHandle]:
        """Enqueue jobs of an iterable of any length; a handle for each, in order, once it is durable.

        Two thousand jobs are under way at a time, and no more of the iterable is read than that. It is read
        in the thread that asks for the handles, whenever that asks for one. Raises like `enqueue` for the
        first job that is refused; jobs after it may have been enqueued.
        """
        under_way: deque[Future[AsyncJobHandle]] = deque()
        try:
            for job in jobs:
                enqueue = functools.partial(_enqueue, job=job)
                under_way.append(BACKGROUND.begin(self._source, enqueue))
                if len(under_way) >= UNDER_WAY_MAX:
                    yield self._blocking_handle(under_way.popleft().result())
            while under_way:
                yield self._blocking_handle(under_way.popleft().result())
        finally:
            for future in under_way:
                future.cancel()

    def handle(self, id: str, tenant: str | None = None) -> JobHandle:
        """A handle on a job; nothing is sent, and the job need not exist."""
        return JobHandle(self, id, tenant)

    def _blocking_handle(self, handle: AsyncJobHandle) -> JobHandle:
        return JobHandle(self, handle.id, handle.tenant)

    # Cluster

    query = _blocking(SiloGRPCClient.query)
    reset_shards = _blocking(SiloGRPCClient.reset_shards)
    refresh_topology = _blocking(SiloGRPCClient.refresh_topology)
    get_topology = _on_loop(SiloGRPCClient.get_topology)
    get_shard_for_tenant = _on_loop(SiloGRPCClient.get_shard_for_tenant)


async def _enqueue(client: SiloGRPCClient, job: NewJob) -> AsyncJobHandle:
    return await client.enqueue(**vars(job))


def _asked_in_thread(token: Callable[[], str]) -> AsyncToken:
    async def ask() -> str:
        return await asyncio.to_thread(token)

    return ask
