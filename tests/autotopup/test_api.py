"""Auto top-up over HTTP: what its owner sends and sees, a charge that sets it off, and a secret that is never shown."""

import asyncio
import json
import uuid
from datetime import datetime, timedelta
from decimal import Decimal
from typing import Any

import pytest

from app.autotopup.wallet import Encryption, Probe, WalletUri, hosts
from app.kernel import logs
from tests.rig import Customer, Rig, exact
from tests.wallets import NWC_URL, PUBKEY, SECRET, UNREACHABLE, UNSUITABLE, FakeWallets

pytestmark = pytest.mark.usefixtures("within_an_hour")


def wallets_of(rig: Rig) -> FakeWallets:
    assert isinstance(rig.house.wallets, FakeWallets)
    return rig.house.wallets


async def connect(rig: Rig, customer: Customer, **wanted: Any) -> Any:
    response = await rig.client.post(
        "/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL, **wanted}
    )
    assert response.status_code == 200, response.text
    return exact(response)


async def shown(rig: Rig, customer: Customer) -> Any:
    return exact(await rig.client.get("/nwc-auto-topup", headers=customer.owner))


async def attempts(rig: Rig, customer: Customer, query: str = "") -> Any:
    return exact(await rig.client.get(f"/nwc-auto-topup/attempts{query}", headers=customer.owner))


async def test_a_connected_wallet_is_shown_without_its_secret(rig: Rig) -> None:
    customer = await rig.customer("50")
    answer = await connect(rig, customer, threshold_usd=5, topup_amount_usd="20.5", max_per_day_usd=100)
    data = answer["data"]
    assert answer["status"] == "success"
    assert data.pop("created_at").endswith("Z")
    assert data == {
        "enabled": True, "state": "active", "pause_reason": None, "threshold_usd": 5, "topup_amount_usd": Decimal("20.5"),
        "max_per_day_usd": 100, "wallet_pubkey": PUBKEY, "relays": ["relay.example.com"], "encryption": "nip44_v2",
        "lud16": "me@example.com", "warnings": [], "next_attempt_at": None, "last_attempt": None,
    }  # fmt: skip
    again = (await shown(rig, customer))["data"]
    assert {**again, "created_at": None} == {**data, "created_at": None}


async def test_a_wallet_that_cannot_look_up_payments_is_connected_with_a_warning(rig: Rig) -> None:
    customer = await rig.customer("50")
    wallets_of(rig).methods = frozenset({"pay_invoice", "get_info"})
    for answer in (await connect(rig, customer), await shown(rig, customer)):
        [warning] = answer["data"]["warnings"]
        assert "lookup_invoice" in warning
        assert answer["data"]["state"] == "active"
    wallets_of(rig).methods |= {"lookup_invoice"}
    assert (await connect(rig, customer))["data"]["warnings"] == []


async def test_without_a_wallet_there_is_nothing_to_show_or_to_remove(rig: Rig) -> None:
    customer = await rig.customer()
    assert await shown(rig, customer) == {"status": "success", "data": None}
    assert await attempts(rig, customer) == {"status": "success", "data": [], "next_cursor": None}
    gone = await rig.client.delete("/nwc-auto-topup/connection", headers=customer.owner)
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")


@pytest.mark.parametrize("rest", ["", "/", "/v1", "?token=key", "/v1?token=key"])
def test_of_a_relay_only_the_host_is_shown(rest: str) -> None:
    assert hosts([f"wss://relay.example.com:7000{rest}", f"wss://[2606:4700::1111]{rest}"]) == [
        "relay.example.com:7000",
        "[2606:4700::1111]",
    ]


async def test_an_account_connects_one_wallet_at_a_time(rig: Rig) -> None:
    customer, another = await rig.customer("50"), await rig.customer("50")
    going, answers = asyncio.Event(), asyncio.Event()

    async def probe(uri: WalletUri) -> Probe:
        going.set()
        await answers.wait()
        return Probe(Encryption.NIP44, frozenset({"pay_invoice"}))

    slow, wallets_of(rig).probe = wallets_of(rig).probe, probe  # type: ignore[method-assign]
    first = asyncio.create_task(connect(rig, customer))
    await going.wait()
    async with asyncio.timeout(20):
        second = await rig.client.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL})
    assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
    wallets_of(rig).probe = slow  # type: ignore[method-assign]
    await connect(rig, another)
    answers.set()
    await first
    await connect(rig, customer)


async def test_the_defaults_are_ten_and_ten(rig: Rig) -> None:
    data = (await connect(rig, await rig.customer("50"), threshold_usd=None))["data"]
    assert (data["threshold_usd"], data["topup_amount_usd"], data["max_per_day_usd"]) == (10, 10, None)


