"""`python -m benchmarks`: measure all queues, write a page and a picture. See `make compare`."""

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from rich.text import Text

from benchmarks.comparison import Comparison, Trial, TrialFailed, compare, describe, planned
from benchmarks.describe import Description
from benchmarks.machine import machine_facts
from benchmarks.peers import NAMES
from benchmarks.plot import draw
from benchmarks.processes import ROOT, exit_on_sigterm
from benchmarks.report import BULK, CALLS, Circumstances, as_json, as_markdown, ranked, summary

_SHOWN = {
    CALLS: "end to end/s",
    BULK: "in bulk",
    "enqueue_per_s": "enqueue/s",
    "lat_p50_ms": "p50 ms",
    "lat_p99_ms": "p99 ms",
}

_console = Console(stderr=True)  # What it prints beside JSON.


@dataclass(frozen=True)
class _Selection:
    queues: list[Description]
    skipped: list[str]


def main(arguments: Sequence[str]) -> int:
    """The exit code: 0 if all that could be measured was."""
    options = _parser().parse_args(arguments)
    try:
        selection = _select(options.only)
    except TrialFailed as error:
        _console.print(error, style="red", markup=False)
        return 1
    circumstances = Circumstances(
        date=datetime.now(UTC).date().isoformat(),
        command=f"make compare ARGS={shlex.quote(' '.join(arguments))}" if arguments else "make compare",
        machine=machine_facts(),
        rounds=options.rounds,
        jobs=options.jobs,
        skipped=selection.skipped,
    )
    comparison = _measure(selection.queues, rounds=options.rounds, seed=options.seed, jobs=options.jobs)
    _publish(comparison, circumstances, options.docs)
    if options.json:
        print(json.dumps(as_json(comparison, circumstances), indent=2))
    return 1 if comparison.failures else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Compare Silo with other job queues."
    )
    parser.add_argument("--jobs", type=_at_least_1, default=5_000, help="jobs of a measurement (5000)")
    parser.add_argument("--rounds", type=_at_least_1, default=3, help="times that all is measured (3)")
    parser.add_argument("--only", type=_names, default=NAMES, help=f"some of: {','.join(NAMES)}")
    parser.add_argument("--seed", type=int, default=1, help="draws the order of the measurements (1)")
    parser.add_argument("--json", action="store_true", help="print all figures on standard output")
    parser.add_argument(
        "--docs", type=Path, default=ROOT / "docs", help="folder of the page and the picture (docs)"
    )
    return parser


def _at_least_1(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    for name in names:
        if name not in NAMES:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMES)}")
    return names


def _select(names: Sequence[str]) -> _Selection:
    """The queues that can be measured here; the others are told of."""
    selection = _Selection([], [])
    for name in names:
        queue = describe(name)
        if queue.missing is None:
            selection.queues.append(queue)
        else:
            reason = f"{queue.label} (not installed: {queue.missing})"
            selection.skipped.append(reason)
            _console.print(f"SKIPPED {reason}", style="bold red", markup=False)
    return selection


def _measure(queues: Sequence[Description], *, rounds: int, seed: int, jobs: int) -> Comparison:
    trials = planned(queues, rounds=rounds, seed=seed)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=_console) as progress:
        task = progress.add_task("", total=len(trials))
        done = 0

        def on_trial(trial: Trial) -> None:
            nonlocal done
            text = f"round {trial.round + 1}/{rounds}  {trial.queue.label}  {trial.measurement}"
            progress.update(task, completed=done, description=text)
            done += 1

        def on_failure(text: str) -> None:
            _console.print(f"FAILED {text}", style="bold red", markup=False)

        comparison = compare(queues, trials, jobs=jobs, on_trial=on_trial, on_failure=on_failure)
        progress.update(task, completed=done, description="done")
    return comparison


def _publish(comparison: Comparison, circumstances: Circumstances, docs: Path) -> None:
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "benchmarks.md").write_text(as_markdown(comparison, circumstances))
    draw(comparison, docs / "benchmarks.svg")
    _console.print(_shown(comparison), Text(summary(comparison)), sep="\n")
    _console.print(f"written: {docs / 'benchmarks.md'}, {docs / 'benchmarks.svg'}", markup=False)


def _shown(comparison: Comparison) -> Table:
    """What fits into a terminal; the page has all."""
    table = Table("Queue", *(Column(title, justify="right") for title in _SHOWN.values()))
    for queue in ranked(comparison):
        medians = [comparison.median(queue, figure) for figure in _SHOWN]
        table.add_row(queue.label, *("" if value is None else f"{value:,.1f}" for value in medians))
    return table


if __name__ == "__main__":
    exit_on_sigterm()
    sys.exit(main(sys.argv[1:]))
