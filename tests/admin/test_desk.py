"""The rest of an operator's desk over HTTP: keys, top-ups, prices, audits, the log and the figures."""

import asyncio
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from app.activity.rollup import roll_up
from app.admin.today import lately
from app.pricing.starter import ensure_starter
from tests.admin.desk import Operator, account_of, code_of, operator
from tests.rig import Rig, exact

PRICES = {
    "format": "satmeter-prices-1",
    "models": [{"model": "m", "provider": "p", "mode": "chat", "usd_per_million": {"input": "0.15", "output": "0.60"}}],
}  # fmt: skip


async def test_a_key_of_any_account_is_made_changed_switched_off_and_revoked_as_its_owner_would(rig: Rig) -> None:
    ops, customer = await operator(rig, "support", "read"), await rig.customer("20")
    keys = f"accounts/{account_of(rig, customer)}/keys"
    made = (await ops.post(keys, {"name": "ours", "usage_limit_usd": 5, "reset_period": "daily"}))["data"]
    secret, path = made["api_key"], f"{keys}/{made['_id']}"
    assert (await rig.authorize(secret, "1"))["decision"] == "allow"
    changed = (await ops.ask("PATCH", path, {"usage_limit_usd": 7, "reset_period": None})).json()["data"]
    assert (changed["usage_limit_usd"], changed["reset_period"]) == (7, None)
    for verb, decision in (("disable", "deny"), ("enable", "allow"), ("revoke", "deny")):
        await ops.post(f"{path}/{verb}", {"reason": "ticket 7"})
        assert (await rig.authorize(secret, "1"))["decision"] == decision, verb
    assert (await ops.ask("DELETE", path)).status_code == 404
    shown = await ops.ask("GET", f"{keys}?limit=1")
    page = shown.json()
    assert [key["name"] for key in page["data"]] == ["Default"]
    rest = (await ops.get(f"{keys}?cursor={page['next_cursor']}"))["data"]
    assert [(key["name"], key["deleted_at"] is None) for key in rest] == [("ours", False)]
    assert (await ops.get(f"{keys}?include_disabled=false"))["next_cursor"] is None
    acts = {act["act"]: act for act in await ops.acts(f"?target={account_of(rig, customer)}")}
    assert list(acts) == ["key.revoke", "key.enable", "key.disable", "key.change", "key.create"]
    assert acts["key.change"]["before"] == {"reset_period": "day", "usage_limit_usd": "5"}
    assert acts["key.change"]["after"] == {"reset_period": None, "usage_limit_usd": "7"}
    assert secret not in str(acts)


async def test_a_key_is_found_under_its_own_account_alone(rig: Rig) -> None:
    ops, one, other = await operator(rig), await rig.customer(), await rig.customer()
    key = await rig.new_key(one)
    for method, tail in (("GET", ""), ("PATCH", ""), ("DELETE", ""), ("POST", "/disable"), ("POST", "/revoke")):
        answer = await ops.ask(method, f"accounts/{account_of(rig, other)}/keys/{key['_id']}{tail}", {} if method != "GET" else None)  # fmt: skip
        assert (answer.status_code, code_of(answer)) == (404, "key_not_found"), method
    assert (await ops.ask("GET", "accounts/00000000-0000-0000-0000-000000000001/keys")).status_code == 404
    assert await ops.acts() == []


