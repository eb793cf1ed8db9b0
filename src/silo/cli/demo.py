"""`silo demo`: real jobs on a real server that is killed half-way, and a check that nothing was lost."""

import asyncio
import hashlib
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import silo
from silo import Job, JobHandle, JobResult, RetryPolicy, SiloGRPCClient, SiloWorker, TaskContext
from silo.cli.server_process import ServerProcess

_GROUP = "demo"
_RETRY = RetryPolicy(
    retry_count=5,
    initial_interval_ms=50,
    max_interval_ms=500,
    randomize_interval=True,
    backoff_factor=2.0,
)
_DEADLINE_S = 50.0
_AT_A_TIME = 32  # Calls in flight while the results are fetched.

Payload = dict[str, Any]  # JSON-like values; the demo's own shapes are below.
Context = TaskContext[Payload, dict[str, str]]


@dataclass
class _Entry:
    """One job as the demo asked for it."""

    handle: JobHandle
    kind: str
    expected: object
    due_ms: int


@dataclass
class _Story:
    """What happened, as the demo saw it from outside."""

    entries: list[_Entry] = field(default_factory=list)
    runs: dict[str, int] = field(default_factory=dict)
    finished: set[str] = field(default_factory=set)  # Jobs with a run that returned a value.
    finished_before_kill: int = 0


@dataclass
class _Verdict:
    """One job as the server tells it afterwards."""

    entry: _Entry
    attempts: int
    wait_s: float
    result: object
    complaint: str | None


def run() -> int:
    """Play the demo on the terminal; the exit code: 0 only if every job ended as it should."""
    console = Console()
    try:
        return asyncio.run(_play(console))
    except (RuntimeError, silo.SiloClientError) as error:
        console.print(f"[red bold]The demo failed:[/red bold] {error}")
        return 1


async def _play(console: Console) -> int:
    console.print("[bold]Silo demo[/bold]: a server on local files, a worker, and a kill -9 in the middle\n")
    with tempfile.TemporaryDirectory(prefix="silo-demo-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        console.print(f"server   pid {server.pid} on {server.address}, data in {folder}")
        try:
            async with SiloGRPCClient(servers=[server.address]) as client:
                story = await _run_jobs(console, server, client)
                return _conclude(console, story, await _ask_about_all(client, story))
        finally:
            await server.stop()


async def _run_jobs(console: Console, server: ServerProcess, client: SiloGRPCClient) -> _Story:
    story = _Story()
    started = time.monotonic()
    await _enqueue_all(client, story)
    took_s = time.monotonic() - started
    console.print(f"jobs     {len(story.entries)} enqueued in {took_s:.2f} s, each acknowledged on disk\n")

    async def handler(ctx: Context) -> object:
        job_id = ctx.task.job_id
        story.runs[job_id] = story.runs.get(job_id, 0) + 1
        result = await _handle(ctx)
        story.finished.add(job_id)
        return result

    worker = SiloWorker(
        client=client,
        worker_id="demo-worker",
        task_group=_GROUP,
        handler=handler,
        max_concurrent_tasks=8,
        on_error=lambda error, context: None,  # The outage is the point of the demo.
    )
    async with worker:
        await _watch(console, server, story)
    return story


async def _enqueue_all(client: SiloGRPCClient, story: _Story) -> None:
    root = Path(silo.__file__).parent
    texts = {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))}

    async def add(kind: str, payload: Payload, expected: object, priority: int, delay: float = 0.0) -> None:
        due_ms = time.time_ns() // 1_000_000 + round(delay * 1000)
        handle = await client.enqueue(
            payload={"kind": kind, **payload},
            task_group=_GROUP,
            retry_policy=_RETRY,
            priority=priority,
            start_at_ms=due_ms if delay else None,
        )
        story.entries.append(_Entry(handle, kind, expected, due_ms))

    for name, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        await asyncio.gather(
            add("count words", {"name": name, "text": text}, len(text.split()), 20),
            add("checksum", {"name": name, "text": text}, digest, 60),
        )
    await asyncio.gather(
        *(add("fail twice", {"n": n}, n * n, 50) for n in range(40)),
        *(add("delayed", {"n": n}, n + 1, 50, delay=1.0 + n / 20) for n in range(40)),
        *(add("urgent", {"n": n}, n, 0) for n in range(20)),
    )


