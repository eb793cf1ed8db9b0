"""What is told of a comparison: a page of documentation, and the same figures as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.comparison import Comparison
from benchmarks.describe import Description
from benchmarks.measurements import LATENCY_JOBS
from benchmarks.peers import SILO
from benchmarks.peers.peer import CONCURRENCY

CALLS = "end_to_end_per_s"
BULK = "bulk_end_to_end_per_s"

_PAGE = Path(__file__).with_name("page.md")


@dataclass(frozen=True)
class Circumstances:
    """What figures must be read with."""

    date: str
    command: str
    machine: Mapping[str, str]
    rounds: int
    jobs: int
    skipped: Sequence[str]  # Queues that were not measured, and why.


def ranked(comparison: Comparison) -> list[Description]:
    """The queues, fastest end to end first."""
    return sorted(comparison.queues, key=lambda queue: _best(comparison, queue), reverse=True)


def as_json(comparison: Comparison, circumstances: Circumstances) -> dict[str, object]:
    """Medians by the names of the figures, and all samples."""
    peers = []
    for queue in ranked(comparison):
        samples = comparison.samples.get(queue.name, {})
        medians = {figure: round(comparison.median(queue, figure) or 0.0, 2) for figure in samples}
        peers.append({"peer": queue.name, **medians, "versions": queue.versions, "samples": samples})
    return {
        "date": circumstances.date,
        "command": circumstances.command,
        "machine": circumstances.machine,
        "rounds": circumstances.rounds,
        "jobs": circumstances.jobs,
        "skipped": circumstances.skipped,
        "failures": comparison.failures,
        "peers": peers,
    }


def as_markdown(comparison: Comparison, circumstances: Circumstances) -> str:
    """The page."""
    queues = ranked(comparison)
    servers = {queue.broker: queue.broker_settings for queue in queues}
    return _PAGE.read_text().format(
        summary=summary(comparison),
        figures=figures_table(comparison),
        absences="".join(_absences(comparison, circumstances)),
        latency_jobs=LATENCY_JOBS,
        rounds="one round" if circumstances.rounds == 1 else f"{circumstances.rounds} rounds",
        jobs=_number(circumstances.jobs),
        meaning=_table(
            ("Queue", "Server", "An acknowledged job is", "A job whose worker is killed", "Settings"),
            [(it.label, it.broker, it.acknowledged, it.worker_killed, it.settings) for it in queues],
        ),
        concurrency=CONCURRENCY,
        servers="; ".join(f"{server} with {settings}" for server, settings in servers.items()),
        run=_table(
            ("", ""),
            [
                ("date", circumstances.date),
                ("command", f"`{circumstances.command}`"),
                *circumstances.machine.items(),
                ("versions", _versions(queues)),
            ],
        ).strip(),
    )


def summary(comparison: Comparison) -> str:
    """How Silo stands beside the fastest of the others, in a sentence or two."""
    return " ".join(
        sentence
        for way, figure in (("With a call for each job", CALLS), ("With many jobs in a call", BULK))
        for sentence in _standing(comparison, way, figure)
    )


def figures_table(comparison: Comparison) -> str:
    """All figures of all queues, fastest end to end first."""
    return _table(
        (
            "Queue", "End to end, calls", "Silo ÷ it", "End to end, bulk", "Silo ÷ it", "Enqueue, calls",
            "Enqueue, bulk", "Drain", "Latency p50", "Latency p99",
        ),
        [
            (
                f"**{queue.label}**" if queue.name == SILO else queue.label,
                _with_range(comparison.of(queue, CALLS), comparison.median(queue, CALLS)),
                _ratio(comparison, queue, CALLS),
                _with_range(comparison.of(queue, BULK), comparison.median(queue, BULK)),
                _ratio(comparison, queue, BULK),
                _rate(comparison.median(queue, "enqueue_per_s")),
                _rate(comparison.median(queue, "bulk_enqueue_per_s")),
                _rate(comparison.median(queue, "drain_per_s_incl_boot")),
                _ms(comparison.median(queue, "lat_p50_ms")),
                _ms(comparison.median(queue, "lat_p99_ms")),
            )
            for queue in ranked(comparison)
        ],
        right_from=1,
    )  # fmt: skip


def _standing(comparison: Comparison, way: str, figure: str) -> Iterator[str]:
    silo = _silo_median(comparison, figure)
    others = [queue for queue in comparison.queues if queue.name != SILO and comparison.of(queue, figure)]
    if silo is None or not others:
        return
    best = max(others, key=lambda queue: comparison.median(queue, figure) or 0.0)
    ratio = silo / (comparison.median(best, figure) or 1.0)
    yield (
        f"{way}, Silo moves {_rate(silo)} jobs a second end to end, {ratio:.1f} times as many as "
        f"{best.label}, the fastest other queue."
    )


def _best(comparison: Comparison, queue: Description) -> float:
    return max((comparison.median(queue, figure) or 0.0) for figure in (CALLS, BULK))


def _silo_median(comparison: Comparison, figure: str) -> float | None:
    silo = next((queue for queue in comparison.queues if queue.name == SILO), None)
    return None if silo is None else comparison.median(silo, figure)


def _ratio(comparison: Comparison, queue: Description, figure: str) -> str:
    silo, its = _silo_median(comparison, figure), comparison.median(queue, figure)
    return "—" if silo is None or its is None or queue.name == SILO else f"{silo / its:.1f} ×"


def _absences(comparison: Comparison, circumstances: Circumstances) -> Iterator[str]:
    for title, entries in (("Not measured", circumstances.skipped), ("Failed", comparison.failures)):
        if entries:
            yield f"\n**{title}:** {'; '.join(entries)}.\n"


def _versions(queues: Sequence[Description]) -> str:
    """Of all packages and servers; queues may have different ones of a package."""
    versions = {f"{name} {number}" for queue in queues for name, number in queue.versions.items()}
    return ", ".join(sorted(versions, key=str.lower))


def _with_range(samples: Sequence[float], middle: float | None) -> str:
    if middle is None or len(samples) == 1:
        return _rate(middle)
    return f"{_rate(middle)} ({_rate(min(samples))}–{_rate(max(samples))})"


def _rate(value: float | None) -> str:
    return "—" if value is None else _number(round(value))


def _ms(value: float | None) -> str:
    return "—" if value is None else f"{value:.1f} ms"


def _number(value: int) -> str:
    return f"{value:,}".replace(",", " ")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, right_from: int | None = None) -> str:
    """A table of Markdown; columns from `right_from` on hold figures."""
    columns = range(len(head))
    rule = ["---:" if right_from is not None and column >= right_from else "---" for column in columns]
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]
    return "\n".join(lines) + "\n"
