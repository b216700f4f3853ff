"""How an answer goes out: HEAD, the newline at its end, compression, and what may be asked for again by its ETag."""

import gzip
import json
import re
from collections.abc import Mapping
from typing import Any, cast

import pytest
from litestar.routes import HTTPRoute

from app.pricing.starter import ensure_starter
from app.web.outgoing import COMPRESSED, PUBLISHED, heads_as_gets, well_ended
from tests.door import JSON, Answer, Door
from tests.rig import Customer

GZIP = {"Accept-Encoding": "gzip, deflate, br"}
CHANGING = ("x-request-id", "date")


def lasting(answer: Answer) -> dict[str, str]:
    """The headers that two answers have alike; of a visitor's cookie, which is another each time, all but its value."""
    headers = {name: value for name, value in answer.headers.items() if name not in CHANGING}
    return headers | {name: re.sub(r"=[^;]+", "=", headers[name], count=1) for name in headers.keys() & {"set-cookie"}}


def squeezed(answer: Answer) -> bool:
    return answer.headers.get("content-encoding") == "gzip"


async def _everything_asked(door: Door, customer: Customer) -> list[tuple[str, Mapping[str, str]]]:
    """Every address, as somebody may ask for it."""
    known = {"charge_id": "none", "key_id": "none", "invoice_id": "none", "token": "none", "topup_id": "none", "backend": "btcpay", "method": "btc"}  # fmt: skip
    admin = await door.admin()
    found: list[tuple[str, Mapping[str, str]]] = []
    for route in door.app.routes:
        if isinstance(route, HTTPRoute) and not route.path.startswith("/v1/meter/ext-authz"):
            path = route.path_format
            for name in ("{" + one + "}" for one in (*known, "key_hash", "model_id", "path")):
                path = path.replace(name, known.get(name[1:-1], "gpt-4o"))
            found.append((path, admin if path.startswith("/admin") else customer.owner))
    return found


async def test_head_is_get_without_the_body_wherever_one_asks(door: Door) -> None:
    await ensure_starter(door.rig.house.db)
    customer, statuses = await door.customer("10"), set()
    asked = [*await _everything_asked(door, customer), ("/nope", {}), ("/keys", {}), ("/queries/history?limit=0", customer.owner), ("/api/v1/key", customer.key)]  # fmt: skip
    for path, who in asked:
        for extra in ({}, GZIP, {"Accept": "text/csv"}, {"Origin": "https://a.example.com"}):
            head, get = [await door.ask(method, path, {**who, **extra}) for method in ("HEAD", "GET")]
            assert head.body == b"", path
            assert head.status == get.status, path
            if path == "/metrics":
                continue  # is another one each time
            assert lasting(head) == lasting(get), path
            assert get.status in (204, 303) or int(head.headers["content-length"]) == len(get.body) > 0, path
            statuses.add(get.status)
    assert statuses >= {200, 401, 404, 405, 422}


async def test_what_takes_get_says_that_it_takes_head(door: Door) -> None:
    assert (await door.ask("OPTIONS", "/v1/models")).headers["allow"] == "GET, HEAD, OPTIONS"
    assert (await door.ask("DELETE", "/v1/models")).headers["allow"] == "GET, HEAD, OPTIONS"
    assert "HEAD" not in (await door.ask("GET", "/v1/meter/settle")).headers["allow"]
    assert (await door.ask("OPTIONS", "/queries/history?limit=5")).status == 204
    told = (await door.ask("GET", "/metrics")).body.decode()
    await door.ask("HEAD", "/health/live")
    assert 'method="HEAD",route="/health/live",status="200"' in (await door.ask("GET", "/metrics")).body.decode(), told


