"""The queues that are compared, one module each."""

from importlib import import_module

from benchmarks.peers.peer import Peer

SILO = "silo"
NAMES = (
    SILO,
    "arq",
    "celery",
    "dramatiq",
    "huey",
    "pgqueuer",
    "pgqueuer_100",
    "procrastinate",
    "rq",
    "saq",
    "taskiq",
)


def peer_named(name: str) -> type[Peer]:
    """The queue of this name. Only its module is imported: workers carry the libraries of no other."""
    peer: type[Peer] = import_module(f"benchmarks.peers.{name}").PEER
    return peer
