"""A customer's pages: what a credential may see there, what a second submit does, and that nothing secret stands in them."""

import asyncio
import re
from typing import Any

import pytest

from tests.console.street import Visitor, hidden_of
from tests.door import JSON, Door
from tests.rig import Customer

PAGES = (
    "/console", "/console/topup", "/console/keys", "/console/activity", "/console/autotopup", "/console/account",
)  # fmt: skip
WAIT_SECONDS = 20


async def signed_in(door: Door, usd: str = "0") -> tuple[Customer, Visitor]:
    customer, visitor = await door.customer(usd), Visitor(door)
    await visitor.sign_in(customer.credit_id)
    return customer, visitor


async def a_key(door: Door, customer: Customer, **wanted: Any) -> Any:
    import json

    owner = {"x-credit-id": customer.credit_id} | JSON
    return (await door.ask("POST", "/keys", owner, json.dumps({"name": "narrow"} | wanted).encode())).json["data"]


@pytest.mark.parametrize("path", PAGES)
async def test_every_page_needs_a_session_and_shows_no_secret(door: Door, path: str) -> None:
    assert (await Visitor(door).get(path)).headers["location"] == "/console/sign-in"
    customer, visitor = await signed_in(door)
    page = await visitor.get(path)
    assert page.status == 200
    text = page.body.decode()
    assert customer.credit_id not in text
    assert customer.api_key not in text
    assert not re.search(r"<[^>]*\s(style|on[a-z]+)=", text)


async def test_a_key_sees_what_its_scopes_allow_and_no_more(door: Door) -> None:
    customer = await door.customer("10")
    key = await a_key(door, customer, scopes=["balance"])
    visitor = Visitor(door)
    await visitor.sign_in(key["api_key"])
    assert "$10.00" in (await visitor.get("/console")).body.decode()
    for path in ("/console/topup", "/console/activity", "/console/activity.csv", f"/console/charges/{key['_id']}"):
        answer = await visitor.get(path)
        assert answer.status == 403, path
        assert "scope" in answer.body.decode()
    spender = await a_key(door, customer, name="spender", scopes=["spend"])
    other = Visitor(door)
    await other.sign_in(spender["api_key"])
    page = (await other.get("/console")).body.decode()
    assert "$10.00" not in page
    assert "sign in with the credit id" in page


async def test_a_key_without_the_scope_of_it_manages_neither_keys_nor_wallets_nor_the_account(door: Door) -> None:
    customer = await door.customer()
    visitor = Visitor(door)
    await visitor.sign_in(customer.api_key)
    token = hidden_of((await visitor.get("/console")).body.decode(), "/console/sign-out")
    for path, fields in (
        ("/console/keys", {"name": "x"}), ("/console/autotopup", {"nwc_url": "x"}), ("/console/autotopup/disconnect", {}),
        ("/console/account/rotate", {}), ("/console/account/close", {"sure": "close"}),
    ):  # fmt: skip
        assert (await visitor.post(path, token | fields)).status == 403, path
    assert "Default" not in (await visitor.get("/console/keys")).body.decode()
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": customer.credit_id})).status == 200


async def test_a_key_that_may_make_keys_manages_those_below_it_and_no_other(door: Door) -> None:
    """What it may do on the wire it may do on its pages, with the same answers."""
    customer = await door.customer()
    manager = await a_key(door, customer, name="manager", scopes=["keys", "balance"], usage_limit_usd=5)
    beside, visitor = await a_key(door, customer, name="beside"), Visitor(door)
    await visitor.sign_in(manager["api_key"])
    page = (await visitor.get("/console/keys")).body.decode()
    assert "No key yet" in page
    assert 'value="balance"' in page
    assert 'value="spend"' not in page  # what it may not do it cannot give
    refused = await visitor.submit("/console/keys", "/console/keys", name="dear", limit_total="6", scopes=["balance"])
    assert (refused.status, 'role="alert"' in refused.body.decode()) == (422, True)
    refused = await visitor.submit("/console/keys", "/console/keys", name="more", limit_total="2", scopes=["spend"])
    assert refused.status == 422
    made = await visitor.submit("/console/keys", "/console/keys", name="child", limit_total="2", scopes=["balance"])
    (secret,) = set(re.findall(r"sk-\w{49}", made.body.decode()))
    listed = (await door.ask("GET", "/keys", {"Authorization": f"Bearer {manager['api_key']}"})).json["data"]
    assert [(key["name"], key["parent_id"], key["scopes"]) for key in listed] == [
        ("child", manager["_id"], ["balance"])
    ]
    page = (await visitor.get("/console/keys")).body.decode()
    assert "child" in page
    assert "beside" not in page
    assert f"/console/keys/{manager['_id']}" not in page
    child = f"/console/keys/{listed[0]['_id']}"
    assert secret in (await visitor.submit(child, child, act="reveal")).body.decode()
    assert (
        await visitor.submit(child, child, act="change", name="renamed", limit_total="1", scopes=["balance"])
    ).status == 303
    token = hidden_of((await visitor.get("/console/keys")).body.decode(), "/console/keys")
    for other in (beside["_id"], manager["_id"]):
        assert (await visitor.get(f"/console/keys/{other}")).status == 404
        for act in ("reveal", "off", "on", "revoke", "change"):
            assert (await visitor.post(f"/console/keys/{other}", token | {"act": act, "name": "x"})).status == 404, act
    assert (await visitor.get("/console/account")).status == 200
    assert (await visitor.post("/console/account/rotate", token)).status == 403
    await visitor.submit(child, child, act="revoke")
    assert (await door.ask("GET", "/credits/balance", {"Authorization": f"Bearer {secret}"})).status == 401
    names = {key["name"] for key in (await door.ask("GET", "/keys", {"x-credit-id": customer.credit_id})).json["data"]}
    assert names == {"Default", "manager", "beside"}


