"""Queries: SQL with parameters, and what came back."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias  # Cells are of any type that MessagePack has.

from silo.client.errors import SiloClientError
from silo.wire.payload import decode
from silo.wire.pb.silo.v1 import silo_pb2 as pb

QueryParameter: TypeAlias = bool | int | float | str | bytes | None

_INT64_MIN, _INT64_MAX, _UINT64_MAX = -(2**63), 2**63 - 1, 2**64 - 1


@dataclass(frozen=True)
class QueryColumn:
    """A column of a result; `data_type` is the engine's name of the type, such as `Utf8` or `Int64`."""

    name: str
    data_type: str


@dataclass(frozen=True, kw_only=True)
class QueryResult:
    """The rows of a query, each from column name to value. Its columns are known without rows, too."""

    columns: tuple[QueryColumn, ...]
    rows: tuple[Mapping[str, Any], ...]
    row_count: int


def query_to_pb(sql: str, *, tenant: str | None, parameters: Iterable[QueryParameter]) -> pb.QueryRequest:
    """The query; its shard is filled in when it is sent.

    Raises:
        ValueError: a number is not finite, or has more than 64 bits.
        TypeError: a parameter is of a type that SQL does not have.
    """
    return pb.QueryRequest(sql=sql, tenant=tenant or None, parameters=map(_parameter_to_pb, parameters))


def _parameter_to_pb(value: QueryParameter) -> pb.QueryParameter:
    match value:
        case None:
            return pb.QueryParameter(null_value=pb.QueryNull())
        case bool():  # Before `int`, which it is, too.
            return pb.QueryParameter(bool_value=value)
        case int():
            if _INT64_MIN <= value <= _INT64_MAX:
                return pb.QueryParameter(int64_value=value)
            if 0 <= value <= _UINT64_MAX:
                return pb.QueryParameter(uint64_value=value)
            raise ValueError("query bind integer parameters must fit into 64 bits")
        case float():
            if not math.isfinite(value):
                raise ValueError("query bind parameter numbers must be finite")
            return pb.QueryParameter(float64_value=value)
        case str():
            return pb.QueryParameter(string_value=value)
        case bytes():
            return pb.QueryParameter(bytes_value=value)
        case _:
            raise TypeError(f"unsupported query bind parameter type: {type(value).__name__}")


def result_from_pb(response: pb.QueryResponse) -> QueryResult:
    """The result.

    Raises:
        PayloadError: a row is not one MessagePack value.
        SiloClientError: a row is in an encoding that this client does not know.
    """
    return QueryResult(
        columns=tuple(QueryColumn(column.name, column.data_type) for column in response.columns),
        rows=tuple(_row_from_pb(row, index) for index, row in enumerate(response.rows)),
        row_count=response.row_count,
    )


def _row_from_pb(row: pb.SerializedBytes, index: int) -> Mapping[str, Any]:
    encoding = row.WhichOneof("encoding")
    if encoding != "msgpack":
        raise SiloClientError(f"Unsupported encoding for row[{index}]: {encoding}")
    values: Mapping[str, Any] = decode(row.msgpack, field=f"row[{index}]")
    return values