@pytest.mark.parametrize(
    ("wanted", "code", "param"),
    [
        ({"threshold_usd": "4.99"}, "invalid_field", "threshold_usd"),
        ({"topup_amount_usd": "0.09"}, "amount_out_of_range", "topup_amount_usd"),
        ({"topup_amount_usd": "1000.01"}, "amount_out_of_range", "topup_amount_usd"),
        ({"max_per_day_usd": "9.99"}, "invalid_field", "max_per_day_usd"),
        ({"nwc_url": "https://example.com"}, "invalid_field", "nwc_url"),
        ({"nwc_url": NWC_URL.replace("wss:", "gopher:")}, "invalid_field", "nwc_url"),
    ],
)
async def test_what_cannot_be_is_refused_naming_the_field(
    rig: Rig, wanted: dict[str, str], code: str, param: str
) -> None:
    customer = await rig.customer()
    response = await rig.client.post(
        "/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL} | wanted
    )
    assert (response.status_code, response.json()["error"]["code"], response.json()["error"]["param"]) == (
        422,
        code,
        param,
    )
    assert SECRET not in response.text
    assert (await shown(rig, customer))["data"] is None


async def test_a_wallet_that_cannot_be_reached_or_used_is_refused_and_the_old_one_stays(rig: Rig) -> None:
    customer, wallets = await rig.customer("50"), wallets_of(rig)
    await connect(rig, customer)
    for unfit, code in ((UNREACHABLE, "wallet_unreachable"), (UNSUITABLE, "wallet_unsuitable")):
        wallets.unfit = unfit
        response = await rig.client.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL})
        assert (response.status_code, response.json()["error"]["code"]) == (422, code)
        assert "example.com" not in response.text
    wallets.unfit, wallets.methods = None, frozenset({"get_info"})
    response = await rig.client.post("/nwc-auto-topup/connect", headers=customer.owner, json={"nwc_url": NWC_URL})
    assert response.json()["error"]["code"] == "wallet_unsuitable"
    assert (await shown(rig, customer))["data"]["enabled"] is True


async def test_a_repeated_connect_is_answered_again_and_done_once(rig: Rig) -> None:
    customer = await rig.customer("50")
    headers = customer.owner | {"Idempotency-Key": "once"}
    first = await rig.client.post("/nwc-auto-topup/connect", headers=headers, json={"nwc_url": NWC_URL})
    before = rig.sql("SELECT id FROM nwc_connection")
    again = await rig.client.post("/nwc-auto-topup/connect", headers=headers, json={"nwc_url": NWC_URL})
    assert (again.json(), again.headers["Idempotent-Replayed"]) == (first.json(), "true")
    assert rig.sql("SELECT id FROM nwc_connection") == before


async def test_a_charge_below_the_threshold_is_refilled_by_the_wallet_at_once(rig: Rig) -> None:
    customer = await rig.customer("12")
    await connect(rig, customer)
    hold = await rig.authorize(customer.api_key, "3")
    await rig.settle(hold["hold_id"], "2.5")
    await rig.house.watcher.idle()
    assert await rig.balance(customer) == Decimal("9.5") + Decimal("10.5")
    last = (await shown(rig, customer))["data"]["last_attempt"]
    assert (last["state"], last["amount_usd"], last["credited_usd"]) == ("settled", 10, Decimal("10.5"))
    topups = (await rig.client.get("/topups", headers=customer.owner)).json()["data"]
    assert topups[0]["invoice_id"] == last["invoice_id"]


async def test_a_charge_that_leaves_enough_sets_nothing_off(rig: Rig) -> None:
    customer = await rig.customer("12")
    await connect(rig, customer)
    await rig.meter("charge", request_id="a", api_key=customer.api_key, cost_usd="2")
    await rig.house.watcher.idle()
    assert (await attempts(rig, customer))["data"] == []


async def test_a_hundred_charges_at_once_set_off_one_attempt(rig: Rig) -> None:
    customer = await rig.customer("12")
    await connect(rig, customer)
    answers = await asyncio.gather(
        *(rig.meter("charge", request_id=f"c{n}", api_key=customer.api_key, cost_usd="0.05") for n in range(100))
    )
    assert {answer.status_code for answer in answers} == {200}
    await rig.house.watcher.idle()
    assert [each["state"] for each in (await attempts(rig, customer))["data"]] == ["settled"]
    assert await rig.balance(customer) == Decimal("12") - Decimal("5") + Decimal("10.5")


async def test_connecting_with_a_low_balance_tops_up_at_once(rig: Rig) -> None:
    customer = await rig.customer()
    await connect(rig, customer)
    await rig.house.watcher.idle()
    assert await rig.balance(customer) == Decimal("10.5")


async def test_a_pause_tells_its_reason_and_connecting_again_ends_it(rig: Rig) -> None:
    customer, wallets = await rig.customer(), wallets_of(rig)
    wallets.acts = ["UNAUTHORIZED"]
    await connect(rig, customer)
    await rig.house.watcher.idle()
    data = (await shown(rig, customer))["data"]
    assert (data["enabled"], data["state"], data["last_attempt"]["code"]) == (False, "paused", "UNAUTHORIZED")
    assert "Connect it again" in data["pause_reason"]
    assert data["last_attempt"]["reason"] == "The wallet refused to pay."
    assert (await connect(rig, customer))["data"]["state"] == "active"


