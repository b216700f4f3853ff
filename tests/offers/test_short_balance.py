"""A key without money is told how to pay in the refusal itself: one offer of a key, for a sum that helps, or none."""

import asyncio
import uuid
from decimal import Decimal
from typing import Any

import pytest

from app.kernel.settings import Settings
from app.keys.verify import KeyOwner
from app.metering.api.ext_authz import PATH
from app.offers.mint import Rest, Short, amount_to_offer
from app.topups.gateway import Invoice, NewInvoice
from app.wiring import build
from tests.door import opened
from tests.offers.payer import Challenge, challenged, lightning, pay, refused
from tests.rig import Rig, exact

D = Decimal
USD = 10**9


async def test_a_refusal_for_want_of_money_bears_an_offer_and_the_one_line_that_every_client_reads(rig: Rig) -> None:
    customer = await rig.customer()
    told = await refused(rig, customer.api_key, "0.2")
    offer, headers = told["error"]["metadata"]["offer"], told["headers"]
    assert set(offer) == {"lightning_invoice", "amount_usd", "amount_sats", "expires_at", "checkout_url"}
    assert offer["amount_usd"] == D("4")  # twenty times what was lacking
    assert headers["Cache-Control"] == "no-store"
    challenge = Challenge.of(headers["WWW-Authenticate"])
    assert challenge.invoice == offer["lightning_invoice"]
    request = challenge.request
    asked = lightning(rig).bolt11s[challenge.invoice]
    assert (request["amount"], request["currency"]) == (str(offer["amount_sats"]), "sat")
    assert request["methodDetails"] == {
        "invoice": challenge.invoice, "network": "regtest", "paymentHash": asked.payment_hash
    }  # fmt: skip
    assert (challenge.payment["realm"], challenge.payment["intent"]) == ("127.0.0.1:8080", "charge")
    assert len(told["headers"]["WWW-Authenticate"]) < 2000
    assert offer["amount_sats"] * 1000 >= (asked.amount_msat or 0)


@pytest.mark.parametrize("verb", ["charge", "verify"])
async def test_every_verdict_about_money_bears_it(rig: Rig, verb: str) -> None:
    rig.house.mint.patience_seconds = 20
    customer = await rig.customer()
    more = {"request_id": "r1", "cost_usd": "0.02"} if verb == "charge" else {}
    told = exact(await rig.meter(verb, api_key=customer.api_key, **more))
    assert told["status"] == 402
    assert (
        Challenge.of(told["headers"]["WWW-Authenticate"]).invoice
        == told["error"]["metadata"]["offer"]["lightning_invoice"]
    )


async def subrequest(rig: Rig, headers: dict[str, str], query: str = "") -> Any:
    rig.house.mint.patience_seconds = 20
    token = (await rig.service())["Authorization"].removeprefix("Bearer ")
    return await rig.client.get(PATH + query, headers={"X-Service-Token": token, **headers})


async def test_a_gateway_s_subrequest_bears_it_too_and_nginx_finds_it_in_a_header_of_its_own(rig: Rig) -> None:
    customer = await rig.customer()
    answer = await subrequest(rig, customer.key)
    assert answer.status_code == 402
    line = answer.headers["www-authenticate"]
    assert Challenge.of(line).invoice == answer.json()["error"]["metadata"]["offer"]["lightning_invoice"]
    assert answer.headers["cache-control"] == "no-store"
    nginx = await subrequest(rig, customer.key, "?mode=nginx")
    assert (nginx.status_code, nginx.headers["x-authz-status"]) == (403, "402")
    assert nginx.headers["x-authz-challenge"] == line
    assert "www-authenticate" not in nginx.headers
    assert len(nginx.headers["x-authz-challenge"] + nginx.headers["x-authz-body"]) < 3500  # nginx reads 4 KB of headers


async def test_whoever_probes_twice_is_shown_the_same_invoice_whichever_way(rig: Rig) -> None:
    customer = await rig.customer()
    lines = {(await refused(rig, customer.api_key))["headers"]["WWW-Authenticate"] for _ in range(3)}
    lines.add((await subrequest(rig, customer.key)).headers["www-authenticate"])
    assert len(lines) == 1
    assert rig.btcpay.created == 1


