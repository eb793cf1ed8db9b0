"""Handlers of the main module: how a child process comes by them.

A script's functions are known as `__main__`'s, and in a child that is another module. As in
`multiprocessing`, the child runs the script once more under the name `__mp_main__`, so that what stands below
`if __name__ == "__main__":` is left out. It does so only when something of that module is asked for.
In the worker `multiprocessing` makes `__mp_main__` another name of `__main__`, for what comes back.
"""

import multiprocessing.spawn
import sys
from dataclasses import dataclass
from pathlib import Path

_is_imported = False
_is_importing = False


@dataclass(frozen=True)
class MainModule:
    """Where the main module of the worker can be had again: by one of both, or not at all."""

    name: str | None = None
    path: str | None = None

    @property
    def is_importable(self) -> bool:
        return self.name is not None or self.path is not None


def main_module() -> MainModule:
    """The main module of this process."""
    main = sys.modules["__main__"]
    name = getattr(main.__spec__, "name", None)
    if name is not None:  # It was started with `python -m`.
        is_guarded = name.rpartition(".")[2] != "__main__"  # What a package runs as a program never is.
        return MainModule(name=name) if is_guarded else MainModule()
    path = getattr(main, "__file__", None)
    return MainModule(path=path) if path is not None and Path(path).is_file() else MainModule()


def import_main(main: MainModule) -> None:
    """Make the worker's main module the one of this process. The second call does nothing."""
    global _is_imported, _is_importing
    if _is_imported:
        return
    _is_importing = True
    try:
        if main.name is not None:
            multiprocessing.spawn.prepare({"init_main_from_name": main.name})
        elif main.path is not None:
            multiprocessing.spawn.prepare({"init_main_from_path": main.path})
    finally:
        _is_importing = False
    _is_imported = True


def refuse_during_import() -> None:
    """Keep a script that is imported by a child from becoming another worker, with children of its own.

    Raises:
        RuntimeError: this process is a child that imports its worker's main module.
    """
    if _is_importing:
        raise RuntimeError(
            "a worker was started while its main module is imported in a child process: "
            'start it below `if __name__ == "__main__":`'
        )
