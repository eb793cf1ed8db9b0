"""Handlers that tests run in child processes. Nothing of Silo is imported unless a handler does it."""

import contextlib
import ctypes
import errno
import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

turns = itertools.count()
later = queue.SimpleQueue[Any]()  # For what handlers leave behind for the next one in the same process.
told = queue.SimpleQueue[Any]()


def nothing(ctx: Any) -> None: ...


def payload(ctx: Any) -> Any:
    return ctx.task.payload


def pid(ctx: Any) -> int:
    return os.getpid()


def turn(ctx: Any) -> tuple[int, int, Any]:
    """Which job of this process it is."""
    return os.getpid(), next(turns), ctx.task.payload


def task(ctx: Any) -> Any:
    return ctx.task


def is_in_main_thread(ctx: Any) -> bool:
    return threading.current_thread() is threading.main_thread()


def size(ctx: Any) -> int:
    return len(ctx.task.payload)


def many_bytes(ctx: Any) -> bytes:
    return bytes(ctx.task.payload)


def modules(ctx: Any) -> list[str]:
    return list(sys.modules)


def names_of_silo(ctx: Any) -> list[object]:
    """In every way in which a handler may come by them."""
    import silo  # noqa: PLC0415
    from silo import Success, TaskContext  # noqa: PLC0415
    from silo.client.outcome import Success as TheSame  # noqa: PLC0415

    unknown = getattr(silo, "unknown", "no such name")
    return [Success is TheSame, silo.TaskContext is TaskContext, unknown, "SiloWorker" in silo.__all__]


def silo_in_two_threads(ctx: Any) -> list[str]:
    names = list[str]()
    both = threading.Barrier(2)

    def look() -> None:
        both.wait()
        from silo import SiloWorker  # noqa: PLC0415

        names.append(SiloWorker.__name__)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


def an_outcome(ctx: Any) -> Any:
    from silo import Failure  # noqa: PLC0415

    return Failure("NOT_TODAY", {"why": "rain"})


def a_retry(ctx: Any) -> None:
    from silo import Retry  # noqa: PLC0415

    raise Retry(after=7)


# Errors


class PickledError(Exception):
    code = "PICKLED"

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text, number)
        self.number = number

    def __str__(self) -> str:
        return f"{self.args[0]} {self.number}"


class StrangeError(Exception):
    """Its constructor wants what pickle does not know."""

    def __init__(self, *, number: int) -> None:
        super().__init__(f"strange {number}")
        self.number = number


class LongerError(Exception):
    """Each call of its constructor makes its text longer."""

    def __init__(self, text: str) -> None:
        super().__init__(f"longer {text}")


class UnpickledError(Exception):
    code = "UNPICKLED"

    def __init__(self, number: int) -> None:
        super().__init__(f"unpickled {number}")
        self.lock = threading.Lock()


class Unreadable:
    def __reduce__(self) -> Any:
        return _refuse, ()


def _refuse() -> None:
    raise OSError(errno.EIO, "not here")


def raise_value_error(ctx: Any) -> None:
    raise ValueError("bad value")


def raise_pickled(ctx: Any) -> None:
    raise PickledError("pickled", 7)


def raise_strange(ctx: Any) -> None:
    raise StrangeError(number=7)


def raise_longer(ctx: Any) -> None:
    raise LongerError("text")


def raise_unpickled(ctx: Any) -> None:
    raise UnpickledError(7)


def raise_foreign(ctx: Any) -> None:
    import foreign_errors  # noqa: PLC0415  # A module that the test makes.

    raise foreign_errors.ForeignError("far away")


def raise_stop_iteration(ctx: Any) -> None:
    next(iter(()))


def raise_cancelled(ctx: Any) -> None:
    import asyncio  # noqa: PLC0415

    raise asyncio.CancelledError


def unpicklable(ctx: Any) -> Any:
    return threading.Lock()


def unreadable(ctx: Any) -> Any:
    return Unreadable()


# Crashes