async def test_a_shortfall_that_outgrew_the_offer_gets_another_and_one_is_open(rig: Rig) -> None:
    customer = await rig.customer()
    small = await challenged(rig, customer.api_key, "0.01")
    assert (await challenged(rig, customer.api_key, "1")).invoice == small.invoice  # it still helps
    large = await challenged(rig, customer.api_key, "1.5")
    assert large.invoice != small.invoice
    assert (await challenged(rig, customer.api_key, "0.01")).invoice == large.invoice
    assert rig.sql("SELECT count(*), count(*) FILTER (WHERE closed_at IS NULL) FROM offer") == [(2, 1)]


async def test_an_offer_that_is_nearly_over_is_not_shown_any_more(rig: Rig) -> None:
    customer = await rig.customer()
    first = await challenged(rig, customer.api_key)
    rig.sql("UPDATE offer SET expires_at = now() + interval '50 seconds'")
    assert (await challenged(rig, customer.api_key)).invoice != first.invoice


async def test_what_paying_would_not_help_bears_no_offer(rig: Rig) -> None:
    """A key's limit, funds that are held, a frozen account, a key that is none."""
    customer = await rig.customer("10")
    limited = await rig.new_key(customer, usage_limit_usd=1)
    told = await rig.authorize(limited["api_key"], "2")
    assert told["error"]["code"] == "key_limit_exceeded"
    assert "headers" not in told
    await rig.authorize(customer.api_key, "9")
    held = await rig.authorize(customer.api_key, "3")
    assert held["error"]["code"] == "funds_held"
    assert "headers" not in held
    poor = await rig.customer()
    rig.sql("UPDATE account SET status = 'frozen' WHERE posted_nusd = 0")
    for key in (poor.api_key, "sk-nothing"):
        told = await rig.authorize(key, "1")
        assert told["status"] in (401, 403)
        assert "headers" not in told
    assert rig.sql("SELECT count(*) FROM offer") == [(0,)]


async def test_who_wants_no_offer_says_so_in_a_header_or_the_body_and_none_is_minted(rig: Rig) -> None:
    customer = await rig.customer()
    no = {"X-Topup-Offer": "none"}
    assert "www-authenticate" not in (await subrequest(rig, customer.key | no)).headers
    for verb, more in (("authorize", {"max_cost_usd": 1}), ("charge", {"cost_usd": 1}), ("verify", {})):
        asked = {"api_key": customer.api_key, **more} | ({"request_id": verb} if more else {})
        by_header = await rig.client.post(f"/v1/meter/{verb}", headers=await rig.service() | no, json=asked)
        by_body = await rig.client.post(
            f"/v1/meter/{verb}", headers=await rig.service(), json=asked | {"topup_offer": "none"}
        )
        for answer in (by_header, by_body):
            assert answer.json()["status"] == 402
            assert "headers" not in answer.json()
            assert "offer" not in answer.json()["error"]["metadata"]
    assert rig.sql("SELECT count(*) FROM offer") == [(0,)]


OWNER = KeyOwner(uuid.UUID(int=1), uuid.UUID(int=2))


@pytest.mark.parametrize(
    ("short_usd", "debt_usd", "most_usd", "offered_usd"),
    [
        ("0.001", "0", None, "1"),  # at least a dollar
        ("0.2", "0", None, "4"),  # twenty times
        ("0.0505", "0", None, "1.01"),  # whole cents
        ("0.2", "0", "2.509", "2.50"),  # at most what the key may still spend
        ("0.2", "0", "0.19", None),  # which does not help
        ("0.05", "0", "0.09", None),  # below what Lightning takes
        ("200", "0", None, "1000"),
        ("1001", "0", None, None),
        ("0.1", "5", None, "7"),  # what is owed, once
        ("0", "0", None, "1"),
    ],
)
def test_how_much_is_offered(short_usd: str, debt_usd: str, most_usd: str | None, offered_usd: str | None) -> None:
    def nusd(text: str | None) -> int | None:
        return None if text is None else int(D(text) * USD)

    short = Short(OWNER, nusd(short_usd) or 0, nusd(debt_usd) or 0, nusd(most_usd))
    assert amount_to_offer(short, USD) == nusd(offered_usd)


async def test_a_key_s_own_remaining_limit_bounds_what_is_offered(rig: Rig) -> None:
    customer = await rig.customer()
    key = await rig.new_key(customer, usage_limit_usd=1.5)
    told = await refused(rig, key["api_key"], "0.5")
    assert told["error"]["metadata"]["offer"]["amount_usd"] == D("1.5")


