"""A tenant is found in the one shard whose range holds its hash."""

import pytest

from silo import TopologyError, hash_tenant
from silo.client.topology import ShardLocation, Topology, bare_address, shard_for_tenant
from silo.model.shards import initial_ranges


def a_shard(start: str = "", end: str = "", *, id: str | None = None, at: str = "h:1") -> ShardLocation:
    return ShardLocation(id or f"{start}-{end}", at, start, end)


def shards(count: int) -> list[ShardLocation]:
    return [a_shard(range.start, range.end, id=str(n)) for n, range in enumerate(initial_ranges(count))]


@pytest.mark.spec("W-CC-24")
@pytest.mark.parametrize(
    ("tenant", "hashed"),
    [
        ("-", "7a162ebe4ce6fc55"),
        ("", "ef46db3751d8e999"),
        ("a", "d24ec4f1a98c6e5b"),
        ("test-tenant", "7bda10a719882c53"),
        ("test-tenant-1", "c9e3d39c7c8cd4ad"),
        ("tenant-a", "24cbcbec76c2694a"),
        ("customer-123", "0bb632d435317a69"),
        ("env-0", "9aae63e52d465736"),
        ("env-1", "c9e27457ebe2c8a1"),
        ("bench-0", "a2141d91e072cee4"),
        ("bench-1", "6ea740ed732a1cf1"),
        ("tenant-é", "19d699ed7d1be963"),
        ("日本", "80c2e40b8486afab"),
    ],
)
def test_the_hash_of_a_tenant_is_that_of_every_other_client(tenant: str, hashed: str) -> None:
    assert hash_tenant(tenant) == hashed


@pytest.mark.parametrize(("count", "index"), [(1, 0), (2, 0), (4, 1), (8, 3), (16, 7)])
def test_without_a_tenant_work_goes_to_the_shard_of_the_default_tenant(count: int, index: int) -> None:
    assert Topology.of(shards(count)).locate(None).shard_id == str(index)
    assert Topology.of(shards(count)).locate("").shard_id == str(index)


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_every_hash_has_exactly_one_shard(count: int) -> None:
    known = shards(count)
    for n in range(200):
        hashed = hash_tenant(f"tenant-{n}")
        holders = [
            shard
            for shard in known
            if shard.range_start <= hashed and (not shard.range_end or hashed < shard.range_end)
        ]
        assert [shard_for_tenant(hashed, known)] == holders


@pytest.mark.spec("W-CC-27")
def test_a_boundary_belongs_to_the_shard_that_starts_there() -> None:
    left, right = a_shard("", "8000000000000000"), a_shard("8000000000000000", "")
    assert shard_for_tenant("8000000000000000", [left, right]) is right
    assert shard_for_tenant("7fffffffffffffff", [left, right]) is left


def test_a_hash_in_a_gap_or_outside_has_no_shard() -> None:
    known = [a_shard("2", "4"), a_shard("6", "8")]
    assert [shard_for_tenant(hashed, known) for hashed in ("1", "5", "9")] == [None, None, None]
    assert shard_for_tenant("5", []) is None


def test_shards_are_sorted_whatever_their_order_was() -> None:
    topology = Topology.of(reversed(shards(5)))
    assert [shard.shard_id for shard in topology.shards] == ["0", "1", "2", "3", "4"]


def test_shards_without_an_owner_are_left_out_and_their_tenants_are_not_found() -> None:
    low, high = a_shard("", "8", at=""), a_shard("8", "")
    topology = Topology.of([low, high])
    assert topology.shards == (high,)
    with pytest.raises(TopologyError, match='No shard found for tenant "-"'):
        topology.locate(None)


def test_nothing_is_found_before_anything_is_known() -> None:
    with pytest.raises(TopologyError, match="Cluster topology not discovered yet"):
        Topology().locate("a")


def test_addresses_come_once_each_in_the_order_of_the_ranges() -> None:
    topology = Topology.of([a_shard("", "4", at="a"), a_shard("8", "", at="a"), a_shard("4", "8", at="b")])
    assert topology.addresses() == ["a", "b"]
    assert topology.address_of("4-8") == "b"
    assert topology.address_of("gone") is None


@pytest.mark.parametrize("address", ["h:1", "http://h:1", "https://h:1", "HTTPS://h:1/"])
def test_an_address_is_used_without_its_scheme(address: str) -> None:
    assert bare_address(address) == "h:1"
