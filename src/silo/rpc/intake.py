"""What stands between gRPC and the handlers: who may call, what is taken in, and how much of it at a time."""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple  # grpc is untyped: contexts are Any here.

import grpc
from google.protobuf.message import DecodeError, Message

from silo.errors import ErrorKind, InvalidRequest, SiloError
from silo.node.memory import Memory, ShortOfMemory
from silo.node.node import Node
from silo.rpc import ext_handlers, handlers
from silo.rpc.answering import shortened
from silo.rpc.auth import EVERYTHING, Access, Tokens, Unauthenticated
from silo.rpc.status import STATUS
from silo.wire.pb.silo.ext.v1 import ext_pb2
from silo.wire.pb.silo.v1 import silo_pb2

# Bytes of all requests that are being handled, before calls that add work are refused.
REQUEST_BYTES_MAX = 512 << 20
_ADDING = frozenset({"Enqueue", "ImportJobs", "EnqueueMany"})


class TooManyBytes(SiloError):
    """Back off and try again."""

    kind = ErrorKind.EXHAUSTED


def all_handlers(
    node: Node, tokens: Tokens | None = None, *, extension: bool = True
) -> grpc.GenericRpcHandler:
    """All methods of our services, by their paths; for callers with one of `tokens`, if there are any.

    Without `extension` the server only speaks `silo.v1`, as others do.
    """
    intake = _Intake(node.memory)
    services = _SERVICES if extension else _SERVICES[:1]

    def handlers_for(access: Access) -> grpc.GenericRpcHandler:
        return _handlers(node, access, intake, services)

    if tokens is None:
        return handlers_for(EVERYTHING)
    return _Guarded(tokens, {access: handlers_for(access) for access in tokens.accesses})