async def test_every_text_ends_in_a_newline_and_its_length_is_told(door: Door) -> None:
    await ensure_starter(door.rig.house.db)
    customer, service = await door.customer("10"), await door.service()
    body = json.dumps({"request_id": "r", "api_key": customer.api_key, "max_cost_usd": 1}).encode()
    answers = [await door.ask("GET", path, who) for path, who in await _everything_asked(door, customer)]
    answers += [
        await door.ask("GET", "/queries/history", customer.owner | {"Accept": "text/csv"}),
        await door.ask("POST", "/accounts/create"),
        await door.ask("POST", "/v1/meter/authorize", service | JSON, body),
        await door.ask("POST", "/v1/meter/authorize?", service | JSON, body),
        await door.ask("POST", "/v1/meter/authorize", service | JSON, b"{}"),
        await door.ask("POST", "/v1/meter/authorize", JSON, b"{}"),
        await door.ask("POST", "/v1/meter/settle/batch", service | JSON, b'{"settles": []}'),
        await door.ask("GET", "/nope"),
        await door.ask("PUT", "/keys"),
    ]
    for answer in answers:
        if answer.status == 303:  # a page to who is not signed in: it has no text, only where to go
            assert (answer.body, answer.headers["content-length"], "location" in answer.headers) == (b"", "0", True)
            continue
        assert answer.body.endswith(b"\n"), answer
        assert not answer.body.endswith(b"\n\n")
        assert int(answer.headers["content-length"]) == len(answer.body)


async def test_a_repeat_by_idempotency_key_is_the_same_to_the_last_byte(door: Door) -> None:
    first, again = [await door.ask("POST", "/accounts/create", {"Idempotency-Key": "a-key-of-my-own-0001"}) for _ in range(2)]  # fmt: skip
    assert (first.body, first.headers["content-length"]) == (again.body, again.headers["content-length"])


async def test_long_public_texts_are_compressed_when_asked(door: Door) -> None:
    await ensure_starter(door.rig.house.db)
    customer = await door.customer("10")
    for number in range(8):
        await door.rig.meter("charge", request_id=f"r{number}", api_key=customer.api_key, cost_usd="0.01", model=f"m{number}")  # fmt: skip
    for path in COMPRESSED:
        plain, small = [await door.ask("GET", path, customer.owner | extra) for extra in ({}, GZIP)]
        assert not squeezed(plain), path
        assert {answer.headers["vary"] for answer in (plain, small)} == {"Accept-Encoding"}, path
        assert squeezed(small) == (len(plain.body) > 1024), path
        if squeezed(small) and path != "/metrics":
            assert gzip.decompress(small.body) == plain.body
            assert int(small.headers["content-length"]) == len(small.body) < len(plain.body)
    csv = await door.ask("GET", "/queries/history", customer.owner | GZIP | {"Accept": "text/csv"})
    assert squeezed(csv)


@pytest.mark.parametrize(
    ("asked", "is_squeezed"),
    [
        ("gzip", True), ("x-gzip", True), ("GZIP", True), ("*", True), ("br, gzip;q=0.5", True), ("deflate, gzip;q=1.0, *;q=0", True), ("gzip ; q=0.001", True),
        ("", False), ("identity", False), ("br", False), ("gzip;q=0", False), ("gzip;q=0.000", False), ("*;q=0", False), ("gzip;q=0, *", False), ("gzip;q=x", False),
    ],
)  # fmt: skip
async def test_who_asks_says_whether_gzip_is_taken(door: Door, asked: str, is_squeezed: bool) -> None:
    assert squeezed(await door.ask("GET", "/openapi.json", {"Accept-Encoding": asked})) == is_squeezed