async def test_topups_are_listed_by_state_and_what_was_paid_and_not_credited_is_found_and_credited(rig: Rig) -> None:
    ops, customer = await operator(rig, "read", "support"), await rig.customer("20")
    waiting = await rig.topup(customer, "30")
    seen = await rig.topup(customer, "40")
    rig.btcpay.pay(seen, settled=False)
    await rig.deliver(seen)
    await rig.process()

    async def listed(query: str) -> list[Any]:
        return [each["invoice_id"] for each in (await ops.get(f"topups{query}"))["data"]]

    assert await listed("?state=new") == [waiting]
    assert await listed("?state=processing") == [seen]
    assert await listed("?state=open") == [seen, waiting]
    assert len(await listed("?state=all")) == 3
    assert len(await listed("?state=settled")) == 1
    assert await listed("") == await listed("?state=expired") == []
    assert await listed("/unapplied") == await listed("?state=unapplied") == [seen]
    first = await ops.get("topups?state=all&limit=2")
    assert len((await ops.get(f"topups?state=all&cursor={first['next_cursor']}"))["data"]) == 1
    [payment] = rig.btcpay.invoices[seen].payments
    rig.btcpay.change(seen, payments=())
    rig.btcpay.pay(seen)
    topup_id = (await ops.get("topups/unapplied"))["data"][0]["id"]
    once = {"Idempotency-Key": "reconcile-1"}
    answers = [await ops.post(f"topups/{topup_id}/reconcile", **once) for _ in range(2)]
    assert [answer["credited_usd"] for answer in answers] == [40, 40]
    assert await listed("/unapplied") == []
    assert await rig.balance(customer) == 60
    [act] = await ops.acts("?act=topup.reconcile")
    assert (act["before"]["credited_usd"], act["after"]["credited_usd"]) == ("0", "40")
    assert payment.value


