"""A proof of payment stands for the key that the payment was asked of, wherever a key may stand; the backend's word credits."""

import asyncio
import base64
import io
import json
import logging
import uuid
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest
import structlog

from app.kernel import logs
from app.offers.challenge import Challenges, Payable
from app.offers.proofs import Proofs
from tests.offers.payer import Challenge, challenged, lightning, pay, preimage_of
from tests.offers.test_short_balance import subrequest
from tests.rig import Customer, Rig, exact

D = Decimal


async def paid(rig: Rig, customer: Customer, usd: str = "0.01") -> Challenge:
    challenge = await challenged(rig, customer.api_key, usd)
    pay(rig, challenge)
    return challenge


async def ask(rig: Rig, headers: Mapping[str, str], usd: str = "0.01", **more: Any) -> Any:
    """As a proxy asks that was sent these headers; told that the payment is not known yet, its caller asks again."""
    for _ in range(20):
        answer = await ask_once(rig, headers, usd, **more)
        if answer.get("status") != 503:
            break
    return answer


async def ask_once(rig: Rig, headers: Mapping[str, str], usd: str = "0.01", **more: Any) -> Any:
    told: dict[str, Any] = {"payment_proof": headers["Authorization"]}
    if "x-api-key" in headers:
        told["api_key"] = headers["x-api-key"]
    answer = await rig.meter("authorize", **{"request_id": uuid.uuid4().hex, "max_cost_usd": usd} | told | more)
    assert answer.status_code == 200, answer.text
    return exact(answer)


@pytest.mark.parametrize("scheme", ["L402", "LSAT", "l402", "L402 L402"])
async def test_a_token_is_an_alias_of_its_key_on_any_route_and_any_number_of_times(rig: Rig, scheme: str) -> None:
    customer = await rig.customer()
    proof = (await paid(rig, customer)).l402(scheme)
    assert (await ask(rig, proof))["decision"] == "allow"  # no webhook came: the backend was asked at once
    assert (await subrequest(rig, proof)).status_code == 200
    for path in ("/credits/balance", "/topups", "/queries/history", "/api/v1/key", "/api/v1/credits"):
        assert (await rig.client.get(path, headers=proof)).status_code == 200, path
    balance = exact(await rig.client.get("/credits/balance", headers=proof))["balance"]
    assert balance == await rig.balance(customer) == D("1.05")
    assert (await rig.client.get("/keys", headers=proof)).status_code == 401  # a key may not do that either
    spent = exact(await rig.meter("charge", request_id="c1", payment_proof=proof["Authorization"], cost_usd="1"))
    assert spent["decision"] == "allow"
    told = await ask(rig, proof, "5")
    assert told["status"] == 402  # it topped up this key, and tops it up again
    assert "WWW-Authenticate" in told["headers"]


async def test_a_proof_for_one_request_admits_one_of_four_that_race(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer, "0.2")
    for way in ("meter", "beside its key", "subrequest", "route"):
        rig.sql("UPDATE offer SET consumed_at = NULL, consumed_by = NULL WHERE topup_id IN (SELECT id FROM topup WHERE destination = %s)", challenge.invoice)  # fmt: skip
        proof = challenge.once() | ({"x-api-key": customer.api_key} if way == "beside its key" else {})
        if way == "subrequest":
            answers = await asyncio.gather(*(subrequest(rig, proof) for _ in range(4)))
            statuses = sorted(answer.status_code for answer in answers)
        elif way == "route":
            got = await asyncio.gather(*(rig.client.get("/credits/balance", headers=proof) for _ in range(4)))
            statuses = sorted(answer.status_code for answer in got)
        else:
            told = await asyncio.gather(*(ask(rig, proof) for _ in range(4)))
            statuses = sorted(each.get("status", 200) for each in told)
            [used] = {each["error"]["code"] for each in told if "status" in each}
            assert used == "invalid_challenge"
        assert statuses == [200, 402, 402, 402], way


async def test_a_used_proof_is_refused_with_a_fresh_challenge(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer)
    assert (await ask(rig, challenge.once()))["decision"] == "allow"
    again = await ask(rig, challenge.once())
    assert (again["status"], again["error"]["code"]) == (402, "invalid_challenge")
    assert Challenge.of(again["headers"]["WWW-Authenticate"]).invoice != challenge.invoice


