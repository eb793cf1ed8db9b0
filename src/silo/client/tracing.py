"""OpenTelemetry in the client: who called goes along, and lost shards are counted.

It is used when it is installed, as with the extra `otel`. Without it nothing here does anything.
"""

from collections.abc import Callable, MutableMapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opentelemetry.metrics import Meter

try:
    from opentelemetry import metrics, propagate
except ImportError:
    _is_installed = False
else:
    _is_installed = True


def inject(headers: MutableMapping[str, str | bytes]) -> None:
    """Add what the global propagator says of the current span; nothing when there is none."""
    if _is_installed:
        said: dict[str, str] = {}
        propagate.inject(said)
        headers.update((name.lower(), text) for name, text in said.items())


def wrong_shard_counter(meter: "Meter | None") -> Callable[[], None]:
    """Count a call that is repeated because a server did not have the shard any more."""
    if not _is_installed:
        return lambda: None
    counter = (meter or metrics.get_meter("silo-client")).create_counter(
        "silo.client.wrong_shard_retries",
        description="Calls repeated because a server did not have the shard any more",
    )
    return lambda: counter.add(1)
