"""A TCP proxy that does to connections what networks do: late, silent, half gone, cut, reset.

What is held back is sent later, as TCP would send it again: bytes are late, or lost with their
connection, and never just missing.
"""

import asyncio
import enum
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_CHUNK_BYTES = 64 << 10


class Way(enum.Enum):
    """A direction."""

    UP = "up"  # From the client to the server.
    DOWN = "down"


BOTH = (Way.UP, Way.DOWN)


class FaultProxy:
    """Listens on loopback and carries each connection to one server, until told to do worse."""

    def __init__(self, target: str) -> None:
        """`target`: host and port of the server, which may come and go."""
        self.target = target
        self.address = ""
        self.accepted = 0  # Connections so far.
        self.delay_s = 0.0  # How late what comes is sent on, either way.
        self.refuses = False  # New connections are reset at once.
        self._flows = {way: asyncio.Event() for way in BOTH}
        self._carried: set[_Carried] = set()
        self.heal()

    @property
    def connections(self) -> int:
        """Those that are open."""
        return len(self._carried)

    # Faults

    def black_hole(self, *ways: Way) -> None:
        """Let nothing through on these ways, on connections of now and later, and say so to nobody."""
        for way in ways:
            self._flows[way].clear()

    def heal(self) -> None:
        """Let everything through again, and soon, what was held back first."""
        self.delay_s = 0.0
        self.refuses = False
        for flow in self._flows.values():
            flow.set()

    async def cut(self) -> None:
        """Close every connection, at both ends. What was held back is lost."""
        await self._end_all(with_reset=False)

    async def reset(self) -> None:
        """End every connection with a reset, at both ends."""
        await self._end_all(with_reset=True)

    def half_close(self, way: Way) -> None:
        """Say on every connection that nothing more comes this way, and drop what does."""
        for carried in self._carried:
            carried.half_close(way)

    async def _end_all(self, *, with_reset: bool) -> None:
        await asyncio.gather(*(carried.end(with_reset=with_reset) for carried in self._carried))

    # Carrying

    async def carry(self, from_client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        """Serve one connection to its end."""
        self.accepted += 1
        host, _, port = self.target.rpartition(":")
        try:
            if self.refuses:
                raise ConnectionRefusedError
            from_server, to_server = await asyncio.open_connection(host, int(port))
        except OSError:
            _reset(to_client)
            return
        carried = _Carried(self, {Way.UP: (from_client, to_server), Way.DOWN: (from_server, to_client)})
        self._carried.add(carried)
        try:
            await carried.run()
        finally:
            self._carried.discard(carried)

    async def held_back(self, way: Way) -> None:
        """Return when bytes that have come may go on."""
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._flows[way].wait()


class _Carried:
    """One connection through the proxy."""

    def __init__(
        self, proxy: FaultProxy, ways: dict[Way, tuple[asyncio.StreamReader, asyncio.StreamWriter]]
    ) -> None:
        self._proxy = proxy
        self._ways = ways
        self._half_closed: set[Way] = set()
        self._is_reset = False
        self._ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        self._pumps = [loop.create_task(self._pump(way), name=f"carry {way.value}") for way in ways]

    async def run(self) -> None:
        """Until both sides have said all, or one of them is gone."""
        try:
            await asyncio.wait(self._pumps, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for pump in self._pumps:
                pump.cancel()
            for outcome in await asyncio.gather(*self._pumps, return_exceptions=True):
                self._is_reset |= isinstance(outcome, OSError)  # One side was reset, so the other is.
            for _, writer in self._ways.values():
                if self._is_reset:
                    _reset(writer)
                else:
                    writer.close()
            self._ended.set()

    async def end(self, *, with_reset: bool) -> None:
        self._is_reset = with_reset
        for pump in self._pumps:
            pump.cancel()
        await self._ended.wait()

    def half_close(self, way: Way) -> None:
        self._half_closed.add(way)
        _, writer = self._ways[way]
        writer.write_eof()

    async def _pump(self, way: Way) -> None:
        reader, writer = self._ways[way]
        while chunk := await reader.read(_CHUNK_BYTES):
            await self._proxy.held_back(way)
            if way not in self._half_closed:
                writer.write(chunk)
                await writer.drain()
        await self._proxy.held_back(way)
        if way not in self._half_closed:
            writer.write_eof()


def _reset(writer: asyncio.StreamWriter) -> None:
    own: socket.socket = writer.get_extra_info("socket")
    if own.fileno() >= 0:  # Otherwise it is gone already.
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def fault_proxy(target: str) -> AsyncIterator[FaultProxy]:
    """A proxy before `target` that listens while the block runs."""
    proxy = FaultProxy(target)
    server = await asyncio.start_server(proxy.carry, "127.0.0.1", 0)
    try:
        proxy.address = "127.0.0.1:{1}".format(*server.sockets[0].getsockname())
        yield proxy
    finally:
        server.close()
        await server.wait_closed()
        await proxy.cut()