async def test_what_a_key_may_do_stays_ticked_on_its_page(door: Door) -> None:
    customer, visitor = await signed_in(door)
    for scopes, ticked in ((None, 4), (["balance", "keys"], 2)):
        key = await a_key(door, customer, name=f"may {ticked}", scopes=scopes)
        page = (await visitor.get(f"/console/keys/{key['_id']}")).body.decode()
        assert len(re.findall(r'name="scopes"[^>]*\bchecked', page)) == ticked, scopes
    refused = await visitor.submit("/console/keys", "/console/keys", name="Default", scopes=["balance", "keys"])
    assert len(re.findall(r'name="scopes"[^>]*\bchecked', refused.body.decode())) == 2


async def test_a_key_is_made_once_however_often_its_form_is_sent(door: Door) -> None:
    customer, visitor = await signed_in(door)
    fields = hidden_of((await visitor.get("/console/keys")).body.decode(), "/console/keys") | {
        "name": "laptop", "limit_weekly": "2.50", "limit_total": "40", "scopes": ["spend", "keys"],
    }  # fmt: skip
    answers = [await visitor.post("/console/keys", fields) for _ in range(3)]
    shown = {re.findall(r"sk-\w{49}", answer.body.decode())[0] for answer in answers}
    assert len(shown) == 1
    listed = (await door.ask("GET", "/keys", {"x-credit-id": customer.credit_id})).json["data"]
    (made,) = [key for key in listed if key["name"] == "laptop"]
    assert [(each["usd"], each["period"]) for each in made["limits"]] == [(2.5, "weekly"), (40, "total")]
    assert sorted(made["scopes"]) == ["keys", "spend"]
    page = (await visitor.get(f"/console/keys/{made['_id']}")).body.decode()
    assert "$0.00 of $2.50 used this week" in page
    assert "$0.00 of $40.00 used in all" in page
    assert shown.pop() not in (await visitor.get("/console/keys")).body.decode()


async def test_what_a_key_may_not_be_is_told_above_the_form_and_kept_in_it(door: Door) -> None:
    _, visitor = await signed_in(door)
    for wrong, words in (
        ({"name": ""}, "name must have"), ({"name": "Default"}, "named"), ({"name": "x", "limit_daily": "-1"}, "limits"),
        ({"name": "x", "requests_per_minute": "many"}, "requests_per_minute"),
        ({"name": "x", "expire_at": "2020-01-01"}, "future"), ({"name": "x", "scopes": "everything"}, "scopes"),
    ):  # fmt: skip
        answer = await visitor.submit("/console/keys", "/console/keys", **wrong)
        assert answer.status in (409, 422), wrong
        assert words in answer.body.decode(), wrong
        assert 'role="alert"' in answer.body.decode()


async def test_a_key_is_revealed_switched_off_and_revoked_by_its_page(door: Door) -> None:
    customer, visitor = await signed_in(door)
    key = await a_key(door, customer, name="mine")
    page = f"/console/keys/{key['_id']}"
    assert key["api_key"] in (await visitor.submit(page, page, act="reveal")).body.decode()
    await visitor.submit(page, page, act="off")
    assert (await door.ask("GET", "/credits/balance", {"Authorization": f"Bearer {key['api_key']}"})).status == 401
    await visitor.submit(page, page, act="on")
    assert (await door.ask("GET", "/credits/balance", {"Authorization": f"Bearer {key['api_key']}"})).status == 200
    await visitor.submit(page, page, act="revoke")
    assert (await door.ask("GET", "/credits/balance", {"Authorization": f"Bearer {key['api_key']}"})).status == 401


