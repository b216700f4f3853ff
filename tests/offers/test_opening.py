"""A wallet without an account: a 402 that can be paid, and the account with the money on it for the proof, once and for a day."""

import asyncio
import base64
import json
import uuid
from decimal import Decimal
from typing import Any

import pytest

from app.audit import Secrets, audit
from app.audit.offers import ALIASES, OFFERS
from app.kernel.settings import Settings
from app.offers.opening import forget_old_offers
from tests.door import opened
from tests.offers.payer import Challenge, challenged, pay
from tests.offers.test_proofs import ask
from tests.offers.test_short_balance import subrequest
from tests.rig import Customer, Rig, exact

D = Decimal
WISH = {"amount": 5000, "currency": "SATS"}


async def create(rig: Rig, proof: dict[str, str] | None = None, wish: Any = WISH, agent: str = "a") -> Any:
    return await rig.client.post("/accounts/create", headers=(proof or {}) | {"User-Agent": agent}, json=wish)


async def asked(rig: Rig, wish: Any = WISH, agent: str = "a") -> Challenge:
    answer = await create(rig, wish=wish, agent=agent)
    assert answer.status_code == 402, answer.text
    return Challenge.of(answer.headers["www-authenticate"])


async def test_a_wallet_without_an_account_pays_a_refusal_and_has_a_funded_account(rig: Rig) -> None:
    refusal = await create(rig)
    assert (refusal.status_code, refusal.headers["cache-control"]) == (402, "no-store")
    challenge = Challenge.of(refusal.headers["www-authenticate"])
    metadata = exact(refusal)["error"]["metadata"]
    assert metadata["lightning_invoice"] == metadata["offer"]["lightning_invoice"] == challenge.invoice
    assert (metadata["amount_due"], metadata["offer"]["amount_sats"]) == (D("0.00005"), 5000)
    assert metadata["offer"]["amount_usd"] == D("3.25")
    assert {"checkout_url", "expires_at"} <= set(metadata)
    pay(rig, challenge)
    answer = await create(rig, challenge.l402())
    assert answer.status_code == 201
    account = exact(answer)
    assert account["balance"] == D("3.4125")  # with Lightning's five percent
    customer = Customer(account["credit_id"], account["api_key"])
    assert await rig.balance(customer) == D("3.4125")
    assert (await rig.authorize(customer.api_key, "3"))["decision"] == "allow"
    told = json.loads(base64.urlsafe_b64decode(answer.headers["payment-receipt"] + "=="))
    assert told["reference"] == challenge.request["methodDetails"]["paymentHash"]
    assert (told["status"], told["method"]) == ("success", "lightning")


async def test_the_same_proof_again_opens_the_same_account_and_key_whichever_way_it_is_written(rig: Rig) -> None:
    challenge = await asked(rig)
    pay(rig, challenge)
    proofs = [challenge.l402(), challenge.once(), challenge.l402("LSAT"), challenge.once()]
    answers = await asyncio.gather(*(create(rig, proof) for proof in proofs), create(rig, challenge.l402(), wish=None))
    assert {answer.status_code for answer in answers} == {201}
    assert len({(answer.json()["credit_id"], answer.json()["api_key"]) for answer in answers}) == 1
    assert rig.sql("SELECT count(*) FROM account") == [(1,)]


async def test_a_paid_account_has_the_recovery_code_that_was_asked_for(rig: Rig) -> None:
    challenge = await asked(rig, WISH | {"recovery": True})
    assert (await asked(rig)).invoice != challenge.invoice
    pay(rig, challenge)
    account = (await create(rig, challenge.l402())).json()
    assert (await create(rig, challenge.l402())).json() == account
    again = await rig.client.post("/accounts/recover", json={"recovery_code": account["recovery_code"]})
    assert again.status_code in (200, 201), again.text
    balance = await rig.client.get("/credits/balance", headers={"x-credit-id": again.json()["credit_id"]})
    assert exact(balance)["balance"] == D("3.4125")


async def test_after_a_day_the_proof_tells_nothing_more_and_its_secrets_are_forgotten(rig: Rig) -> None:
    challenge = await asked(rig)
    pay(rig, challenge)
    assert (await create(rig, challenge.l402())).status_code == 201
    rig.sql("UPDATE offer SET told_at = now() - interval '24 hours 1 second'")
    again = await create(rig, challenge.l402())
    assert again.status_code == 402
    assert Challenge.of(again.headers["www-authenticate"]).invoice != challenge.invoice
    assert (await create(rig, challenge.l402(), wish=None)).status_code == 402
    assert await forget_old_offers(rig.house.db) == 1
    assert (await create(rig, challenge.l402(), wish=None)).status_code == 402
    assert (await ask(rig, challenge.l402()))["decision"] == "allow"  # the token lives as long as its key


