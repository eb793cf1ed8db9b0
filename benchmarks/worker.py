"""A worker process: `python -m benchmarks.worker PEER ADDRESS FOLDER WARM_UP JOBS`."""

import logging
import sys
from pathlib import Path

from benchmarks import tally
from benchmarks.peers import peer_named


def main(name: str, address: str, folder: str, warm_up: str, jobs: str) -> None:
    logging.disable(logging.INFO)  # Some say two lines for each job.
    tally.install(tally.Tally(Path(folder), warm_up=int(warm_up), jobs=int(jobs)))
    peer_named(name)(address).work()


if __name__ == "__main__":
    main(*sys.argv[1:])
