"""A JWT stands for its subject's key: it opens that subject's account once, spends from it, and ends with it."""

import asyncio
import hashlib
import json
import uuid
from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from app.accounts.reap import reap_empty
from app.admin.tokens import create_token
from app.doctor import issuer as doctors_look
from app.doctor.lines import Level
from app.kernel.security import subject_hash
from app.kernel.settings import Settings, SettingsError, load
from app.main import create_app
from app.pricing.starter import ensure_starter
from app.wiring import build
from tests.adapters.test_jwt import RSA, bad_tokens
from tests.door import JSON, Answer, Books, Door, opened
from tests.issuers import AUDIENCE, ISSUER, IssuerServer, served, signer
from tests.rig import Rig
from tests.test_production import PRODUCTION

ALL_SCOPES: Final = ("spend", "balance", "topup", "activity")


@pytest.fixture
async def server() -> AsyncIterator[IssuerServer]:
    async with served(RSA, signer("ec-1", "EC"), signer("rsa-2")) as server:
        yield server


@pytest.fixture
async def door(clean: str, settings: Settings, server: IssuerServer) -> AsyncIterator[Door]:
    async with opened(clean, settings, **taking(server)) as door:
        await ensure_starter(door.rig.house.db)
        yield door


def taking(server: IssuerServer, **other: Any) -> dict[str, Any]:
    return {"jwt_issuer": ISSUER, "jwt_audience": (AUDIENCE,), "jwt_jwks": server.url} | other


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


async def admin(door: Door, method: str, path: str, **body: Any) -> Any:
    raw = json.dumps(body).encode() if body else None
    house = door.rig.house
    token = await create_token(house.db, house.settings.pepper, "admin", uuid.uuid4().hex)
    answer = await door.ask(method, path, bearer(token) | JSON, raw)
    assert answer.status in (200, 201), answer.body
    return answer.json


async def account_of(door: Door, subject: str = "user-1") -> str:
    """As an operator finds it who knows the subject alone."""
    [found] = (await admin(door, "POST", "/admin/accounts/search", q=subject))["data"]
    assert found["matched"] == ["jwt_subject"]
    return str(found["account_id"])


async def key_of(door: Door, account_id: str) -> Any:
    [key] = (await admin(door, "GET", f"/admin/accounts/{account_id}/keys?include_disabled=true"))["data"]
    return key


async def credit(door: Door, usd: str, subject: str = "user-1") -> str:
    account_id = await account_of(door, subject)
    await admin(door, "POST", f"/admin/accounts/{account_id}/credit", amount_usd=usd, reason="a month's fee")
    return account_id


async def test_a_subject_spends_what_was_credited_and_no_more(door: Door) -> None:
    rig = door.rig
    denied = await rig.authorize(RSA.token(), "0.5")
    assert (denied["decision"], denied["status"], denied["error"]["code"]) == ("deny", 402, "insufficient_balance")
    account_id = await credit(door, "1")
    allowed = await rig.authorize(signer("ec-1", "EC").token(), "0.75")
    assert (allowed["decision"], allowed["account_id"]) == ("allow", account_id)
    assert (await rig.authorize(RSA.token(), "0.5"))["decision"] == "deny"
    await rig.settle(allowed["hold_id"], "0.7")
    charged = (await rig.meter("charge", request_id="c", api_key=RSA.token(), cost_usd="0.1")).json()
    assert charged["decision"] == "allow"
    key = await key_of(door, account_id)
    assert (key["name"], key["scopes"], key["total_usage_all_time_usd"]) == ("JWT", ["spend"], 0.8)
    assert key["api_key_preview"].startswith("jwt-")