async def test_secrets_that_were_told_open_with_the_payer_s_preimage_alone(rig: Rig) -> None:
    challenge = await asked(rig)
    pay(rig, challenge)
    account = (await create(rig, challenge.l402())).json()
    [(topup_id, sealed)] = rig.sql("SELECT topup_id, sealed FROM offer")
    opened_by_us = rig.house.settings.sealer.open_bytes(bytes(sealed), f"offer/{topup_id}")
    assert account["api_key"].encode() not in opened_by_us
    assert account["credit_id"].encode() not in opened_by_us


async def test_the_token_of_an_account_stands_for_its_first_key_and_a_single_use_is_spent_on_opening_it(
    rig: Rig,
) -> None:
    challenge = await asked(rig)
    pay(rig, challenge)
    assert (await ask(rig, challenge.l402()))["decision"] == "allow"  # before anybody was told the key
    account = (await create(rig, challenge.once())).json()
    assert (await ask(rig, challenge.once()))["error"]["code"] == "invalid_challenge"
    balance = exact(await rig.client.get("/credits/balance", headers=challenge.l402()))["balance"]
    assert balance == await rig.balance(Customer(account["credit_id"], account["api_key"]))


async def test_payers_who_ask_twice_or_at_once_are_shown_the_same_invoice_and_others_another(rig: Rig) -> None:
    invoices = {challenge.invoice for challenge in await asyncio.gather(*(asked(rig) for _ in range(5)))}
    invoices.add((await asked(rig)).invoice)
    assert len(invoices) == 1
    assert rig.sql("SELECT count(*) FROM account") == [(1,)]
    assert (await asked(rig, wish={"amount": 1, "currency": "USD"})).invoice not in invoices
    assert (await asked(rig, agent="another")).invoice not in invoices
    [first] = invoices
    pay(rig, Challenge("", first, {}))
    await rig.poll()
    assert (await asked(rig)).invoice != first  # what is paid is somebody's


async def test_an_unpaid_proof_is_503_and_one_of_a_key_opens_no_account(rig: Rig) -> None:
    rig.house.proofs._patience_seconds = 0.3
    challenge = await asked(rig)
    answer = await create(rig, challenge.l402())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    customer = await rig.customer()
    of_key = await challenged(rig, customer.api_key)
    pay(rig, of_key)
    assert (await create(rig, of_key.l402())).status_code == 401
    assert (await create(rig, {"Authorization": "L402 x:00"})).status_code == 401


@pytest.mark.parametrize(
    ("wish", "status", "param"),
    [
        ({"amount": 5, "currency": "SATS"}, 422, "amount"), ({"amount": "x"}, 422, "amount"), ({"amount": -1}, 422, "amount"),
        ({"amount": 10, "currency": "LTC"}, 422, "currency"), ({"amount": 2000}, 422, "amount"),
    ],
)  # fmt: skip
async def test_a_wish_that_cannot_be_paid_is_refused_and_opens_nothing(
    rig: Rig, wish: Any, status: int, param: str
) -> None:
    answer = await create(rig, wish=wish)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert rig.sql("SELECT count(*) FROM account") == [(0,)]


async def test_without_an_amount_an_account_is_free_as_ever(rig: Rig) -> None:
    for wish in (None, {}, {"name": "me"}):
        answer = await create(rig, wish=wish)
        assert (answer.status_code, answer.json()["balance"]) == (201, 0)
    assert (await rig.client.post("/accounts/create")).status_code == 201


async def test_so_many_accounts_are_offered_a_minute_and_the_next_is_refused_without_an_offer(
    clean: str, settings: Settings
) -> None:
    async with opened(clean, settings, now=lambda: 0.0, offers_per_minute=3) as door:
        door.rig.house.openings._allowances._now = lambda: 0.0
        answers = [await create(door.rig, agent=uuid.uuid4().hex) for _ in range(5)]
        assert [answer.status_code for answer in answers] == [402] * 5
        assert ["www-authenticate" in answer.headers for answer in answers] == [True, True, True, False, False]
        assert "offer" not in answers[-1].json()["error"].get("metadata", {})


