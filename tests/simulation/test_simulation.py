"""A short round of simulations, and what they stand on. `make simulate` plays many more."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation import loop
from tests.simulation.loop import Process, Stuck, start

ROOT = Path(__file__).parents[2]
SEEDS = 51  # Three of each scenario.


def played(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Simulations in a process of their own: killed servers leave frames behind that nobody may collect."""
    return subprocess.run(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )


@pytest.mark.xdist_group("simulation")
def test_everything_holds_in_a_short_round_of_simulations() -> None:
    done = played("--seeds", str(SEEDS), "--quiet")
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


def test_a_seed_plays_the_same_history_again() -> None:
    rounds = [played("--seeds", "17", "--processes", count).stdout for count in ("1", "2")]
    digests = [[line.split()[-8] for line in done.splitlines() if line.startswith("seed")] for done in rounds]
    assert len(digests[0]) == 17
    assert digests[0] == digests[1]


def test_a_killed_process_runs_nothing_any_more() -> None:
    happened: list[str] = []

    async def live(name: str) -> None:
        try:
            for second in range(3):
                await asyncio.sleep(1)
                happened.append(f"{name} {second}")
        finally:
            happened.append(f"{name} tidies up")

    async def main() -> None:
        victim = Process("victim")
        start(victim, live("victim"), name="main")
        other = start(Process("other"), live("other"), name="main")
        await asyncio.sleep(1.5)
        victim.kill()
        await other

    loop.run(main(), seed="kill")
    assert sorted(happened) == ["other 0", "other 1", "other 2", "other tidies up", "victim 0"]


def test_the_order_of_events_is_drawn_from_the_seed() -> None:
    async def main() -> list[int]:
        order: list[int] = []

        async def run(number: int) -> None:
            await asyncio.sleep(1)
            order.append(number)

        await asyncio.gather(*(run(number) for number in range(8)))
        return order

    rounds = [loop.run(main(), seed=seed) for seed in ("a", "a", "b")]
    assert rounds[0] == rounds[1] != rounds[2]


def test_time_passes_only_in_the_simulation() -> None:
    async def main() -> float:
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    assert loop.run(main(), seed="day") == pytest.approx(86_400)


def test_whoever_waits_for_nothing_is_told() -> None:
    async def main() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Stuck):
        loop.run(main(), seed="stuck")
