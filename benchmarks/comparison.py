"""All measurements of all queues, round by round, each round in an order of its own.

Queues take turns within a round, so that a machine that becomes faster or slower meanwhile does so for all.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median

from benchmarks.describe import Description
from benchmarks.measurements import LATENCY_JOBS, Figures
from benchmarks.processes import ROOT

_SHOWN_CHARS = 2_000
_PATIENCE_S = 900
_STOP_TIMEOUT_S = 60


class TrialFailed(Exception):
    """A measurement came to no figures; the text says which, and what was printed."""


@dataclass(frozen=True)
class Trial:
    """One measurement of one queue in one round."""

    round: int
    queue: Description
    measurement: str


@dataclass
class Comparison:
    """What was measured so far."""

    queues: Sequence[Description]
    samples: dict[str, dict[str, list[float]]] = field(
        default_factory=dict
    )  # By queue and figure, per round.
    failures: list[str] = field(default_factory=list)

    def add(self, trial: Trial, figures: Figures) -> None:
        of_queue = self.samples.setdefault(trial.queue.name, {})
        for figure, value in figures.items():
            of_queue.setdefault(figure, []).append(value)

    def of(self, queue: Description, figure: str) -> list[float]:
        """The samples of a figure; empty if there are none."""
        return self.samples.get(queue.name, {}).get(figure, [])

    def median(self, queue: Description, figure: str) -> float | None:
        samples = self.of(queue, figure)
        return median(samples) if samples else None


def describe(name: str) -> Description:
    """What the queue of this name is.

    Raises:
        TrialFailed: its libraries are not there.
    """
    return Description(**json.loads(_run(name, "benchmarks.describe", name)))


def planned(queues: Sequence[Description], *, rounds: int, seed: int) -> list[Trial]:
    """What to measure, in which order; the same for the same seed."""
    random = Random(seed)
    trials = []
    for number in range(rounds):
        of_round = [Trial(number, queue, name) for queue in queues for name in queue.measurements]
        random.shuffle(of_round)
        trials += of_round
    return trials


def compare(
    queues: Sequence[Description],
    trials: Sequence[Trial],
    *,
    jobs: int,
    on_trial: Callable[[Trial], None],
    on_failure: Callable[[str], None],
) -> Comparison:
    """Do all that is planned. A measurement that fails is told of, and leaves the others as they are."""
    comparison = Comparison(queues)
    for trial in trials:
        on_trial(trial)
        name, count = trial.queue.name, LATENCY_JOBS if trial.measurement == "latency" else jobs
        try:
            said = _run(name, "benchmarks.trial", name, trial.measurement, str(count))
        except TrialFailed as error:
            comparison.failures.append(f"{trial.queue.label}, {trial.measurement}")
            on_failure(str(error))
        else:
            comparison.add(trial, json.loads(said))
    return comparison


def _run(name: str, module: str, *arguments: str) -> str:
    """What a module of ours prints in the environment of this queue."""
    process = subprocess.Popen(
        [_python(name), "-m", module, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is for us alone; then we end it in an orderly way.
    )
    try:
        out, err = process.communicate(timeout=_PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise TrialFailed(f"{' '.join(arguments)}: not done after {_PATIENCE_S} s") from None
    finally:
        process.terminate()  # Not if it has ended, which is the rule.
        process.wait(_STOP_TIMEOUT_S)
    if process.returncode:
        raise TrialFailed(f"{' '.join(arguments)}: ended with {process.returncode}\n{err[-_SHOWN_CHARS:]}")
    return out


def _python(name: str) -> Path:
    """The interpreter with the libraries of this queue: of an environment beside ours if it has its own."""
    own = Path(sys.prefix).parent / name / "bin" / "python"
    return own if own.exists() else Path(sys.executable)