@pytest.mark.usefixtures("within_an_hour")
async def test_a_neighbourhood_is_offered_as_many_accounts_as_it_may_open(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, accounts_per_hour_per_block=2) as door:
        answers = [await create(door.rig, agent=uuid.uuid4().hex) for _ in range(3)]
        assert ["www-authenticate" in answer.headers for answer in answers] == [True, True, False]


async def test_a_backend_that_is_down_opens_nothing_that_can_be_paid(rig: Rig) -> None:
    rig.btcpay.is_down = True
    answer = await create(rig)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "payment_backend_unavailable")
    rig.btcpay.is_down = False
    assert Challenge.of((await create(rig)).headers["www-authenticate"])


async def test_a_gateway_s_caller_without_a_key_is_401_unless_the_operator_offers_accounts(
    clean: str, rig: Rig, settings: Settings
) -> None:
    assert (await subrequest(rig, {})).status_code == 401
    async with opened(clean, settings, keyless_offer_usd="2") as door:
        answer = await subrequest(door.rig, {})
        assert answer.status_code == 402
        assert (await subrequest(door.rig, {"X-Topup-Offer": "none"})).status_code == 401
        challenge = Challenge.of(answer.headers["www-authenticate"])
        pay(door.rig, challenge)
        assert (await subrequest(door.rig, challenge.l402())).status_code == 200


LIES = (
    ("consumed_offer_was_paid", "UPDATE offer SET consumed_at = now(), consumed_by = 'me' WHERE id = {unpaid}"),
    ("consumed_offer_was_paid", "UPDATE payment SET status = 'Invalid' WHERE topup_id = (SELECT topup_id FROM offer WHERE id = {paid})"),
    ("one_offer_of_a_key_is_open", "DROP INDEX offer_open; UPDATE offer SET closed_at = NULL, key_id = (SELECT key_id FROM offer WHERE id = {paid}), account_id = (SELECT account_id FROM offer WHERE id = {paid})"),
    ("proof_leads_to_its_offer", "UPDATE proof_ref SET offer_id = {paid} WHERE offer_id = {unpaid}"),
    ("proof_leads_to_its_offer", "DELETE FROM proof_ref WHERE offer_id = {unpaid}"),
    ("alias_is_of_its_key", "UPDATE offer SET key_id = gen_random_uuid() WHERE id = {paid}"),
    ("everything_has_its_key", "UPDATE offer SET key_id = gen_random_uuid() WHERE id = {paid}"),
    ("alias_is_of_its_key", "UPDATE proof_ref SET proof = 'x' WHERE offer_id = {paid}"),
    ("offer_is_a_topup", "UPDATE offer SET topup_id = gen_random_uuid() WHERE id = {unpaid}"),
)  # fmt: skip


@pytest.mark.parametrize(("check", "lie"), LIES)
async def test_the_audit_names_what_is_not_true_of_offers(rig: Rig, check: str, lie: str) -> None:
    rich, poor = await rig.customer(), await rig.customer()
    challenge = await challenged(rig, rich.api_key)
    pay(rig, challenge)
    assert (await ask(rig, challenge.once()))["decision"] == "allow"
    await challenged(rig, poor.api_key)
    [(paid,)] = rig.sql("SELECT id FROM offer WHERE consumed_at IS NOT NULL")
    [(unpaid,)] = rig.sql("SELECT id FROM offer WHERE consumed_at IS NULL")
    index = "CREATE UNIQUE INDEX offer_open ON offer (account_id, key_id) WHERE closed_at IS NULL"
    rig.sql("CREATE TABLE kept_offer AS TABLE offer")
    rig.sql("CREATE TABLE kept_ref AS TABLE proof_ref")
    try:
        for statement in lie.format(paid=f"'{paid}'", unpaid=f"'{unpaid}'").split("; "):
            rig.sql(statement)
        report = await audit(rig.house.db, Secrets.of(rig.house.settings))
        assert check in {finding.check for finding in report.findings}
    finally:
        rig.sql("TRUNCATE offer, proof_ref")
        rig.sql("INSERT INTO offer SELECT * FROM kept_offer")
        rig.sql("INSERT INTO proof_ref SELECT * FROM kept_ref")
        rig.sql("DROP TABLE kept_offer, kept_ref")
        rig.sql("UPDATE payment SET status = 'Settled'")
        rig.sql(f"DO $$ BEGIN IF to_regclass('offer_open') IS NULL THEN {index}; END IF; END $$")


def test_every_check_of_offers_has_a_lie_that_it_finds() -> None:
    assert {check for check, _ in LIES} >= {check.name for check in OFFERS} | {proof.name for proof in ALIASES}
