"""The proxy of the fault tests does what its tests rely on."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.builders import until
from tests.integration.fault_proxy import BOTH, FaultProxy, Way, fault_proxy


class End:
    """One end of a connection, and what has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.got = b""
        self.ended: str | None = None
        self.reading = asyncio.get_running_loop().create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        try:
            while chunk := await reader.read(1 << 16):
                self.got += chunk
        except ConnectionResetError:
            self.ended = "reset"
        else:
            self.ended = "closed"

    async def close(self) -> None:
        self.reading.cancel()
        await asyncio.wait({self.reading})
        self.writer.close()


@asynccontextmanager
async def a_line() -> AsyncIterator[tuple[FaultProxy, End, End]]:
    """A connection through a proxy: the end of the client and that of the server."""
    accepted: asyncio.Queue[End] = asyncio.Queue()
    server = await asyncio.start_server(lambda *ends: accepted.put_nowait(End(*ends)), "127.0.0.1", 0)
    async with server, fault_proxy("127.0.0.1:{1}".format(*server.sockets[0].getsockname())) as proxy:
        client = await connected(proxy)
        far = await accepted.get()
        await until(lambda: proxy.connections == 1)
        try:
            yield proxy, client, far
        finally:
            for end in (client, far):
                await end.close()


async def connected(proxy: FaultProxy) -> End:
    host, _, port = proxy.address.rpartition(":")
    return End(*await asyncio.open_connection(host, int(port)))


async def test_what_is_sent_arrives_at_the_other_end() -> None:
    async with a_line() as (proxy, client, server):
        client.writer.write(b"x" * 1_000_000)
        server.writer.write(b"y" * 1_000_000)
        await until(lambda: (len(server.got), len(client.got)) == (1_000_000, 1_000_000))
        assert (proxy.connections, proxy.accepted) == (1, 1)


@pytest.mark.parametrize("way", BOTH)
async def test_a_black_hole_holds_back_one_way_until_it_is_healed(way: Way) -> None:
    async with a_line() as (proxy, client, server):
        proxy.black_hole(way)
        client.writer.write(b"up")
        server.writer.write(b"down")
        passes = client if way is Way.UP else server
        waits = server if way is Way.UP else client
        await until(lambda: bool(passes.got))
        assert waits.got == b""
        client.writer.write(b"!")
        server.writer.write(b"!")
        await until(lambda: passes.got.endswith(b"!"))
        assert waits.got == b""
        proxy.heal()
        await until(lambda: (server.got, client.got) == (b"up!", b"down!"))


async def test_the_end_of_a_side_is_held_back_too() -> None:
    async with a_line() as (proxy, client, server):
        proxy.black_hole(Way.UP)
        client.writer.write(b"last")
        client.writer.write_eof()
        server.writer.write(b"first")
        await until(lambda: client.got == b"first")
        assert (server.got, server.ended) == (b"", None)
        proxy.heal()
        await until(lambda: (server.got, server.ended) == (b"last", "closed"))


async def test_a_cut_closes_both_ends() -> None:
    async with a_line() as (proxy, client, server):
        await proxy.cut()
        await until(lambda: (client.ended, server.ended) == ("closed", "closed"))
        assert proxy.connections == 0


async def test_a_reset_resets_both_ends() -> None:
    async with a_line() as (proxy, client, server):
        await proxy.reset()
        await until(lambda: (client.ended, server.ended) == ("reset", "reset"))
        assert proxy.connections == 0


async def test_half_a_close_leaves_the_other_way_open() -> None:
    async with a_line() as (proxy, client, server):
        proxy.half_close(Way.UP)
        await until(lambda: server.ended == "closed")
        client.writer.write(b"dropped")
        server.writer.write(b"arrives")
        await until(lambda: client.got == b"arrives")
        assert (server.got, client.ended) == (b"", None)


async def test_what_is_late_still_arrives_in_order() -> None:
    async with a_line() as (proxy, client, server):
        proxy.delay_s = 0.01
        for number in range(5):
            client.writer.write(b"%d" % number)
            await asyncio.sleep(0)
        await until(lambda: server.got == b"01234")


async def test_whoever_is_refused_is_reset_and_those_there_go_on() -> None:
    async with a_line() as (proxy, client, server):
        proxy.refuses = True
        late = await connected(proxy)
        await until(lambda: late.ended is not None)
        await late.close()
        client.writer.write(b"x")
        await until(lambda: server.got == b"x")


async def test_one_side_that_is_gone_takes_the_other_with_it() -> None:
    async with a_line() as (proxy, client, server):
        server.writer.transport.abort()
        await until(lambda: client.ended is not None)
        client.writer.close()
        await until(lambda: proxy.connections == 0)
