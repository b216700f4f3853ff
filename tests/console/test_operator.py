"""The operator's pages: what the admin API does, done by hand; no more than the token may, and all of it in the log."""

import asyncio
import json
import re
from html import unescape
from typing import Any

import pytest

from app.admin.scopes import SCOPES
from app.pricing.importer import OWN_FORMAT
from app.topups.gateway import AdditionalStatus, InvoiceStatus
from tests.admin.desk import account_of, operator
from tests.console.street import Visitor, hidden_of
from tests.door import Door
from tests.rig import Customer

PAGES = (
    "/operator",
    "/operator/accounts",
    "/operator/topups",
    "/operator/prices",
    "/operator/tokens",
    "/operator/audit",
)


def sheet(**prices: tuple[str, str]) -> dict[str, Any]:
    """A price file of our own: USD for a million tokens in and out."""
    return {
        "format": OWN_FORMAT,
        "models": [
            {"model": name, "provider": "p", "mode": "chat", "usd_per_million": {"input": into, "output": out}}
            for name, (into, out) in prices.items()
        ],
    }


async def signed_in(door: Door, *scopes: str) -> Visitor:
    visitor = Visitor(door)
    answer = await visitor.sign_in_as_operator((await operator(door.rig, *scopes)).token)
    assert (answer.status, answer.headers["location"]) == (303, "/operator")
    return visitor


def text_of(page: str) -> str:
    """What a person reads of it."""
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", page)).split())


async def read(visitor: Visitor, path: str) -> str:
    answer = await visitor.get(path)
    assert answer.status == 200, answer.body[:300]
    return text_of(answer.body.decode())


def acts(door: Door) -> list[tuple[Any, ...]]:
    return door.rig.sql("SELECT act, reason, amount_nusd FROM admin_log ORDER BY id")


async def a_review(door: Door) -> tuple[Customer, str]:
    """A top-up that waits for a person, and its customer."""
    customer = await door.rig.customer()
    invoice_id = await door.rig.topup(customer, "20")
    door.rig.btcpay.change(invoice_id, status=InvoiceStatus.SETTLED, additional_status=AdditionalStatus.MARKED)
    await door.rig.poll()
    [(topup_id,)] = door.rig.sql("SELECT id FROM topup WHERE invoice_id = %s", invoice_id)
    return customer, str(topup_id)


async def decide(visitor: Visitor, topup_id: str, **wish: str) -> Any:
    there = f"/operator/topups/{topup_id}"
    hidden = hidden_of((await visitor.get(there)).body.decode(), f"{there}/resolve")
    return await visitor.post(f"{there}/resolve", hidden | wish)


@pytest.mark.parametrize("path", PAGES)
async def test_each_page_stands_on_an_empty_house_and_says_what_to_do(door: Door, path: str) -> None:
    page = await read(await signed_in(door), path)
    assert "Something of ours broke" not in page


@pytest.mark.parametrize("path", PAGES)
async def test_nobody_sees_a_page_without_an_operators_session(door: Door, path: str) -> None:
    customer = await door.customer()
    visitor = Visitor(door)
    await visitor.sign_in(customer.credit_id)
    assert (await visitor.get(path)).headers["location"] == "/operator/sign-in"


async def test_today_tells_what_came_in_what_is_owed_and_what_waits(door: Door) -> None:
    customer, _ = await a_review(door)
    await door.rig.fund(customer, "50")
    held = await door.rig.authorize(customer.api_key, "1")
    await door.rig.authorize(customer.api_key, "2")
    await door.rig.settle(held["hold_id"], "0.75")
    page = await read(await signed_in(door), "/operator")
    for words in (
        "1 top-up waits for your decision", "Received $50.00", "Revenue $0.75 1 call", "Held $2.00 1 open hold",
        "Customers' balances $49.25 98.5 % of what was received", "Payment backends Answer", "Bitcoin Paid",
    ):  # fmt: skip
        assert words in page, words


