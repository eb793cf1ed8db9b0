"""The bound on memory: when it is short, when it is enough again, and how much there is."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from silo.node import memory as module
from silo.node.memory import (
    LARGE_BYTES,
    RELEASE_LOOKS,
    Memory,
    ShortOfMemory,
    bound_from,
    memory_bytes,
    read_resident_bytes,
    watched,
)
from tests.builders import until

MB = 1 << 20
PAGES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Reading:
    """A memory that is as large as a test says, of which a release frees what it says."""

    def __init__(self, mb: int | None) -> None:
        self.mb = mb
        self.free_mb = 0
        self.releases = 0

    def __call__(self) -> int | None:
        return None if self.mb is None else self.mb * MB

    def release(self) -> None:
        assert self.mb is not None
        self.releases += 1
        self.mb -= self.free_mb
        self.free_mb = 0


def a_memory(reading: Reading, bound_mb: int | None = 100) -> Memory:
    bound = None if bound_mb is None else bound_mb * MB
    return Memory(bound, resident_bytes=reading, release=reading.release)


def test_it_is_short_above_the_bound_and_enough_again_below_95_percent() -> None:
    reading = Reading(50)
    memory = a_memory(reading)
    for mb, is_short in [(50, False), (100, False), (101, True), (100, True), (95, True), (94, False)]:
        reading.mb = mb
        assert (memory.look(), memory.is_short) == (is_short, is_short)
    for mb, is_short in [(96, False), (100, False), (101, True)]:
        reading.mb = mb
        assert memory.look() is is_short


def test_an_episode_is_logged_once_at_each_end(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    reading = Reading(50)
    memory = a_memory(reading)
    for mb in (50, 101, 120, 110, 98, 94, 90):
        reading.mb = mb
        memory.look()
    assert [(record.levelname, record.getMessage(), record.fields) for record in caplog.records] == [  # type: ignore[attr-defined]
        ("WARNING", "short of memory: refusing new jobs", {"resident_mb": 101, "max_memory_mb": 100}),
        ("INFO", "memory is enough again: taking new jobs", {"resident_mb": 94, "max_memory_mb": 100}),
    ]


def test_without_a_bound_there_is_always_enough() -> None:
    reading = Reading(1 << 40)
    assert not a_memory(reading, None).look()


def test_where_the_system_does_not_tell_nothing_changes() -> None:
    reading = Reading(101)
    memory = a_memory(reading)
    memory.look()
    reading.mb = None
    assert memory.look()


def test_large_things_are_looked_at_as_they_come() -> None:
    reading = Reading(101)
    memory = a_memory(reading)
    memory.check(LARGE_BYTES - 1)
    with pytest.raises(ShortOfMemory, match=r"^server is short of memory; try again later$"):
        memory.check(LARGE_BYTES)
    memory.check(LARGE_BYTES - 1)  # Small ones go on: most of what they do ends work.


async def test_what_is_free_is_given_back_before_anybody_is_refused() -> None:
    reading = Reading(150)
    reading.free_mb = 100
    assert not await a_memory(reading).tick()
    assert (reading.mb, reading.releases) == (50, 1)


async def test_giving_back_is_tried_now_and_then_while_memory_is_short() -> None:
    reading = Reading(50)
    memory = a_memory(reading)
    await memory.tick()
    assert reading.releases == 0
    reading.mb = 150
    for _ in range(2 * (RELEASE_LOOKS + 1)):
        assert await memory.tick()
    assert reading.releases == 2
    reading.free_mb = 100
    assert not await memory.tick()
    assert reading.releases == 3


async def test_a_watched_memory_is_looked_at_once_before_anything_else_and_then_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "LOOK_S", 0.001)
    reading = Reading(101)
    memory = a_memory(reading)
    async with watched(memory):
        assert memory.is_short
        reading.mb = 50
        await until(lambda: not memory.is_short)


# How much there is


def test_the_bound_is_what_is_set_or_most_of_what_there_is() -> None:
    assert bound_from(0) is None
    assert bound_from(3) == 3 * MB
    default = bound_from(None)
    assert default is not None
    assert 0 < default <= PAGES * 80 // 100


def test_this_process_has_some_memory() -> None:
    resident = read_resident_bytes()
    assert resident is not None
    assert MB < resident < PAGES


@pytest.mark.parametrize(
    ("cgroup", "files", "limit_mb"),
    [
        ("0::/\n", {"sys/fs/cgroup/memory.max": 512}, 512),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": 512}, 512),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": 512, "sys/fs/cgroup/a/memory.max": 256}, 256),
        ("0::/a/b\n", {"sys/fs/cgroup/a/b/memory.max": "max", "sys/fs/cgroup/a/memory.max": 256}, 256),
        ("0::/as/the/host/names/it\n", {"sys/fs/cgroup/memory.max": 512}, 512),
        (
            "5:cpu:/\n4:memory:/x\n0::/\n",
            {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": 512},
            512,
        ),
        ("4:cpu,memory:/x\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 512}, 512),
        ("4:memory:/x\n", {"sys/fs/cgroup/memory/memory.limit_in_bytes": 1 << 43}, None),
        ("0::/\n", {"sys/fs/cgroup/memory.max": "max"}, None),
        ("0::/\n", {}, None),
        ("no cgroup line\n", {}, None),
        (None, {}, None),
    ],
)
def test_a_control_group_bounds_the_memory_of_its_processes(
    tmp_path: Path, cgroup: str | None, files: dict[str, int | str], limit_mb: int | None
) -> None:
    if cgroup is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(cgroup)
    for name, value in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value * MB if isinstance(value, int) else value}\n")
    assert memory_bytes(tmp_path) == (PAGES if limit_mb is None else limit_mb * MB)


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert all(record.levelno <= logging.WARNING for record in caplog.records)
