"""The comparison with other queues, as far as it needs none of them: its measurements of Silo."""

from benchmarks.trial import measure

JOBS = 200


def test_silo_can_be_measured_end_to_end() -> None:
    figures = measure("silo", "bulk_end_to_end", JOBS)
    assert figures["bulk_end_to_end_per_s"] > 0


def test_latency_of_silo_can_be_measured() -> None:
    figures = measure("silo", "latency", JOBS // 10)
    assert 0 < figures["lat_p50_ms"] <= figures["lat_p99_ms"]
