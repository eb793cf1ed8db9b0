"""From what went wrong to what a caller is told."""

import functools
import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar, cast  # grpc is untyped: contexts are Any here.
from urllib.parse import quote

import grpc

from silo.errors import SiloError
from silo.rpc.status import STATUS
from silo.wire.pb.silo.ext.v1 import ext_pb2 as pb

log = logging.getLogger(__name__)

_TEXT_BYTES_MAX = 4096  # A status text travels in a header, of which clients take 8 KiB at most.

_Handler = TypeVar("_Handler", bound=Callable[..., Awaitable[Any]])


def answering(handler: _Handler) -> _Handler:
    """Turn what a handler raises into a status. Anything unforeseen is INTERNAL, and logged.

    Handlers of streams send the initial metadata themselves before they write: gRPC takes it for unsent while
    the first message is being written, and whoever cancels that could not send a status any more.
    """

    @functools.wraps(handler)
    async def answer(self: object, request: Any, context: Any) -> Any:
        try:
            return await handler(self, request, context)
        except SiloError as error:
            # Its traceback has the request in it, and is in a circle where the error was a variable.
            error.__traceback__ = None
            code, text = STATUS[error.kind], shortened(error.message)
        except Exception as error:
            if context.done() or isinstance(error, grpc.aio.AbortError):
                raise
            log.exception("call failed", extra={"fields": {"method": handler.__name__}})
            code, text = grpc.StatusCode.INTERNAL, "internal error"
        del request  # See `_taken_in`.
        return await context.abort(code, text)

    return cast(_Handler, answer)


def shortened(text: str) -> str:
    """`text` without its middle if it is too long: what clients match on stands at either end."""
    if len(quote(text)) <= _TEXT_BYTES_MAX:  # Signs beyond ASCII travel as three bytes for each of theirs.
        return text
    half = _TEXT_BYTES_MAX // 24  # One sign takes twelve bytes at most.
    return f"{text[:half]}…{text[-half:]}"


def status_of(error: SiloError) -> pb.Status:
    """What would be the status of a call of its own, for answers that hold several."""
    code: int = STATUS[error.kind].value[0]
    return pb.Status(code=code, message=shortened(error.message))