async def test_a_repeat_of_the_call_that_consumed_a_proof_has_its_hold_again(rig: Rig) -> None:
    customer = await rig.customer()
    proof = (await paid(rig, customer)).once()
    first, again = await ask(rig, proof, request_id="r1"), await ask(rig, proof, request_id="r1")
    assert (first["hold_id"], again["repeat"]) == (again["hold_id"], True)
    charge = {
        "request_id": "r2",
        "payment_proof": (await paid(rig, customer, "2")).once()["Authorization"],
        "cost_usd": "0.01",
    }
    told = [exact(await rig.meter("charge", **charge)) for _ in range(2)]
    assert told[0]["charge_id"] == told[1]["charge_id"]


async def test_a_refused_call_consumes_no_proof(rig: Rig) -> None:
    customer = await rig.customer()
    proof = (await paid(rig, customer)).once()
    assert (await ask(rig, proof, "5"))["error"]["code"] == "insufficient_balance"
    assert rig.sql("SELECT count(*) FROM offer WHERE consumed_at IS NOT NULL") == [(0,)]
    assert (await ask(rig, proof))["decision"] == "allow"


async def test_another_key_beside_a_proof_decides_and_the_proof_only_pays_its_own(rig: Rig) -> None:
    rich, poor = await rig.customer(), await rig.customer()
    challenge = await paid(rig, rich)
    for proof in (challenge.l402(), challenge.once()):
        told = await ask(rig, proof | {"x-api-key": poor.api_key})
        assert (told["status"], told["error"]["code"]) == (402, "insufficient_balance")
        assert (
            exact(await rig.client.get("/credits/balance", headers=proof | {"x-api-key": poor.api_key}))["balance"] == 0
        )
    assert await rig.balance(rich) == D("1.05")
    assert (await ask(rig, challenge.once()))["decision"] == "allow"  # it was not consumed


