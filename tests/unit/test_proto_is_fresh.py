"""The generated protobuf code is what its sources say."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_committed_code_is_what_the_generator_makes() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "generate_protos.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
