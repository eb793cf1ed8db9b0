"""The application uses its tasks, and each type is what one would write down."""

import asyncio
from typing import assert_type

import silo
from app.models import Attachment, Customer, Receipt, Totals
from app.tasks import app, charge, clean_up, largest_prime_factor, send_email, total

ADA = Customer(id=1, email="ada@example.com")


async def enqueue() -> list[object]:
    email = await send_email.enqueue(ADA, subject="hi", attachments=[Attachment("a", b"x")])
    assert_type(email, silo.TaskHandle[Receipt])
    end = await email.result(timeout=30)
    assert_type(end, silo.JobResult[Receipt])
    assert_type(end.result, Receipt | None)
    charged = await (await charge.options(priority=0, tenant=None).enqueue(cents=5)).result(timeout=30)
    assert_type(charged.result, Receipt | None)
    totals = await (await total.enqueue("2024-05", 1, 2)).result(timeout=30)
    assert_type(totals.result, Totals | None)
    prime = await (await largest_prime_factor.enqueue(n=84)).result(timeout=30)
    assert_type(prime.result, int | None)
    assert_type(await clean_up.enqueue(), silo.TaskHandle[None])
    assert_type(send_email.handle(email.id), silo.TaskHandle[Receipt])
    return [end.result, charged.result, totals.result, prime.result]


async def call() -> None:
    """Without a server: tasks are functions still."""
    assert_type(await charge(5), Receipt | silo.Failure | silo.Cancelled)
    assert_type(largest_prime_factor(84), int)
    assert_type(total("2024-05", 1, 2), Totals)


def view() -> str:
    """From code that waits."""
    handle = send_email.options(delay=5, id="order-17").sync.enqueue(ADA, subject="hi")
    assert_type(handle.result(timeout=1).result, Receipt | None)
    return total.sync.enqueue("2024-05").id


async def main() -> None:
    async with app, app.worker(groups=["emails", "shop"], max_concurrent_tasks=20, processes=1):
        print(await enqueue())


if __name__ == "__main__":
    asyncio.run(main())