async def test_an_account_is_found_by_its_credit_id_which_stands_in_no_address(door: Door) -> None:
    customer, visitor = await door.customer("10"), await signed_in(door, "read")
    for asked in (customer.credit_id, customer.api_key):
        answer = await visitor.submit("/operator/accounts", "/operator/accounts/search", q=asked)
        assert answer.status == 303
        assert answer.headers["location"] == f"/operator/accounts/{account_of(door.rig, customer)}"
    answer = await visitor.submit("/operator/accounts", "/operator/accounts/search", q="nothing-is-this")
    assert "Nothing here is that" in answer.body.decode()


async def test_an_account_is_credited_after_a_page_of_before_and_after_and_once(door: Door) -> None:
    customer, visitor = await door.customer("10"), await signed_in(door)
    there = f"/operator/accounts/{account_of(door.rig, customer)}"
    wish = {"direction": "credit", "amount_usd": "2.5", "reason": "goodwill for Monday"}
    asked = await visitor.submit(there, f"{there}/adjust", **wish)
    page = asked.body.decode()
    assert (asked.status, acts(door)) == (200, [])
    assert "Balance before $10.00 Balance after $12.50" in text_of(page)
    fields = hidden_of(page, f"{there}/adjust")
    answers = [await visitor.post(f"{there}/adjust", fields) for _ in range(3)]
    assert {answer.headers["location"] for answer in answers} == {f"{there}?said=adjusted"}
    assert acts(door) == [("account.credit", "goodwill for Monday", 2_500_000_000)]
    assert await door.rig.balance(customer) == 12.5
    assert "Adjustment $2.50 $12.50" in await read(visitor, there)
    await door.rig.audit()


@pytest.mark.parametrize(
    ("wish", "words"),
    [
        ({"direction": "debit", "amount_usd": "11"}, "is more than the $10 that may be spent"),
        ({"direction": "debit", "amount_usd": "0"}, "must be more than 0"),
        ({"direction": "credit", "amount_usd": "1e3"}, "decimal number"),
        ({"direction": "sideways", "amount_usd": "1"}, "credited or debited"),
        ({"direction": "credit", "amount_usd": "1", "reason": "x"}, "a reason is one line"),
    ],
)  # fmt: skip
async def test_what_cannot_be_adjusted_is_said_on_the_accounts_page(
    door: Door, wish: dict[str, str], words: str
) -> None:
    customer, visitor = await door.customer("10"), await signed_in(door)
    there = f"/operator/accounts/{account_of(door.rig, customer)}"
    answer = await visitor.submit(there, f"{there}/adjust", **({"reason": "as it must be"} | wish))
    assert answer.status in (402, 422)
    assert words in text_of(answer.body.decode())
    assert acts(door) == []


async def test_an_account_is_frozen_let_go_rotated_and_closed(door: Door) -> None:
    customer, visitor = await door.customer(), await signed_in(door)
    there = f"/operator/accounts/{account_of(door.rig, customer)}"
    await visitor.submit(there, f"{there}/freeze", reason="odd calls at night")
    assert "Frozen" in await read(visitor, there)
    await visitor.submit(there, f"{there}/unfreeze")
    answer = await visitor.submit(there, f"{there}/rotate", reason="it leaked")
    [credit_id] = re.findall(r"<code>([0-9a-f-]{36})</code>", answer.body.decode())
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": credit_id})).status == 200
    assert (await door.ask("GET", "/credits/balance", {"x-credit-id": customer.credit_id})).status == 401
    await visitor.submit(there, f"{there}/close", reason="asked for")
    assert [act for act, _, _ in acts(door)] == [
        "account.freeze",
        "account.unfreeze",
        "account.rotate",
        "account.close",
    ]
    assert "It is closed" in await read(visitor, there)