async def test_what_the_offer_brings_is_an_ordinary_topup(rig: Rig) -> None:
    customer = await rig.customer()
    challenge = await challenged(rig, customer.api_key)
    pay(rig, challenge)
    await rig.poll()
    assert await rig.balance(customer) == D("1.05")
    assert (await rig.authorize(customer.api_key, "0.01"))["decision"] == "allow"
    later = await challenged(rig, customer.api_key, "2")
    assert later.invoice != challenge.invoice


# --- bounds ---


async def test_ten_thousand_refused_calls_mint_one_invoice_a_key_raced_and_in_two_processes(
    rig: Rig, settings: Settings
) -> None:
    customers = [await rig.customer() for _ in range(3)]
    other = build(settings, rig.database_url, gateway=rig.btcpay, wallets=rig.house.wallets)
    await other.db.open()
    try:
        owners = [await rig.house.verifier.owner_of(secret=customer.api_key) for customer in customers]
        shorts = [Short(owner, 10**7) for owner in owners if owner is not None]

        rig.house.mint.patience_seconds = other.mint.patience_seconds = 20

        async def refuse(mint: Any, short: Short) -> str:
            offered = await mint._in_time(short)
            return "" if offered is None else offered.payable.bolt11

        minting = [(mint, short) for _ in range(1700) for mint in (rig.house.mint, other.mint) for short in shorts]
        shown = [
            await asyncio.gather(*(refuse(*each) for each in minting[at : at + 500]))
            for at in range(0, len(minting), 500)
        ]
        assert len(minting) > 10_000
        assert {invoice for some in shown for invoice in some if invoice} == set(lightning(rig).bolt11s)
        assert rig.btcpay.created == 3
        assert rig.sql("SELECT count(*) FROM offer") == [(3,)]
    finally:
        await other.close()


async def test_the_limits_on_unpaid_topups_hold_for_offers(clean: str, settings: Settings) -> None:
    async with opened(clean, settings, topups_waiting=2) as door:
        customer = await door.rig.customer()
        keys = [(await door.rig.new_key(customer))["api_key"] for _ in range(4)]
        told = [await refused(door.rig, key) for key in keys]
        assert ["headers" in each for each in told] == [True, True, False, False]


async def test_a_backend_that_is_down_or_slow_leaves_the_plain_refusal_and_is_left_alone(rig: Rig) -> None:
    customer = await rig.customer()
    rig.btcpay.is_down = True
    assert "headers" not in await refused(rig, customer.api_key)
    rig.btcpay.is_down = False
    assert "headers" not in await refused(rig, customer.api_key)  # it is given a rest
    rig.house.mint.rest.end()
    assert "headers" in await refused(rig, customer.api_key)


async def test_what_is_minted_too_late_is_for_the_next_who_asks(rig: Rig) -> None:
    customer = await rig.customer()
    answers, create = asyncio.Event(), rig.btcpay.create

    async def slowly(new: NewInvoice) -> Invoice:
        await answers.wait()
        return await create(new)

    rig.btcpay.create = slowly  # type: ignore[method-assign]
    rig.house.mint.patience_seconds = 0.2
    assert "headers" not in await rig.authorize(customer.api_key, "0.01")
    answers.set()
    while rig.sql("SELECT count(*) FROM offer WHERE payment_hash IS NOT NULL") == [(0,)]:
        await asyncio.sleep(0.01)
    assert "headers" in await refused(rig, customer.api_key)
    assert rig.btcpay.created == 1


def test_after_a_failure_one_tries_for_all() -> None:
    now = 0.0
    rest = Rest(lambda: now)
    assert not rest.is_given()
    rest.begin()
    assert rest.is_given()
    now = 5.0
    assert [rest.is_given() for _ in range(3)] == [False, True, True]
    rest.end()
    assert not rest.is_given()


async def test_an_offer_whose_maker_died_gives_way(rig: Rig) -> None:
    customer = await rig.customer()
    await challenged(rig, customer.api_key)
    rig.sql("DELETE FROM proof_ref")
    rig.sql("UPDATE offer SET payment_hash = NULL, created_at = now() - interval '11 seconds'")
    assert "headers" in await refused(rig, customer.api_key)


async def test_offers_are_counted_by_what_became_of_them(rig: Rig) -> None:
    customer = await rig.customer()
    await challenged(rig, customer.api_key)
    await challenged(rig, customer.api_key)
    told = (await rig.client.get("/metrics")).text
    assert 'satmeter_offers_total{result="minted"}' in told
    assert 'satmeter_offers_total{result="shown_again"}' in told