def exit_at_once(ctx: Any) -> None:
    os._exit(ctx.task.payload)


def exit_politely(ctx: Any) -> None:
    sys.exit(ctx.task.payload)


def exit_with_a_thread_left(ctx: Any) -> None:
    threading.Thread(target=time.sleep, args=[1000]).start()
    sys.exit(3)


def die_of(ctx: Any) -> None:
    os.kill(os.getpid(), ctx.task.payload)
    time.sleep(1000)


def fault(ctx: Any) -> None:
    ctypes.string_at(0)


def fork_and_die(ctx: Any) -> None:
    """The forked process holds the socket of this one open."""
    forked = os.fork()
    if not forked:
        time.sleep(1000)
        os._exit(0)
    Path(ctx.task.payload).write_text(str(forked))
    os._exit(3)


# Time


def say(ctx: Any, text: str) -> None:
    """For tests that look into the file that the payload names."""
    with Path(ctx.task.payload).open("a") as file:
        file.write(text)


def sleep(ctx: Any) -> None:
    say(ctx, f"{os.getpid()} ")
    time.sleep(1000)


def sleep_and_clean_up(ctx: Any) -> None:
    try:
        sleep(ctx)
    finally:
        time.sleep(0.05)
        say(ctx, "clean")


def never_end(ctx: Any) -> None:
    say(ctx, f"{os.getpid()} ")
    while True:
        try:
            time.sleep(1000)
        except BaseException:
            say(ctx, "stubborn ")


def run_another_program(ctx: Any) -> None:
    with subprocess.Popen(["sleep", "1000"]) as process:
        say(ctx, f"{os.getpid()} {process.pid} ")


def wait_cancelled(ctx: Any) -> tuple[bool, bool, bool]:
    before = ctx.wait_cancelled(0.001)
    say(ctx, f"{os.getpid()} ")
    return before, ctx.wait_cancelled(), ctx.cancelled


def spin_until_cancelled(ctx: Any) -> str:
    say(ctx, f"{os.getpid()} ")
    while not ctx.cancelled:
        pass
    return "seen"


def cancel(ctx: Any) -> bool:
    ctx.cancel()
    return ctx.cancelled


def cancel_in_the_next_job(ctx: Any) -> int:
    """Leave a thread behind that cancels this job when the next one runs."""

    def cancel() -> None:
        later.get()
        try:
            ctx.cancel()
        except RuntimeError as error:
            told.put((str(error), ctx.cancelled))

    threading.Thread(target=cancel, daemon=True).start()
    return os.getpid()


def end_while_a_thread_cancels(ctx: Any) -> int:
    def cancel() -> None:
        with contextlib.suppress(RuntimeError):
            ctx.cancel()

    threading.Thread(target=cancel, daemon=True).start()
    ctx.wait_cancelled()
    return os.getpid()


def be_the_next_job(ctx: Any) -> tuple[int, Any, bool]:
    later.put("go on")
    return os.getpid(), told.get(timeout=10), ctx.cancelled


# Processes


def grow(ctx: Any) -> int:
    later.put(b"x" * ctx.task.payload)
    return os.getpid()


def listening_ports(ctx: Any) -> list[int]:
    """Of all sockets that this process has."""
    ports = []
    for fd in [int(path.name) for path in Path("/dev/fd").iterdir()]:
        with contextlib.suppress(OSError):  # It is no socket, or was the list's own.
            duplicate = os.dup(fd)
            try:
                with socket.socket(fileno=duplicate) as sock:
                    if sock.family == socket.AF_INET:
                        ports.append(sock.getsockname()[1])
            except OSError:
                os.close(duplicate)
    return ports


def stdin_and_interrupt(ctx: Any) -> tuple[str, bool]:
    return sys.stdin.read(), signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def terminate_a_forked_process(ctx: Any) -> int | None:
    import multiprocessing  # noqa: PLC0415

    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=[1000])
    process.start()
    process.terminate()
    process.join(10)
    return process.exitcode