async def test_a_key_is_switched_off_and_on_and_revoked(door: Door) -> None:
    customer, visitor = await door.customer("10"), await signed_in(door)
    account = account_of(door.rig, customer)
    [(key_id,)] = door.rig.sql("SELECT id FROM api_key")
    there = f"/operator/accounts/{account}"
    for what in ("disable", "enable", "revoke"):
        answer = await visitor.submit(there, f"{there}/keys/{key_id}/{what}")
        assert answer.headers["location"] == f"{there}?said=key-changed"
    assert [act for act, _, _ in acts(door)] == ["key.disable", "key.enable", "key.revoke"]
    assert "It has no key" in await read(visitor, there)


async def test_a_review_shows_quote_and_backend_side_by_side_and_is_decided_after_before_and_after(door: Door) -> None:
    (customer, topup_id), visitor = await a_review(door), await signed_in(door)
    there = f"/operator/topups/{topup_id}"
    assert "marked settled by hand" in await read(visitor, "/operator/topups")
    page = await read(visitor, there)
    assert "1 BTC = $65000" in page
    assert f'hx-get="{there}/backend"' in (await visitor.get(there)).body.decode()
    said = text_of((await visitor.get(f"{there}/backend", **{"HX-Request": "true"})).body.decode())
    assert "State Paid, marked by hand" in said
    assert "Order Ours" in said
    wish = {"action": "credit", "amount_usd": "20", "reason": "paid in cash"}
    asked = await decide(visitor, topup_id, **wish)
    assert "Balance before $0.00 Balance after $20.00" in text_of(asked.body.decode())
    assert acts(door) == []
    fields = hidden_of(asked.body.decode(), f"{there}/resolve")
    assert (await visitor.post(f"{there}/resolve", fields)).headers["location"] == f"{there}?said=resolved"
    assert acts(door) == [("topup.credit", "paid in cash", 20_000_000_000)]
    assert await door.rig.balance(customer) == 20
    assert "Nothing waits for a decision" in await read(visitor, "/operator/topups")
    assert "resolve" not in (await visitor.get(there)).body.decode()


async def test_a_review_is_dismissed_and_the_backend_asked_again(door: Door) -> None:
    (_, topup_id), visitor = await a_review(door), await signed_in(door)
    there = f"/operator/topups/{topup_id}"
    answer = await visitor.submit(there, f"{there}/reconcile")
    assert answer.headers["location"] == f"{there}?said=reconciled"
    odd = await decide(visitor, topup_id, action="credit", reason="no amount was given")
    assert (odd.status, "must be more than 0" in odd.body.decode()) == (422, True)
    await decide(visitor, topup_id, action="dismiss", reason="a test of ours")
    assert [act for act, _, _ in acts(door)] == ["topup.reconcile", "topup.dismiss"]


async def test_a_backend_that_is_down_is_said_beside_what_we_know(door: Door) -> None:
    (_, topup_id), visitor = await a_review(door), await signed_in(door)
    door.rig.btcpay.is_down = True
    said = await visitor.get(f"/operator/topups/{topup_id}/backend", **{"HX-Request": "true"})
    assert (said.status, "does not answer now" in said.body.decode()) == (200, True)
    assert "top-ups cannot be made" in await read(visitor, "/operator")


async def _import(visitor: Visitor, sheet: Any, name: str = "mine.json") -> Any:
    hidden = hidden_of((await visitor.get("/operator/prices")).body.decode(), "/operator/prices/import")
    boundary = "----satmeter"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'
        for key, value in hidden.items()
    ]
    parts.append(
        f'--{boundary}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        f"Content-Type: application/json\r\n\r\n{sheet if isinstance(sheet, str) else json.dumps(sheet)}\r\n--{boundary}--\r\n"
    )
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    return visitor._kept(
        await visitor.door.ask("POST", "/operator/prices/import", visitor._headers() | kind, "".join(parts).encode())
    )