async def test_a_proof_before_the_payment_is_known_waits_then_is_503_and_never_402(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    for proof in (challenge.l402(), challenge.once()):
        told = await ask_once(rig, proof)
        assert (told["status"], told["headers"]) == (503, {"Retry-After": "1"})
    rig.house.proofs._patience_seconds = 0.3
    for answer in (
        await subrequest(rig, challenge.l402()), await rig.client.get("/credits/balance", headers=challenge.l402())
    ):  # fmt: skip
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    rig.btcpay.is_down = True
    pay(rig, challenge)
    rig.house.proofs._patience_seconds = 0.3
    assert (await subrequest(rig, challenge.once())).status_code == 503
    rig.btcpay.is_down = False
    rig.house.proofs._patience_seconds = 20
    assert (await subrequest(rig, challenge.once())).status_code == 200
    assert (await ask(rig, challenge.l402()))["decision"] == "allow"


async def test_a_preimage_credits_nothing_and_a_backend_that_says_nothing_is_asked_by_one_for_all(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    rig.house.proofs._patience_seconds = 0.3
    answers = await asyncio.gather(*(subrequest(rig, challenge.l402()) for _ in range(20)))
    assert {answer.status_code for answer in answers} == {503}
    assert await rig.balance(customer) == 0
    assert rig.sql("SELECT count(*) FROM entry") == [(0,)]


async def test_who_pays_while_their_proof_waits_is_served(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    rig.house.proofs._patience_seconds = 20
    waiting = asyncio.create_task(subrequest(rig, challenge.l402()))
    await asyncio.sleep(0)
    pay(rig, challenge)
    assert (await waiting).status_code == 200


async def test_a_proof_whose_key_is_revoked_disabled_or_expired_is_401(rig: Rig) -> None:
    for death in ("deleted_at = now()", "disabled_at = now()", "expire_at = now() - interval '1 second'"):
        customer = await rig.customer()
        key = await rig.new_key(customer)
        challenge = await challenged(rig, key["api_key"], "2")
        pay(rig, challenge)
        assert (await ask(rig, challenge.l402(), "0"))["decision"] == "allow"
        rig.sql(f"UPDATE api_key SET {death} WHERE id = %s", key["_id"])
        for proof in (challenge.l402(), challenge.once()):
            told = await ask(rig, proof)
            assert (told["status"], told["error"]["code"]) == (401, "invalid_api_key"), death
            assert (await subrequest(rig, proof)).status_code == 401
        assert (await rig.client.get("/credits/balance", headers=challenge.l402())).status_code == 401
        rig.sql("UPDATE api_key SET deleted_at = NULL, disabled_at = NULL, expire_at = NULL WHERE id = %s", key["_id"])


async def test_a_late_payment_is_credited_and_its_proof_stands_for_the_key(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    pay(rig, challenge, late=True)
    assert (await ask(rig, challenge.l402()))["decision"] == "allow"
    assert await rig.balance(customer) > D("0.9")


async def test_a_token_lives_so_many_days_and_no_longer(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer)
    house, now = rig.house, datetime.now(UTC)
    proofs = Proofs(
        house.db, house.gateways, house.settings.pepper, house.proofs.challenges, token_days=30, now=lambda: now
    )
    token, once = challenge.l402()["Authorization"], challenge.once()["Authorization"]
    assert (await proofs.proven(token)).kind == "shortfall"
    now += timedelta(days=30)
    with pytest.raises(Exception, match="Invalid API key"):
        await proofs.proven(token)
    assert (await proofs.proven(once)).use is not None  # it was paid for, and not spent


async def test_what_is_no_proof_is_401_before_the_database_is_asked(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer)
    other = await challenged(rig, (await rig.customer()).api_key)
    preimage = preimage_of(challenge.invoice).hex()
    macaroon = base64.b64decode(challenge.macaroon)
    spoilt = base64.b64encode(macaroon[:-1] + bytes([macaroon[-1] ^ 1])).decode()
    told = json.loads(base64.urlsafe_b64decode(challenge.once()["Authorization"][8:] + "=="))
    for authorization in (
        "L402", "L402 ", "L402 x", f"L402 {challenge.macaroon}", f"L402 {challenge.macaroon}:", f"L402 {challenge.macaroon}:zz",
        f"L402 {challenge.macaroon}:{'00' * 32}", f"L402 {spoilt}:{preimage}", f"L402 {other.macaroon}:{preimage}",
        f"L402 {base64.b64encode(macaroon[:40]).decode()}:{preimage}", "Payment", "Payment e30", "Payment !!", "Payment bnVsbA",
        payment(told | {"payload": {"preimage": "00" * 32}}), payment(told | {"payload": {}}), payment([]),
        *(payment({**told, "challenge": told["challenge"] | {name: value}}) for name, value in (
            ("id", "x"), ("realm", "example.com"), ("intent", "session"), ("expires", "2030-01-01T00:00:00Z"), ("opaque", "x"),
            ("digest", "x"), ("request", other.payment["request"]), ("id", None), ("expires", 7), ("request", {}), ("method", "é"),
        )),
        f"Payment {'A' * 9000}", "L402 é:00",
    ):  # fmt: skip
        line = {b"Authorization": authorization.encode()}
        answer = await rig.client.get("/credits/balance", headers=line)
        assert answer.status_code == 401, authorization
        assert answer.json()["error"]["code"] == "invalid_api_key"
        beside = line | {b"x-api-key": customer.api_key.encode()}
        if " " in authorization.strip():
            assert (await rig.client.get("/credits/balance", headers=beside)).status_code == 401, authorization
    assert (await rig.client.get("/credits/balance", headers=challenge.l402())).status_code == 200


def payment(told: Any) -> str:
    return f"Payment {base64.urlsafe_b64encode(json.dumps(told).encode()).decode().rstrip('=')}"


async def test_a_proxy_s_caller_who_writes_nonsense_is_401_and_the_proxy_is_not_blamed(rig: Rig) -> None:
    for proof in ("", "x", "L402 ☃", "Payment " + "A" * 20_000):
        told = await ask(rig, {"Authorization": proof})
        assert (told["status"], told["error"]["code"]) == (401, "invalid_api_key"), proof


async def test_two_proofs_that_differ_are_a_malformed_header(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer)
    lines = [("Authorization", challenge.l402()["Authorization"]), ("Authorization", challenge.once()["Authorization"])]
    assert (await rig.client.get("/credits/balance", headers=lines)).status_code == 400


async def test_a_proof_that_somebody_gave_to_another_account_in_the_database_opens_nothing(rig: Rig) -> None:
    victim, thief = await rig.customer("100"), await rig.customer()
    mine = await paid(rig, thief)
    key = await rig.new_key(victim)
    theirs = await challenged(rig, key["api_key"], "150")
    before = rig.sql("SELECT payment_hash, account_id, offer_id FROM proof_ref")
    hashes = {
        invoice: bytes.fromhex(lightning(rig).bolt11s[invoice].payment_hash)
        for invoice in (mine.invoice, theirs.invoice)
    }
    rig.sql(
        """UPDATE proof_ref m SET account_id = t.account_id, offer_id = t.offer_id FROM proof_ref t
           WHERE m.payment_hash = %s AND t.payment_hash = %s""",
        hashes[mine.invoice], hashes[theirs.invoice],
    )  # fmt: skip
    assert (await ask(rig, mine.l402()))["status"] == 401
    for payment_hash, account_id, offer_id in before:
        rig.sql(
            "UPDATE proof_ref SET account_id = %s, offer_id = %s WHERE payment_hash = %s",
            account_id,
            offer_id,
            payment_hash,
        )
    assert (await ask(rig, mine.l402()))["decision"] == "allow"


async def test_settle_and_release_find_the_hold_of_a_call_that_a_proof_admitted(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await paid(rig, customer)
    told = await ask(rig, challenge.l402(), request_id="lost")
    payment_hash = lightning(rig).bolt11s[challenge.invoice].payment_hash
    answer = await rig.meter("release", request_id="lost", api_key_hash=payment_hash)
    assert (answer.status_code, answer.json()["status"]) == (200, "released"), told
    again = await rig.meter(
        "authorize", request_id="x", api_key_hash=payment_hash, max_cost_usd="0.01"
    )  # an invoice's hash is no secret, and proves nothing
    assert again.json()["status"] == 401


async def test_no_proof_and_no_token_ever_stands_in_a_log(rig: Rig) -> None:
    told = io.StringIO()
    logs._stream, logs._least = told, logging.DEBUG
    structlog.configure(
        processors=[structlog.processors.JSONRenderer()], wrapper_class=structlog.make_filtering_bound_logger(0),
        logger_factory=structlog.PrintLoggerFactory(told), cache_logger_on_first_use=False,
    )  # fmt: skip
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    rig.house.proofs._patience_seconds = 0.3
    rig.btcpay.is_down = True
    await subrequest(rig, challenge.l402())
    rig.btcpay.is_down = False
    pay(rig, challenge)
    for proof in (challenge.l402(), challenge.once(), challenge.once()):
        await subrequest(rig, proof)
        await rig.client.get(f"/credits/balance?x={proof['Authorization']}", headers=proof)
        await ask(rig, proof)
    await rig.client.get("/credits/balance", headers={"Authorization": f"L402 {challenge.macaroon}:00"})
    text = told.getvalue()
    assert text.count("\n") > 5
    payment = challenge.once()["Authorization"][8:]
    for secret in (
        preimage_of(challenge.invoice).hex(),
        challenge.macaroon,
        challenge.macaroon[20:60],
        payment[:60],
        payment[-60:],
    ):
        assert secret not in text
    assert (
        repr(rig.house.proofs.challenges.read(challenge.l402()["Authorization"])).count(
            preimage_of(challenge.invoice).hex()
        )
        == 0
    )


def test_the_challenge_is_stable_and_the_macaroon_is_read_by_a_macaroon_library(rig: Rig) -> None:
    """Version 2, no location, no caveat, an identifier of 66 bytes: lnget refuses others."""
    challenges = rig.house.proofs.challenges
    payable = Payable("lnbcrt10u1x", "bcrt", 1000, b"\x07" * 32, datetime(2030, 1, 1, tzinfo=UTC))
    assert challenges.line(payable) == challenges.line(replace(payable))
    token = challenges.macaroon(payable.payment_hash)
    assert (token[:3], token[3:37], len(token)) == (b"\x02\x02\x42", b"\x00\x00" + b"\x07" * 32, 3 + 66 + 4 + 32)
    assert token[69:73] == b"\x00\x00\x06\x20"
    assert 'expires="2029-12-31T23:59:30Z"' in challenges.line(payable)
    assert "Payment" not in challenges.line(replace(payable, network="tb"))
    other = Challenges(rig.house.settings.pepper, "elsewhere.example", "x")
    assert other.challenge_id(payable) != challenges.challenge_id(payable)
