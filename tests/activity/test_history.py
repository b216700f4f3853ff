"""History: what was called, newest first, as JSON and as CSV, by filter and page, and of whose keys."""

import base64
import csv
import io
import json
import uuid
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from app.activity.calendar import first_id, moment_of
from app.activity.history import query_type
from app.activity.spreadsheet import csv_text, wants_csv
from app.kernel.db import new_id
from app.pricing.starter import ensure_starter
from tests.activity.conftest import Past
from tests.rig import Customer, exact

D = Decimal
ROW = (
    "id", "timestamp", "model", "provider", "endpoint", "input_count", "output_count", "price_in_usd", "query_type", "query_source",
    "api_key_id", "status", "error_code", "request_id",
)  # fmt: skip


async def test_a_call_is_listed_with_all_that_is_known_of_it(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(
        customer, "0.000045", request_id="call-1", model="openai/gpt-4o", endpoint="/v1/chat/completions", provider="openai",
        usage={"input_tokens": 12, "output_tokens": 9}, outcome="partial",
    )  # fmt: skip
    [call] = (await past.ask("/queries/history", customer))["data"]
    assert tuple(call) == ROW
    when = datetime.fromisoformat(call.pop("timestamp"))
    assert abs(datetime.now(UTC) - when) < timedelta(minutes=1)
    assert uuid.UUID(call.pop("id")).version == 7
    assert call == {
        "model": "openai/gpt-4o", "provider": "openai", "endpoint": "/v1/chat/completions", "input_count": 12, "output_count": 9,
        "price_in_usd": D("0.000045"), "query_type": "chat", "query_source": "api", "api_key_id": made["key_id"], "status": "partial",
        "error_code": None, "request_id": "call-1",
    }  # fmt: skip


async def test_pages_lose_no_call_and_show_none_twice_while_new_ones_come(past: Past) -> None:
    customer = await past.rig.customer("10")
    for _ in range(7):
        await past.charge(customer, "0.01")
    seen: list[str] = []
    cursor: str | None = None
    while True:
        query = {"limit": 3} | ({"cursor": cursor} if cursor else {})
        page = await past.ask("/queries/history", customer, **query)
        seen += [call["id"] for call in page["data"]]
        await past.charge(customer, "0.01")
        if (cursor := page["next_cursor"]) is None:
            break
    assert len(seen) == len(set(seen)) == 7
    assert seen == sorted(seen, reverse=True)


async def test_each_filter_leaves_what_it_names(past: Past) -> None:
    customer = await past.rig.customer("10")
    other = await past.rig.new_key(customer)
    await past.charge(customer, "0.01", request_id="long-ago", model="a", endpoint="/chat")
    await past.back(3)
    await past.charge(
        customer, "0.01", request_id="images", model="b", endpoint="/images", outcome="client_disconnected"
    )
    await past.charge(customer, "0.01", other["api_key"], request_id="others", served_model="a", endpoint="/chat")

    async def found(**query: str) -> set[str]:
        return {call["request_id"] for call in (await past.ask("/queries/history", customer, **query))["data"]}

    today, now = datetime.now(UTC).date(), datetime.now(UTC)
    assert await found(model="a") == {"long-ago", "others"}
    assert await found(endpoint="/images") == await found(status="client_disconnected") == {"images"}
    assert await found(api_key_id=other["_id"]) == {"others"}
    assert await found(**{"from": str(today - timedelta(days=1))}) == {"images", "others"}
    assert await found(**{"from": str(today - timedelta(days=9)), "to": str(today - timedelta(days=2))}) == {"long-ago"}
    assert await found(to=str(today - timedelta(days=3))) | await found(to=str(today - timedelta(days=2))) == {
        "long-ago"
    }
    assert await found(**{"from": (now - timedelta(hours=1)).isoformat(), "model": "b"}) == {"images"}
    assert await found(**{"from": "2999-01-01"}) == await found(to="1969-12-31") == await found(model="none") == set()


async def test_a_moment_splits_calls_to_the_millisecond(past: Past) -> None:
    customer = await past.rig.customer("10")
    for _ in range(4):
        await past.charge(customer, "0.01")
    calls = (await past.ask("/queries/history", customer))["data"]
    middle = calls[1]["timestamp"]
    older = (await past.ask("/queries/history", customer, to=middle))["data"]
    newer = (await past.ask("/queries/history", customer, **{"from": middle}))["data"]
    assert [call["id"] for call in newer + older] == [call["id"] for call in calls]
    assert all(call["timestamp"] >= middle for call in newer)


async def test_a_key_sees_its_own_calls_and_with_all_keys_the_accounts_and_never_anothers(past: Past) -> None:
    customer, stranger = await past.rig.customer("10"), await past.rig.customer("10")
    other = await past.rig.new_key(customer)
    first = (await past.charge(customer, "0.01", request_id="first"))["key_id"]
    await past.charge(customer, "0.01", other["api_key"], request_id="second")
    await past.charge(stranger, "0.01", request_id="strangers")

    for path, name in (("/queries/history", "request_id"), ("/activity", "api_key_id")):

        async def found(headers: dict[str, str], query: str = "", path: str = path, name: str = name) -> set[str]:
            response = await past.rig.client.get(f"{path}?{query}", headers=headers)
            return {row[name] for row in response.json()["data"]}

        mine, both = {"first", first}, {"first", "second", first, other["_id"]}
        assert await found(customer.key) < mine
        assert len(await found(customer.key, "all_keys=true")) == len(await found(customer.owner)) == 2
        assert await found(customer.owner) < both
        assert await found(customer.key, f"api_key_id={other['_id']}") == set()
        assert await found(customer.key, f"api_key_id={first}") < mine
        assert len(await found(customer.key, f"all_keys=true&api_key_id={other['_id']}")) == 1


async def test_a_key_needs_the_scope_to_read_activity(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(customer, "0.01")
    narrow = await past.rig.new_key(customer, scopes=["spend"])
    reader = await past.rig.new_key(customer, scopes=["activity"])
    for path in ("/queries/history", "/activity", f"/activity/{made['charge_id']}/explain"):
        refused = await past.rig.client.get(path, headers={"Authorization": f"Bearer {narrow['api_key']}"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "missing_scope")
        allowed = await past.rig.client.get(path, headers={"Authorization": f"Bearer {reader['api_key']}"})
        assert allowed.status_code == 200


async def test_csv_is_the_same_page_and_its_cursor_a_header(past: Past) -> None:
    customer = await past.rig.customer("10")
    for number in range(3):
        await past.charge(customer, "0.000045", request_id=f"c{number}", usage={"input_tokens": number})
    page = await past.ask("/queries/history", customer, limit=2)
    response = await past.rig.client.get(
        "/queries/history?limit=2", headers=customer.owner | {"Accept": "text/csv, */*;q=0.1"}
    )
    assert response.headers["content-type"] == "text/csv; charset=utf-8"
    assert response.headers["x-next-cursor"] == page["next_cursor"]
    lines = list(csv.DictReader(io.StringIO(response.text, newline="")))
    assert lines == [{name: "" if row[name] is None else str(row[name]) for name in ROW} for row in page["data"]]
    rest = await past.rig.client.get(
        f"/queries/history?cursor={page['next_cursor']}", headers=customer.owner | {"Accept": "text/csv"}
    )
    assert len(rest.text.splitlines()) == 2
    assert "x-next-cursor" not in rest.headers


async def _request_ids(past: Past, customer: Customer, **query: Any) -> list[str]:
    return [call["request_id"] for call in (await past.ask("/queries/history", customer, **query))["data"]]


async def test_readers_that_know_no_cursor_page_by_number_and_by_offset(past: Past) -> None:
    """As they ask: `page` with `page_count` or `limit`, or `offset`, until a page is not full."""
    customer = await past.rig.customer("10")
    for number in range(7):
        await past.charge(customer, "0.01", request_id=f"c{number}")
    every = [f"c{number}" for number in reversed(range(7))]
    for named in ("page_count", "limit"):
        pages = [await _request_ids(past, customer, page=page, **{named: 3}) for page in (1, 2, 3, 4)]
        assert pages == [every[:3], every[3:6], every[6:], []], named
    by_offset = [await _request_ids(past, customer, offset=offset, limit=3) for offset in (0, 3, 6, 7, 1_000_000)]
    assert by_offset == [every[:3], every[3:6], every[6:], [], []]
    assert await _request_ids(past, customer, page=1) == await _request_ids(past, customer, page_count=200) == every
    assert await _request_ids(past, customer, offset=5) == every[5:]


async def test_a_page_by_number_goes_on_by_cursor_narrowed_and_in_csv_too(past: Past) -> None:
    customer = await past.rig.customer("10")
    for number in range(6):
        await past.charge(customer, "0.01", request_id=f"c{number}", model="a" if number % 2 else "b")
    page = await past.ask("/queries/history", customer, model="a", page=2, page_count=1)
    assert (page["status"], [call["request_id"] for call in page["data"]]) == ("success", ["c3"])
    assert await _request_ids(past, customer, model="a", cursor=page["next_cursor"]) == ["c1"]
    csv_page = await past.rig.client.get(
        "/queries/history?model=a&page=2&page_count=1", headers=customer.owner | {"Accept": "text/csv"}
    )
    [line] = csv.DictReader(io.StringIO(csv_page.text, newline=""))
    assert (line["request_id"], csv_page.headers["x-next-cursor"]) == ("c3", page["next_cursor"])


async def test_a_page_has_200_rows_at_most_and_none_is_passed_over(past: Past) -> None:
    customer = await past.rig.customer("10")
    made = await past.charge(customer, "0.01", request_id="first")
    past.rig.sql(
        """INSERT INTO usage (account_id, id, hold_id, service, request_id, key_id, outcome, cost_nusd, balance_after_nusd, held_after_nusd)
           SELECT account_id, (lpad(to_hex(n), 12, '0') || right(replace(id::text, '-', ''), 20))::uuid, hold_id, service, 'n' || n, key_id, outcome, 0, 0, 0
           FROM usage, generate_series(1, 450) n"""
    )
    try:
        for size in ({"limit": 1000}, {"page_count": 201}, {"limit": 200}):
            pages = [await _request_ids(past, customer, page=page, **size) for page in (1, 2, 3, 4)]
            assert [len(page) for page in pages] == [200, 200, 51, 0]
            assert len({each for page in pages for each in page}) == 451
        key = {"api_key_id": made["key_id"], "limit": 200}
        assert len(await _request_ids(past, customer, offset=200, **key)) == 200
    finally:
        past.rig.sql("DELETE FROM usage WHERE request_id LIKE 'n%%'")


async def test_start_date_and_end_date_are_from_and_to(past: Past) -> None:
    customer = await past.rig.customer("10")
    await past.charge(customer, "0.01", request_id="long-ago")
    await past.back(3)
    await past.charge(customer, "0.01", request_id="now")
    today = datetime.now(UTC).date()
    assert await _request_ids(past, customer, start_date=str(today - timedelta(days=1))) == ["now"]
    assert await _request_ids(past, customer, end_date=str(today - timedelta(days=1))) == ["long-ago"]
    moment = (datetime.now(UTC) - timedelta(days=1)).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    assert await _request_ids(past, customer, start_date=moment) == ["now"]
    assert await _request_ids(past, customer, start_date=str(today), **{"from": str(today)}) == ["now"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("page=0", "page"), ("page=-1", "page"), ("page=x", "page"), ("page_count=0", "page_count"), ("offset=-1", "offset"), ("offset=1.5", "offset"),
        ("page=2&offset=3", "page"), ("page=1&cursor={cursor}", "page"), ("offset=0&cursor={cursor}", "offset"), ("limit=5&page_count=6", "page_count"),
        ("page=999999999999", "page"), ("offset=1000001", "offset"), ("start_date=2026-01-01&from=2026-01-02", "start_date"),
        ("end_date=2026-01-01&to=2026-01-02", "end_date"), ("start_date=yesterday", "start_date"), ("end_date=2026-02-30", "end_date"),
        ("pages=2", "pages"), ("start=2026-01-01", "start"), ("per_page=3", "per_page"),
    ],
)  # fmt: skip
async def test_two_ways_to_say_where_a_page_begins_are_422_as_is_what_makes_no_sense(
    past: Past, query: str, param: str
) -> None:
    customer = await past.rig.customer("10")
    for _ in range(2):
        await past.charge(customer, "0.01")
    cursor = (await past.ask("/queries/history", customer, limit=1))["next_cursor"]
    for accept in ("application/json", "text/csv"):
        response = await past.rig.client.get(
            f"/queries/history?{query.format(cursor=cursor)}", headers=customer.owner | {"Accept": accept}
        )
        assert (response.status_code, response.json()["error"]["param"]) == (422, param), response.text


async def test_a_model_named_like_a_formula_does_not_run_in_a_spreadsheet(past: Past) -> None:
    customer = await past.rig.customer("10")
    evil = '=HYPERLINK("http://evil.example","x"),+1'
    await past.charge(customer, "0.01", request_id="-1-1", model=evil, provider="@SUM(1)", endpoint="+cmd")
    response = await past.rig.client.get("/queries/history", headers=customer.owner | {"Accept": "text/csv"})
    [line] = csv.DictReader(io.StringIO(response.text, newline=""))
    assert line["model"] == "'" + evil
    assert (line["provider"], line["endpoint"], line["request_id"]) == ("'@SUM(1)", "'+cmd", "'-1-1")
    [call] = (await past.ask("/queries/history", customer))["data"]
    assert call["model"] == evil


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("from=yesterday", "from"), ("from=2026-13-01", "from"), ("to=2026-02-30", "to"), ("from=9999-99-99", "from"), ("to=", "to"),
        ("from=0001-01-01T00:00:00%2B23:00", "from"), ("to=9999-12-31", "to"), ("from=%00", "from"), ("from=%D9%A1%D9%A2", "from"),
        ("model=%00", "model"), ("model=a%0Ab", "model"), ("endpoint=" + "x" * 201, "endpoint"), ("status=fine", "status"),
        ("api_key_id=x", "api_key_id"), ("all_keys=maybe", "all_keys"), ("limit=0", "limit"), ("limit=101", "limit"), ("limit=x", "limit"),
        ("cursor=x", "cursor"), ("cursor=%00", "cursor"), ("cursor=WzFd", "cursor"),
    ],
)  # fmt: skip
async def test_a_query_that_makes_no_sense_is_422_naming_what(past: Past, query: str, param: str) -> None:
    customer = await past.rig.customer()
    for path in ("/queries/history", "/activity"):
        if path == "/queries/history" and query == "limit=101":
            continue  # existing readers ask for up to 200, and are given them
        response = await past.rig.client.get(f"{path}?{query}", headers=customer.owner)
        if path == "/activity" and query.startswith("to=9999"):
            assert response.status_code == 200  # there a day is only compared
            continue
        assert (response.status_code, response.json()["error"]["param"]) == (422, param), response.text


