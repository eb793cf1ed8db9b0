"""How an app reaches its servers: settings that may come late, and one client for each event loop."""

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from silo.client.client import SiloGRPCClient
from silo.client.router import Token
from silo.client.tls import TlsOptions

if TYPE_CHECKING:
    from silo.sync import SiloClient

DEFAULT_SERVER = "127.0.0.1:7450"


class Connection:
    """Opens a client when the first one is needed. What was not configured comes from the environment."""

    def __init__(
        self,
        servers: str | Sequence[str] | None,
        *,
        token: Token | None,
        tls: bool | TlsOptions | None,
        tenant: str | None,
    ) -> None:
        self._servers = servers
        self._token = token
        self._tls = tls
        self._given: SiloGRPCClient | None = None
        self._blocking: SiloClient | None = None
        self._opened: dict[asyncio.AbstractEventLoop, SiloGRPCClient] = {}
        self.tenant = tenant

    def __repr__(self) -> str:
        return repr(self._given) if self._given is not None else f"Connection({', '.join(self.servers)})"

    @property
    def servers(self) -> tuple[str, ...]:
        """The addresses that clients are opened with; none are known if a client was given."""
        if self._given is not None:
            return ()
        if self._servers is not None:
            return (self._servers,) if isinstance(self._servers, str) else tuple(self._servers)
        listed = (server.strip() for server in os.environ.get("SILO_SERVERS", "").split(","))
        return tuple(filter(None, listed)) or (DEFAULT_SERVER,)

    def configure(
        self,
        servers: str | Sequence[str] | None,
        *,
        token: Token | None,
        tls: bool | TlsOptions | None,
        tenant: str | None,
        client: SiloGRPCClient | None,
    ) -> None:
        """Change what is not None.

        Raises:
            RuntimeError: a client is open with the settings as they were.
        """
        if (servers, token, tls) != (None, None, None):
            if self._still_open():
                raise RuntimeError("the app is connected already: configure it earlier, or close it first")
            if self._blocking is not None:
                self._blocking.close()
                self._blocking = None
        if servers is not None:
            self._given = None
        self._servers = self._servers if servers is None else servers
        self._token = self._token if token is None else token
        self._tls = self._tls if tls is None else tls
        self.tenant = self.tenant if tenant is None else tenant
        self._given = self._given if client is None else client

    def client(self) -> SiloGRPCClient:
        """The client of the running event loop; it is opened if there is none.

        Raises:
            RuntimeError: no event loop runs.
            ConfigError: the settings are no good.
        """
        if self._given is not None:
            return self._given
        loop = asyncio.get_running_loop()
        client = self._still_open().get(loop)
        if client is None:
            client = self._opened[loop] = self._new_client()
        return client

    def _new_client(self) -> SiloGRPCClient:
        token = self._token or os.environ.get("SILO_TOKEN")
        return SiloGRPCClient(self.servers, token=token, tls=self._tls)

    def blocking_client(self) -> "SiloClient":
        """The client for code that waits; it is made if there is none.

        Raises:
            RuntimeError: the app was given a client, which belongs to an event loop.
            ConfigError: the settings are no good.
        """
        from silo.sync import SiloClient  # noqa: PLC0415  # Its thread and fork hooks cost.

        if self._given is not None:
            raise RuntimeError("the app was given a client, which blocking code cannot use: give it servers")
        if self._blocking is None:
            self._blocking = SiloClient.of(self._new_client)
        return self._blocking

    async def close(self) -> None:
        """Close the client of the running event loop, unless it was given."""
        client = self._opened.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.close()

    def _still_open(self) -> dict[asyncio.AbstractEventLoop, SiloGRPCClient]:
        """Forgets those whose loop was closed: nothing can be done with them any more."""
        self._opened = {loop: client for loop, client in self._opened.items() if not loop.is_closed()}
        return self._opened
