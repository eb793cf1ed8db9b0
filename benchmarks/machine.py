"""Facts about the machine that figures must be read with."""

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

_WRITES = 50


def machine_facts() -> dict[str, str]:
    """By name, for people."""
    return {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
        "Python": platform.python_version(),
        "fsync of 4 KiB": f"{_fsync_ms():.2f} ms",
        "load before the run": f"{os.getloadavg()[0]:.1f}",
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _fsync_ms() -> float:
    """The median where the servers have their files: it bounds what durable queues can do."""
    took_s = []
    with tempfile.TemporaryFile() as file:
        for _ in range(_WRITES):
            file.write(bytes(4096))
            file.flush()
            began_s = time.perf_counter()
            os.fsync(file.fileno())
            took_s.append(time.perf_counter() - began_s)
    return statistics.median(took_s) * 1000
