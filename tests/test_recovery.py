"""An account that cannot be lost or stolen for good: credit ids that are rotated, and ways back to one that is gone."""

import asyncio
import base64
import hashlib
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, cast

import httpx
import nostr_sdk
import pytest

from app.accounts.nostr import Request, is_of
from app.adapters.nip98 import SignedRequests
from app.adapters.nostr import public_key, sign_event
from app.audit import Secrets, audit
from app.audit.sealing import seal
from app.kernel.security import Kind, canonical_recovery_code, new_recovery_code
from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.door import opened
from tests.rig import Customer, Rig
from tests.wallets import FakeLightning, FakeWallets

SECRET = "01" * 32
OTHER = "02" * 32


@pytest.fixture
async def other(rig: Rig, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """A second process over the same database."""
    btcpay = FakeLightning()
    house = build(settings, rig.database_url, gateway=btcpay, wallets=FakeWallets(btcpay))
    await house.db.open()
    transport = httpx.ASGITransport(cast("Any", create_app(house)), raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
        yield client
    await house.close()


@dataclass(frozen=True, slots=True)
class Owner(Customer):
    """A customer who asked for a recovery code."""

    code: str = ""


async def an_owner(rig: Rig) -> Owner:
    made = (await rig.client.post("/accounts/create", json={"recovery": True})).json()
    return Owner(made["credit_id"], made["api_key"], made["recovery_code"])


def by(credit_id: str) -> dict[str, str]:
    return {"x-credit-id": credit_id}


async def rotate(rig: Rig, credit_id: str, **body: Any) -> Any:
    answer = await rig.client.post("/accounts/rotate", headers=by(credit_id), json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def recover(rig: Rig, code: str, **more: Any) -> httpx.Response:
    return await rig.client.post("/accounts/recover", json={"recovery_code": code, **more})


async def holds(client: httpx.AsyncClient, credit_id: str) -> bool:
    status = (await client.get("/credits/balance", headers=by(credit_id))).status_code
    assert status in (200, 401)
    return status == 200


async def acts(rig: Rig, credit_id: str) -> list[tuple[str, str]]:
    found = (await rig.client.get("/accounts/events", headers=by(credit_id))).json()["data"]
    return [(each["act"], each["shown_by"]) for each in found]


def nostr(
    rig: Rig,
    secret: str,
    path: str,
    body: bytes = b"",
    *,
    method: str = "POST",
    at: float | None = None,
    **changed: Any,
) -> dict[str, str]:
    """An Authorization header of NIP-98 for a request; `changed` are tags that say something else, None for none."""
    tags = {
        "u": f"{rig.house.settings.public_url}{path}",
        "method": method,
        "payload": hashlib.sha256(body).hexdigest(),
    } | changed
    event = sign_event(
        secret, kind=27235, content="", tags=[[name, value] for name, value in tags.items() if value is not None],
        created_at=int(time.time() if at is None else at),
    )  # fmt: skip
    return header(event)


def header(event: Any) -> dict[str, str]:
    text = event if isinstance(event, str) else json.dumps(event)
    return {"Authorization": f"Nostr {base64.b64encode(text.encode()).decode()}"}


async def bind(rig: Rig, credit_id: str, secret: str) -> httpx.Response:
    path = "/accounts/recovery/nostr"
    return await rig.client.post(path, headers=by(credit_id) | nostr(rig, secret, path))


BODY = b'{"revoke_keys": false}'
JSON = {"Content-Type": "application/json"}


async def recover_by(rig: Rig, secret: str, body: bytes = BODY, **changed: Any) -> httpx.Response:
    headers = JSON | nostr(rig, secret, "/accounts/recover", body, **changed)
    return await rig.client.post("/accounts/recover", headers=headers, content=body)


# --- rotation ---------------------------------------------------------------------------------------


async def test_a_rotated_credit_id_is_dead_at_once_in_every_process_and_keys_live_on(
    rig: Rig, other: httpx.AsyncClient
) -> None:
    customer = await rig.customer("20")
    assert await holds(other, customer.credit_id)
    new = (await rotate(rig, customer.credit_id))["credit_id"]
    for client in (rig.client, other):
        assert not await holds(client, customer.credit_id)
        assert await holds(client, new)
        assert (await client.get("/credits/balance", headers=customer.key)).json()["balance"] == 20
    assert (await rig.client.post("/accounts/rotate", headers=customer.owner)).status_code == 401
    assert await acts(rig, new) == [("rotated", "credit_id")]


async def test_in_its_overlap_the_old_credit_id_reads_and_tops_up_and_no_more(
    rig: Rig, other: httpx.AsyncClient
) -> None:
    customer = await rig.customer()
    key_id = (await rig.new_key(customer))["_id"]
    new = (await rotate(rig, customer.credit_id, overlap_seconds=3600))["credit_id"]
    old = customer.owner
    for client in (rig.client, other):
        for path in (
            "/credits/balance",
            "/keys",
            "/topups",
            "/queries/history",
            "/accounts/recovery",
            "/accounts/events",
        ):
            assert (await client.get(path, headers=old)).status_code == 200, path
    topup = await rig.client.post("/topup/create/btc", headers=old, json={"amount": "20", "currency": "USD"})
    assert topup.status_code == 201
    refused: list[tuple[str, str, Any]] = [
        ("POST", "/accounts/rotate", {}), ("POST", "/accounts/recovery/code", {}), ("DELETE", "/accounts/recovery/code", None),
        ("POST", "/accounts/recovery/nostr", None), ("DELETE", "/accounts/recovery/nostr", None), ("DELETE", "/accounts", None),
        ("POST", "/keys", {"name": "kept"}), ("PATCH", f"/keys/{key_id}", {"name": "mine"}), ("DELETE", f"/keys/{key_id}", None),
        ("GET", f"/keys/{key_id}?show_key=true", None), ("GET", "/keys?show_key=true", None), ("POST", "/api/v1/keys", {"name": "kept"}),
        ("POST", "/nwc-auto-topup/connect", {"nwc_url": "nostr+walletconnect://x"}), ("DELETE", "/nwc-auto-topup/connection", None),
    ]  # fmt: skip
    for method, path, body in refused:
        answer = await rig.client.request(method, path, headers=old, json=body)
        assert answer.status_code == 403, (method, path, answer.text)
        assert "rotated" in answer.json()["message"]
    assert (await rig.client.get(f"/keys/{key_id}?show_key=true", headers=by(new))).json()["data"]["api_key"]
    assert await holds(rig.client, new)


async def test_after_its_overlap_the_old_credit_id_is_dead_in_every_process(rig: Rig, other: httpx.AsyncClient) -> None:
    customer = await rig.customer()
    told = await rotate(rig, customer.credit_id, overlap_seconds=1)
    ends_at = datetime.fromisoformat(told["old_ends_at"])
    while datetime.now(UTC) <= ends_at:
        await asyncio.sleep(0.05)
    assert [await holds(client, customer.credit_id) for client in (rig.client, other)] == [False, False]
    assert await holds(rig.client, told["credit_id"])


async def test_another_rotation_ends_an_overlap_at_once(rig: Rig) -> None:
    customer = await rig.customer()
    first = (await rotate(rig, customer.credit_id, overlap_seconds=86_400))["credit_id"]
    second = (await rotate(rig, first, overlap_seconds=86_400))["credit_id"]
    assert [await holds(rig.client, each) for each in (customer.credit_id, first, second)] == [False, True, True]


@pytest.mark.parametrize("seconds", [-1, 86_401, 1.5, "10", True])
async def test_an_overlap_of_another_length_is_refused_and_changes_nothing(rig: Rig, seconds: Any) -> None:
    customer = await rig.customer()
    answer = await rig.client.post("/accounts/rotate", headers=customer.owner, json={"overlap_seconds": seconds})
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "overlap_seconds")
    assert await holds(rig.client, customer.credit_id)


async def test_of_many_rotations_at_once_one_wins_and_its_credit_id_holds(rig: Rig) -> None:
    customer = await rig.customer()
    answers = await asyncio.gather(
        *(
            rig.client.post("/accounts/rotate", headers=customer.owner, json={"overlap_seconds": at % 2})
            for at in range(12)
        )
    )
    won = [answer.json()["credit_id"] for answer in answers if answer.status_code == 200]
    assert len(won) == 1
    assert {answer.status_code for answer in answers} <= {200, 401, 403}
    assert await holds(rig.client, won[0])


async def test_a_lost_answer_of_a_rotation_can_be_had_again_by_its_idempotency_key_alone(rig: Rig) -> None:
    customer = await rig.customer()
    key = {"Idempotency-Key": uuid.uuid4().hex}
    asks = [await rig.client.post("/accounts/rotate", headers=customer.owner | key, json={}) for _ in range(3)]
    assert [answer.status_code for answer in asks] == [200, 200, 200]
    assert len({answer.text for answer in asks}) == 1
    assert await holds(rig.client, asks[0].json()["credit_id"])
    for headers in ({"Idempotency-Key": uuid.uuid4().hex}, {}):
        again = await rig.client.post("/accounts/rotate", headers=customer.owner | headers, json={})
        assert again.status_code == 401
    short = await rig.client.post("/accounts/rotate", headers=customer.owner | {"Idempotency-Key": "1"}, json={})
    assert short.status_code == 400  # whoever stole the credit id could guess it
    kept = "".join(
        str(line) for line in rig.sql("SELECT encode(answer, 'escape'), encode(answer, 'hex') FROM idempotency")
    )
    assert asks[0].json()["credit_id"] not in kept


async def test_a_key_cannot_be_made_by_a_credit_id_that_was_rotated_meanwhile(rig: Rig) -> None:
    """The thief's request waits behind the rotation, and finds its credit id gone."""
    customer = await rig.customer()
    answers = await asyncio.gather(
        rig.client.post("/accounts/rotate", headers=customer.owner, json={}),
        *(rig.client.post("/keys", headers=customer.owner, json={"name": f"k{at}"}) for at in range(10)),
        *(rig.client.post("/accounts/recovery/code", headers=customer.owner, json={}) for _ in range(4)),
    )
    assert answers[0].status_code == 200
    assert {answer.status_code for answer in answers[1:]} <= {201, 401}
    rotated_at = rig.sql("SELECT created_at FROM credential WHERE kind = 'credit_id' AND ends_at IS NULL")[0][0]
    # now() is when a transaction began: one that began after the rotation cannot have passed by the old one
    later = rig.sql("SELECT count(*) FROM credential WHERE kind = 'api_key' AND created_at > %s", rotated_at)
    made = [answer for answer in answers[1:11] if answer.status_code == 201]
    assert len(made) >= later[0][0]


async def test_requests_in_flight_over_rotations_fail_only_with_what_is_dead(
    rig: Rig, other: httpx.AsyncClient
) -> None:
    """Each asks with what was the newest when it asked: 401 only if a rotation came between."""
    customer = await rig.customer("20")
    newest, wrong, rounds = [customer.credit_id], list[str](), 0

    async def reader(client: httpx.AsyncClient) -> None:
        nonlocal rounds
        while len(newest) < 9:
            mine = newest[-1]
            by_key, by_id = await asyncio.gather(
                client.get("/credits/balance", headers=customer.key), client.get("/credits/balance", headers=by(mine))
            )
            wrong.extend([f"key {by_key.status_code}"] * (by_key.status_code != 200))
            is_newest = mine == newest[-1]
            wrong.extend([f"id {by_id.status_code}"] * (by_id.status_code != 200 and is_newest and not rotating[0]))
            dead = newest[-2] if len(newest) > 1 else None
            wrong.extend(["a dead one passes"] * (dead is not None and await holds(client, dead)))
            rounds += 1

    rotating = [False]
    readers = [asyncio.create_task(reader(client)) for client in (rig.client, other) * 2]
    for _ in range(8):
        seen = rounds
        while rounds < seen + 4:
            await asyncio.sleep(0)
        rotating[0] = True
        answer = await rotate(rig, newest[-1])
        newest.append(answer["credit_id"])
        rotating[0] = False
    await asyncio.gather(*readers)
    assert wrong == []
    assert await rig.balance(replace(customer, credit_id=newest[-1])) == 20


async def test_an_operator_s_rotation_ends_an_overlap_and_both_logs_tell_of_it(clean: str, settings: Settings) -> None:
    async with opened(clean, settings) as door:
        customer, admin = await door.customer(), await door.admin()
        first = (await rotate(door.rig, customer.credit_id, overlap_seconds=600))["credit_id"]
        [(account_id,)] = door.rig.sql("SELECT id FROM account")
        answer = await door.ask(
            "POST", f"/admin/accounts/{account_id}/rotate", admin | JSON, b'{"reason": "was robbed"}'
        )
        new = answer.json["credit_id"]
        assert [await holds(door.rig.client, each) for each in (customer.credit_id, first, new)] == [False, False, True]
        assert await acts(door.rig, new) == [("rotated", "operator"), ("rotated", "credit_id")]
        log = (await door.ask("GET", "/admin/audit-log?act=account.rotate", admin)).json["data"]
        assert [each["reason"] for each in log] == ["was robbed"]


# --- what somebody plants in the database -----------------------------------------------------------


async def test_an_overlap_that_was_prolonged_in_the_database_is_refused_and_found(rig: Rig) -> None:
    customer = await rig.customer()
    new = (await rotate(rig, customer.credit_id))["credit_id"]
    rig.sql("UPDATE credential SET ends_at = now() + interval '1 year' WHERE ends_at IS NOT NULL")
    assert not await holds(rig.client, customer.credit_id)
    found = await audit(rig.house.db, Secrets.of(rig.house.settings))
    assert "credential_is_bound" in {each.check for each in found.findings}
    rig.sql("DELETE FROM credential WHERE ends_at IS NOT NULL")
    assert await holds(rig.client, new)


async def test_a_changed_log_of_credentials_and_a_second_way_back_are_found(rig: Rig) -> None:
    owner = await an_owner(rig)
    await rotate(rig, owner.credit_id)
    rig.sql("UPDATE credential_event SET shown_by = 'operator'")
    rig.sql(
        """INSERT INTO credential (secret_hash, kind, account_id, key_id, proof)
           SELECT '\\x01', kind, account_id, gen_random_uuid(), proof FROM credential WHERE kind = 'recovery_code'"""
    )
    found = {each.check for each in (await audit(rig.house.db, Secrets.of(rig.house.settings))).findings}
    assert found == {"credential_event_is_ours", "credential_is_bound", "account_has_one_way_back"}
    rig.sql("UPDATE credential_event SET shown_by = 'credit_id'")
    rig.sql("DELETE FROM credential WHERE secret_hash = '\\x01'")


# --- a recovery code --------------------------------------------------------------------------------


def test_a_recovery_code_is_for_people() -> None:
    codes = {new_recovery_code() for _ in range(300)}
    assert len(codes) == 300
    for code in codes:
        assert re.fullmatch(r"([0-9A-HJKMNP-TV-Z]{5}-){5}[0-9A-HJKMNP-TV-Z]{5}", code)
        plain = canonical_recovery_code(code)
        assert plain == code.replace("-", "")
        as_written = code.lower().replace("-", " ").replace("0", "o").replace("1", "l")
        assert canonical_recovery_code(f" {as_written}\n") == plain


def test_a_typo_in_a_recovery_code_is_seen_and_any_other_text_is_none() -> None:
    code = new_recovery_code()
    digits = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
    typos = {code[:at] + digit + code[at + 1 :] for at in range(29) for digit in digits if code[at] not in ("-", digit)}
    seen = [typo for typo in typos if canonical_recovery_code(typo) is None]
    assert len(typos) - len(seen) <= 3  # a checksum of 20 bits: one in a million passes
    for text in ("", "x", code[:-1], code + "0", "U" * 30, "é" * 30, "0" * 10_000, str(uuid.uuid4()), "\x00" * 30):
        assert canonical_recovery_code(text) is None


async def test_a_code_comes_only_if_asked_for_and_is_kept_as_a_hash(rig: Rig) -> None:
    assert "recovery_code" not in (await rig.client.post("/accounts/create")).json()
    assert "recovery_code" not in (await rig.client.post("/accounts/create", json={"recovery": False})).json()
    owner = await an_owner(rig)
    dump = "".join(str(line) for line in rig.sql("SELECT c::text, encode(secret_hash, 'escape') FROM credential c"))
    assert owner.code not in dump
    assert owner.code.replace("-", "") not in dump
    ways = (await rig.client.get("/accounts/recovery", headers=owner.owner)).json()["data"]
    assert ways == [{"kind": "recovery_code", "npub": None, "ends_at": None}]


async def test_a_recovery_gives_both_secrets_anew_and_ends_every_credit_id(rig: Rig, other: httpx.AsyncClient) -> None:
    owner = await an_owner(rig)
    await rig.fund(owner, "20")
    stolen = (await rotate(rig, owner.credit_id, overlap_seconds=3600))["credit_id"]
    answer = await recover(rig, owner.code.lower())
    assert answer.status_code == 200
    made = answer.json()
    assert made.keys() == {"success", "credit_id", "recovery_code", "keys_revoked"}
    for client in (rig.client, other):
        assert [await holds(client, each) for each in (owner.credit_id, stolen, made["credit_id"])] == [
            False,
            False,
            True,
        ]
        assert (await client.get("/credits/balance", headers=owner.key)).json()["balance"] == 20
    assert (await recover(rig, owner.code)).status_code == 401
    assert (await recover(rig, made["recovery_code"])).status_code == 200


async def test_a_recovery_may_revoke_every_key_and_gives_one_that_works(rig: Rig) -> None:
    owner = await an_owner(rig)
    await rig.fund(owner, "20")
    stolen = [owner.api_key, *[(await rig.new_key(owner))["api_key"] for _ in range(3)]]
    made = (await recover(rig, owner.code, revoke_keys=True)).json()
    assert made["keys_revoked"] == 4
    for key in stolen:
        assert (await rig.authorize(key, "0.01"))["decision"] == "deny"
        assert (await rig.client.get("/credits/balance", headers={"x-api-key": key})).status_code == 401
    assert (await rig.authorize(made["api_key"], "0.01"))["decision"] == "allow"


async def test_of_many_recoveries_at_once_one_wins(rig: Rig) -> None:
    owner = await an_owner(rig)
    answers = await asyncio.gather(*(recover(rig, owner.code) for _ in range(10)))
    won = [answer.json() for answer in answers if answer.status_code == 200]
    assert len(won) == 1
    assert {answer.status_code for answer in answers} == {200, 401}
    assert await holds(rig.client, won[0]["credit_id"])


async def test_every_failure_of_a_recovery_is_the_same(rig: Rig) -> None:
    owner, closed = await an_owner(rig), await an_owner(rig)
    assert (await rig.client.delete("/accounts", headers=closed.owner)).status_code == 200
    await recover(rig, owner.code)
    texts = set()
    for code in (
        owner.code,
        closed.code,
        new_recovery_code(),
        "x",
        "",
        "é",
        owner.credit_id,
        owner.api_key,
        new_recovery_code()[:-1] + "?",
    ):
        answer = await recover(rig, code)
        assert answer.status_code == 401, code
        texts.add(answer.text)
    spoilt: list[dict[str, Any]] = [{}, {"method": "GET"}, {"u": "https://other.example/accounts/recover"}]
    for changed in spoilt:
        answer = await recover_by(rig, SECRET, **changed)
        assert answer.status_code == 401
        texts.add(answer.text)
    for text in ("Nostr", "Nostr x", "Nostr é", "Bearer x", "Nostr " + "A" * 20_000):
        answer = await rig.client.post("/accounts/recover", headers=[(b"Authorization", text.encode())], json={})
        assert answer.status_code == 401
        texts.add(answer.text)
    assert len(texts) == 1


async def test_recoveries_are_counted_by_neighbourhood(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, accounts_per_hour_per_block=3) as door:
        body = json.dumps({"recovery_code": new_recovery_code()}).encode()
        answers = [await door.ask("POST", "/accounts/recover", JSON, body, client="198.51.100.7") for _ in range(5)]
        assert [answer.status for answer in answers] == [401, 401, 401, 429, 429]
        assert (await door.ask("POST", "/accounts/recover", JSON, body, client="203.0.113.7")).status == 401


async def test_a_lost_answer_of_a_recovery_can_be_had_again_from_anywhere(clean: str, settings: Settings) -> None:
    async with opened(clean, settings) as door:
        owner = await an_owner(door.rig)
        key, body = {"Idempotency-Key": uuid.uuid4().hex}, json.dumps({"recovery_code": owner.code}).encode()
        asks = [
            await door.ask("POST", "/accounts/recover", JSON | key, body, client=client)
            for client in ("198.51.100.7", "203.0.113.7", "203.0.113.8")
        ]
        assert [answer.status for answer in asks] == [200, 200, 200]
        assert len({answer.body for answer in asks}) == 1
        other_body = json.dumps({"recovery_code": new_recovery_code()}).encode()
        assert (await door.ask("POST", "/accounts/recover", JSON | key, other_body)).status == 401


async def test_whoever_stole_the_credit_id_cannot_take_the_way_back_away(rig: Rig) -> None:
    """The thief replaces the code, binds a Nostr key, takes the code away, rotates and recovers; the owner's older code wins."""
    owner = await an_owner(rig)
    thief = (await rig.client.post("/accounts/recovery/code", headers=owner.owner, json={})).json()["recovery_code"]
    assert (await bind(rig, owner.credit_id, OTHER)).status_code == 201
    assert (await rig.client.delete("/accounts/recovery/code", headers=owner.owner)).status_code == 200
    assert (await rig.client.delete("/accounts/recovery/code", headers=owner.owner)).status_code == 404
    stolen = (await recover(rig, thief)).json()
    assert not await holds(rig.client, owner.credit_id)
    mine = (await recover(rig, owner.code)).json()
    assert [await holds(rig.client, each) for each in (stolen["credit_id"], mine["credit_id"])] == [False, True]
    assert (await recover(rig, stolen["recovery_code"])).status_code == 401
    assert (await recover_by(rig, OTHER)).status_code == 401
    ways = (await rig.client.get("/accounts/recovery", headers=by(mine["credit_id"]))).json()["data"]
    assert [(each["kind"], each["ends_at"]) for each in ways] == [("recovery_code", None)]


async def test_a_code_that_is_shown_when_it_is_replaced_ends_at_once(rig: Rig) -> None:
    owner, stranger = await an_owner(rig), await an_owner(rig)
    path = "/accounts/recovery/code"
    for wrong in (stranger.code, new_recovery_code(), "x"):
        answer = await rig.client.post(path, headers=owner.owner, json={"recovery_code": wrong})
        assert answer.status_code in (401, 422), answer.text
    answer = await rig.client.post(path, headers=owner.owner, json={"recovery_code": owner.code})
    assert answer.status_code == 201
    assert (await recover(rig, owner.code)).status_code == 401
    assert (await recover(rig, stranger.code)).status_code == 200
    assert (await recover(rig, answer.json()["recovery_code"])).status_code == 200


async def test_an_account_without_a_code_can_have_one_later(rig: Rig) -> None:
    customer = await rig.customer()
    key = {"Idempotency-Key": uuid.uuid4().hex}
    asks = [await rig.client.post("/accounts/recovery/code", headers=customer.owner | key) for _ in range(2)]
    assert asks[0].text == asks[1].text
    assert await acts(rig, customer.credit_id) == [("recovery_code_made", "credit_id")]
    assert (await recover(rig, asks[0].json()["recovery_code"])).status_code == 200


# --- a Nostr key ------------------------------------------------------------------------------------


async def test_a_bound_nostr_key_recovers_the_account_and_stays_bound(rig: Rig) -> None:
    customer = await rig.customer()
    answer = await bind(rig, customer.credit_id, SECRET)
    assert answer.status_code == 201, answer.text
    assert answer.json()["npub"] == nostr_sdk.PublicKey.parse(public_key(SECRET)).to_bech32()
    first = (await recover_by(rig, SECRET)).json()
    second = (await recover_by(rig, SECRET, b'{"revoke_keys": true}')).json()
    assert second["keys_revoked"] == 1
    held = [await holds(rig.client, each) for each in (customer.credit_id, first["credit_id"], second["credit_id"])]
    assert held == [False, False, True]
    assert await acts(rig, second["credit_id"]) == [("recovered", "nostr")] * 2 + [("nostr_bound", "credit_id")]


async def test_an_event_of_another_library_is_understood(rig: Rig) -> None:
    customer = await rig.customer()
    keys, path = nostr_sdk.Keys.generate(), "/accounts/recovery/nostr"
    url = f"{rig.house.settings.public_url}{path}"
    tags = [nostr_sdk.Tag.parse(["u", url]), nostr_sdk.Tag.parse(["method", "POST"])]
    event = nostr_sdk.EventBuilder(nostr_sdk.Kind(27235), "").tags(tags).finalize(keys)
    answer = await rig.client.post(path, headers=customer.owner | header(event.as_json()))
    assert (answer.status_code, answer.json()["npub"]) == (201, keys.public_key().to_bech32())


async def test_an_event_is_taken_once(rig: Rig) -> None:
    customer = await rig.customer()
    await bind(rig, customer.credit_id, SECRET)
    headers = JSON | nostr(rig, SECRET, "/accounts/recover", BODY)
    asks = await asyncio.gather(
        *(rig.client.post("/accounts/recover", headers=headers, content=BODY) for _ in range(6))
    )
    assert sorted(answer.status_code for answer in asks) == [200, 401, 401, 401, 401, 401]
    path = "/accounts/recovery/nostr"
    [new] = [answer.json()["credit_id"] for answer in asks if answer.status_code == 200]
    unbinding = by(new) | nostr(rig, SECRET, path, method="DELETE")
    assert (await rig.client.delete(path, headers=unbinding)).status_code == 200
    binding = by(new) | nostr(rig, SECRET, path, at=time.time() - 20)  # as none before it
    assert [(await rig.client.post(path, headers=binding)).status_code for _ in range(2)] == [201, 422]


SPOILS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "another kind": lambda event: event | {"kind": 1},
    "another key": lambda event: event | {"pubkey": public_key(OTHER)},
    "another signature": lambda event: event | {"sig": event["sig"][::-1]},
    "another id": lambda event: event | {"id": "0" * 64},
    "a tag more": lambda event: event | {"tags": [*event["tags"], ["x", "y"]]},
    "no signature": lambda event: {name: value for name, value in event.items() if name != "sig"},
    "another moment": lambda event: event | {"created_at": event["created_at"] + 1},
}


def an_event(now: datetime, **changed: Any) -> dict[str, Any]:
    tags = {
        "u": "https://api.example/accounts/recover",
        "method": "POST",
        "payload": hashlib.sha256(b"{}").hexdigest(),
    } | changed
    made = [[name, value] for name, value in tags.items() if value is not None]
    return sign_event(SECRET, kind=27235, content="", tags=made, created_at=int(now.timestamp()))


NAMED = Request("https://api.example/accounts/recover", "POST", b"{}")
NOW = datetime(2026, 11, 28, 12, tzinfo=UTC)


@pytest.mark.parametrize("spoil", SPOILS)
def test_an_event_that_was_changed_after_it_was_signed_is_none(spoil: str) -> None:
    reader, event = SignedRequests(), an_event(NOW)
    assert reader.signed(header(event)["Authorization"]) is not None
    assert reader.signed(header(SPOILS[spoil](event))["Authorization"]) is None


@pytest.mark.parametrize(
    "changed",
    [
        {"u": "http://api.example/accounts/recover"}, {"u": "https://api.example/accounts/recover/"}, {"u": "https://api.example/accounts/recover?a=1"},
        {"u": "https://api.example/accounts/rotate"}, {"u": None}, {"method": "PUT"}, {"method": "post"}, {"method": None},
        {"payload": hashlib.sha256(b"").hexdigest()}, {"payload": None}, {"payload": ""},
    ],
)  # fmt: skip
def test_an_event_of_another_request_does_not_count(changed: dict[str, Any]) -> None:
    reader = SignedRequests()
    whole, other = (reader.signed(header(an_event(NOW, **tags))["Authorization"]) for tags in ({}, changed))
    assert whole is not None
    assert other is not None
    assert is_of(whole, NAMED, NOW)
    assert not is_of(other, NAMED, NOW)


@pytest.mark.parametrize(("seconds", "is_fresh"), [(-61, False), (-60, True), (0, True), (60, True), (61, False)])
def test_an_event_holds_for_a_minute(seconds: int, is_fresh: bool) -> None:
    event = SignedRequests().signed(header(an_event(NOW))["Authorization"])
    assert event is not None
    assert is_of(event, NAMED, datetime.fromtimestamp(NOW.timestamp() + seconds, UTC)) == is_fresh


async def test_a_nostr_key_is_bound_to_one_account_and_by_whoever_has_it_alone(rig: Rig) -> None:
    one, other = await rig.customer(), await rig.customer()
    path = "/accounts/recovery/nostr"
    assert (await rig.client.post(path, headers=one.owner)).status_code == 422
    assert (await rig.client.post(path, headers=nostr(rig, SECRET, path))).status_code == 401
    for_another_route = one.owner | nostr(rig, SECRET, "/accounts/recover")
    assert (await rig.client.post(path, headers=for_another_route)).status_code == 422
    raced = await asyncio.gather(*(bind(rig, each.credit_id, SECRET) for each in (one, other, one, other)))
    assert sorted(answer.status_code for answer in raced)[:1] == [201]
    assert {answer.status_code for answer in raced[1:]} <= {201, 409, 422}
    assert len(rig.sql("SELECT 1 FROM credential WHERE kind = 'nostr'")) == 1


async def test_an_unbound_key_ends_at_once_if_it_signs_and_in_a_week_else(rig: Rig) -> None:
    customer, path = await rig.customer(), "/accounts/recovery/nostr"
    assert (await rig.client.delete(path, headers=customer.owner)).status_code == 404
    await bind(rig, customer.credit_id, SECRET)
    assert (await rig.client.delete(path, headers=customer.owner)).status_code == 200
    [way] = (await rig.client.get("/accounts/recovery", headers=customer.owner)).json()["data"]
    left = datetime.fromisoformat(way["ends_at"]) - datetime.now(UTC)
    assert 6.9 < left.total_seconds() / 86_400 < 7.1
    new = (await recover_by(rig, SECRET)).json()["credit_id"]  # the owner, after a thief unbound it
    signed = by(new) | nostr(rig, SECRET, path, method="DELETE")
    assert (await rig.client.delete(path, headers=signed)).status_code == 200
    assert (await recover_by(rig, SECRET)).status_code == 401


# --- closing ----------------------------------------------------------------------------------------


async def test_an_account_with_nothing_on_it_is_closed_for_good(rig: Rig) -> None:
    owner = await an_owner(rig)
    await bind(rig, owner.credit_id, SECRET)
    assert (await rig.client.delete("/accounts", headers=owner.key)).status_code == 401
    assert (await rig.client.delete("/accounts", headers=owner.owner)).status_code == 200
    assert not await holds(rig.client, owner.credit_id)
    assert (await rig.client.get("/credits/balance", headers=owner.key)).status_code == 401
    assert (await recover(rig, owner.code)).status_code == (await recover_by(rig, SECRET)).status_code == 401
    assert rig.sql("SELECT status FROM account") == [("closed",)]


async def test_an_account_with_something_on_it_is_not_closed_and_tells_what(rig: Rig) -> None:
    customer = await rig.customer("20")
    hold = await rig.authorize(customer.api_key, "1")
    invoice = await rig.topup(customer, "20")
    answer = await rig.client.delete("/accounts", headers=customer.owner)
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_field")
    told = answer.json()["error"]["metadata"]
    assert told == {
        "balance_usd": 20,
        "held_usd": 1,
        "waiting_topups": 1,
        "topups_in_review": 0,
        "wallet_connected": False,
    }
    assert "$20 " in answer.json()["message"]
    assert await holds(rig.client, customer.credit_id)
    await rig.settle(hold["hold_id"], "20")
    assert (await rig.client.delete("/accounts", headers=customer.owner)).json()["error"]["metadata"][
        "waiting_topups"
    ] == 1
    rig.sql(
        "UPDATE topup SET status = 'Expired', expires_at = now() - interval '1 minute' WHERE invoice_id = %s", invoice
    )
    assert (await rig.client.delete("/accounts", headers=customer.owner)).status_code == 200


async def test_what_is_paid_to_a_closed_account_is_booked_and_waits_for_a_person(rig: Rig) -> None:
    customer = await rig.customer()
    invoice = await rig.topup(customer, "20")
    rig.sql("UPDATE topup SET expires_at = now() - interval '1 minute' WHERE invoice_id = %s", invoice)
    assert (await rig.client.delete("/accounts", headers=customer.owner)).status_code == 200
    rig.btcpay.pay(invoice, late=True)
    await rig.deliver(invoice)
    await rig.process()
    [(review, credited)] = rig.sql("SELECT review, credited_nusd FROM topup WHERE invoice_id = %s", invoice)
    assert "closed" in review
    assert credited >= 20_000_000_000


# --- what is told, and sealed ----------------------------------------------------------------------------


async def test_a_key_that_is_shown_again_is_told_of(rig: Rig) -> None:
    customer = await rig.customer()
    [key] = (await rig.client.get("/keys", headers=customer.owner)).json()["data"]
    assert await acts(rig, customer.credit_id) == []
    for target in (f"/keys/{key['_id']}?show_key=true", "/keys?show_key=true"):
        assert customer.api_key in (await rig.client.get(target, headers=customer.owner)).text
    found = (await rig.client.get("/accounts/events?limit=1", headers=customer.owner)).json()
    assert [(each["act"], each["subject"]) for each in found["data"]] == [("key_revealed", key["_id"])]
    more = await rig.client.get(f"/accounts/events?limit=1&cursor={found['next_cursor']}", headers=customer.owner)
    assert (len(more.json()["data"]), more.json()["next_cursor"]) == (1, None)


async def test_rotations_and_recoveries_are_told_to_the_notices_address(rig: Rig) -> None:
    owner = await an_owner(rig)
    npub = nostr_sdk.Keys.generate().public_key().to_bech32()
    assert (await rig.client.put("/notices", headers=owner.owner, json={"npub": npub})).status_code == 200
    new = (await rotate(rig, owner.credit_id))["credit_id"]
    await rig.client.get("/keys?show_key=true", headers=by(new))
    await recover(rig, owner.code)
    told = rig.sql(
        "SELECT type, data ->> 'act' FROM notice WHERE type IN ('account.rotated', 'key.revealed') ORDER BY id"
    )
    assert sorted(told) == [
        ("account.rotated", "recovered"),
        ("account.rotated", "rotated"),
        ("key.revealed", "key_revealed"),
    ]


async def test_an_old_credit_id_that_is_put_back_is_found_by_the_seals(rig: Rig) -> None:
    """A row that was copied before a rotation has a proof that is right; only the seals know that it was gone."""
    customer = await rig.customer()
    pepper = rig.house.settings.pepper
    await seal(rig.house.db, pepper)
    [old] = rig.sql("SELECT secret_hash, account_id, proof FROM credential WHERE kind = 'credit_id'")
    new = (await rotate(rig, customer.credit_id, overlap_seconds=60))["credit_id"]
    await seal(rig.house.db, pepper)
    await rig.audit()  # a rotation of ours is no finding, in its overlap or after it
    last = (await rotate(rig, new))["credit_id"]
    await seal(rig.house.db, pepper)
    await rig.audit()
    rig.sql("DELETE FROM credential WHERE kind = 'credit_id' AND ends_at IS NULL")
    rig.sql("INSERT INTO credential (secret_hash, kind, account_id, proof) VALUES (%s, 'credit_id', %s, %s)", *old)
    found = await audit(rig.house.db, Secrets.of(rig.house.settings))
    assert "credential" in str(found.findings)
    rig.sql("DELETE FROM credential WHERE secret_hash = %s", old[0])
    kept = await rig.client.get("/credits/balance", headers=by(last))
    assert kept.status_code == 401
    rig.sql("UPDATE credential SET ends_at = NULL WHERE kind = 'credit_id'")
    rig.sql("DELETE FROM seal")
    rig.sql("DELETE FROM seal_run")
    rig.sql("DELETE FROM credential WHERE kind = 'credit_id'")
    await rig.house.db.transaction(
        lambda session: rig.house.keyring.register(session, customer.credit_id, Kind.CREDIT_ID, old[1], None)
    )
