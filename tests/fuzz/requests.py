"""Requests that no client would send: messages filled at random, and bytes that are no messages at all."""

from random import Random
from typing import Any  # Descriptors and messages of protobuf are untyped.

from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from silo.wire.pb.silo.ext.v1 import ext_pb2 as ext
from silo.wire.pb.silo.v1 import silo_pb2 as pb

METHODS: dict[str, MethodDescriptor] = {
    method.name: method
    for service in (pb.DESCRIPTOR.services_by_name["Silo"], ext.DESCRIPTOR.services_by_name["SiloExt"])
    for method in service.methods
}
_WEIRD = (
    "", " ", "-", "\0", "a\0b", "\x7f", "é", "日本", "\U0001f600", "a" * 63, "a" * 64, "é" * 65, "x" * 5_000,
    "../../etc", "floating_refresh:k", "%s%n", "0", "None", "k", "k2", "u",
)  # fmt: skip
_NUMBERS = (0, 1, 2, 3, 99, 100, 1_000, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, (1 << 63) - 1)
_FLOATS = (0.0, 1.0, 2.0, -1.0, 1e308, float("inf"), float("-inf"), float("nan"), 1e-320)
_TEXTS_LONG = 0.001  # How often a text is long enough to hurt.


class Known:
    """What the server has told so far, so that requests get past their first check."""

    def __init__(self, shards: list[str]) -> None:
        self.shards = shards
        self.job_ids = [f"j{number}" for number in range(40)]
        self.groups = ["g1", "g2"]
        self.workers = ["w1", "w2"]
        self.sessions = ["s1", "s2", "s3"]
        self.task_ids: list[str] = ["none"]

    def learn(self, answer: Any) -> None:
        if isinstance(answer, pb.LeaseTasksResponse | ext.WorkResponse):
            self.task_ids += [task.id for task in (*answer.tasks, *answer.refresh_tasks)]
            del self.task_ids[:-50]