async def test_another_accounts_things_are_not_there(door: Door) -> None:
    stranger = await door.customer("10")
    key = await a_key(door, stranger)
    await door.rig.topup(stranger, "10")
    topup_id = await _newest_topup(door)
    _, visitor = await signed_in(door)
    for path in (
        f"/console/keys/{key['_id']}", f"/console/topups/{topup_id}", f"/console/topups/{topup_id}/qr.svg",
        f"/console/topups/{topup_id}/live", "/console/topups/x", "/console/keys/x", f"/console/charges/{key['_id']}",
    ):  # fmt: skip
        assert (await visitor.get(path)).status == 404, path


async def test_a_top_up_is_made_once_paid_and_told_live_until_it_is_over(door: Door) -> None:
    _, visitor = await signed_in(door)
    fields = hidden_of((await visitor.get("/console/topup?method=btc")).body.decode(), "/console/topup") | {
        "pick": "USD:25"
    }
    answers = [await visitor.post("/console/topup", fields) for _ in range(3)]
    (address,) = {answer.headers["location"] for answer in answers}
    page = (await visitor.get(address)).body.decode()
    assert "Waiting for your payment" in page
    qr = await visitor.get(f"{address}/qr.svg")
    assert (qr.status, qr.headers["content-type"]) == (200, "image/svg+xml")
    jar = {"Cookie": "; ".join(f"{name}={value}" for name, value in visitor.cookies.items())}
    telling = asyncio.create_task(door.rig.client.get(f"{address}/live", headers=jar))
    invoice_id = next(iter(door.rig.btcpay.invoices))
    door.rig.btcpay.pay(invoice_id)
    await door.rig.deliver(invoice_id)
    await door.rig.process()
    told = await asyncio.wait_for(telling, WAIT_SECONDS)
    assert told.headers["content-type"].startswith("text/event-stream")
    assert told.content.endswith(b"event: over\ndata: over\n\n")
    assert b"$25.00 was added to the balance" in told.content
    assert "Paid" in (await visitor.get("/console/topup")).body.decode()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"amount": "1"}, "takes 10 to 10000 USD"), ({"amount": "1e3"}, "decimal"), ({}, "decimal"), ({"pick": "SATS:100"}, "not"),
        ({"amount": "10", "currency": "EUR"}, "EUR"), ({"amount": "٣"}, "decimal"),
    ],
)  # fmt: skip
async def test_an_amount_that_cannot_be_paid_is_told_above_the_form(
    door: Door, fields: dict[str, str], words: str
) -> None:
    _, visitor = await signed_in(door)
    answer = await visitor.submit("/console/topup?method=btc", "/console/topup", **fields)
    assert answer.status == 422
    assert words in answer.body.decode()
    assert door.rig.btcpay.created == 0


async def test_a_charge_is_explained_to_the_nano_dollar_and_activity_adds_up(door: Door) -> None:
    customer, visitor = await signed_in(door, "10")
    await door.rig.meter("charge", request_id="one", api_key=customer.api_key, cost_usd="0.000045678")
    home = (await visitor.get("/console")).body.decode()
    address = re.findall(r'href="(/console/charges/[0-9a-f-]+)"', home)
    assert "$0.000045678" in home
    page = (await visitor.get(address[0])).body.decode()
    assert page.count("$0.000045678") >= 3
    for metric in ("cost", "calls", "input", "output"):
        for by in ("model", "key"):
            answer = await visitor.get(f"/console/activity?metric={metric}&by={by}&period=7")
            assert answer.status == 200
            assert "$0.000045678" in answer.body.decode()
    await door.rig.meter("charge", request_id="two", api_key=customer.api_key, cost_usd="0.25", model="m")
    page = (await visitor.get("/console/activity")).body.decode()
    by_day = page[page.index("Day by day") :]
    assert re.findall(r"<td[^>]*>([^<]+)</td>", by_day)[1:3] == ["$0.25", "$0.000045678"]
    csv = await visitor.get("/console/activity.csv?period=7")
    assert csv.headers["content-type"].startswith("text/csv")
    assert "0.000045678" in csv.body.decode()
    for odd in ("metric=x", "by=x", "period=1", "key_id=x", "cursor=x"):
        assert (await visitor.get(f"/console/activity?{odd}")).status == 422, odd


async def test_a_charge_tells_what_was_held_for_it_and_what_was_refunded(door: Door) -> None:
    customer, visitor = await signed_in(door, "10")
    held = await door.rig.authorize(customer.api_key, "0.75", "held")
    charge = await door.rig.settle(held["hold_id"], "0.5")
    await door.rig.meter("refund", charge_id=charge["charge_id"], amount_usd="0.125", reason="goodwill")
    page = (await visitor.get(f"/console/charges/{charge['charge_id']}")).body.decode()
    for words in ("Held", "$0.75", "Charged", "$0.50", "Refunded", "$0.125", "It cost you", "$0.375"):
        assert words in page, words


