"""The pytest plugin of Silo: fixtures with a server for tests.

It is no part of the package `silo`, so that whoever does not use the fixtures does not import that.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from silo import SiloGRPCClient
    from silo.testing import Server, SyncServer


@pytest.fixture
def silo_server() -> "Iterator[Server]":
    """A server of the test's own, with a clock that stands still; see `silo.testing.Server`.

    It is for tests that are coroutines, whatever runs them: the server is in a thread of its own, and its
    client connects where it is used first.
    """
    from silo.testing import started  # noqa: PLC0415  # Only for those who use it.

    with started() as server:
        yield server


@pytest.fixture
def silo_client(silo_server: "Server") -> "SiloGRPCClient":
    """The client of `silo_server`."""
    return silo_server.client


@pytest.fixture
def silo_sync() -> "Iterator[SyncServer]":
    """The same for tests that are no coroutines; see `silo.testing.SyncServer`."""
    from silo.testing import sync_server  # noqa: PLC0415  # Only for those who use it.

    with sync_server() as server:
        yield server
