"""`silo demo`: real jobs on a real server that is killed half-way, and a check that nothing was lost."""

import asyncio
import hashlib
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import silo
from silo import JobHandle, RetryPolicy, SiloGRPCClient, SiloWorker
from silo.cli.server_process import ServerProcess
from silo import TaskContext

_GROUP = "demo"
_RETRY = RetryPolicy(
    retry_count=5,
    initial_interval_ms=50,
    max_interval_ms=500,
    randomize_interval=True,
    backoff_factor=2.0,
)
_DEADLINE_S = 120.0

Payload = dict[str, Any]  # JSON-like values; the demo's own shapes are below.
Context = TaskContext[Payload, dict[str, str]]


@dataclass
class _Story:
    """What happened, as the demo saw it from outside."""

    handles: dict[str, list[JobHandle]] = field(default_factory=dict)
    expected: dict[str, object] = field(default_factory=dict)
    runs: Counter[str] = field(default_factory=Counter)
    done: int = 0

    @property
    def total(self) -> int:
        return sum(map(len, self.handles.values()))


def run() -> int:
    """Play the demo on the terminal; the exit code: 0 only if every job ended as it should."""
    return asyncio.run(_play(Console()))


async def _play(console: Console) -> int:
    console.print("[bold]Silo demo[/bold]: a server on local files, a worker, and a kill -9 in the middle\n")
    with tempfile.TemporaryDirectory(prefix="silo-demo-") as folder:
        server = ServerProcess(Path(folder))
        await server.start()
        console.print(f"server   pid {server.pid} on {server.address}, data in {folder}")
        try:
            async with SiloGRPCClient(servers=[server.address]) as client:
                return await _run_jobs(console, server, client)
        finally:
            await server.stop()


async def _run_jobs(console: Console, server: ServerProcess, client: SiloGRPCClient) -> int:
    story = _Story()
    started = time.monotonic()
    await _enqueue_all(client, story)
    console.print(
        f"enqueued {story.total} jobs in {time.monotonic() - started:.2f} s, each acknowledged after fsync\n"
    )

    async def handler(ctx: Context) -> object:
        story.runs[ctx.task.job_id] += 1
        result = await _handle(ctx)
        story.done += 1
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
    return await _verify(console, client, story)


async def _enqueue_all(client: SiloGRPCClient, story: _Story) -> None:
    root = Path(silo.__file__).parent
    texts = {str(path.relative_to(root)): path.read_text() for path in sorted(root.rglob("*.py"))}

    async def add(kind: str, payload: Payload, expected: object, **options: Any) -> None:
        handle = await client.enqueue(
            payload={"kind": kind, **payload}, task_group=_GROUP, retry_policy=_RETRY, **options
        )
        story.handles.setdefault(kind, []).append(handle)
        story.expected[handle.id] = expected

    for name, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        await asyncio.gather(
            add("count words", {"name": name, "text": text}, len(text.split()), priority=20),
            add("checksum", {"name": name, "text": text}, digest, priority=60),
        )
    await asyncio.gather(
        *(add("fail twice", {"n": n}, n * n) for n in range(40)),
        *(add("delayed", {"n": n}, n + 1, delay=1.0 + n / 20) for n in range(40)),
        *(add("urgent", {"n": n}, n, priority=0) for n in range(20)),
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
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    )  # fmt: skip
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("working", total=story.total)
        killed = False
        async with asyncio.timeout(_DEADLINE_S):
            while story.done < story.total:
                progress.update(bar, completed=story.done)
                if not killed and story.done >= story.total // 2:
                    killed = True
                    pid = server.pid
                    await server.kill()
                    console.print(f"[red]kill -9 {pid}[/red]: the server is gone, in the middle of work")
                    await asyncio.sleep(0.5)
                    await server.start()
                    console.print(f"[green]started again[/green] as pid {server.pid}, on the same files")
                await asyncio.sleep(0.05)
        progress.update(bar, completed=story.total)


async def _verify(console: Console, client: SiloGRPCClient, story: _Story) -> int:
    """Ask the server about every job and compare with what we enqueued."""
    table = Table(title="What ran", title_justify="left")
    for name in ("kind", "jobs", "succeeded", "attempts", "wait p50", "wait max", "example result"):
        table.add_column(name, justify="left" if name in ("kind", "example result") else "right")
    wrong: list[str] = []
    for kind, handles in story.handles.items():
        attempts, waits, succeeded, example = 0, [], 0, ""
        for handle in handles:
            result = await handle.result(timeout=30)
            job = await handle.job(include_attempts=True)
            attempts += len(job.attempts or ())
            ended_well = [a for a in job.attempts or () if a.status == "Succeeded"]
            if result.status != "Succeeded" or result.result != story.expected[handle.id]:
                wrong.append(f"{kind} {handle.id}: {result}")
                continue
            if len(ended_well) != 1:
                wrong.append(f"{kind} {handle.id}: succeeded {len(ended_well)} times")
            succeeded += 1
            waits.append(((ended_well[0].finished_at_ms or 0) - job.status_changed_at_ms) / 1000)
            example = str(result.result)[:16]
        starts = sorted(waits) or [0.0]
        table.add_row(
            kind, str(len(handles)), str(succeeded), str(attempts),
            f"{starts[len(starts) // 2]:.2f} s", f"{starts[-1]:.2f} s", example,
        )  # fmt: skip
    console.print(table)
    repeated = sum(1 for runs in story.runs.values() if runs > 1)
    if wrong:
        console.print(f"[red bold]{len(wrong)} jobs are not as they should be:[/red bold]")
        for line in wrong[:10]:
            console.print(f"  {line}")
        return 1
    console.print(
        f"[green bold]Nothing was lost[/green bold]: {story.total} of {story.total} jobs were acknowledged, "
        f"survived kill -9 and succeeded exactly once ({repeated} ran more than once: retries on purpose, "
        "or a run that the kill cut off)."
    )
    console.print("Next: `silo server`, then README.md and docs/guides/running-workers.md")
    return 0