async def test_a_sheet_is_imported_looked_at_and_activated_with_its_leaps_and_drops_allowed(door: Door) -> None:
    visitor = await signed_in(door)
    first = await _import(visitor, sheet(one=("1", "2"), two=("3", "4")))
    assert first.status == 303, text_of(first.body.decode())
    there = first.headers["location"]
    assert "2 models and 4 prices" in await read(visitor, there)
    assert (await visitor.submit(there, f"{there}/activate")).headers["location"] == "/operator/prices?said=activated"
    there = (await _import(visitor, sheet(one=("10", "0.1")), "again.json")).headers["location"]
    page = await read(visitor, there)
    assert "1 leap" in page
    assert "3 drops" in page
    refused = await visitor.submit(there, f"{there}/activate")
    assert refused.status == 422
    assert [act for act, _, _ in acts(door)] == ["prices.import", "prices.activate", "prices.import"]
    done = await visitor.submit(there, f"{there}/activate", allow_drops="yes", allow_leaps="yes")
    assert done.status == 303
    page = await read(visitor, "/operator/prices")
    assert "Sheet 2 Sold by" in page
    assert "Sheet 1 Earlier" in page
    assert "one p input $10 / 1M" in page


@pytest.mark.parametrize("file", ["", "{", "[]", '{"models": []}', "null"])
async def test_what_is_no_price_sheet_is_refused_on_the_page(door: Door, file: str) -> None:
    visitor = await signed_in(door)
    answer = await _import(visitor, file)
    assert answer.status in (400, 422)
    assert 'role="alert"' in answer.body.decode()
    assert door.rig.sql("SELECT count(*) FROM price_version") == [(0,)]


async def test_margins_are_of_the_calls_whose_providers_cost_is_known(door: Door) -> None:
    customer = await door.customer("10")
    for cost, theirs in (("1", "0.6"), ("2", None)):
        told = {} if theirs is None else {"provider_cost_usd": theirs}
        made = await door.rig.meter(
            "charge", request_id=f"c-{cost}", api_key=customer.api_key, model="m", cost_usd=cost, **told
        )
        assert made.status_code == 200
    assert "m 2 $3.00 1 $0.60 $0.40 40.0 %" in await read(await signed_in(door), "/operator/prices")


RULES = {
    "override": (
        "overrides",
        {"model": "m", "provider": "p", "dimension": "input", "price_usd": "0.15", "per_units": "1000000", "min_input_tokens": "200000"},
        "Override m of p, input, from 200,000 input tokens $0.15 / 1M",
    ),
    "override of an image": (
        "overrides",
        {"model": "painter", "dimension": "images", "price_usd": "0.04", "per_units": "1", "attributes": "quality=hd"},
        "Override painter, images, quality=hd $0.04 each",
    ),
    "markup": ("markups", {"scope": "default", "factor": "1.2", "per_request_usd": "0.001"}, "Markup every call × 1.2 and $0.001 a call"),
    "markup of a model": ("markups", {"scope": "model", "subject": "m", "factor": "0.9"}, "Markup model m × 0.9"),
    "fee": ("fees", {"feature": "web", "price_usd": "0.02"}, "Fee calls that use web $0.02 a call"),
}  # fmt: skip


@pytest.mark.parametrize(("where", "wish", "words"), RULES.values(), ids=list(RULES))
async def test_a_rule_of_each_kind_is_made_once_as_the_wire_tells_it_and_ended(
    door: Door, where: str, wish: dict[str, str], words: str
) -> None:
    visitor, owner = await signed_in(door), await operator(door.rig)
    bearer = {"Authorization": f"Bearer {owner.token}"}
    there = f"/operator/prices/{where}"
    fields = hidden_of((await visitor.get("/operator/prices")).body.decode(), there) | wish
    for _ in range(2):
        assert (await visitor.post(there, fields)).headers["location"] == "/operator/prices?said=rule-made"
    assert words in await read(visitor, "/operator/prices")
    [rule] = json.loads((await door.ask("GET", "/admin/prices/rules", bearer)).body)["data"]
    assert {name: str(rule[name]) for name in wish if name not in ("per_units", "price_usd")} == {
        name: text for name, text in wish.items() if name not in ("per_units", "price_usd")
    }
    await visitor.submit("/operator/prices", f"/operator/prices/rules/{rule['id']}/end")
    assert [act for act, _, _ in acts(door)] == [f"prices.{rule['kind']}", "prices.end"]


