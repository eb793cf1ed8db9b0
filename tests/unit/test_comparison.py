"""The comparison with other queues: counting, order and report, without any queue."""

import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.comparison import Comparison, Trial, planned
from benchmarks.describe import Description
from benchmarks.measurements import MEASUREMENTS
from benchmarks.report import BULK, CALLS, Circumstances, as_json, as_markdown, ranked, summary
from benchmarks.tally import PAYLOAD_CHARS, Tally, finish_in, payload


def a_queue(name: str, *, broker: str = "Redis", bulk: bool = False) -> Description:
    return Description(
        name=name,
        label=name.capitalize(),
        broker=broker,
        broker_settings=f"{broker} as it comes",
        settings="defaults",
        acknowledged="on disk",
        worker_killed="runs again",
        measurements=[it for it in MEASUREMENTS if bulk or not it.startswith("bulk")],
        versions={name: "1.0"},
        missing=None,
    )


SILO = a_queue("silo", broker="Silo", bulk=True)
HARE = a_queue("hare")
TORTOISE = a_queue("tortoise", bulk=True)


def a_comparison(queues: Sequence[Description] = (HARE, SILO, TORTOISE)) -> Comparison:
    comparison = Comparison(queues)
    for queue, figure, samples in (
        (SILO, CALLS, (4_000.0, 6_000.0, 5_000.0)),
        (SILO, BULK, (4_500.0,)),
        (HARE, CALLS, (2_000.0,)),
        (TORTOISE, CALLS, (100.0,)),
        (TORTOISE, BULK, (9_000.0,)),
    ):
        for sample in samples:
            comparison.add(Trial(0, queue, "end_to_end"), {figure: sample})
    return comparison


def circumstances(skipped: Sequence[str] = ()) -> Circumstances:
    return Circumstances(
        date="2026-01-31",
        command="make compare",
        machine={"memory": "1 GiB"},
        rounds=3,
        jobs=5_000,
        skipped=skipped,
    )


def test_a_job_that_is_delivered_twice_counts_once(tmp_path: Path) -> None:
    tally = Tally(tmp_path, warm_up=1, jobs=2)
    first, second, third = payload(-1), payload(0), payload(1)
    for given in (first, second, second, first):
        tally.note(given)
    assert finish_in(tmp_path / "done") is None
    tally.note(third)
    assert finish_in(tmp_path / "done") is not None


def test_latencies_leave_out_the_warm_up(tmp_path: Path) -> None:
    began_s = time.monotonic()
    tally = Tally(tmp_path, warm_up=2, jobs=1)
    for number in (-1, -2):
        tally.note(payload(number))
    assert finish_in(tmp_path / "ready") is not None
    tally.note(payload(0))
    finish = finish_in(tmp_path / "done")
    assert finish is not None
    [wait_s] = finish.waits_s
    assert -0.001 <= wait_s <= finish.at_s - began_s


def test_payloads_have_their_length_whatever_the_number() -> None:
    assert {len(payload(number)) for number in (-20, 0, 1_000_000)} == {PAYLOAD_CHARS}


def test_each_round_measures_everything_once_in_an_order_of_its_own() -> None:
    trials = planned([SILO, HARE], rounds=2, seed=1)
    rounds = [[(it.queue.name, it.measurement) for it in trials if it.round == number] for number in (0, 1)]
    assert sorted(rounds[0]) == sorted(rounds[1])
    assert len(set(rounds[0])) == len(SILO.measurements) + len(HARE.measurements)
    assert rounds[0] != rounds[1]
    assert trials == planned([SILO, HARE], rounds=2, seed=1)


def test_queues_are_ranked_by_their_faster_way_end_to_end() -> None:
    assert ranked(a_comparison()) == [TORTOISE, SILO, HARE]


def test_the_summary_tells_the_fastest_other_queue_of_each_way_even_if_it_is_faster() -> None:
    told = summary(a_comparison())
    assert (
        "With a call for each job, Silo moves 5 000 jobs a second end to end, 2.5 times as many as Hare"
        in told
    )
    assert (
        "With many jobs in a call, Silo moves 4 500 jobs a second end to end, 0.5 times as many as Tortoise"
        in told
    )


def test_the_page_has_medians_with_their_range_and_what_was_left_out() -> None:
    comparison = a_comparison()
    comparison.failures.append("Hare, latency")
    page = as_markdown(comparison, circumstances(skipped=["Snail (not installed: snaild)"]))
    assert "| **Silo** | 5 000 (4 000–6 000) | — | 4 500 | — |" in page
    assert "| Hare | 2 000 | 2.5 × | — | — |" in page
    assert "**Not measured:** Snail (not installed: snaild)." in page
    assert "**Failed:** Hare, latency." in page


def test_without_silo_there_is_nothing_to_compare_with() -> None:
    comparison = a_comparison([HARE])
    assert summary(comparison) == ""
    assert "| Hare | 2 000 | — | — | — |" in as_markdown(comparison, circumstances())


def test_json_has_the_medians_and_all_samples() -> None:
    peers = as_json(a_comparison(), circumstances())["peers"]
    assert isinstance(peers, list)
    silo = next(peer for peer in peers if peer["peer"] == "silo")
    assert silo[CALLS] == 5_000.0
    assert silo["samples"][CALLS] == [4_000.0, 6_000.0, 5_000.0]
