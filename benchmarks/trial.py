"""One measurement of one queue: `python -m benchmarks.trial PEER MEASUREMENT JOBS`, figures as JSON.

A process of its own for each, so that nothing of one queue is left when the next one is measured.
"""

import json
import sys
import tempfile
from pathlib import Path

import uvloop

from benchmarks.brokers import BROKERS
from benchmarks.measurements import MEASUREMENTS, Figures, Stage
from benchmarks.peers import peer_named
from benchmarks.processes import exit_on_sigterm


def measure(name: str, measurement: str, jobs: int) -> Figures:
    """Figures of the queue `name`, on an empty server in a temporary folder.

    Raises:
        RuntimeError: the server or the worker ended.
        TimeoutError: the server did not start, or jobs were not handled in time.
    """
    broker = BROKERS[peer_named(name).broker]
    with (
        tempfile.TemporaryDirectory(prefix="comparison-") as folder,
        broker.serve(Path(folder)) as address,
    ):
        return uvloop.run(MEASUREMENTS[measurement](Stage(name, address, Path(folder)), jobs))


if __name__ == "__main__":
    exit_on_sigterm()
    print(json.dumps(measure(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
