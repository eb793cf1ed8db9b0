"""Generate the protobuf code that is committed under src/silo/wire/pb; with --check, only compare.

Run with the project's own environment: the version of grpcio-tools is part of the result.
"""

import filecmp
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "proto"
OUT = ROOT / "src" / "silo" / "wire" / "pb"
PACKAGE = "silo.wire.pb"


def generate(out: Path) -> None:
    """Write the generated modules of every .proto file below `out`."""
    files = sorted(str(path.relative_to(PROTOS)) for path in PROTOS.rglob("*.proto"))
    arguments = [
        "protoc",
        f"-I{PROTOS}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main([*arguments, *files]) != 0:
        raise SystemExit("protoc failed")
    # The generator imports by the folders of the sources, as if they were packages of their own.
    folders = "|".join(sorted({re.escape(Path(file).parts[0]) for file in files}))
    for path in [*out.rglob("*_pb2*.py"), *out.rglob("*_pb2.pyi")]:
        own = re.sub(
            rf"^from (({folders})[.\w]*) import", rf"from {PACKAGE}.\1 import", path.read_text(), flags=re.M
        )
        path.write_text(own)
    for path in list(out.rglob("*_pb2.py")):
        for folder in path.relative_to(out).parents:
            (out / folder / "__init__.py").touch()


def stale(fresh: Path) -> list[str]:
    """Names of generated files that the committed ones do not match."""
    names = {path.relative_to(fresh) for path in fresh.rglob("*.py*") if "__pycache__" not in path.parts}
    names |= {path.relative_to(OUT) for path in OUT.rglob("*.py*") if "__pycache__" not in path.parts}
    return sorted(
        str(name)
        for name in names
        if not (fresh / name).is_file()
        or not (OUT / name).is_file()
        or not filecmp.cmp(fresh / name, OUT / name, shallow=False)
    )


def main() -> None:
    if "--check" not in sys.argv[1:]:
        OUT.mkdir(parents=True, exist_ok=True)
        generate(OUT)
        return
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        names = stale(Path(folder))
    if names:
        raise SystemExit(f"generated protobuf code is stale; run `make proto`: {', '.join(names)}")


if __name__ == "__main__":
    main()
