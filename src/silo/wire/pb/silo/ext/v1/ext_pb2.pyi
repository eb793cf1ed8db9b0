from silo.wire.pb.silo.v1 import silo_pb2 as _silo_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Status(_message.Message):
    __slots__ = ("code", "message")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class EnqueueManyRequest(_message.Message):
    __slots__ = ("jobs",)
    JOBS_FIELD_NUMBER: _ClassVar[int]
    jobs: _containers.RepeatedCompositeFieldContainer[_silo_pb2.EnqueueRequest]
    def __init__(self, jobs: _Optional[_Iterable[_Union[_silo_pb2.EnqueueRequest, _Mapping]]] = ...) -> None: ...

class EnqueueManyResponse(_message.Message):
    __slots__ = ("results",)
    RESULTS_FIELD_NUMBER: _ClassVar[int]
    results: _containers.RepeatedCompositeFieldContainer[EnqueueResult]
    def __init__(self, results: _Optional[_Iterable[_Union[EnqueueResult, _Mapping]]] = ...) -> None: ...

class EnqueueResult(_message.Message):
    __slots__ = ("id", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: str
    error: Status
    def __init__(self, id: _Optional[str] = ..., error: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class WorkRequest(_message.Message):
    __slots__ = ("hello", "window", "reports")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    REPORTS_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    window: int
    reports: _containers.RepeatedCompositeFieldContainer[Report]
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., window: _Optional[int] = ..., reports: _Optional[_Iterable[_Union[Report, _Mapping]]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "task_groups", "session", "slots", "held")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TASK_GROUPS_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    task_groups: _containers.RepeatedScalarFieldContainer[str]
    session: str
    slots: int
    held: _containers.RepeatedCompositeFieldContainer[HeldTask]
    def __init__(self, worker_id: _Optional[str] = ..., task_groups: _Optional[_Iterable[str]] = ..., session: _Optional[str] = ..., slots: _Optional[int] = ..., held: _Optional[_Iterable[_Union[HeldTask, _Mapping]]] = ...) -> None: ...

class HeldTask(_message.Message):
    __slots__ = ("task_id", "shard")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    shard: str
    def __init__(self, task_id: _Optional[str] = ..., shard: _Optional[str] = ...) -> None: ...

class Report(_message.Message):
    __slots__ = ("task_id", "shard", "tenant_id", "success", "failure", "cancelled", "postponed", "handed_back", "refresh_success", "refresh_failure")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    TENANT_ID_FIELD_NUMBER: _ClassVar[int]
    SUCCESS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_FIELD_NUMBER: _ClassVar[int]
    POSTPONED_FIELD_NUMBER: _ClassVar[int]
    HANDED_BACK_FIELD_NUMBER: _ClassVar[int]
    REFRESH_SUCCESS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_FAILURE_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    shard: str
    tenant_id: str
    success: _silo_pb2.SerializedBytes
    failure: Failure
    cancelled: _silo_pb2.Cancelled
    postponed: Postponed
    handed_back: HandedBack
    refresh_success: _silo_pb2.RefreshSuccess
    refresh_failure: _silo_pb2.RefreshFailure
    def __init__(self, task_id: _Optional[str] = ..., shard: _Optional[str] = ..., tenant_id: _Optional[str] = ..., success: _Optional[_Union[_silo_pb2.SerializedBytes, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., cancelled: _Optional[_Union[_silo_pb2.Cancelled, _Mapping]] = ..., postponed: _Optional[_Union[Postponed, _Mapping]] = ..., handed_back: _Optional[_Union[HandedBack, _Mapping]] = ..., refresh_success: _Optional[_Union[_silo_pb2.RefreshSuccess, _Mapping]] = ..., refresh_failure: _Optional[_Union[_silo_pb2.RefreshFailure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "data", "is_final")
    CODE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    IS_FINAL_FIELD_NUMBER: _ClassVar[int]
    code: str
    data: _silo_pb2.SerializedBytes
    is_final: bool
    def __init__(self, code: _Optional[str] = ..., data: _Optional[_Union[_silo_pb2.SerializedBytes, _Mapping]] = ..., is_final: _Optional[bool] = ...) -> None: ...

class Postponed(_message.Message):
    __slots__ = ("delay_ms",)
    DELAY_MS_FIELD_NUMBER: _ClassVar[int]
    delay_ms: int
    def __init__(self, delay_ms: _Optional[int] = ...) -> None: ...

class HandedBack(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkResponse(_message.Message):
    __slots__ = ("welcome", "tasks", "refresh_tasks", "acknowledgements", "cancellations", "lost_leases")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TASKS_FIELD_NUMBER: _ClassVar[int]
    REFRESH_TASKS_FIELD_NUMBER: _ClassVar[int]
    ACKNOWLEDGEMENTS_FIELD_NUMBER: _ClassVar[int]
    CANCELLATIONS_FIELD_NUMBER: _ClassVar[int]
    LOST_LEASES_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    tasks: _containers.RepeatedCompositeFieldContainer[_silo_pb2.Task]
    refresh_tasks: _containers.RepeatedCompositeFieldContainer[_silo_pb2.RefreshFloatingLimitTask]
    acknowledgements: _containers.RepeatedCompositeFieldContainer[Acknowledgement]
    cancellations: _containers.RepeatedCompositeFieldContainer[Cancellation]
    lost_leases: _containers.RepeatedCompositeFieldContainer[LostLease]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., tasks: _Optional[_Iterable[_Union[_silo_pb2.Task, _Mapping]]] = ..., refresh_tasks: _Optional[_Iterable[_Union[_silo_pb2.RefreshFloatingLimitTask, _Mapping]]] = ..., acknowledgements: _Optional[_Iterable[_Union[Acknowledgement, _Mapping]]] = ..., cancellations: _Optional[_Iterable[_Union[Cancellation, _Mapping]]] = ..., lost_leases: _Optional[_Iterable[_Union[LostLease, _Mapping]]] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("lease_ms", "window_max")
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_MAX_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    window_max: int
    def __init__(self, lease_ms: _Optional[int] = ..., window_max: _Optional[int] = ...) -> None: ...

class Acknowledgement(_message.Message):
    __slots__ = ("task_id", "error")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    error: Status
    def __init__(self, task_id: _Optional[str] = ..., error: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class Cancellation(_message.Message):
    __slots__ = ("task_id", "cancelled_at_ms")
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    CANCELLED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    cancelled_at_ms: int
    def __init__(self, task_id: _Optional[str] = ..., cancelled_at_ms: _Optional[int] = ...) -> None: ...

class LostLease(_message.Message):
    __slots__ = ("task_id",)
    TASK_ID_FIELD_NUMBER: _ClassVar[int]
    task_id: str
    def __init__(self, task_id: _Optional[str] = ...) -> None: ...

class WatchJobRequest(_message.Message):
    __slots__ = ("shard", "id", "tenant")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    shard: str
    id: str
    tenant: str
    def __init__(self, shard: _Optional[str] = ..., id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class WatchJobResponse(_message.Message):
    __slots__ = ("result",)
    RESULT_FIELD_NUMBER: _ClassVar[int]
    result: _silo_pb2.GetJobResultResponse
    def __init__(self, result: _Optional[_Union[_silo_pb2.GetJobResultResponse, _Mapping]] = ...) -> None: ...

class WatchJobsRequest(_message.Message):
    __slots__ = ("watch", "forget")
    WATCH_FIELD_NUMBER: _ClassVar[int]
    FORGET_FIELD_NUMBER: _ClassVar[int]
    watch: _containers.RepeatedCompositeFieldContainer[Watch]
    forget: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, watch: _Optional[_Iterable[_Union[Watch, _Mapping]]] = ..., forget: _Optional[_Iterable[int]] = ...) -> None: ...

class Watch(_message.Message):
    __slots__ = ("number", "shard", "id", "tenant")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ID_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    number: int
    shard: str
    id: str
    tenant: str
    def __init__(self, number: _Optional[int] = ..., shard: _Optional[str] = ..., id: _Optional[str] = ..., tenant: _Optional[str] = ...) -> None: ...

class WatchJobsResponse(_message.Message):
    __slots__ = ("watched",)
    WATCHED_FIELD_NUMBER: _ClassVar[int]
    watched: _containers.RepeatedCompositeFieldContainer[Watched]
    def __init__(self, watched: _Optional[_Iterable[_Union[Watched, _Mapping]]] = ...) -> None: ...

class Watched(_message.Message):
    __slots__ = ("number", "result", "error")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    number: int
    result: _silo_pb2.GetJobResultResponse
    error: Status
    def __init__(self, number: _Optional[int] = ..., result: _Optional[_Union[_silo_pb2.GetJobResultResponse, _Mapping]] = ..., error: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...
