"""Which shard covers a tenant, and which server has the shard."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from silo.client.errors import TopologyError
from silo.model.shards import hash_tenant

_DEFAULT_TENANT = "-"


@dataclass(frozen=True)
class ShardLocation:
    """One shard of the cluster."""

    shard_id: str
    server_addr: str
    range_start: str
    range_end: str


def shard_for_tenant(hashed: str, shards: Sequence[ShardLocation]) -> ShardLocation | None:
    """The shard whose range contains the hash, as of `hash_tenant`; None when none does.

    `shards` are sorted by start, as `SiloGRPCClient.get_topology` gives them.
    """
    index = bisect_right([shard.range_start for shard in shards], hashed) - 1
    if index < 0:
        return None
    shard = shards[index]
    return shard if not shard.range_end or hashed < shard.range_end else None


@dataclass(frozen=True)
class Topology:
    """A snapshot of the shard map with owners. Shards without an owner are left out."""

    shards: tuple[ShardLocation, ...] = ()
    is_known: bool = False

    @classmethod
    def of(cls, shards: Iterable[ShardLocation]) -> "Topology":
        owned = (shard for shard in shards if shard.server_addr)
        return cls(tuple(sorted(owned, key=lambda shard: shard.range_start)), is_known=True)

    def locate(self, tenant: str | None) -> ShardLocation:
        """The shard of a tenant; none stands for the default tenant.

        Raises:
            TopologyError: no owned shard covers it.
        """
        name = tenant or _DEFAULT_TENANT
        if not self.shards:
            raise TopologyError("Cluster topology not discovered yet. Call refreshTopology() first.")
        shard = shard_for_tenant(hash_tenant(name), self.shards)
        if shard is None:
            raise TopologyError(f'No shard found for tenant "{name}". This indicates a topology error.')
        return shard

    def address_of(self, shard_id: str) -> str | None:
        return next((shard.server_addr for shard in self.shards if shard.shard_id == shard_id), None)

    def addresses(self) -> list[str]:
        """Every server that has a shard, once."""
        return list(dict.fromkeys(shard.server_addr for shard in self.shards))


def bare_address(address: str) -> str:
    """`host:port` without a scheme."""
    return split_scheme(address)[0]


def split_scheme(address: str) -> tuple[str, bool | None]:
    """`host:port`, and whether the scheme before it asks for TLS; None without one."""
    scheme, separator, rest = address.partition("://")
    asks_for_tls = {"http": False, "https": True}.get(scheme.lower())
    if not separator or asks_for_tls is None:
        return address, None
    return rest.removesuffix("/"), asks_for_tls
