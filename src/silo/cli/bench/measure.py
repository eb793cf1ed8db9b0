"""Facts about the machine, and summaries of samples."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path


def machine_facts() -> dict[str, object]:
    """What a figure must be read with."""
    return {
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "slatedb": version("slatedb"),
        "grpcio": version("grpcio"),
        "silo": version("silo-queue"),
    }


def percentile(samples: Sequence[float], share: float) -> float:
    """The sample that `share` (0 to 1) of all samples do not exceed."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def resident_mb(pid: int) -> float:
    """Resident memory of a process in MB, from /proc."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1)


def cpu_seconds(pid: int) -> float:
    """What a process has used of processors so far, from /proc."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def role_command(role: str, argument: str, count: int) -> tuple[str, ...]:
    """The command line of a child process that plays a part in a bench."""
    return (sys.executable, "-m", "silo.cli.bench.roles", role, argument, str(count))