async def test_a_rule_holds_from_the_moment_that_was_filled_in_as_utc(door: Door) -> None:
    visitor = await signed_in(door)
    fee = {"feature": "web", "price_usd": "0.02", "effective_from": "2099-01-31T08:30"}
    await visitor.submit("/operator/prices", "/operator/prices/fees", **fee)
    assert door.rig.sql("SELECT effective_from AT TIME ZONE 'UTC' FROM fee")[0][0].isoformat() == "2099-01-31T08:30:00"


@pytest.mark.parametrize(
    ("where", "wish"),
    [
        ("markups", {"scope": "default", "factor": "-1"}),
        ("markups", {"scope": "everything", "factor": "1"}),
        ("markups", {"scope": "account", "subject": "nobody", "factor": "2"}),
        ("markups", {"scope": "default", "factor": "2", "effective_from": "tomorrow"}),
        ("overrides", {"model": "m", "dimension": "input", "price_usd": "-1", "per_units": "1"}),
        ("overrides", {"model": "m", "dimension": "smell", "price_usd": "1", "per_units": "1"}),
        ("overrides", {"model": "m", "dimension": "input", "price_usd": "1", "per_units": "0"}),
        ("overrides", {"model": "m", "dimension": "input", "price_usd": "1", "per_units": "x"}),
        ("overrides", {"dimension": "input", "price_usd": "1", "per_units": "1"}),
        ("fees", {"feature": "web", "price_usd": "dear"}),
        ("fees", {"feature": "web"}),
        ("fees", {"price_usd": "1"}),
    ],
)
async def test_a_rule_that_is_none_is_refused_with_what_is_wrong_and_nothing_is_written(
    door: Door, where: str, wish: dict[str, str]
) -> None:
    visitor = await signed_in(door)
    answer = await visitor.submit("/operator/prices", f"/operator/prices/{where}", **wish)
    assert answer.status in (400, 422)
    assert 'class="problem" role="alert"' in answer.body.decode()
    assert acts(door) == []


async def test_a_token_is_made_shown_once_and_revoked(door: Door) -> None:
    visitor = await signed_in(door)
    hidden = hidden_of((await visitor.get("/operator/tokens")).body.decode(), "/operator/tokens")
    answer = await visitor.post("/operator/tokens", hidden | {"name": "my-proxy", "on_expiry": "release"})
    [token] = re.findall(r"<code>(svc-\w+)</code>", answer.body.decode())
    customer = await door.customer("10")
    asked = {"request_id": "a", "api_key": customer.api_key, "max_cost_usd": 1}
    bearer = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
    assert (await door.ask("POST", "/v1/meter/authorize", bearer, json.dumps(asked).encode())).status == 200
    page = await read(visitor, "/operator/tokens")
    assert "my-proxy" in page
    assert re.search(r"my-proxy .{0,40}1 \$1\.00", page)
    assert token not in (await visitor.get("/operator/tokens")).body.decode()
    [(token_id,)] = door.rig.sql("SELECT id FROM service_token WHERE name = 'my-proxy'")
    await visitor.submit("/operator/tokens", f"/operator/tokens/{token_id}/revoke")
    assert [act for act, _, _ in acts(door)] == ["token.create", "token.revoke"]


