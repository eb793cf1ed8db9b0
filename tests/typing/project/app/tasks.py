"""An application with tasks of every kind."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import silo
from app.models import Attachment, Customer, Receipt, Totals

app = silo.App(task_group="shop")
sent: list[str] = []


@app.lifespan
@asynccontextmanager
async def mail_server() -> AsyncGenerator[None]:
    sent.clear()
    yield


@app.middleware
async def note_failures(
    context: silo.TaskContext[Any, dict[str, str]],
    call_next: Callable[[silo.TaskContext[Any, dict[str, str]]], Awaitable[object]],
) -> object:
    try:
        return await call_next(context)
    except ConnectionError:
        sent.append(f"{context.task.metadata['silo.task']} failed")
        raise


@app.refresh_handler
async def refresh(context: silo.RefreshTaskContext) -> int:
    return context.task.current_max_concurrency + 1


@app.task(
    task_group="emails",
    priority=20,
    retry=silo.RetryPolicy(retry_count=5),
    retry_on=(ConnectionError,),
    give_up_on=(ConnectionRefusedError,),
    limits=[silo.RateLimit(name="mail", unique_key="all", limit=100, duration_ms=60_000)],
    timeout=30.0,
)
async def send_email(
    to: Customer, *, subject: str, attachments: Sequence[Attachment] | None = None
) -> Receipt:
    context = silo.current_task()
    if not sent:
        sent.append("the server is busy")
        raise silo.Retry(after=0.01)
    sent.append(f"{subject} to {to.email} with {len(attachments or ())}")
    return Receipt(message_id=context.task.job_id, attempts=context.task.attempt_number)


@send_email.limits
def one_at_a_time_for_each_customer(to: Customer, **rest: object) -> list[silo.Limit]:
    return [silo.ConcurrencyLimit(key=f"customer {to.id}", max_concurrency=1)]


@app.task
async def charge(cents: int) -> Receipt | silo.Failure | silo.Cancelled:
    if cents < 0:
        return silo.Failure("NEGATIVE", {"cents": cents})
    return Receipt("charged", 1) if cents else silo.Cancelled()


@app.task
def total(month: str, *amounts: int) -> Totals:
    if silo.current_blocking_task().cancelled:
        return {"month": month, "cents": 0}
    return {"month": month, "cents": sum(amounts)}


@app.task(execution="process", name="shop.prime")
def largest_prime_factor(n: int) -> int:
    factor = 2
    while factor * factor <= n:
        if n % factor:
            factor += 1
        else:
            n //= factor
    return n


@app.task()
async def clean_up() -> None:
    await total.options(delay=60, metadata={"by": "clean-up"}).enqueue("2024-05", 1, 2)
