"""Errors of the client have the classes, members and codes that every client has."""

import asyncio

import grpc
import pytest

import silo
from silo import errors
from silo.client.errors import from_status

UNANSWERED = [
    (grpc.StatusCode.UNAVAILABLE, "connection refused"),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded"),
    (grpc.StatusCode.INTERNAL, f"Received {errors.CONNECTION_RESET} with error code 2"),
]
ANSWERED = [
    (grpc.StatusCode.INTERNAL, "storage error"),
    (grpc.StatusCode.CANCELLED, ""),
    (grpc.StatusCode.UNKNOWN, ""),
    (grpc.StatusCode.NOT_FOUND, "shard not found"),
    (grpc.StatusCode.RESOURCE_EXHAUSTED, "busy"),
    (grpc.StatusCode.DEADLINE_EXCEEDED, "Query exceeded statement timeout of 5 ms"),
]


def an_answer(code: grpc.StatusCode, text: str = "because") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details=text)


@pytest.mark.parametrize(
    "error",
    [
        silo.JobNotFoundError("j"),
        silo.JobNotTerminalError("j"),
        silo.TaskNotFoundError("t"),
        silo.TaskLeaseLostError("t", "j", ValueError()),
        silo.DuplicateTaskDeliveryError("t"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_is_missing_or_lost_is_an_error_of_the_client_but_no_status(error: Exception) -> None:
    assert isinstance(error, silo.SiloClientError)
    assert not isinstance(error, silo.SiloGrpcError)


def test_a_taken_job_id_is_something_that_exists_and_a_status() -> None:
    assert issubclass(silo.JobAlreadyExistsError, silo.SiloAlreadyExistsError)
    assert issubclass(silo.SiloAlreadyExistsError, silo.SiloGrpcError)


@pytest.mark.parametrize(
    ("status", "error", "code"),
    [
        (grpc.StatusCode.ALREADY_EXISTS, silo.SiloAlreadyExistsError, "SILO_ALREADY_EXISTS"),
        (grpc.StatusCode.NOT_FOUND, silo.SiloNotFoundError, "SILO_NOT_FOUND"),
        (grpc.StatusCode.INVALID_ARGUMENT, silo.SiloInvalidArgumentError, "SILO_INVALID_ARGUMENT"),
        (grpc.StatusCode.FAILED_PRECONDITION, silo.SiloFailedPreconditionError, "SILO_FAILED_PRECONDITION"),
        (grpc.StatusCode.UNAUTHENTICATED, silo.SiloUnauthenticatedError, "SILO_UNAUTHENTICATED"),
        (grpc.StatusCode.PERMISSION_DENIED, silo.SiloPermissionDeniedError, "SILO_PERMISSION_DENIED"),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, silo.SiloResourceExhaustedError, "SILO_RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.UNAVAILABLE, silo.SiloUnavailableError, "SILO_UNAVAILABLE"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, silo.SiloDeadlineExceededError, "SILO_DEADLINE_EXCEEDED"),
        (grpc.StatusCode.OUT_OF_RANGE, silo.SiloGrpcError, "SILO_GRPC_ERROR"),
    ],
)
def test_a_status_about_nothing_in_particular_has_the_class_of_its_code(
    status: grpc.StatusCode, error: type[silo.SiloGrpcError], code: str
) -> None:
    mapped = from_status(an_answer(status))
    assert isinstance(mapped, silo.SiloGrpcError)
    assert (type(mapped), mapped.code) == (error, code)
    assert (mapped.grpc_code, mapped.grpc_message, str(mapped)) == (status.name, "because", "because")


def test_a_call_that_names_a_task_or_a_job_has_their_errors() -> None:
    missing, taken = an_answer(grpc.StatusCode.NOT_FOUND), an_answer(grpc.StatusCode.ALREADY_EXISTS)
    assert type(from_status(missing, task_id="t")) is silo.TaskNotFoundError
    assert type(from_status(missing, job_id="j")) is silo.JobNotFoundError
    assert type(from_status(taken, task_id="t")) is silo.SiloAlreadyExistsError
    assert type(from_status(taken, job_id="j")) is silo.JobAlreadyExistsError


def test_a_lost_lease_shows_what_caused_it() -> None:
    cause = ValueError("why")
    error = silo.TaskLeaseLostError("t", "j", cause)
    assert (error.task_id, error.job_id) == ("t", "j")
    assert error.cause is error.__cause__ is cause


def test_an_empty_tenant_is_not_named() -> None:
    assert str(silo.JobNotFoundError("j", "")) == 'Job "j" not found'


@pytest.mark.parametrize(("code", "text"), UNANSWERED, ids=str)
def test_no_answer_is_a_matter_of_connectivity(code: grpc.StatusCode, text: str) -> None:
    assert silo.is_connectivity_error(an_answer(code, text))


@pytest.mark.parametrize(("code", "text"), ANSWERED, ids=str)
def test_an_answer_is_no_matter_of_connectivity(code: grpc.StatusCode, text: str) -> None:
    assert not silo.is_connectivity_error(an_answer(code, text))


@pytest.mark.parametrize("error", [ConnectionError(), TimeoutError(), asyncio.CancelledError()], ids=repr)
def test_an_error_from_elsewhere_is_no_matter_of_connectivity(error: BaseException) -> None:
    assert not silo.is_connectivity_error(error)