async def test_a_forged_cursor_or_an_odd_moment_does_no_harm(past: Past) -> None:
    customer = await past.rig.customer()
    for position in (
        ["2026-01-01", str(uuid.uuid4()), "a\x00"],
        ["0001-01-01", str(uuid.UUID(int=0)), ""],
        ["9999-12-31", "x", ""],
    ):
        cursor = base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")
        assert (await past.rig.client.get(f"/activity?cursor={cursor}", headers=customer.owner)).status_code in (
            200,
            422,
        )
    for text in (
        "0001-01-01",
        "9999-12-30",
        "1969-12-31T23:59:59.999Z",
        "2026-W01-1",
        "20260131",
        "2026-01-31T25:00:00",
    ):
        for path in ("/queries/history", "/activity"):
            for name in ("from", "to"):
                response = await past.rig.client.get(f"{path}?{name}={text}", headers=customer.owner)
                assert response.status_code in (200, 422), (path, name, text, response.text)


def test_an_id_tells_its_moment_and_bounds_are_exact() -> None:
    call = new_id()
    assert abs(datetime.now(UTC) - moment_of(call)) < timedelta(seconds=5)
    assert first_id(moment_of(call)) <= call < first_id(moment_of(call) + timedelta(milliseconds=1))
    assert first_id(moment_of(call) + timedelta(microseconds=1)) > call
    assert first_id(datetime(1, 1, 1, tzinfo=UTC)) == uuid.UUID(int=0)
    assert first_id(datetime.max.replace(tzinfo=UTC)) > call


