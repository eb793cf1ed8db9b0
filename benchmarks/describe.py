"""What a queue is, apart from its figures: `python -m benchmarks.describe PEER` prints it as JSON."""

import json
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version

from benchmarks.brokers import BROKERS
from benchmarks.measurements import MEASUREMENTS, applies_to
from benchmarks.peers import peer_named


@dataclass(frozen=True)
class Description:
    """One queue with its server."""

    name: str
    label: str
    broker: str
    broker_settings: str
    settings: str
    acknowledged: str
    worker_killed: str
    measurements: list[str]
    versions: dict[str, str]
    missing: str | None  # What must be installed before it can be measured.


def describe(name: str) -> Description:
    """Tell of the queue of this name."""
    peer = peer_named(name)
    broker = BROKERS[peer.broker]
    calls = "1 call" if peer.calls_at_a_time == 1 else f"{peer.calls_at_a_time} calls"
    missing = broker.missing()
    versions = {package: version(package) for package in peer.packages}
    if missing is None:
        versions[f"{broker.label} server"] = broker.version()
    return Description(
        name=name,
        label=peer.label,
        broker=broker.label,
        broker_settings=broker.settings,
        settings=f"{calls} at a time; {peer.settings}",
        acknowledged=broker.acknowledged,
        worker_killed=peer.worker_killed,
        measurements=[measurement for measurement in MEASUREMENTS if applies_to(measurement, peer)],
        versions=versions,
        missing=missing,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(describe(sys.argv[1]))))