async def test_it_is_taken_wherever_a_key_is(clean: str, settings: Settings, server: IssuerServer) -> None:
    """In each of the four ways to send one, on the customer's own routes, and by a gateway's subrequest."""
    async with opened(clean, settings, **taking(server, jwt_scopes=ALL_SCOPES)) as door:
        token = RSA.token()
        ways = [bearer(token), {"Authorization": f"Token {token}"}, {"x-api-key": token}, {"api-key": token}]
        for headers in ways:
            assert (await door.ask("GET", "/credits/balance", headers)).json["balance"] == 0
        for path in ("/queries/history", "/activity", "/api/v1/key", "/api/v1/credits", "/topups"):
            assert (await door.ask("GET", path, bearer(token))).status == 200, path
        body = b'{"amount": 20, "currency": "USD"}'
        made = await door.ask("POST", "/topup/create/btc", bearer(token) | JSON, body)
        assert made.status == 201
        door.rig.btcpay.pay(made.json["invoice_id"])
        await door.rig.deliver(made.json["invoice_id"])
        await door.rig.process()
        assert (await door.ask("GET", "/credits/balance", bearer(RSA.token(exp=2**33)))).json["balance"] == 20
        service = (await door.service())["Authorization"].split()[1]
        asked = await door.ask("GET", "/v1/meter/ext-authz", bearer(token) | {"X-Service-Token": service})
        assert (asked.status, asked.headers["x-account-id"]) == (200, await account_of(door))
        assert (await door.ask("GET", "/keys", bearer(token))).status == 403
        assert (await door.ask("GET", "/admin/accounts", bearer(token))).status == 401
        assert (await door.ask("POST", "/v1/meter/verify", bearer(token) | JSON, b"{}")).status == 401


async def test_its_key_may_spend_and_what_its_operator_gives_it(door: Door) -> None:
    token = RSA.token()
    assert (await door.ask("GET", "/credits/balance", bearer(token))).code == "missing_scope"
    account_id = await account_of(door)
    key = await key_of(door, account_id)
    await admin(door, "PATCH", f"/admin/accounts/{account_id}/keys/{key['_id']}", scopes=["spend", "balance"])
    assert (await door.ask("GET", "/credits/balance", bearer(token))).status == 200


async def test_a_bad_token_is_refused_alike_and_changes_nothing(door: Door) -> None:
    """Also where its subject has an account with money on it."""
    await door.rig.authorize(RSA.token(), "0.1")
    await credit(door, "5")
    unknown = await door.ask("GET", "/credits/balance", bearer("sk-nothing"))
    service = await door.service()
    with Books(door.rig.database_url) as books:
        before = books.fingerprint()
        wrong = {}
        for what, token in bad_tokens().items():
            asked = {"request_id": uuid.uuid4().hex, "api_key": token, "max_cost_usd": "0.01"}
            by_service = await door.ask("POST", "/v1/meter/authorize", service | JSON, json.dumps(asked).encode())
            itself = await door.ask("GET", "/credits/balance", bearer(token))
            denied = by_service.json.get("decision") == "deny" and by_service.json["status"] == 401
            is_alike = (itself.status, itself.json) == (401, unknown.json)
            if not (denied and is_alike) or token.encode() in by_service.body + itself.body:
                wrong[what] = by_service.body, itself.body
        assert wrong == {}
        assert books.fingerprint() == before


async def test_the_first_calls_of_one_moment_open_one_account(door: Door) -> None:
    tokens = [RSA.token(sub=f"user-{n % 3}", jti=str(n)) for n in range(36)]
    answers = await asyncio.gather(*(door.rig.authorize(token, "0.1") for token in tokens))
    assert {answer["error"]["code"] for answer in answers} == {"insufficient_balance"}
    counts = [door.rig.sql(f"SELECT count(*) FROM {table}")[0][0] for table in ("account", "api_key", "credential")]
    assert counts == [3, 3, 6]
    assert len({await account_of(door, f"user-{n}") for n in range(3)}) == 3


async def test_a_revoked_key_is_not_made_again(door: Door, settings: Settings, server: IssuerServer) -> None:
    rig = door.rig
    await rig.authorize(RSA.token(), "0.1")
    account_id = await credit(door, "5")
    key = await key_of(door, account_id)
    path = f"/admin/accounts/{account_id}/keys/{key['_id']}"
    await admin(door, "PATCH", path, disabled=True)
    assert (await rig.authorize(RSA.token(), "0.1"))["status"] == 401
    await admin(door, "PATCH", path, disabled=False, usage_limit_usd=0.05)
    assert (await rig.authorize(RSA.token(), "0.1"))["error"]["code"] == "key_limit_exceeded"
    assert (await rig.authorize(RSA.token(), "0.01"))["decision"] == "allow"
    await admin(door, "DELETE", path)
    another = build(rig.house.settings, rig.database_url, gateway=rig.btcpay)  # one that remembers nothing
    await another.db.open()
    try:
        for house_door in (door, Door(create_app(another), rig)):
            assert (await house_door.ask("GET", "/credits/balance", bearer(RSA.token()))).status == 401
            asked = json.dumps(
                {"request_id": uuid.uuid4().hex, "api_key": RSA.token(), "max_cost_usd": "0.01"}
            ).encode()
            denied = await house_door.ask("POST", "/v1/meter/authorize", await rig.service() | JSON, asked)
            assert denied.json["status"] == 401
    finally:
        await another.close()
    assert rig.sql("SELECT count(*) FROM account") == [(1,)]


