"""PgQueuer without the bound that all others have on handlers at a time."""

from benchmarks.peers.pgqueuer import PgQueuerPeer


class WidePgQueuerPeer(PgQueuerPeer):
    label = "PgQueuer, 100 at a time"
    settings = "`batch_size` 100; bulk: `enqueue` of 200; keeps no results"
    batch_size = 100


PEER = WidePgQueuerPeer
