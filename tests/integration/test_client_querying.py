"""Queries go to the shard of their tenant, and what went wrong says so."""

import grpc
import pytest

from silo import (
    QueryColumn,
    SiloDeadlineExceededError,
    SiloGrpcError,
    SiloInvalidArgumentError,
    SiloNotFoundError,
    SiloResourceExhaustedError,
)
from silo.wire.pb.silo.v1 import silo_pb2 as pb
from tests.integration.fake_silo import (
    SHARD,
    Status,
    a_client,
    fake_silo,
    not_found,
    unavailable,
    value,
    wrong_shard,
)

OTHER_SHARD = "22222222-2222-4222-8222-222222222222"
ONE_ROW = pb.QueryResponse(
    columns=[pb.ColumnInfo(name="n", data_type="Int64")], rows=[value({"n": 1})], row_count=1
)
Code = grpc.StatusCode


async def test_a_query_goes_to_the_shard_of_its_tenant_and_brings_rows() -> None:
    async with fake_silo() as low, fake_silo() as high, a_client(low) as client:
        low.shards = [(SHARD, "", "8", low.address), (OTHER_SHARD, "8", "", high.address)]
        low.answer("Query", ONE_ROW)
        high.answer("Query", ONE_ROW)
        result = await client.query("select $1", parameters=[1])
        assert (result.columns, result.rows, result.row_count) == (
            (QueryColumn("n", "Int64"),),
            ({"n": 1},),
            1,
        )
        await client.query("select 1", "env-0")  # 9aae…
        [by_default], [of_tenant] = low.calls("Query"), high.calls("Query")
        assert (by_default.shard, by_default.HasField("tenant"), by_default.sql) == (
            SHARD,
            False,
            "select $1",
        )
        assert by_default.parameters == [pb.QueryParameter(int64_value=1)]
        assert (of_tenant.shard, of_tenant.tenant) == (OTHER_SHARD, "env-0")


async def test_a_parameter_without_a_form_is_refused_before_anything_is_sent() -> None:
    async with fake_silo() as server, a_client(server) as client:
        with pytest.raises(ValueError, match="must be finite"):
            await client.query("select $1", parameters=[float("nan")])
        assert server.received == []


async def test_a_query_that_is_not_answered_is_repeated_where_its_shard_is_now() -> None:
    async with fake_silo() as old, fake_silo() as new, a_client(old) as client:
        old.answer("Query", unavailable())
        old.always("Query", wrong_shard(owner=new.address))
        new.answer("Query", ONE_ROW)
        assert (await client.query("select 1")).row_count == 1


async def test_a_statement_timeout_is_not_tried_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        text = "Query exceeded statement timeout of 5000 ms"
        server.always("Query", Status(Code.DEADLINE_EXCEEDED, text))
        with pytest.raises(SiloDeadlineExceededError, match=text):
            await client.query("select 1")
        assert len(server.calls("Query")) == 1


async def test_another_deadline_is_tried_again() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.answer("Query", Status(Code.DEADLINE_EXCEEDED, "Deadline Exceeded"), ONE_ROW)
        assert (await client.query("select 1")).row_count == 1


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (Status(Code.INVALID_ARGUMENT, "SQL error: no such table"), SiloInvalidArgumentError),
        (Status(Code.INTERNAL, "Query execution failed: x"), SiloGrpcError),
        (not_found("nothing like that"), SiloNotFoundError),
    ],
)
async def test_a_refused_query_is_not_tried_again(status: Status, error: type[SiloGrpcError]) -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("Query", status)
        with pytest.raises(error) as raised:
            await client.query("select 1", "t")
        assert (type(raised.value), raised.value.grpc_message) == (error, status.text)
        assert len(server.calls("Query")) == 1


async def test_too_many_statements_are_tried_again_by_the_channel() -> None:
    async with fake_silo() as server, a_client(server) as client:
        server.always("Query", Status(Code.RESOURCE_EXHAUSTED, "8 statements already in flight"))
        with pytest.raises(SiloResourceExhaustedError, match="in flight"):
            await client.query("select 1")
        assert len(server.calls("Query")) == 5