async def _handle(ctx: Context) -> object:
    payload = ctx.task.payload
    await asyncio.sleep(0.02)  # As if it called another service.
    match payload["kind"]:
        case "count words":
            return len(payload["text"].split())
        case "checksum":
            return hashlib.sha256(payload["text"].encode()).hexdigest()
        case "fail twice":
            if ctx.task.attempt_number <= 2:
                raise ConnectionError(f"attempt {ctx.task.attempt_number} fails on purpose")
            return payload["n"] ** 2
        case "delayed":
            return payload["n"] + 1
        case _:
            return payload["n"]


async def _watch(console: Console, server: ServerProcess, story: _Story) -> None:
    """Show the progress, and kill the server half-way.

    Raises:
        RuntimeError: the jobs did not end in time.
    """
    total = len(story.entries)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    deadline = time.monotonic() + _DEADLINE_S
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("working", total=total)
        while len(story.finished) < total:
            if time.monotonic() > deadline:
                raise RuntimeError(f"only {len(story.finished)} of {total} jobs ended in {_DEADLINE_S:.0f} s")
            progress.update(bar, completed=len(story.finished))
            if not story.finished_before_kill and len(story.finished) >= total // 2:
                story.finished_before_kill = len(story.finished)
                await _kill_and_start_again(console, server)
            await asyncio.sleep(0.05)
        progress.update(bar, completed=total)


async def _kill_and_start_again(console: Console, server: ServerProcess) -> None:
    pid = server.pid
    await server.kill()
    console.print(f"[red]kill -9 {pid}[/red]: the server is gone, in the middle of work")
    await asyncio.sleep(0.5)
    await server.start()
    console.print(
        f"[green]started again[/green] as pid {server.pid}, on the same files; "
        "the worker connects again and goes on with what it has"
    )


async def _ask_about_all(client: SiloGRPCClient, story: _Story) -> list[_Verdict]:
    """What the server knows of every job, and what is wrong with it."""
    turns = asyncio.Semaphore(_AT_A_TIME)

    async def ask(entry: _Entry) -> _Verdict:
        async with turns:
            result = await entry.handle.result(timeout=30)
            return _verdict(entry, result, await entry.handle.job(include_attempts=True))

    return await asyncio.gather(*map(ask, story.entries))


def _verdict(entry: _Entry, result: JobResult[Any], job: Job) -> _Verdict:
    attempts = job.attempts or ()
    successes = sum(attempt.status == "Succeeded" for attempt in attempts)
    complaint = None
    if result.status != "Succeeded" or successes != 1:
        complaint = f"is {result.status}, with {successes} successful attempts"
    elif result.result != entry.expected:
        complaint = f"has the result {result.result!r}, not {entry.expected!r}"
    started_ms = attempts[0].started_at_ms if attempts else None
    wait_s = max(0, (started_ms or entry.due_ms) - entry.due_ms) / 1000
    return _Verdict(entry, len(attempts), wait_s, result.result, complaint)


def _conclude(console: Console, story: _Story, verdicts: list[_Verdict]) -> int:
    console.print(_table(verdicts))
    wrong = [verdict for verdict in verdicts if verdict.complaint is not None]
    if wrong:
        console.print(f"[red bold]{len(wrong)} jobs are not as they should be:[/red bold]")
        for verdict in wrong[:10]:
            console.print(f"  {verdict.entry.kind} {verdict.entry.handle.id} {verdict.complaint}")
        return 1
    total = len(verdicts)
    attempts = sum(verdict.attempts for verdict in verdicts)
    console.print(
        f"[green bold]Nothing was lost.[/green bold] {total} jobs were acknowledged, "
        f"{total - story.finished_before_kill} of them were still to be done when the server was killed, "
        f"and {total - len(wrong)} succeeded, each exactly once, in {attempts} attempts."
    )
    console.print("Next: [bold]silo server[/bold], README.md, docs/guides/running-workers.md")
    return 0


def _table(verdicts: list[_Verdict]) -> Table:
    table = Table(title="What ran", title_justify="left")
    for name in ("kind", "jobs", "succeeded", "attempts", "wait p50", "wait max", "a result"):
        table.add_column(name, justify="left" if name in ("kind", "a result") else "right")
    for kind in dict.fromkeys(verdict.entry.kind for verdict in verdicts):
        of_kind = [verdict for verdict in verdicts if verdict.entry.kind == kind]
        waits = sorted(verdict.wait_s for verdict in of_kind)
        table.add_row(
            kind,
            str(len(of_kind)),
            str(sum(verdict.complaint is None for verdict in of_kind)),
            str(sum(verdict.attempts for verdict in of_kind)),
            f"{waits[len(waits) // 2]:.2f} s",
            f"{waits[-1]:.2f} s",
            str(of_kind[0].result)[:10],
        )
    return table
