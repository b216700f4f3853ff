"""Operators and accounts over HTTP: each verb works, refuses, is repeated, races, and stands in the log."""

import asyncio
import hashlib
import uuid
from decimal import Decimal

import pytest

from tests.admin.desk import account_of, code_of, operator
from tests.rig import Rig, exact


async def test_accounts_are_listed_newest_first_in_pages_without_a_secret(rig: Rig) -> None:
    ops, made = await operator(rig), [await rig.customer() for _ in range(5)]
    ids, cursor, texts = [], "", []
    while True:
        answer = await ops.ask("GET", f"accounts?limit=2{cursor}")
        page = answer.json()
        texts.append(answer.text)
        ids += [each["account_id"] for each in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert ids == [account_of(rig, customer) for customer in reversed(made)]
    assert not any(secret in text for text in texts for each in made for secret in (each.credit_id, each.api_key))
    await ops.post(f"accounts/{ids[0]}/freeze")
    assert [each["account_id"] for each in (await ops.get("accounts?status=frozen"))["data"]] == [ids[0]]


async def test_an_account_is_found_by_whatever_a_customer_has_in_hand(rig: Rig) -> None:
    ops, customer, _ = await operator(rig, "read"), await rig.customer("20"), await rig.customer("20")
    account_id = account_of(rig, customer)
    key = (await rig.client.get("/keys", headers=customer.owner)).json()["data"][0]
    [(topup_id, invoice_id)] = rig.sql("SELECT id, invoice_id FROM topup WHERE account_id = %s", account_id)
    rig.sql("UPDATE payment SET payment_id = %s WHERE account_id = %s", "ab" * 32 + "-1", account_id)
    rig.sql("UPDATE topup_address SET destination = 'bc1qhers' WHERE account_id = %s", account_id)
    rig.sql("UPDATE topup SET destination = 'bc1qhers' WHERE account_id = %s", account_id)
    hands = {
        "account_id": account_id, "credit_id": customer.credit_id, "api_key": customer.api_key, "key_id": key["_id"],
        "key_preview": key["api_key_preview"], "api_key_hash": hashlib.sha256(customer.api_key.encode()).hexdigest(),
        "topup_id": str(topup_id), "invoice_id": invoice_id, "payment": "ab" * 32, "address": "bc1qhers",
    }  # fmt: skip
    for what, asked in hands.items():
        for found in (
            (await rig.client.get("/admin/accounts", headers=ops.headers, params={"q": asked})).json(),
            await ops.post("accounts/search", {"q": asked}),
        ):
            assert [each["account_id"] for each in found["data"]] == [account_id], what
            assert what in found["data"][0]["matched"], what
    assert await ops.post("accounts/search", {"q": key["api_key_preview"].replace("…", "...")}) != {"data": []}
    for nothing in ("nobody's", "%", "_" * 64, str(uuid.uuid4()), "sk-abc…wxyz", "ab" * 31):
        assert (await ops.post("accounts/search", {"q": nothing}))["data"] == [], nothing


async def test_an_account_is_shown_with_its_balance_holds_keys_topups_and_entries(rig: Rig) -> None:
    ops, customer = await operator(rig, "read"), await rig.customer("20")
    hold = await rig.authorize(customer.api_key, "1.5", model="gpt-4o")
    shown = await ops.get(f"accounts/{account_of(rig, customer)}")
    assert shown["account"] | {"created_at": None} == {
        "account_id": account_of(rig, customer), "status": "active", "balance_usd": 20, "held_usd": Decimal("1.5"),
        "available_usd": Decimal("18.5"), "floor_usd": 0, "keys": 1, "created_at": None, "matched": None,
    }  # fmt: skip
    assert [(each["model"], each["hold_usd"]) for each in shown["holds"]] == [("gpt-4o", Decimal("1.5"))]
    assert [each["name"] for each in shown["keys"]] == ["Default"]
    assert [(each["status"], each["credited_usd"]) for each in shown["topups"]] == [("Settled", 20)]
    assert [(each["kind"], each["amount_usd"], each["balance_after_usd"]) for each in shown["entries"]] == [("topup", 20, 20)]  # fmt: skip
    await rig.settle(hold["hold_id"], "1.5")
    assert (await ops.get(f"accounts/{account_of(rig, customer)}"))["holds"] == []
    for missing in (uuid.uuid4(), "none", customer.credit_id):
        assert (await ops.ask("GET", f"accounts/{missing}")).status_code == 404


async def test_an_account_that_an_operator_opens_is_its_customers(rig: Rig) -> None:
    ops = await operator(rig, "support")
    once = {"Idempotency-Key": "for-a-customer-1"}
    made, again = await ops.post("accounts", **once), await ops.post("accounts", **once)
    assert made == again
    owner = {"x-credit-id": made["credit_id"]}
    assert (await rig.client.get("/credits/balance", headers=owner)).json()["balance"] == 0
    [act] = await (await operator(rig, "read")).acts("?act=account.create")
    assert (act["actor"], act["target"], act["after"]) == (ops.name, made["account_id"], {"status": "active"})
    assert made["credit_id"] not in str(act)


async def test_a_frozen_account_calls_nothing_settles_what_is_held_and_calls_again_once_unfrozen(rig: Rig) -> None:
    ops, customer = await operator(rig, "support"), await rig.customer("20")
    account_id, hold = account_of(rig, customer), (await rig.authorize(customer.api_key, "1"))["hold_id"]
    frozen = await ops.post(f"accounts/{account_id}/freeze", {"reason": "chargeback"}, **{"X-Request-Id": "ticket-7"})
    assert frozen["status"] == "frozen"
    refused = await rig.authorize(customer.api_key, "1")
    assert (refused["decision"], refused["error"]["code"]) == ("deny", "account_frozen")
    assert (await rig.settle(hold, "1"))["balance_usd"] == 19
    assert (await ops.post(f"accounts/{account_id}/unfreeze"))["status"] == "active"
    assert (await rig.authorize(customer.api_key, "1"))["decision"] == "allow"
    unfrozen, act = await (await operator(rig, "read")).acts(f"?target={account_id}")
    assert (act["act"], act["reason"], act["request_id"]) == ("account.freeze", "chargeback", "ticket-7")
    assert (act["before"], act["after"]) == ({"status": "active"}, {"status": "frozen"})
    assert (unfrozen["before"], unfrozen["after"]) == ({"status": "frozen"}, {"status": "active"})


async def test_calls_that_race_a_freeze_are_refused_from_its_answer_on(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    account_id, answered = account_of(rig, customer), asyncio.Event()
    late: list[str] = []

    async def call() -> None:
        is_late = answered.is_set()
        verdict = await rig.authorize(customer.api_key, "0.01")
        late.extend([verdict["decision"]] * is_late)

    async def freeze() -> None:
        await ops.post(f"accounts/{account_id}/freeze")
        answered.set()
        await asyncio.gather(*(call() for _ in range(20)))

    await asyncio.gather(freeze(), *(call() for _ in range(20)))
    assert late == ["deny"] * 20


async def test_an_account_is_closed_with_nothing_on_it_and_for_ever(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    account_id = account_of(rig, customer)
    refused = await ops.ask("POST", f"accounts/{account_id}/close")
    assert (refused.status_code, code_of(refused)) == (422, "invalid_field")
    assert "$20" in refused.text
    assert (await rig.client.get("/credits/balance", headers=customer.owner)).status_code == 200
    await ops.post(f"accounts/{account_id}/debit", {"amount_usd": 20, "reason": "paid back"})
    assert (await ops.post(f"accounts/{account_id}/close", {"reason": "asked for it"}))["status"] == "closed"
    for headers in (customer.owner, customer.key):
        assert (await rig.client.get("/credits/balance", headers=headers)).status_code == 401
    for verb, body in (
        ("close", None), ("unfreeze", None), ("freeze", None), ("rotate", None), ("keys", {"name": "k"}), ("credit", {"amount_usd": 1, "reason": "why"}),
    ):  # fmt: skip
        assert (await ops.ask("POST", f"accounts/{account_id}/{verb}", body)).status_code == 422, verb
    assert (await ops.get(f"accounts/{account_id}"))["account"]["keys"] == 0
    assert [act["act"] for act in await ops.acts(f"?target={account_id}")] == ["account.close", "account.debit"]


async def test_a_rotated_credit_id_is_dead_at_once_and_the_new_one_has_the_account(rig: Rig) -> None:
    ops, customer = await operator(rig, "support"), await rig.customer("20")
    account_id = account_of(rig, customer)
    answers = await asyncio.gather(*(ops.post(f"accounts/{account_id}/rotate", {"reason": "leaked"}) for _ in range(4)))
    assert (await rig.client.get("/credits/balance", headers=customer.owner)).status_code == 401
    works = [await rig.client.get("/credits/balance", headers={"x-credit-id": each["credit_id"]}) for each in answers]
    assert sorted(answer.status_code for answer in works) == [200, 401, 401, 401]  # the last of them has it
    assert [answer.json()["balance"] for answer in works if answer.status_code == 200] == [20]
    assert (await rig.client.get("/credits/balance", headers=customer.key)).status_code == 200
    acts = await (await operator(rig)).acts("?act=account.rotate")
    assert len(acts) == 4
    assert not any(each["credit_id"] in str(acts) for each in answers)


async def test_a_credit_is_an_entry_that_names_its_act_once_however_often_it_is_sent(rig: Rig) -> None:
    ops, customer = await operator(rig, "money", "read"), await rig.customer("20")
    account_id, body = account_of(rig, customer), {"amount_usd": "2.5", "reason": "goodwill"}
    tried = await ops.post(f"accounts/{account_id}/credit", body | {"dry_run": True})
    assert (tried["balance_usd"], tried["dry_run"], tried["reference"]) == (Decimal("22.5"), True, None)
    assert await rig.balance(customer) == 20
    assert await ops.acts(f"?target={account_id}") == []
    once = {"Idempotency-Key": "goodwill-1"}
    asks = (ops.ask("POST", f"accounts/{account_id}/credit", body, **once) for _ in range(5))
    answers = [answer for answer in await asyncio.gather(*asks) if answer.status_code == 200]
    assert {exact(answer)["balance_usd"] for answer in answers} == {Decimal("22.5")}
    assert await rig.balance(customer) == Decimal("22.5")
    [act] = await ops.acts(f"?target={account_id}")
    assert (act["act"], act["reason"], act["amount_usd"]) == ("account.credit", "goodwill", Decimal("2.5"))
    assert (act["before"], act["after"]) == ({"balance_usd": "20"}, {"balance_usd": "22.5"})
    entry = (await ops.get(f"accounts/{account_id}"))["entries"][0]
    assert (entry["kind"], entry["contra"], entry["reference"]) == ("adjustment", "adjustment", f"act/{act['id']}")


async def test_a_debit_leaves_the_floor_and_what_is_held_alone_unless_told_so(rig: Rig) -> None:
    ops, customer = await operator(rig, "money"), await rig.customer("20")
    account_id = account_of(rig, customer)
    hold = (await rig.authorize(customer.api_key, "5"))["hold_id"]
    for dry_run in (True, False):
        refused = await ops.ask(
            "POST", f"accounts/{account_id}/debit", {"amount_usd": "15.01", "reason": "fraud", "dry_run": dry_run}
        )
        assert (refused.status_code, code_of(refused)) == (402, "insufficient_balance")
        assert exact(refused)["error"]["metadata"]["available_usd"] == 15
    assert await rig.balance(customer) == 20
    assert (await ops.post(f"accounts/{account_id}/debit", {"amount_usd": 15, "reason": "fraud"}))["available_usd"] == 0
    told = {"amount_usd": 7, "reason": "fraud", "below_floor": True}
    assert (await ops.post(f"accounts/{account_id}/debit", told))["balance_usd"] == -2
    assert (await rig.settle(hold, "5"))["balance_usd"] == -7
    assert (await rig.authorize(customer.api_key, "0.01"))["decision"] == "deny"


async def test_debits_that_race_take_no_more_than_there_is(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    path = f"accounts/{account_of(rig, customer)}/debit"
    answers = await asyncio.gather(*(ops.ask("POST", path, {"amount_usd": 6, "reason": "race"}) for _ in range(6)))
    assert sorted(answer.status_code for answer in answers) == [200, 200, 200, 402, 402, 402]
    assert await rig.balance(customer) == 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"amount_usd": 0, "reason": "why"}, "amount_usd"), ({"amount_usd": -1, "reason": "why"}, "amount_usd"),
        ({"amount_usd": "1e3", "reason": "why"}, "amount_usd"), ({"amount_usd": 1}, "reason"), ({"amount_usd": 1, "reason": "  "}, "reason"),
        ({"amount_usd": 1, "reason": "a\nb c"}, "reason"), ({"amount_usd": 1, "reason": "why", "balance_usd": 5}, "balance_usd"),
    ],
)  # fmt: skip
async def test_an_adjustment_that_makes_no_sense_is_422_and_changes_nothing(
    rig: Rig, body: dict[str, object], param: str
) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    for verb in ("credit", "debit"):
        answer = await ops.ask("POST", f"accounts/{account_of(rig, customer)}/{verb}", body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert await rig.balance(customer) == 20
    assert await ops.acts() == []


async def test_no_route_sets_a_balance(rig: Rig) -> None:
    ops, customer = await operator(rig), await rig.customer("20")
    account_id = account_of(rig, customer)
    for method in ("PUT", "PATCH", "DELETE"):
        assert (await ops.ask(method, f"accounts/{account_id}", {"balance_usd": 5})).status_code == 405
    assert await rig.balance(customer) == 20
