"""Mistakes: a type checker reports each line that ends in a marker, and no other."""

from typing import Any

import silo
from app.models import Customer, Receipt
from app.tasks import app, charge, send_email, total

ADA = Customer(id=1, email="ada@example.com")


async def enqueue() -> None:
    await send_email.enqueue(ADA)  # mypy: call-arg, pyright: reportCallIssue
    await send_email.enqueue("ada", subject="hi")  # mypy: arg-type, pyright: reportArgumentType
    await send_email.enqueue(ADA, "hi")  # mypy: call-arg, pyright: reportCallIssue
    await send_email.enqueue(ADA, subjekt="hi")  # mypy: call-arg, pyright: reportCallIssue
    await send_email.enqueue(ADA, subject="", attachments=[1])  # mypy: list-item, pyright: reportArgumentType
    await send_email.options(delay=1).enqueue(ADA)  # mypy: call-arg, pyright: reportCallIssue
    send_email.options(dleay=1)  # mypy: call-arg, pyright: reportCallIssue
    send_email.options(priority=1)(ADA, subject="hi")  # mypy: operator, pyright: reportCallIssue
    await total.enqueue("2024-05", "1")  # mypy: arg-type, pyright: reportArgumentType
    handle = await charge.enqueue(5)
    end: silo.JobResult[int] = await handle.result()  # mypy: assignment, pyright: reportAssignmentType
    print(end)


async def call() -> None:
    receipt: Receipt = await charge(5)  # mypy: assignment, pyright: reportAssignmentType
    print(receipt)
    await total("2024-05", 1)  # mypy: misc, pyright: reportGeneralTypeIssues


def view() -> None:
    send_email.sync.enqueue(to=ADA)  # mypy: call-arg, pyright: reportCallIssue


@send_email.limits  # mypy: arg-type, pyright: reportArgumentType
def by_number(to: int, **rest: object) -> list[silo.Limit]:
    return [silo.ConcurrencyLimit(key=str(to), max_concurrency=1)]


@app.task(retry_on=(5,))  # mypy: arg-type, pyright: reportArgumentType
async def wrong_exceptions() -> None: ...


@app.task(execution="greenlet")  # mypy: call-overload untyped-decorator, pyright: reportArgumentType
async def wrong_execution() -> None: ...


@app.middleware  # mypy: arg-type, pyright: reportArgumentType
async def wrong_middleware(context: silo.TaskContext[Any, dict[str, str]]) -> None: ...


@app.lifespan  # mypy: arg-type, pyright: reportArgumentType
async def wrong_lifespan() -> None: ...