async def test_the_log_is_shown_narrowed_and_exported(door: Door) -> None:
    customer, visitor = await door.customer(), await signed_in(door)
    account = account_of(door.rig, customer)
    await visitor.submit(f"/operator/accounts/{account}", f"/operator/accounts/{account}/freeze", reason="=cmd|calls")
    page = await read(visitor, f"/operator/audit?target={account}&what=account.freeze")
    assert "status: active → frozen" in page
    assert "Nobody did that" in await read(visitor, "/operator/audit?actor=nobody")
    answer = await visitor.get("/operator/audit/log.csv")
    assert answer.headers["content-disposition"].startswith("attachment")
    assert "'=cmd|calls" in answer.body.decode()


async def test_an_audit_is_started_and_its_verdict_told(door: Door) -> None:
    visitor = await signed_in(door)
    answer = await visitor.submit("/operator/audit", "/operator/audit/start")
    assert answer.headers["location"] == "/operator/audit?said=audit-began"
    for _ in range(200):
        if door.rig.sql("SELECT state FROM audit_run") == [("done",)]:
            break
        await asyncio.sleep(0.1)
    assert "Clean" in await read(visitor, "/operator/audit")


def _acts_of(door: Door, account: str, key: str, topup: str) -> dict[str, str]:
    """Every form that does something, with the scope that its route of the API needs."""
    there, topups = f"/operator/accounts/{account}", f"/operator/topups/{topup}"
    return {
        f"{there}/freeze": "support", f"{there}/unfreeze": "support", f"{there}/close": "support", f"{there}/rotate": "support",
        f"{there}/keys/{key}/disable": "support", f"{there}/keys/{key}/revoke": "support", f"{there}/adjust": "money",
        f"{topups}/reconcile": "support", f"{topups}/resolve": "money", "/operator/prices/import": "prices",
        "/operator/prices/1/activate": "prices", "/operator/prices/markups": "prices",
        "/operator/prices/overrides": "prices", "/operator/prices/fees": "prices",
        f"/operator/prices/rules/{account}/end": "prices", "/operator/tokens": "tokens",
        f"/operator/tokens/{account}/revoke": "tokens", "/operator/accounts/search": "read", "/operator/audit/start": "read",
    }  # fmt: skip


async def test_a_token_that_may_not_sees_no_button_and_a_forged_form_is_refused(door: Door) -> None:
    customer, topup_id = await a_review(door)
    account = account_of(door.rig, customer)
    [(key_id,)] = door.rig.sql("SELECT id FROM api_key WHERE account_id = %s", account)
    forms = _acts_of(door, account, str(key_id), topup_id)
    pages = (*PAGES, f"/operator/accounts/{account}", f"/operator/topups/{topup_id}")
    for scope in SCOPES:
        visitor = await signed_in(door, *{scope, "read"})
        shown = {
            action
            for path in pages
            for action in re.findall(r'method="post" action="([^"]+)"', (await visitor.get(path)).body.decode())
        }
        csrf = hidden_of((await visitor.get("/operator")).body.decode(), "/operator/sign-out")["csrf"]
        for action, needed in forms.items():
            if needed in (scope, "read"):
                continue
            assert action not in shown, (scope, action)
            forged = await visitor.post(action, {"csrf": csrf, "reason": "forged by hand"})
            assert forged.status == 403, (scope, action)
            assert f"lacks the scope &#39;{needed}&#39;" in forged.body.decode(), (scope, action)
    assert acts(door) == []


async def test_a_token_without_read_sees_nothing(door: Door) -> None:
    visitor = await signed_in(door, "money")
    for path in PAGES:
        assert (await visitor.get(path)).status == 403


async def test_a_form_of_another_session_does_nothing(door: Door) -> None:
    customer, visitor = await door.customer("10"), await signed_in(door)
    there = f"/operator/accounts/{account_of(door.rig, customer)}"
    wish = {"direction": "credit", "amount_usd": "1", "reason": "not from a page", "confirmed": "yes"}
    for csrf in ("", "0" * 32):
        assert (await visitor.post(f"{there}/adjust", wish | {"csrf": csrf})).status == 403
    assert acts(door) == []
