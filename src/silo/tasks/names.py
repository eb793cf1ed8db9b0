"""The name of a task: the same in every process that imports it, however it was started."""

import sys
from collections.abc import Callable
from pathlib import Path

_MAIN = ("__main__", "__mp_main__")  # The second one is what a spawned process calls the first.


def task_name(function: Callable[..., object]) -> str:
    """Module and qualified name, as an import would have them.

    A script that runs as `__main__` counts as the module of its file, so that what it enqueues
    finds the tasks of a worker that imported it.
    """
    module = function.__module__
    if module in _MAIN:
        module = _importable_name(module)
    return f"{module}.{function.__qualname__}"


def _importable_name(main: str) -> str:
    module = sys.modules[main]
    spec = getattr(module, "__spec__", None)
    if spec is not None:  # `python -m package.module`.
        name: str = spec.name
        return name
    file = getattr(module, "__file__", None)
    return Path(file).stem if file else main