async def test_no_answer_with_a_secret_is_compressed_nor_a_verdict(door: Door) -> None:
    """How long it is would tell what it repeats."""
    customer, service = await door.customer("50"), await door.service()
    models = [f"{number:03}".ljust(200, "x") for number in range(15)]
    body = json.dumps({"name": "long", "allowed_models": models}).encode()
    made = await door.ask("POST", "/keys", customer.owner | JSON | GZIP, body)
    for _ in range(3):
        await door.rig.topup(customer, "20")
    settles = json.dumps({"settles": [{"hold_id": "none", "cost_usd": 1} for _ in range(20)]}).encode()
    answers = [
        made, await door.ask("GET", "/keys?show_key=true", customer.owner | GZIP), await door.ask("GET", "/topups", customer.owner | GZIP),
        await door.ask("POST", "/v1/meter/settle/batch", service | JSON | GZIP, settles), await door.ask("GET", "/admin/topups", await door.admin() | GZIP),
        await door.ask("GET", "/api/v1/keys", customer.owner | GZIP), await door.ask("POST", "/accounts/create", GZIP),
    ]  # fmt: skip
    assert sum(len(answer.body) > 1024 for answer in answers) >= 4
    assert not any(squeezed(answer) for answer in answers)
    with_secrets = (
        "key",
        "topup/create",
        "topup/status",
        "topups",
        "receipt",
        "nwc",
        "account",
        "admin",
        "meter",
        "webhook",
        "balance",
    )
    assert not [path for path in COMPRESSED if any(word in path for word in with_secrets)]


@pytest.mark.parametrize("path", sorted(PUBLISHED))
async def test_what_lasts_until_we_are_updated_is_asked_for_again_by_its_etag(door: Door, path: str) -> None:
    first = await door.ask("GET", path)
    tag = first.headers["etag"]
    assert (first.status, first.headers["cache-control"]) == (200, "no-cache")
    assert (await door.ask("GET", path, GZIP)).headers["etag"] == tag, "it is the same text"
    for kept in (tag, f'"x", {tag}', tag.removeprefix("W/"), "*"):
        for method in ("GET", "HEAD"):
            again = await door.ask(method, path, {"If-None-Match": kept} | GZIP)
            assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
            assert "content-length" not in again.headers
            assert "x-request-id" in again.headers
    for other in ('"x"', "", tag[:-2] + '"', tag.strip('W/"')):
        assert (await door.ask("GET", path, {"If-None-Match": other})).status == 200


@pytest.mark.parametrize(
    ("kind", "pieces"),
    [("text/event-stream", [b"data: 1\n\n", b"data: [DONE]"]), ("text/event-stream", [b"data: 1" * 500]), ("application/json", [b'{"a":' * 500, b"1}"]), ("image/png", [b"x" * 5000])],
)  # fmt: skip
async def test_what_streams_or_is_no_text_goes_out_as_it_comes(kind: str, pieces: list[bytes]) -> None:
    async def streaming(scope: Any, receive: Any, send: Any) -> None:
        scope["path_template"] = "/v1/models"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind.encode())]})
        for number, piece in enumerate(pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(pieces)})

    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(dict(message))

    for method in ("GET", "HEAD"):
        sent.clear()
        scope: Any = {"type": "http", "method": method, "headers": [(b"accept-encoding", b"gzip")]}
        await heads_as_gets(well_ended(streaming))(scope, cast("Any", None), send)
        assert sent[0]["headers"] == [(b"content-type", kind.encode())]
        assert [message["body"] for message in sent[1:]] == (pieces if method == "GET" else [b""] * len(pieces))
        assert (scope["method"], scope["path_template"]) == (method, "/v1/models")


async def test_what_is_somebodys_own_may_not_be_kept(door: Door) -> None:
    customer = await door.customer("10")
    front, other = [await door.ask("GET", "/", GZIP | {"If-None-Match": "*"}) for _ in range(2)]
    assert front.body != other.body, "the token in its form is the visitor's own"
    assert not squeezed(front)
    for path in ("/", "/keys", "/queries/history", "/v1/models", "/api/v1/credits"):
        answer = await door.ask("GET", path, customer.owner | {"If-None-Match": "*"})
        assert (answer.status, answer.headers["cache-control"], "etag" in answer.headers) == (200, "no-store", False)