def test_what_kind_of_call_it_was_is_seen_from_what_it_used() -> None:
    assert query_type({"video_seconds": 4}, None) == "video"
    assert query_type({"input_tokens": 9, "images": 1}, "/v1/images") == "image"
    assert query_type({"characters": 9}, None) == "audio"
    assert query_type({"input_tokens": 9}, "/v1/embeddings") == "embedding"
    assert query_type({"input_tokens": 9, "images": 0}, None) == query_type(None, "/v1/chat/completions") == "chat"
    assert query_type(None, None) == query_type({}, "/search") == "other"


def test_csv_cells_are_quoted_and_harmless() -> None:
    text = csv_text(("a", "b"), [('x,"y"', None), ("\t=1", "1.5"), ("＝1", "")])
    assert text == 'a,b\r\n"x,""y""",\r\n\'\t=1,1.5\r\n\'＝1,\r\n'
    assert wants_csv("text/csv")
    assert wants_csv("application/json;q=0.5, TEXT/CSV; charset=utf-8")
    assert not wants_csv("")
    assert not wants_csv("*/*")
    assert not wants_csv("text/csvx")


@pytest.mark.parametrize(
    "unseen",
    ["", " ", "   ", "\u00a0", "\ufeff", "\u200b", "\u200e", "\u2003", "\u2060", " \u00a0\u200b", "\u00ad", "\x0b"],
)
@pytest.mark.parametrize("sign", ["=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠"])
def test_no_cell_begins_a_formula_whatever_unseen_stands_before_it(unseen: str, sign: str) -> None:
    cell = f"{unseen}{sign}HYPERLINK(0)"
    assert _in_csv(cell) == f"'{cell}"


