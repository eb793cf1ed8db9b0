"""What a child process runs. It is called by its path, with two file descriptors.

`silo` imports the client, and that gRPC: a child needs neither, and both cost it time and memory. So the
package is put in place without its contents, and gets them when a handler first asks for a name of it.
"""

import importlib.util
import signal
import sys
import threading
from importlib.machinery import ModuleSpec
from pathlib import Path


def _postpone_the_contents_of_silo() -> None:
    folder = Path(__file__).parents[2]
    spec = importlib.util.spec_from_file_location(
        "silo", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    package = importlib.util.module_from_spec(spec)
    package.__getattr__ = _Contents(spec)  # type: ignore[method-assign]  # PEP 562: asked for names it lacks.
    sys.modules["silo"] = package


class _Contents:
    """Fills the package at the first name that is asked for."""

    def __init__(self, spec: ModuleSpec) -> None:
        self._spec = spec
        self._turn = threading.RLock()  # Who asks while another thread imports waits for it.
        self._is_there = False

    def __call__(self, name: str) -> object:
        package = sys.modules["silo"]
        if importlib.util.find_spec(f"silo.{name}") is not None:
            raise AttributeError(f"module 'silo' has no attribute {name!r}")  # A submodule: it is imported.
        with self._turn:
            if not self._is_there:
                self._is_there = True  # Beforehand: what is imported now may ask, too.
                assert self._spec.loader is not None
                self._spec.loader.exec_module(package)
        if name not in vars(package):
            raise AttributeError(f"module 'silo' has no attribute {name!r}")
        return vars(package)[name]


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the worker, which then drains.
    _postpone_the_contents_of_silo()
    from silo.worker.execution.child import serve

    serve(socket_fd=int(sys.argv[1]), control_fd=int(sys.argv[2]))