class _Guarded(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped.
    """Looks at the token before the request is read, and chooses the handlers of its access."""

    def __init__(self, tokens: Tokens, handlers: Mapping[Access, grpc.GenericRpcHandler]) -> None:
        self._tokens = tokens
        self._handlers = handlers
        self._methods = next(iter(handlers.values()))

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if self._methods.service(details) is None:
            return None  # Not ours: health checks, reflection.
        try:
            access = self._tokens.access(details.invocation_metadata)
        except Unauthenticated as refusal:
            return _refusing(refusal)
        return self._handlers[access].service(details)


class _Intake:
    """How many bytes of requests are being handled."""

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self.bytes = 0

    def objection(self, size: int) -> SiloError | None:
        """Why a request of this size that adds work is not taken; None if it is."""
        try:
            self._memory.check(size)
        except ShortOfMemory as refusal:
            return refusal
        if self.bytes + size > REQUEST_BYTES_MAX:
            return TooManyBytes("too many bytes of requests at once; try again")
        return None


class _Shedding(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped.
    """Refuses calls that add work while memory is short, before their requests are read."""

    def __init__(self, memory: Memory, handlers: grpc.GenericRpcHandler) -> None:
        self._memory = memory
        self._handlers = handlers
        self._adding = {
            f"/{service.full_name}/{method.name}"
            for service, _, _ in _SERVICES
            for method in service.methods
            if method.name in _ADDING
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if self._memory.is_short and details.method in self._adding:
            return _refusing(ShortOfMemory())
        return self._handlers.service(details)


def _refusing(refusal: SiloError) -> grpc.RpcMethodHandler:
    async def refuse(requests: Any, context: Any) -> None:
        await context.abort(STATUS[refusal.kind], refusal.message)

    # As a stream, whatever the method is: then nothing of the request is read.
    return grpc.stream_stream_rpc_method_handler(refuse)


_SERVICES = (
    (handlers.SERVICE, handlers.SiloServicer, silo_pb2),
    (ext_handlers.SERVICE, ext_handlers.SiloExtServicer, ext_pb2),
)


def _handlers(
    node: Node, access: Access, intake: _Intake, services: Sequence[tuple[Any, Any, Any]]
) -> grpc.GenericRpcHandler:
    """The handlers of one access.

    The generated registration answers UNKNOWN, which says nothing, to bytes that
    are no message; here they are a wrong request like any other.
    """
    found: dict[str, grpc.RpcMethodHandler] = {}
    for service, servicer_type, messages in services:
        servicer = servicer_type(node, access)
        for method in service.methods:
            found[f"/{service.full_name}/{method.name}"] = _method_handler(
                getattr(servicer, method.name), method, messages, access, intake
            )
    return _Shedding(node.memory, _Paths(found))


class _Paths(grpc.GenericRpcHandler):  # type: ignore[misc]  # grpc is untyped.
    """Handlers by their paths."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        return self._handlers.get(details.method)


def _method_handler(
    handler: Callable[..., Awaitable[Any]], method: Any, messages: Any, access: Access, intake: _Intake
) -> grpc.RpcMethodHandler:
    reads = _reader(getattr(messages, method.input_type.name))
    writes = _message_of(method.output_type).SerializeToString
    if method.client_streaming:
        return grpc.stream_stream_rpc_method_handler(
            _taken_in_one_by_one(handler, intake), request_deserializer=reads, response_serializer=writes
        )
    answers = (
        grpc.unary_stream_rpc_method_handler
        if method.server_streaming
        else grpc.unary_unary_rpc_method_handler
    )
    return answers(
        _taken_in(_allowed(handler, method.name, access), method.name, intake),
        request_deserializer=reads,
        response_serializer=writes,
    )


def _message_of(descriptor: Any) -> Any:
    return getattr(silo_pb2 if descriptor.file.package == "silo.v1" else ext_pb2, descriptor.name)


class _Received(NamedTuple):
    """A request as it came in; without a message when it does not decode."""

    message: Message | None
    size: int


def _reader(message: type[Message]) -> Callable[[bytes], _Received]:
    def read(data: bytes) -> _Received:
        try:
            return _Received(message.FromString(data), len(data))
        except DecodeError:
            return _Received(None, len(data))

    return read


def _taken_in(
    handler: Callable[..., Awaitable[Any]], method: str, intake: _Intake
) -> Callable[..., Awaitable[Any]]:
    """Count requests by their bytes while they are handled, and refuse those that cannot be.

    gRPC keeps the exception with which a call is aborted, and by it the frames that it passed, until the
    collector finds them, which depends on anything but their size. So no frame between gRPC and a handler
    may still have the request when a call is aborted: refused requests would fill memory.
    """
    adds_work = method in _ADDING

    async def answer(received: _Received, context: Any) -> Any:
        message, size = received
        del received
        if message is None:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the request does not decode")
        if adds_work and (objection := intake.objection(size)) is not None:
            del message
            await context.abort(STATUS[objection.kind], objection.message)
        call = handler(message, context)
        del message
        intake.bytes += size
        try:
            return await call
        finally:
            intake.bytes -= size

    return answer


def _taken_in_one_by_one(
    handler: Callable[..., Awaitable[Any]], intake: _Intake
) -> Callable[..., Awaitable[Any]]:
    """The same for a stream: each message counts until the handler wants the next one."""

    async def messages(requests: AsyncIterator[_Received]) -> AsyncIterator[Message]:
        async for received in requests:
            if received.message is None:
                raise InvalidRequest("the request does not decode")
            intake.bytes += received.size
            try:
                yield received.message
            finally:
                intake.bytes -= received.size

    async def answer(requests: AsyncIterator[_Received], context: Any) -> Any:
        return await handler(messages(requests), context)

    return answer


def _allowed(
    handler: Callable[..., Awaitable[Any]], method: str, access: Access
) -> Callable[..., Awaitable[Any]]:
    if access.is_admin:
        return handler

    async def answer(request: Any, context: Any) -> Any:
        try:
            access.check_call(method, request)
        except SiloError as refusal:
            del request  # See `_taken_in`.
            refusal.__traceback__ = None
            await context.abort(STATUS[refusal.kind], shortened(refusal.message))
        call = handler(request, context)
        del request
        return await call

    return answer
