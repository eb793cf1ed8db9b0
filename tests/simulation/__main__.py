"""Run simulations: `python -m tests.simulation --seeds 200`.

Each seed plays one scenario, in turn. Whatever fails is played again in smaller versions, and the shortest
history found is printed with the command that shows it again.
"""

import argparse
import hashlib
import logging
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import msgspec

from tests.simulation.actors import Trouble
from tests.simulation.network import Weather
from tests.simulation.scenarios import SCENARIOS, Played, Scenario, play
from tests.simulation.storage import Disk

_SHOWN_EVENTS = 120
_DEEDS = ("retries", "delayed", "cancel", "expedite", "delete", "lease_one", "reimport", "drop_holders")


class Result(msgspec.Struct, frozen=True):
    """What is told of one seed."""

    scenario: str
    seed: int
    failure: str | None
    trace: str  # A digest of the history.
    events: int
    commits: int
    virtual_s: float
    real_s: float


def run_seed(number: int, only: str | None) -> Result:
    """Play the scenario of this seed."""
    logging.disable()  # What a server says of faults is of no interest here.
    names = list(SCENARIOS) if only is None else [only]
    name = names[number % len(names)]
    started = time.perf_counter()
    played = play(name, str(number))
    return Result(
        scenario=name,
        seed=number,
        failure=None if played.failure is None else _told(played.failure),
        trace=digest(played),
        events=len(played.history),
        commits=played.commits,
        virtual_s=played.seconds,
        real_s=time.perf_counter() - started,
    )


def digest(played: Played) -> str:
    """The same for the same history."""
    text = "\n".join(map(str, played.history))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def shorter(name: str, seed: str) -> tuple[Scenario, Played]:
    """The failing version of a scenario with the shortest history, of those tried."""
    best = SCENARIOS[name]
    shortest = play(name, seed, best)
    is_smaller = True
    while is_smaller:
        is_smaller = False
        for smaller in _smaller(best):
            played = play(name, seed, smaller)
            if played.failure is not None and len(played.history) < len(shortest.history):
                best, shortest, is_smaller = smaller, played, True
                break
    return best, shortest


def _smaller(scenario: Scenario) -> Iterator[Scenario]:
    """The same with less of one thing."""
    replace = msgspec.structs.replace
    for field in ("clients", "jobs", "workers"):
        count = getattr(scenario, field)
        for fewer in (count // 2, count - 1):
            if 1 <= fewer < count:
                yield replace(scenario, **{field: fewer})
    for field, calm in (("trouble", Trouble()), ("weather", Weather()), ("disk", Disk())):
        if getattr(scenario, field) != calm:
            yield replace(scenario, **{field: calm})
    for limits in scenario.mix.limits if len(scenario.mix.limits) > 1 else ():
        fewer_limits = [kept for kept in scenario.mix.limits if kept is not limits]
        yield replace(scenario, mix=replace(scenario.mix, limits=fewer_limits))
    for field in _DEEDS:
        if getattr(scenario.mix, field):
            yield replace(scenario, mix=replace(scenario.mix, **{field: 0.0}))


def _told(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return "; ".join(_told(each) for each in error.exceptions)
    return f"{type(error).__name__}: {error}"


def _show(name: str, seed: int) -> None:
    scenario, played = shorter(name, str(seed))
    facts = " ".join(str(scenario).split())  # Messages of protobuf are told on many lines.
    print(f"\nShortest history found ({len(played.history)} events): {facts}\n")
    for event in played.history[-_SHOWN_EVENTS:]:
        print(event)
    assert played.failure is not None
    print(f"\n{_told(played.failure)}")
    print(f"\nShow it again: make simulate FROM={seed} SEEDS=1 SCENARIO='{name}'")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="how many seeds")
    parser.add_argument("--from", type=int, default=0, dest="first", help="the first seed")
    parser.add_argument("--scenario", choices=list(SCENARIOS), help="this one only")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--quiet", action="store_true", help="only the summary and what fails")
    options = parser.parse_args()
    failed: list[Result] = []
    count = events = commits = 0
    started = time.perf_counter()
    with ProcessPoolExecutor(options.processes) as pool:
        seeds = range(options.first, options.first + options.seeds)
        for result in pool.map(run_seed, seeds, [options.scenario] * options.seeds):
            count += 1
            events += result.events
            commits += result.commits
            if result.failure is not None:
                failed.append(result)
            if result.failure is not None or not options.quiet:
                print(
                    f"seed {result.seed:<6} {result.scenario:26} {result.trace}  {result.commits:5} commits "
                    f"{result.virtual_s:7.1f} s in {result.real_s:5.1f} s  {result.failure or 'ok'}",
                    flush=True,
                )
    elapsed_s = time.perf_counter() - started
    print(f"{count} seeds, {events} events, {commits} commits in {elapsed_s:.0f} s: {len(failed)} failed")
    if failed:
        first = min(failed, key=lambda result: result.events)
        _show(first.scenario, first.seed)
    return 1 if failed else 0


if __name__ == "__main__":
    if os.environ.get("PYTHONHASHSEED") != "0":  # Sets of texts would have another order in each process.
        os.execve(
            sys.executable,
            [sys.executable, "-m", "tests.simulation", *sys.argv[1:]],
            {**os.environ, "PYTHONHASHSEED": "0"},
        )
    code = main()
    sys.stdout.flush()
    os._exit(code)  # Killed processes stay as they are: nobody tidies up after them.
