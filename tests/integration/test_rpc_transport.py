"""What goes over a connection beside calls: pings, to be answered whatever the server does, and headers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any  # Stubs of grpc are untyped.

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from silo.wire.pb.silo.v1 import silo_pb2 as pb
from silo.wire.pb.silo.v1 import silo_pb2_grpc
from tests.builders import until
from tests.integration.rpc_server import RpcServer, refusal, rpc_server

PREFACE_BYTES = 24
PING, GOAWAY, ACK = 6, 7, 1
WAIT_S = 20.0


class Wire:
    """A relay to a server that counts what goes through it. In threads: event loops may be busy."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._changed = threading.Condition()
        self.connections = 0
        self.pongs = 0  # Pings of clients that the server answered.
        self.was_sent_away = False  # The server told a client to go.

    def wait_for_pongs(self, count: int) -> bool:
        """Whether that many more pings are answered soon. Blocks."""
        with self._changed:
            enough = self.pongs + count
            return self._changed.wait_for(lambda: self.pongs >= enough, WAIT_S)

    def start(self) -> None:
        self._threads[0].start()

    def stop(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for end in self._sockets:
            end.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            with self._changed:
                self.connections += 1
            for source, target, skip in ((client, server, PREFACE_BYTES), (server, client, 0)):
                thread = threading.Thread(target=self._relay, args=(source, target, skip))
                self._threads.append(thread)
                thread.start()

    def _relay(self, source: socket.socket, target: socket.socket, skip: int) -> None:
        try:
            with source.makefile("rb") as stream:
                target.sendall(stream.read(skip))
                while head := stream.read(9):
                    body = stream.read(int.from_bytes(head[:3]))
                    if not skip:
                        self._count(kind=head[3], flags=head[4])
                    target.sendall(head + body)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            return

    def _count(self, *, kind: int, flags: int) -> None:
        with self._changed:
            self.pongs += kind == PING and flags == ACK
            self.was_sent_away |= kind == GOAWAY
            self._changed.notify_all()


@contextmanager
def wire(server: RpcServer) -> Iterator[Wire]:
    relay = Wire(server.address)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()


def pinging(address: str) -> grpc.aio.Channel:
    """A channel that pings as existing clients do, idle or not, only as often as gRPC lets it."""
    options = (
        ("grpc.keepalive_time_ms", 1_000),
        ("grpc.keepalive_timeout_ms", 1_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.use_local_subchannel_pool", 1),
    )
    return grpc.aio.insecure_channel(address, options=options)


@pytest.mark.spec("W-CC-1")
async def test_a_client_that_is_idle_and_pings_is_never_sent_away() -> None:
    """Each second for 5 s, instead of every 5 s for 30 s; by default the third ping is one too many."""
    async with rpc_server() as server:
        with wire(server) as relay:
            async with pinging(relay.address) as channel:
                stub = silo_pb2_grpc.SiloStub(channel)
                await stub.GetClusterInfo(pb.GetClusterInfoRequest())
                await until(lambda: relay.pongs >= 5 or relay.was_sent_away, timeout_s=WAIT_S)
                assert channel.get_state() is grpc.ChannelConnectivity.READY
                await stub.GetClusterInfo(pb.GetClusterInfoRequest())
                assert not relay.was_sent_away
                assert relay.connections == 1


@pytest.mark.spec("W-CC-2")
async def test_a_busy_handler_keeps_no_ping_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Busy for 3 s, in which a client pings each second and not every 5 s. One late answer is too late."""
    async with rpc_server() as server:
        shard_map = server.node.shard_map
        answered = []

        def busy() -> Any:
            answered.append(relay.wait_for_pongs(3))  # Nothing else on this event loop moves.
            return shard_map()

        with wire(server) as relay:
            async with pinging(relay.address) as channel:
                stub = silo_pb2_grpc.SiloStub(channel)
                await stub.GetNodeInfo(pb.GetNodeInfoRequest())
                monkeypatch.setattr(server.node, "shard_map", busy)
                assert (await stub.GetClusterInfo(pb.GetClusterInfoRequest())).num_shards == 1
                assert answered == [True]
                assert relay.connections == 1


TRACES = [
    (("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), ("tracestate", "a=1,b=2")),
    (("traceparent", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),),
    (("traceparent", "00-00000000000000000000000000000000-0000000000000000-00"),),
    (("traceparent", ""), ("tracestate", "")),
    (("traceparent", "no trace"), ("tracestate", "=,=,")),
    (("traceparent", "00-" + "0" * 4000), ("tracestate", "x" * 3000)),
    (("traceparent", "00-a"), ("traceparent", "00-b"), ("baggage", ";;;")),
]


@pytest.mark.spec("W-CC-96")
@pytest.mark.parametrize("metadata", TRACES, ids=lambda metadata: metadata[0][1][:20] or "empty")
async def test_the_headers_of_a_trace_right_or_wrong_harm_no_call(metadata: Any) -> None:
    """There are no spans yet that a trace could go on in."""
    async with rpc_server() as server:
        request = pb.EnqueueRequest(shard=server.shard, id="j", task_group="g")
        assert (await server.stub.Enqueue(request, metadata=metadata)).id == "j"
        ask = pb.GetJobRequest(shard=server.shard, id="none")
        call = server.stub.GetJob(ask, metadata=metadata)
        assert await refusal(call) == (grpc.StatusCode.NOT_FOUND, "job not found")
        health = health_pb2_grpc.HealthStub(server.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), metadata=metadata)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
