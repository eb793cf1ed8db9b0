"""Profiles name who is busy and who allocates, and a dump names who waits; none of them blocks the loop."""

import asyncio
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from silo.telemetry import profiling
from silo.telemetry.pprof import Frame, Sample, ValueType, encoded
from silo.telemetry.profiling import (
    HeapProfilingMissing,
    ProfileRunning,
    clamped,
    cpu_profile,
    dump_tasks,
    heap_profile,
)
from tests.builders import until
from tests.profiles import Stack, read

SECRET = "a payload nobody may see"


def spin_here(stop: threading.Event) -> None:
    secret = SECRET
    while not stop.is_set():
        sum(range(1000))
    assert secret


@contextmanager
def busy_thread() -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=spin_here, args=(stop,), name="spinner")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def allocate_here() -> list[bytes]:
    return [bytes(10_000) for _ in range(100)]


# The format


def test_what_is_encoded_decodes_to_the_same() -> None:
    leaf, root = Frame("leaf", "a.py", 300), Frame("root", "b.py", 7)
    samples = [Sample([leaf, root], [1, 1 << 40], "main"), Sample([root], [0, 0])]
    cpu = ValueType("cpu", "nanoseconds")

    profile = read(
        encoded(
            samples,
            types=[ValueType("samples", "count"), cpu],
            duration_ns=5,
            period_type=cpu,
            period=10,
            comment="ünder test",
        )
    )

    assert profile.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert profile.stacks == [
        Stack((("leaf", "a.py", 300), ("root", "b.py", 7)), (1, 1 << 40), "main"),
        Stack((("root", "b.py", 7),), (0, 0), None),
    ]
    assert (profile.duration_ns, profile.period, profile.comment) == (5, 10, "ünder test")


# CPU


async def test_a_cpu_profile_shows_the_busy_function_and_its_thread() -> None:
    with busy_thread():
        profile = await cpu_profile(duration_s=1, frequency_hz=100)

    found = read(profile.data)
    busy = [stack for stack in found.stacks if "spin_here" in stack.functions]
    assert busy
    assert {stack.thread for stack in busy} == {"spinner"}
    assert found.types == [("samples", "count"), ("cpu", "nanoseconds")]
    assert profile.duration_s == 1
    assert profile.samples == sum(stack.values[0] for stack in found.stacks if stack.thread)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the CPU time of threads")
async def test_a_thread_that_waits_costs_nothing() -> None:
    done = threading.Event()
    thread = threading.Thread(target=done.wait, name="waiting")
    thread.start()
    try:
        with busy_thread():
            profile = read((await cpu_profile(duration_s=1, frequency_hz=50)).data)
    finally:
        done.set()
        thread.join()

    assert "spinner" in {stack.thread for stack in profile.stacks}
    assert "waiting" not in {stack.thread for stack in profile.stacks}


async def test_the_loop_runs_while_a_profile_is_taken() -> None:
    profile = asyncio.ensure_future(cpu_profile(duration_s=1))
    turns = 0
    while not profile.done():
        await asyncio.sleep(0.001)
        turns += 1

    assert turns > 10
    assert read(profile.result().data).period == 10_000_000


async def test_different_stacks_beyond_the_bound_are_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "_STACKS_MAX", 0)
    with busy_thread():
        profile = read((await cpu_profile(duration_s=1)).data)

    assert {stack.functions for stack in profile.stacks if stack.thread == "spinner"} == {("(other stacks)",)}


# Memory


async def test_a_heap_profile_shows_who_allocated_what_is_still_there() -> None:
    profile = asyncio.ensure_future(heap_profile(duration_s=1))
    kept = []
    while not profile.done():
        kept.append(allocate_here())
        await asyncio.sleep(0.02)  # It records from some moment on, which nobody tells.
    found = read((await profile).data)

    sizes = [
        stack.values
        for stack in found.stacks
        if any(name.endswith("allocate_here") for name in stack.functions)
    ]
    assert sum(objects for objects, _ in sizes) >= len(kept[-1])
    assert sum(size for _, size in sizes) >= 100 * 10_000
    assert found.types == [("inuse_objects", "count"), ("inuse_space", "bytes")]


async def test_what_was_given_back_is_in_no_heap_profile() -> None:
    profile = asyncio.ensure_future(heap_profile(duration_s=1))
    while not profile.done():
        allocate_here()
        await asyncio.sleep(0.02)
    found = read((await profile).data)

    left = [stack.values[1] for stack in found.stacks if "allocate_here" in stack.functions]
    assert sum(left) < 100 * 10_000