async def test_a_backend_that_is_away_is_503_and_nothing_is_written_down(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer()
    await rig.topup(customer, "30")
    topup_id = (await ops.get("topups?state=all"))["data"][0]["id"]
    rig.btcpay.is_down = True
    answer = await ops.ask("POST", f"topups/{topup_id}/reconcile")
    assert (answer.status_code, code_of(answer)) == (503, "payment_backend_unavailable")
    assert await ops.acts() == []


async def test_prices_are_imported_compared_activated_and_ruled_over(rig: Rig) -> None:
    await ensure_starter(rig.house.db)
    ops = await operator(rig, "prices", "read")
    tried = await ops.post("prices/import?dry_run=true", PRICES)
    assert (tried["version"], tried["prices"]) == (None, 2)
    drafted = await ops.post("prices/import?name=ours.json", PRICES)
    assert (drafted["version"], drafted["models"]) == (2, 1)
    diff = (await ops.get("prices/2/diff"))["diff"]
    assert sorted((each["model"], each["dimension"], each["new_usd"]) for each in diff["added"]) == [
        ("m", "input", Decimal("0.00000015")), ("m", "output", Decimal("0.0000006"))
    ]  # fmt: skip
    refused = await ops.ask("POST", "prices/2/activate")
    assert (refused.status_code, code_of(refused)) == (422, "price_drop_too_large")
    active = await ops.post("prices/2/activate", {"allow_drops": True})
    assert (active["active"], active["before"]) == (2, 1)
    states = [(each["id"], each["state"], each["note"]) for each in (await ops.get("prices"))["data"]]
    assert states[0] == (2, "active", "ours.json")
    assert states[1][:2] == (1, "retired")
    await ops.post("prices/overrides", {"model": "m", "dimension": "output", "price_usd": 12, "per_units": 1_000_000})
    markup = await ops.post("prices/markups", {"scope": "default", "factor": 1.2, "per_request_usd": "0.001"})
    await ops.post("prices/fees", {"feature": "search", "price_usd": 0.03})
    assert (markup["factor"], markup["per_request_usd"]) == (Decimal("1.2"), Decimal("0.001"))
    rules = (await ops.get("prices/rules"))["data"]
    assert sorted((each["kind"], each["price_usd"]) for each in rules if each["feature"] in (None, "search") and each["kind"] != "markup") == [
        ("fee", Decimal("0.03")), ("override", Decimal("0.000012"))
    ]  # fmt: skip
    assert (await ops.ask("DELETE", f"prices/rules/{markup['id']}")).status_code == 200
    assert [act["act"] for act in await ops.acts()] == [
        "prices.end", "prices.fee", "prices.markup", "prices.override", "prices.activate", "prices.import"
    ]  # fmt: skip
    for missing in ("3", "x", "-1", "99999"):
        assert (await ops.ask("GET", f"prices/{missing}/diff")).status_code == 404


async def test_one_audit_runs_at_a_time_and_its_verdict_can_be_had_by_its_id(rig: Rig) -> None:
    ops, customer = await operator(rig, "read"), await rig.customer("20")
    assert (await ops.ask("GET", "audit/last")).status_code == 404
    answers = await asyncio.gather(*(ops.ask("GET", "audit") for _ in range(5)))
    assert {answer.status_code for answer in answers} == {202}
    first = answers[0].json()
    assert first["last"] is None
    verdict = await _done(ops, first["id"])
    assert (verdict["state"], verdict["is_clean"], verdict["accounts"], verdict["findings"]) == ("done", True, 1, [])
    assert verdict["started_by"] == ops.name
    rig.sql("UPDATE account SET posted_nusd = posted_nusd + 1")
    second = (await ops.ask("GET", "audit")).json()
    assert second["last"]["is_clean"] is True
    found = await _done(ops, second["id"])
    assert found["is_clean"] is False
    assert ("balance_is_sum_of_entries", account_of(rig, customer)) in {(each["check"], each["subject"]) for each in found["findings"]}  # fmt: skip
    assert (await ops.get("audit/last"))["id"] == second["id"]
    assert rig.sql("SELECT value FROM figure WHERE name = 'audit_differences'") == [(len(found["findings"]),)], (
        "monitoring is told"
    )
    rig.sql("UPDATE account SET posted_nusd = posted_nusd - 1")


async def test_an_audit_whose_process_is_gone_has_failed_and_keeps_nobody_from_another(rig: Rig) -> None:
    ops = await operator(rig, "read")
    [(dead,)] = rig.sql(
        """INSERT INTO audit_run (id, admin, alive_until) VALUES (gen_random_uuid(), 'ops', now() - interval '1 s')
           RETURNING id::text"""
    )
    assert (await ops.get(f"audit/{dead}"))["state"] == "running"
    started = await ops.get("audit")
    assert started["id"] != dead
    assert (await ops.get(f"audit/{dead}"))["state"] == "failed"
    assert (await _done(ops, started["id"]))["is_clean"] is True


async def _done(ops: Operator, audit_id: str) -> Any:
    async with asyncio.timeout(60):
        while (found := await ops.get(f"audit/{audit_id}"))["state"] == "running":
            await asyncio.sleep(0.1)
    return found


async def test_the_log_is_read_by_actor_act_and_target_in_pages(rig: Rig) -> None:
    one, other, customer = await operator(rig), await operator(rig), await rig.customer("20")
    account_id = account_of(rig, customer)
    for ops in (one, other, one):
        await ops.post(f"accounts/{account_id}/credit", {"amount_usd": 1, "reason": f"by {ops.name}"})
    await other.post("tokens", {"kind": "service", "name": "x"})
    assert [act["actor"] for act in await one.acts(f"?actor={one.name}")] == [one.name, one.name]
    assert len(await one.acts("?act=account.credit")) == 3
    assert len(await one.acts(f"?target={account_id}&actor={other.name}")) == 1
    page = await one.get("audit-log?limit=3")
    assert [act["act"] for act in page["data"]] == ["token.create", "account.credit", "account.credit"]
    assert len((await one.get(f"audit-log?limit=3&cursor={page['next_cursor']}"))["data"]) == 1
    for query in ("limit=0", "limit=101", "cursor=x", "who=me"):
        assert (await one.ask("GET", f"audit-log?{query}")).status_code == 422, query


async def test_the_figures_are_those_of_the_books_in_all_and_by_day(rig: Rig) -> None:
    ops, one, _ = await operator(rig), await rig.customer("20"), await rig.customer("30")
    charged = await rig.meter("charge", request_id="a", api_key=one.api_key, cost_usd="3")
    await rig.settle((await rig.authorize(one.api_key, "1"))["hold_id"], "20")
    await rig.meter("refund", charge_id=charged.json()["charge_id"], amount_usd="1")
    await ops.post(f"accounts/{account_of(rig, one)}/credit", {"amount_usd": "0.5", "reason": "goodwill"})
    await rig.authorize((await rig.customer("20")).api_key, "1.25")
    found = await ops.get("stats")
    balance = await rig.balance(one)
    assert balance < 0
    assert {name: found[name] for name in found if name not in ("days", "accounts")} == {
        "liabilities_usd": 50, "owed_usd": -balance, "held_usd": Decimal("1.25"), "holds_open": 1, "holds_expired": 0, "received_usd": 70,
        "bonus_usd": 0, "adjusted_usd": Decimal("0.5"), "revenue_usd": 22,
    }  # fmt: skip
    assert found["accounts"] == {"active": 3, "frozen": 0, "closed": 0}
    assert len(found["days"]) == 30
    summed = {name: sum(day[name] for day in found["days"]) for name in found["days"][0] if name != "day"}
    assert summed == {
        "received_usd": 70, "bonus_usd": 0, "adjusted_usd": Decimal("0.5"), "revenue_usd": 22, "refunded_usd": 1, "requests": 2,
    }  # fmt: skip


async def test_calls_that_are_summed_and_calls_that_are_not_count_once(rig: Rig) -> None:
    ops, customer = await operator(rig, "read"), await rig.customer("20")
    await rig.meter("charge", request_id="a", api_key=customer.api_key, cost_usd="3")
    before = await ops.get("stats")
    assert await roll_up(rig.house.db) > 0
    assert await ops.get("stats") == before
    await rig.meter("charge", request_id="b", api_key=customer.api_key, cost_usd="0.25")
    today = (await ops.get("stats"))["days"][-1]
    assert (today["requests"], today["revenue_usd"]) == (2, Decimal("3.25"))
    for query in ("from=2026-01-02&to=2026-01-01", "from=2020-01-01", "from=tomorrow", "to=2026-1-1", "day=2026-01-01"):
        assert (await ops.ask("GET", f"stats?{query}")).status_code == 422, query


async def test_calls_a_second_are_of_the_last_minute_and_of_calls_alone(rig: Rig) -> None:
    customer = await rig.customer("20")
    for number in range(3):
        await rig.meter("charge", request_id=f"c{number}", api_key=customer.api_key, cost_usd="0.01")
    held = await rig.authorize(customer.api_key, "1")
    await rig.meter("release", hold_id=held["hold_id"], reason="not needed")
    rig.sql("UPDATE hold SET closed_at = now() - interval '2 minutes' WHERE request_id = 'c0'")
    found = await rig.house.db.transaction(lambda session: lately(session, datetime.now(UTC)))
    assert found.calls_per_second == 2 / 60


async def test_an_operators_routes_are_for_no_page_of_others(rig: Rig) -> None:
    ops = await operator(rig)
    page = {"Origin": "https://page.example.com"}
    for path in ("accounts", "tokens", "stats", "audit-log", "prices"):
        answer = await ops.ask("GET", path, None, **page)
        assert answer.status_code == 200
        assert not [name for name in answer.headers if name.startswith("access-control")], path
        asked = {"Access-Control-Request-Method": "GET", **page}
        preflight = await rig.client.options(f"/admin/{path}", headers=asked)
        assert not [name for name in preflight.headers if name.startswith("access-control")], path


async def test_an_act_that_somebody_rewrites_is_found(rig: Rig) -> None:
    """Its proof covers whatever it says."""
    ops, customer = await operator(rig), await rig.customer("20")
    await ops.post(f"accounts/{account_of(rig, customer)}/freeze", {"reason": "chargeback"}, **{"X-Request-Id": "r-1"})
    [kept] = rig.sql("SELECT id, before, after, request_id, admin, subject, reason FROM admin_log")
    for column in ("before", "after", "request_id", "admin", "subject", "reason"):
        rig.sql(f"UPDATE admin_log SET {column} = %s", "forged")
        answer = await ops.get("audit")
        found = await _done(ops, answer["id"])
        assert "act_is_an_operator_s" in {each["check"] for each in found["findings"]}, column
        was = dict(zip(("id", "before", "after", "request_id", "admin", "subject", "reason"), kept, strict=True))
        rig.sql(f"UPDATE admin_log SET {column} = %s", was[column])
    assert exact(await ops.ask("GET", "audit-log"))["data"][0]["request_id"] == "r-1"