async def test_when_the_next_attempt_may_begin_is_told(rig: Rig) -> None:
    customer, wallets = await rig.customer(), wallets_of(rig)
    wallets.acts = ["INSUFFICIENT_BALANCE"]
    await connect(rig, customer)
    await rig.house.watcher.idle()
    data = (await shown(rig, customer))["data"]
    waits = datetime.fromisoformat(data["next_attempt_at"]) - datetime.fromisoformat(data["last_attempt"]["closed_at"])
    assert timedelta(minutes=59) < waits <= timedelta(hours=1)
    rig.sql("UPDATE nwc_connection SET not_before = NULL")
    data = (await shown(rig, customer))["data"]
    waits = datetime.fromisoformat(data["next_attempt_at"]) - datetime.fromisoformat(data["last_attempt"]["created_at"])
    assert waits == timedelta(seconds=60)
    rig.sql("UPDATE nwc_attempt SET created_at = created_at - interval '61 seconds'")
    assert (await shown(rig, customer))["data"]["next_attempt_at"] is None


async def test_a_paused_wallet_has_no_next_attempt(rig: Rig) -> None:
    customer, wallets = await rig.customer(), wallets_of(rig)
    wallets.acts = ["UNAUTHORIZED"]
    await connect(rig, customer)
    await rig.house.watcher.idle()
    assert (await shown(rig, customer))["data"]["next_attempt_at"] is None


async def test_a_disconnected_wallet_is_asked_for_nothing_more(rig: Rig) -> None:
    customer = await rig.customer("12")
    await connect(rig, customer)
    gone = await rig.client.delete("/nwc-auto-topup/connection", headers=customer.owner)
    assert gone.json()["status"] == "success"
    await rig.meter("charge", request_id="a", api_key=customer.api_key, cost_usd="5")
    await rig.house.watcher.idle()
    assert await shown(rig, customer) == {"status": "success", "data": None}
    assert (await attempts(rig, customer))["data"] == []
    assert rig.sql("SELECT 1 FROM nwc_connection") == []


async def test_attempts_come_in_pages_newest_first_and_are_ones_own(rig: Rig) -> None:
    customer, stranger = await rig.customer("12"), await rig.customer("12")
    await connect(rig, customer)
    await connect(rig, stranger)
    [(account_id,)] = rig.sql("SELECT account_id FROM nwc_connection ORDER BY created_at LIMIT 1")
    for n in range(5):
        rig.sql(
            """INSERT INTO nwc_attempt (account_id, id, topup_id, connection_id, amount_nusd, state, reason, created_at, closed_at)
               VALUES (%s, %s, %s, %s, 1000000000, 'expired', 'backend', now() - make_interval(mins => %s), now())""",
            account_id, uuid.uuid4(), uuid.uuid4(), uuid.uuid4(), n,
        )  # fmt: skip
    seen, cursor = [], ""
    while cursor is not None:
        page = await attempts(rig, customer, f"?limit=2{cursor and f'&cursor={cursor}'}")
        seen += page["data"]
        cursor = page["next_cursor"]
    assert len({each["id"] for each in seen}) == 5
    assert [each["created_at"] for each in seen] == sorted((each["created_at"] for each in seen), reverse=True)
    assert seen[0]["reason"] == "No invoice could be made."
    assert (await attempts(rig, stranger))["data"] == []


async def test_an_api_key_may_neither_connect_nor_look(rig: Rig) -> None:
    customer = await rig.customer("12")
    for method, path in (("POST", "connect"), ("GET", ""), ("GET", "attempts"), ("DELETE", "connection")):
        body = {"nwc_url": NWC_URL} if method == "POST" else None
        answer = await rig.client.request(
            method, f"/nwc-auto-topup/{path}".rstrip("/"), headers=customer.key, json=body
        )
        assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_credit_id")


async def test_the_secret_is_in_no_answer_log_or_table(rig: Rig, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("DEBUG")
    customer, wallets = await rig.customer(), wallets_of(rig)
    told = []
    for unfit in (UNREACHABLE, None):
        wallets.unfit = unfit
        headers = customer.owner | {"Idempotency-Key": f"k{unfit}"[:9].replace(" ", "")}
        told.append(await rig.client.post("/nwc-auto-topup/connect", headers=headers, json={"nwc_url": NWC_URL}))
    await rig.house.watcher.idle()
    told += [
        await rig.client.get(path, headers=customer.owner) for path in ("/nwc-auto-topup", "/nwc-auto-topup/attempts")
    ]
    captured = capsys.readouterr()
    everything = json.dumps([answer.text for answer in told]) + captured.out + captured.err
    for (table,) in rig.sql("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"):
        everything += str(rig.sql(f"SELECT t::text FROM {table} t"))
    assert "autotopup.settled" in everything
    assert SECRET not in everything
    assert SECRET[:20] not in everything
    assert "secret=" not in everything