class Maker:
    """Makes requests from a seed."""

    def __init__(self, rng: Random, known: Known) -> None:
        self._rng = rng
        self._known = known

    def request(self, method: str) -> bytes:
        """A request of a method: mostly one that decodes, often one that is fine in places."""
        rng = self._rng
        if rng.random() < 0.03:
            return rng.randbytes(rng.choice([0, 1, 7, 300, 5_000]))
        message = self._message(method)
        data = bytes(message.SerializeToString())
        return self._damaged(data) if rng.random() < 0.15 else data

    def requests(self, method: str) -> list[bytes]:
        """The requests of a stream. A stream of tasks mostly begins as it should."""
        rng = self._rng
        if method != "Work" or rng.random() < 0.1:
            return [self.request(method) for _ in range(rng.randrange(1, 6))]
        messages = [self._message(method) for _ in range(rng.randrange(1, 6))]
        for number, message in enumerate(messages):
            if number or rng.random() < 0.05:
                message.ClearField("hello")
            elif not message.HasField("hello"):
                message.hello.SetInParent()
                self._repair(message)
        return [bytes(message.SerializeToString()) for message in messages]

    def _message(self, method: str) -> Any:
        descriptor = METHODS[method].input_type
        message = GetMessageClass(descriptor)()
        self._fill(message, descriptor, depth=0)
        self._repair(message)
        return message

    def _fill(self, message: Any, descriptor: Descriptor, *, depth: int) -> None:
        for field in descriptor.fields:
            if self._rng.random() < 0.35:
                continue
            if field.is_repeated:
                self._fill_repeated(message, field, depth)
            elif field.message_type is not None:
                if depth < 6:
                    child = getattr(message, field.name)
                    child.SetInParent()
                    self._fill(child, field.message_type, depth=depth + 1)
            else:
                setattr(message, field.name, self._value(field))

    def _fill_repeated(self, message: Any, field: FieldDescriptor, depth: int) -> None:
        rng = self._rng
        count = rng.choice([0, 1, 1, 2, 3, 17]) if rng.random() < 0.99 else 300
        target = getattr(message, field.name)
        entry = field.message_type
        if entry is not None and entry.GetOptions().map_entry:
            for _ in range(count):
                target[self._text()] = self._text()
        elif entry is not None:
            if depth < 6:
                for _ in range(count):
                    self._fill(target.add(), entry, depth=depth + 1)
        else:
            target.extend(self._value(field) for _ in range(count))

    def _value(self, field: FieldDescriptor) -> Any:
        rng = self._rng
        match field.cpp_type:
            case FieldDescriptor.CPPTYPE_BOOL:
                return rng.random() < 0.5
            case FieldDescriptor.CPPTYPE_DOUBLE | FieldDescriptor.CPPTYPE_FLOAT:
                return rng.choice(_FLOATS)
            case FieldDescriptor.CPPTYPE_ENUM:
                return rng.choice([0, 1, 2, 3, 4, 99, -1])
            case FieldDescriptor.CPPTYPE_INT32 | FieldDescriptor.CPPTYPE_INT64:
                most = (1 << 31) - 1 if field.cpp_type == FieldDescriptor.CPPTYPE_INT32 else (1 << 63) - 1
                number = min(rng.choice(_NUMBERS), most)
                return -number - 1 if rng.random() < 0.2 else number
            case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
                most = (1 << 32) - 1 if field.cpp_type == FieldDescriptor.CPPTYPE_UINT32 else (1 << 64) - 1
                return min(rng.choice(_NUMBERS), most)
        if field.type == FieldDescriptor.TYPE_BYTES:
            return rng.randbytes(rng.choice([0, 1, 30, 2_000, 100_000]))
        return self._text()

    def _text(self) -> str:
        rng = self._rng
        if rng.random() < _TEXTS_LONG:
            return "y" * rng.choice([70_000, 1_000_000])
        if rng.random() < 0.5:
            return rng.choice(_WEIRD)
        return "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x20, 0x2FFF)])) for _ in range(5)
        )

    def _repair(self, message: Any) -> None:
        """Put something sensible where a check would end the call at once."""
        rng, known = self._rng, self._known
        sensible = {
            "shard": known.shards,
            "id": known.job_ids,
            "task_group": known.groups,
            "worker_id": known.workers,
            "task_id": known.task_ids,
        }
        for name, values in sensible.items():
            if name in message.DESCRIPTOR.fields_by_name and rng.random() < 0.9:
                setattr(message, name, rng.choice(values))
        if hasattr(message, "tenant") and rng.random() < 0.95:
            message.ClearField("tenant")
        if hasattr(message, "priority") and rng.random() < 0.8:
            message.priority = rng.choice([0, 50, 99])
        if hasattr(message, "start_at_ms") and rng.random() < 0.7:
            message.start_at_ms = 0
        if hasattr(message, "metadata") and rng.random() < 0.8:
            for name in list(message.metadata)[3:]:
                del message.metadata[name]
        if isinstance(message, pb.LeaseTasksRequest):
            message.max_tasks = rng.choice([0, 1, 5, 2**32 - 1])
        if isinstance(message, pb.CpuProfileRequest | pb.HeapProfileRequest):
            message.duration_seconds = 1
        if isinstance(message, ext.WorkRequest):
            self._repair_work(message)
        if isinstance(message, pb.ImportJobsRequest | ext.EnqueueManyRequest):
            for job in message.jobs:
                self._repair(job)
        if isinstance(message, ext.WatchJobsRequest):
            for watch in message.watch:
                self._repair(watch)

    def _repair_work(self, message: Any) -> None:
        rng, known = self._rng, self._known
        if rng.random() < 0.8:
            message.window = rng.choice([0, 1, 5, 2**32 - 1])
        for report in message.reports:
            self._repair(report)
        if message.HasField("hello"):
            self._repair(message.hello)
            if rng.random() < 0.9:
                message.hello.session = rng.choice(known.sessions)
                del message.hello.task_groups[:]
                message.hello.task_groups.extend(rng.sample(known.groups, rng.randrange(1, 3)))
            for held in message.hello.held:
                self._repair(held)

    def _damaged(self, data: bytes) -> bytes:
        """The same bytes with a few accidents."""
        rng = self._rng
        buffer = bytearray(data)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(buffer) + 1)
            match rng.randrange(4):
                case 0 if buffer:
                    buffer[at % len(buffer)] ^= 1 << rng.randrange(8)
                case 1:
                    buffer[at:at] = rng.randbytes(rng.choice([1, 3, 20]))
                case 2:
                    del buffer[at : at + rng.choice([1, 5, 50])]
                case _:
                    buffer[at:at] = buffer[: rng.choice([1, 10, 100])]
        return bytes(buffer)