async def test_without_its_library_a_heap_profile_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "memray", None)
    with pytest.raises(
        HeapProfilingMissing, match=r"heap profiling is not enabled in the allocator.*silo-queue"
    ):
        await heap_profile(duration_s=1)
    assert not profiling._turn.locked()


# Turns and bounds


@pytest.mark.parametrize("second", [cpu_profile, heap_profile])
async def test_a_second_profile_is_refused_while_one_is_taken(second: object) -> None:
    first = asyncio.ensure_future(cpu_profile(duration_s=1))
    await until(profiling._turn.locked)

    with pytest.raises(ProfileRunning, match="being taken already"):
        await (cpu_profile() if second is cpu_profile else heap_profile())

    assert (await first).duration_s == 1
    assert (await cpu_profile(duration_s=1)).duration_s == 1


@pytest.mark.parametrize("work", [cpu_profile, heap_profile])
async def test_a_caller_that_goes_away_ends_its_profile(work: object) -> None:
    begun = asyncio.ensure_future(
        cpu_profile(duration_s=300) if work is cpu_profile else heap_profile(duration_s=300)
    )
    await until(profiling._turn.locked)
    begun.cancel()
    await asyncio.wait({begun})

    await until(lambda: not profiling._turn.locked())
    assert begun.cancelled()


async def test_a_profile_that_fails_raises_and_gives_its_turn_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict[int, object]:
        raise OSError("no frames")

    with monkeypatch.context() as patch:
        patch.setattr(sys, "_current_frames", broken)
        with pytest.raises(OSError, match="no frames"):
            await cpu_profile(duration_s=1)

    assert not profiling._turn.locked()


@pytest.mark.parametrize(
    ("given", "taken"), [(0, 30), (1, 1), (299, 299), (300, 300), (301, 300), (2**32 - 1, 300)]
)
def test_zero_is_the_default_and_too_much_is_the_most(given: int, taken: int) -> None:
    assert clamped(given, 30, 300) == taken


# Tasks


async def wait_at_the_bottom(begun: asyncio.Event) -> None:
    secret = SECRET
    begun.set()
    await asyncio.Event().wait()
    assert secret


async def wait_at_the_top(begun: asyncio.Event) -> None:
    await wait_at_the_bottom(begun)


async def test_a_dump_shows_what_a_task_awaits_outermost_first() -> None:
    begun = asyncio.Event()
    waiting = asyncio.create_task(wait_at_the_top(begun), name="the patient one")
    await begun.wait()
    text, count = dump_tasks()
    waiting.cancel()
    await asyncio.wait({waiting})

    _, _, block = text.partition('task "the patient one"\n')
    lines = block.partition("\n\n")[0].splitlines()
    assert [line.rpartition(" in ")[2] for line in lines] == [
        "wait_at_the_top",
        "wait_at_the_bottom",
        "Event.wait",
    ]
    assert count == text.count('\ntask "') == 2


async def test_a_dump_shows_threads_and_no_values() -> None:
    with busy_thread():
        text, _ = dump_tasks()

    _, _, block = text.partition('thread "spinner"\n')
    assert "in spin_here\n" in block.partition("\n\n")[0]
    assert 'thread "MainThread"\n' in text
    assert SECRET not in text


async def test_a_dump_is_bounded_and_counts_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "TASKS_MAX", 3)
    begun = [asyncio.Event() for _ in range(9)]
    waiting = [asyncio.create_task(wait_at_the_top(each)) for each in begun]
    for each in begun:
        await each.wait()
    text, count = dump_tasks()
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)

    assert (count, text.count('\ntask "')) == (10, 3)
    assert "… and 7 more tasks" in text


def test_a_profile_ends_quietly_after_its_loop() -> None:
    loop = asyncio.new_event_loop()
    begun = loop.create_task(cpu_profile(duration_s=300))
    loop.run_until_complete(asyncio.sleep(0))
    [thread] = [thread for thread in threading.enumerate() if thread.name == "silo-profile"]
    begun.cancel()
    loop.run_until_complete(asyncio.wait({begun}))
    loop.close()

    thread.join(timeout=60)
    assert not thread.is_alive()
    assert not profiling._turn.locked()