@pytest.mark.parametrize("cell", ["", " ", "gpt-4o", "a=1", " a+b", "1.5", "openai/x", "\u200bx@y"])
def test_a_cell_that_is_no_formula_is_as_it_was(cell: str) -> None:
    assert _in_csv(cell) == cell


def test_a_cell_is_had_back_by_taking_one_apostrophe_away() -> None:
    for cell in ("=1", "'=1", "'", "''x", "x'", "", " @a"):
        assert _in_csv(cell).removeprefix("'") == cell


def _in_csv(cell: str) -> str:
    """The cell as who reads the CSV has it."""
    [line] = csv.DictReader(io.StringIO(csv_text(("cell", "end"), [(cell, "")]), newline=""))
    return line["cell"]


async def test_a_priced_call_names_the_provider_of_its_price(past: Past) -> None:
    customer = await past.rig.customer("10")
    units = {"input_tokens": 1000, "output_tokens": 10}
    await ensure_starter(past.rig.house.db)
    response = await past.rig.meter(
        "charge", request_id="p", api_key=customer.api_key, model="gpt-4o-mini", usage=units
    )
    cost = exact(response)["cost"]["total_cost_usd"]
    [call] = (await past.ask("/queries/history", customer))["data"]
    assert (call["provider"], call["price_in_usd"], call["input_count"]) == ("openai", cost, 1000)
