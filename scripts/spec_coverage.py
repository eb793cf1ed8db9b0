"""Which statements of the specification no test names.

`tests/spec.toml` lists the statements. A test names those that it shows with
`@pytest.mark.spec("LEA-2", "W-ERR-4")`. Fails when one is neither named nor explained, when
one is named that is not listed, and when an explained one has got a test.
"""

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"


def listed() -> tuple[set[str], dict[str, str]]:
    """All statements, and those without a test with the reason."""
    table = tomllib.loads((TESTS / "spec.toml").read_text())
    gaps = table.pop("gaps")
    names = {
        f"{family}-{number}"
        for families in table.values()
        for family, numbers in families.items()
        for number in numbers
    }
    return names, gaps


def named() -> Iterator[tuple[str, str]]:
    """Each statement that a test names, with the file."""
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(), str(path))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.spec":
                for argument in node.args:
                    if not isinstance(argument, ast.Constant):
                        raise SystemExit(f"{path}:{node.lineno}: write statements as texts")
                    yield str(argument.value), str(path.relative_to(ROOT))


def main() -> int:
    statements, gaps = listed()
    tests: dict[str, set[str]] = {}
    for name, path in named():
        tests.setdefault(name, set()).add(path)
    missing = sorted(statements - tests.keys() - gaps.keys(), key=_order)
    unknown = sorted(tests.keys() - statements)
    outdated = sorted((gaps.keys() & tests.keys()) | (gaps.keys() - statements))
    if "-v" in sys.argv[1:]:
        for name in sorted(tests, key=_order):
            print(f"{name:10} {', '.join(sorted(tests[name]))}")
    for name in missing:
        print(f"{name}: no test names it")
    for name in unknown:
        print(f"{name}: named in {', '.join(sorted(tests[name]))}, but not in tests/spec.toml")
    for name in outdated:
        print(f"{name}: explained as a gap, but it has a test or is not listed")
    for name, reason in gaps.items():
        print(f"{name}: no test: {reason}")
    print(
        f"{len(statements & tests.keys())} of {len(statements)} statements have a test, {len(gaps)} explained"
    )
    return 1 if missing or unknown or outdated else 0


def _order(name: str) -> tuple[str, int]:
    family, _, number = name.rpartition("-")
    return family, int(number)


if __name__ == "__main__":
    sys.exit(main())