async def test_a_frozen_or_closed_account_is_refused_and_no_other_is_opened(door: Door) -> None:
    rig = door.rig
    await rig.authorize(RSA.token(), "0.1", topup_offer="none")
    account_id = await account_of(door)
    await admin(door, "POST", f"/admin/accounts/{account_id}/freeze", reason="odd")
    assert (await rig.authorize(RSA.token(), "0"))["error"]["code"] == "account_frozen"
    await admin(door, "POST", f"/admin/accounts/{account_id}/unfreeze", reason="even")
    await admin(door, "POST", f"/admin/accounts/{account_id}/close", reason="gone")
    assert (await rig.authorize(RSA.token(), "0"))["status"] == 401
    assert rig.sql("SELECT count(*) FROM account") == [(1,)]


async def test_nothing_else_opens_a_subjects_account(door: Door) -> None:
    """Neither the hash of a token, nor what stands for its subject, which anybody can compute, nor its masked form."""
    rig, token = door.rig, RSA.token()
    await rig.authorize(token, "0.1")
    account_id = await credit(door, "5")
    await admin(door, "POST", f"/admin/accounts/{account_id}/rotate", reason="for its owner")
    hashes = [hashlib.sha256(token.encode()).digest(), subject_hash(ISSUER, "user-1")]
    for sha256 in hashes:
        asked = await rig.meter("authorize", request_id=uuid.uuid4().hex, api_key_hash=sha256.hex(), max_cost_usd="0")
        assert asked.json().get("status") == 401, asked.text
    for text in (
        subject_hash(ISSUER, "user-1").hex(),
        f"jwt{ISSUER}user-1",
        (await key_of(door, account_id))["api_key_preview"],
    ):
        asked = await rig.meter("authorize", request_id=uuid.uuid4().hex, api_key=text, max_cost_usd="0")
        assert asked.json().get("status") == 401, asked.text


async def test_a_call_that_was_admitted_is_told_of_though_its_token_is_over(door: Door) -> None:
    rig, token = door.rig, RSA.token()
    await rig.authorize(token, "0.1")
    await credit(door, "5")
    for number, verb in enumerate(("settle", "release")):
        assert (await rig.authorize(token, "0.1", request_id=f"lost-{number}"))["decision"] == "allow"
        told: dict[str, Any] = {"cost_usd": "0.05"} if verb == "settle" else {}
        sha256 = hashlib.sha256(token.encode()).hexdigest()
        answer = await rig.meter(verb, request_id=f"lost-{number}", api_key_hash=sha256, **told)
        assert answer.status_code == 200, answer.text
    assert rig.sql("SELECT sum(held_nusd) FROM account") == [(0,)]


async def test_a_request_is_repeated_by_another_token_of_its_subject(
    clean: str, settings: Settings, server: IssuerServer
) -> None:
    async with opened(clean, settings, **taking(server, jwt_scopes=ALL_SCOPES)) as door:

        async def make(token: str, amount: int = 20) -> Answer:
            headers = bearer(token) | JSON | {"Idempotency-Key": "once"}
            return await door.ask("POST", "/topup/create/btc", headers, b'{"amount": %d, "currency": "USD"}' % amount)

        first, again = await make(RSA.token()), await make(RSA.token(jti="another"))
        assert (again.status, again.json) == (201, first.json)
        assert again.headers["idempotent-replayed"] == "true"
        assert (await make(RSA.token(), 21)).status == 409
        assert (await make(RSA.token(sub="user-2"))).json["invoice_id"] != first.json["invoice_id"]


