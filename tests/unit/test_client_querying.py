"""Parameters of a query have their types on the wire, and its result is read row by row."""

from typing import Any

import msgpack
import pytest

from silo import PayloadError, QueryColumn, SiloClientError
from silo.client.querying import query_to_pb, result_from_pb
from silo.wire.pb.silo.v1 import silo_pb2 as pb


def row(plain: Any) -> pb.SerializedBytes:
    return pb.SerializedBytes(msgpack=msgpack.packb(plain))


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "bool_value"),
        (False, "bool_value"),
        (0, "int64_value"),
        (1, "int64_value"),
        (-1, "int64_value"),
        (2**53, "int64_value"),
        (2**63 - 1, "int64_value"),
        (-(2**63), "int64_value"),
        (2**63, "uint64_value"),
        (2**64 - 1, "uint64_value"),
        (1.5, "float64_value"),
        (2.0, "float64_value"),
        ("größe", "string_value"),
        ("", "string_value"),
        (b"\x00\xff", "bytes_value"),
        (b"", "bytes_value"),
    ],
    ids=repr,
)
def test_a_parameter_has_its_type_on_the_wire(value: Any, kind: str) -> None:
    [sent] = query_to_pb("select $1", tenant=None, parameters=[value]).parameters
    assert sent.WhichOneof("value") == kind
    assert getattr(sent, kind) == value


def test_none_is_a_null_and_not_a_missing_value() -> None:
    [sent] = query_to_pb("select $1", tenant=None, parameters=[None]).parameters
    assert sent.WhichOneof("value") == "null_value"


def test_parameters_keep_their_order() -> None:
    sent = query_to_pb("select $1, $2, $3", tenant="t", parameters=(3, 1, 2))
    assert [parameter.int64_value for parameter in sent.parameters] == [3, 1, 2]
    assert (sent.sql, sent.tenant, sent.shard) == ("select $1, $2, $3", "t", "")


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (float("nan"), ValueError, r"^query bind parameter numbers must be finite$"),
        (float("inf"), ValueError, r"^query bind parameter numbers must be finite$"),
        (2**64, ValueError, "64 bits"),
        (-(2**63) - 1, ValueError, "64 bits"),
        ([1], TypeError, r"^unsupported query bind parameter type: list$"),
        ({}, TypeError, r"^unsupported query bind parameter type: dict$"),
        (1j, TypeError, r"^unsupported query bind parameter type: complex$"),
    ],
    ids=lambda value: repr(value) if not isinstance(value, type) else None,
)
def test_a_parameter_without_a_form_is_refused(value: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        query_to_pb("select $1", tenant=None, parameters=[value])


def test_a_result_has_its_columns_in_order_and_its_rows_by_name() -> None:
    result = result_from_pb(
        pb.QueryResponse(
            columns=[pb.ColumnInfo(name="id", data_type="Utf8"), pb.ColumnInfo(name="n", data_type="Int64")],
            rows=[row({"id": "a", "n": 2**63 - 1}), row({"id": "b", "n": None})],
            row_count=2,
        )
    )
    assert result.columns == (QueryColumn("id", "Utf8"), QueryColumn("n", "Int64"))
    assert result.rows == ({"id": "a", "n": 2**63 - 1}, {"id": "b", "n": None})
    assert result.row_count == 2


def test_columns_are_known_without_rows() -> None:
    result = result_from_pb(pb.QueryResponse(columns=[pb.ColumnInfo(name="id", data_type="Utf8")]))
    assert (result.columns, result.rows, result.row_count) == ((QueryColumn("id", "Utf8"),), (), 0)


def test_a_row_of_no_bytes_is_named() -> None:
    with pytest.raises(PayloadError, match=r"^No bytes to decode for field row\[0\]"):
        result_from_pb(pb.QueryResponse(rows=[pb.SerializedBytes(msgpack=b"")]))


def test_a_row_that_is_no_value_is_named() -> None:
    with pytest.raises(PayloadError, match=r"row\[1\]"):
        result_from_pb(pb.QueryResponse(rows=[row({}), pb.SerializedBytes(msgpack=b"boom")]))


def test_a_row_in_an_encoding_of_the_future_is_named() -> None:
    with pytest.raises(SiloClientError, match=r"^Unsupported encoding for row\[1\]: None$"):
        result_from_pb(pb.QueryResponse(rows=[row({}), pb.SerializedBytes()]))
