"""A `Work` stream as a test drives it: what it says, and what it hears."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Any  # Stubs and messages of grpc are untyped.

import grpc

from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb
from silo.wire.pb.silo.ext.v1 import ext_pb2_grpc
from silo.wire.pb.silo.v1 import silo_pb2
from tests.integration.rpc_server import GROUP, WORKER, RpcServer, packed

TIMEOUT_S = 10.0
SESSION = "session-1"


class Stream:
    """One call of `Work`. What was heard is kept."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.welcome: pb.Welcome | None = None
        self.messages: list[pb.WorkResponse] = []
        self.tasks: list[silo_pb2.Task] = []
        self.refreshes: list[silo_pb2.RefreshFloatingLimitTask] = []
        self.answers: list[pb.Acknowledgement] = []
        self.cancelled: list[pb.Cancellation] = []
        self.lost: list[str] = []
        self.is_over = False

    async def say(self, **fields: Any) -> None:
        await self.call.write(pb.WorkRequest(**fields))

    async def hear(self) -> bool:
        """Read one message; False at the end of the stream."""
        async with asyncio.timeout(TIMEOUT_S):
            message = await self.call.read()
        if message is grpc.aio.EOF:
            self.is_over = True
            return False
        if message.HasField("welcome"):
            assert not self.messages, "welcome comes first"
            self.welcome = message.welcome
        self.messages.append(message)
        self.tasks += message.tasks
        self.refreshes += message.refresh_tasks
        self.answers += message.acknowledgements
        self.cancelled += message.cancellations
        self.lost += [lost.task_id for lost in message.lost_leases]
        return True

    async def until(self, condition: Callable[["Stream"], bool]) -> "Stream":
        """Read until it holds."""
        while not condition(self):
            assert await self.hear(), "the stream has ended"
        return self

    async def hear_tasks(self, count: int) -> list[silo_pb2.Task]:
        """All tasks, once there are so many."""
        await self.until(lambda stream: len(stream.tasks) >= count)
        return self.tasks

    async def hear_answers(self, count: int) -> list[tuple[str, int, str]]:
        """All acknowledgements, once there are so many: task id, code and text."""
        await self.until(lambda stream: len(stream.answers) >= count)
        return [(answer.task_id, answer.error.code, answer.error.message) for answer in self.answers]

    async def end(self) -> None:
        """Say that this was all, and read to the end."""
        await self.call.done_writing()
        while await self.hear():
            pass

    async def report(self, *tasks: silo_pb2.Task, **outcome: Any) -> None:
        """Report on tasks, in one message: success, or `outcome`."""
        await self.say(reports=[a_report(task, **outcome) for task in tasks])


def a_report(task: Any, **outcome: Any) -> pb.Report:
    """A report on a task: success, or `outcome`."""
    outcome = outcome or {"success": packed(b"\xa4done")}
    return pb.Report(task_id=task.id, shard=task.shard, tenant_id=task.tenant_id, **outcome)


def a_hello(
    *,
    session: str = SESSION,
    worker_id: str = WORKER,
    task_groups: Iterable[str] = (GROUP,),
    slots: int = 10,
    held: Iterable[Any] = (),
) -> pb.Hello:
    """`held`: tasks."""
    return pb.Hello(
        session=session,
        worker_id=worker_id,
        task_groups=task_groups,
        slots=slots,
        held=[pb.HeldTask(task_id=task.id, shard=task.shard) for task in held],
    )


def ext(server: RpcServer) -> Any:
    return ext_pb2_grpc.SiloExtStub(server.channel)


@asynccontextmanager
async def a_stream(
    server: RpcServer, *, window: int | None = 10, token: str | None = None, **hello: Any
) -> AsyncIterator[Stream]:
    """A stream that has said hello; it is cut off at the end unless it has ended."""
    metadata = None if token is None else (("authorization", f"Bearer {token}"),)
    call = ext(server).Work(metadata=metadata)
    stream = Stream(call)
    try:
        await stream.say(hello=a_hello(**hello), window=window)
        yield stream
    finally:
        call.cancel()


async def welcomed(stream: Stream) -> Stream:
    """The same, once the server has its session."""
    return await stream.until(lambda stream: stream.welcome is not None)