async def test_another_credit_id_is_shown_once_and_ends_the_other_sessions(door: Door) -> None:
    customer, visitor = await signed_in(door)
    other = Visitor(door)
    await other.sign_in(customer.credit_id)
    fields, before = (
        hidden_of((await visitor.get("/console/account")).body.decode(), "/console/account/rotate"),
        dict(visitor.cookies),
    )
    answer = await visitor.post("/console/account/rotate", fields)
    again = await Visitor(door, before).post("/console/account/rotate", fields)  # the click that came twice
    assert re.findall(r"<code>([0-9a-f-]{36})</code>", again.body.decode()) == re.findall(
        r"<code>([0-9a-f-]{36})</code>", answer.body.decode()
    )
    assert (await other.get("/console")).headers["location"] == "/console/sign-in?said=session-over"
    (found,) = re.findall(r"<code>([0-9a-f-]{36})</code>", answer.body.decode())
    assert found != customer.credit_id
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": found})).status == 200
    assert (await visitor.get("/console/account")).status == 200


async def test_an_account_is_closed_only_by_who_means_it_and_with_nothing_on_it(door: Door) -> None:
    _, rich = await signed_in(door, "10")
    answer = await rich.submit("/console/account", "/console/account/close", sure="close")
    assert (answer.status, "nothing on it" in answer.body.decode()) == (422, True)
    customer, visitor = await signed_in(door)
    assert (await visitor.submit("/console/account", "/console/account/close", sure="yes")).status == 422
    gone = await visitor.submit("/console/account", "/console/account/close", sure="close")
    assert gone.headers["location"] == "/console/sign-in?said=closed"
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": customer.credit_id})).status == 401


async def _newest_topup(door: Door) -> str:
    found = await door.rig.house.db.one("SELECT id FROM topup ORDER BY created_at DESC LIMIT 1", {})
    assert found is not None
    return str(found["id"])


async def test_a_lost_credit_id_is_recovered_by_the_code_that_was_shown_when_the_account_was_opened(door: Door) -> None:
    opened = await Visitor(door).submit("/console/sign-in", "/console/open")
    shown = re.findall(r"<code>([^<]+)</code>", opened.body.decode())
    assert len(shown) == 3
    before, code = shown[:2]
    assert (await Visitor(door).submit("/console/recover", "/console/recover", recovery_code="nonsense")).status == 401
    answer = await Visitor(door).submit("/console/recover", "/console/recover", recovery_code=code)
    assert answer.status == 200
    after = re.findall(r"<code>([0-9a-f-]{36})</code>", answer.body.decode())[0]
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": before})).status == 401
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": after})).status == 200


async def test_notices_are_set_tested_and_taken_away_and_the_signing_secret_is_shown_once(door: Door) -> None:
    customer, visitor = await signed_in(door)
    page, address = "/console/account", "/console/account/notices"
    bad = await visitor.submit(page, address, webhook_url="ftp://hooks.example.com")
    assert (bad.status, 'role="alert"' in bad.body.decode()) == (422, True)
    made = await visitor.submit(
        page, address, webhook_url="https://hooks.example.com/secret-path", low_balance_usd="3", events="balance.low"
    )
    (secret,) = re.findall(r"<code>(whsec_[^<]+)</code>", made.body.decode())
    shown = (await visitor.get(page)).body.decode()
    assert "hooks.example.com" in shown
    assert "secret-path" not in shown
    assert secret not in shown
    told = (await door.ask("GET", "/notices", {"x-credit-id": customer.credit_id})).json
    assert (told["low_balance_usd"], told["events"]) == (3, ["balance.low"])
    sent = await visitor.submit(page, f"{address}/test")
    assert sent.headers["location"] == "/console/account?said=test-sent"
    assert "a test" in (await visitor.get(page)).body.decode()
    await visitor.post(address, hidden_of((await visitor.get(page)).body.decode(), address) | {"act": "remove"})
    assert (await door.ask("GET", "/notices", {"x-credit-id": customer.credit_id})).json["webhook_url"] is None


async def test_a_key_that_is_shown_again_stands_in_the_owners_log(door: Door) -> None:
    customer, visitor = await signed_in(door)
    key = await a_key(door, customer, name="mine")
    await visitor.submit(f"/console/keys/{key['_id']}", f"/console/keys/{key['_id']}", act="reveal")
    assert "key revealed" in (await visitor.get("/console/account")).body.decode()