async def test_it_is_off_unless_an_issuer_is_named(rig: Rig, server: IssuerServer) -> None:
    assert (await rig.authorize(RSA.token(), "0"))["status"] == 401
    assert (await rig.client.get("/credits/balance", headers=bearer(RSA.token()))).status_code == 401
    assert server.asked == 0


async def test_while_nobody_can_tell_calls_are_asked_to_wait_and_nothing_is_opened(
    door: Door, server: IssuerServer
) -> None:
    server.status = 503
    asked = await door.rig.meter("authorize", request_id="a", api_key=RSA.token(), max_cost_usd="0")
    itself = await door.ask("GET", "/credits/balance", bearer(RSA.token()))
    for status, code, wait in [
        (asked.status_code, asked.json()["error"]["code"], asked.headers["retry-after"]),
        (itself.status, itself.code, itself.headers["retry-after"]),
    ]:
        assert (status, code) == (503, "issuer_unavailable")
        assert int(wait) > 0
    assert door.rig.sql("SELECT count(*) FROM account") == [(0,)]


async def test_a_refusal_for_want_of_money_can_be_paid_by_whoever_has_the_token(door: Door) -> None:
    rig, token = door.rig, RSA.token()
    offer = (await rig.authorize(token, "0.5"))["error"]["metadata"]["offer"]
    [(invoice_id,)] = rig.sql("SELECT invoice_id FROM topup_invoice")
    assert offer["lightning_invoice"]
    rig.btcpay.pay(invoice_id)
    await rig.deliver(invoice_id)
    await rig.process()
    assert (await rig.authorize(token, "0.5"))["decision"] == "allow"


async def test_a_subjects_account_is_kept_though_it_was_never_used(door: Door) -> None:
    """Nobody could open another one for them."""
    rig = door.rig
    await rig.authorize(RSA.token(), "0.1", topup_offer="none")
    rig.sql("UPDATE account SET created_at = now() - interval '1 year'")
    assert await reap_empty(rig.house.db, rig.house.keyring, 90) == 0
    assert (await rig.authorize(RSA.token(), "0.1", topup_offer="none"))["status"] == 402


async def test_the_doctor_tells_whose_keys_there_are(door: Door, server: IssuerServer) -> None:
    [line] = await doctors_look.look(door.rig.house, "")
    assert (line.level, "rsa-1 (RS256)" in line.found) == (Level.OK, True)
    server.raw = b"{}"
    [line] = await doctors_look.look(door.rig.house, "")
    assert line.level is Level.FAULT


def test_settings_that_would_take_anybodys_token_are_refused(tmp_path: Any, settings: Settings) -> None:
    base = {"DATA_DIR": str(tmp_path)}
    named = base | {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": f"{AUDIENCE}, other"}
    made = load(named)
    assert (made.jwt_audience, made.jwt_jwks) == ((AUDIENCE, "other"), f"{ISSUER}/.well-known/jwks.json")
    assert (made.jwt_scopes, made.jwt_claim) == (("spend",), "sub")
    for wrong in (
        base | {"JWT_ISSUER": ISSUER}, base | {"JWT_AUDIENCE": AUDIENCE}, base | {"JWT_JWKS": "https://a.example/k"},
        named | {"JWT_JWKS": "/no/such/file"}, named | {"JWT_JWKS": "https://user:pw@a.example/"}, named | {"JWT_SCOPES": "all"},
        named | {"JWT_AUDIENCE": ","},
    ):  # fmt: skip
        with pytest.raises(SettingsError, match="JWT_"):
            load(wrong)


@pytest.mark.parametrize("wrong", [{"JWT_JWKS": "http://issuer.example/keys"}, {"JWT_ISSUER": "http://issuer.example"}])
def test_production_asks_no_issuer_over_plain_http(wrong: dict[str, str]) -> None:
    named = PRODUCTION | {"JWT_ISSUER": ISSUER, "JWT_AUDIENCE": AUDIENCE}
    assert load(named).jwt_issuer == ISSUER
    with pytest.raises(SettingsError, match="JWT_JWKS is plain http"):
        load(named | wrong)
