"""kill -9 of everything in each state of an attempt, and at any moment: real processes, which come back and finish it once."""

import asyncio
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.autotopup.rules import LEASE
from tests.integration.real_relay import RealRelay
from tests.program import Program, eventually, free_ports, installation
from tests.rig import exact

pytestmark = pytest.mark.slow

AFTER_MS = (0, 10, 20, 40, 60, 80, 120, 200, 400)
"""How long after the charge that begins an attempt everything is killed."""


@dataclass
class Shop:
    """A running installation with one demo customer, whose wallet is the sandbox's."""

    program: Program
    demo: dict[str, str]
    spent_usd: Decimal = Decimal(0)

    def ask(self, path: str, **headers: str) -> Any:
        answer = httpx.get(f"{self.demo['base_url']}{path}", headers=headers, timeout=20, trust_env=False)
        assert answer.status_code == 200, answer.text
        return exact(answer)

    def drive(self, path: str, **body: Any) -> Any:
        """A word to the sandbox's driver; none is a question."""
        url = f"{self.demo['sandbox_url']}/sandbox/{path}"
        answer = httpx.request("POST" if body else "GET", url, json=body or None, timeout=20, trust_env=False)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def connect(self) -> None:
        body = {"nwc_url": self.drive("wallet")["uri"], "threshold_usd": 5, "topup_amount_usd": 10}
        answer = httpx.post(
            f"{self.demo['base_url']}/nwc-auto-topup/connect", headers={"x-credit-id": self.demo["credit_id"]}, json=body,
            timeout=60, trust_env=False,
        )  # fmt: skip
        assert answer.status_code == 200, answer.text

    def spend(self, usd: str) -> None:
        body = {"request_id": uuid.uuid4().hex, "api_key": self.demo["api_key"], "model": "a/model", "cost_usd": usd}
        answer = httpx.post(
            f"{self.demo['base_url']}/v1/meter/charge",
            headers={"Authorization": f"Bearer {self.demo['service_token']}"}, json=body, timeout=20, trust_env=False,
        )  # fmt: skip
        assert answer.json()["decision"] == "allow", answer.text
        self.spent_usd += Decimal(usd)

    def balance(self) -> Decimal:
        found = self.ask("/credits/balance", Authorization=f"Bearer {self.demo['api_key']}")
        return Decimal(found["balance"])

    def state(self) -> str:
        rows = self.program.sql("SELECT state FROM nwc_attempt ORDER BY created_at DESC LIMIT 1")
        return str(rows[0][0]) if rows else "none"

    def invoices(self) -> list[Any]:
        """What attempts asked for; the demo's own first one is left out."""
        return list(self.drive("invoices"))[:-1]

    def asked_to_pay(self) -> int:
        return sum(request["method"] == "pay_invoice" for request in self.drive("wallet")["requests"])

    def crash_and_come_back(self) -> None:
        """Every process is killed at once. What they held is free at once, too, and what they waited for is due."""
        self.program.kill()
        killed_at = datetime.now(UTC)
        self.program.run()
        # Only the claims of the dead: one that is taken from a living driver while it sends counts as sent for ever.
        self.program.sql("UPDATE nwc_attempt SET claimed_until = now() WHERE claimed_until <= %s", killed_at + LEASE)
        self.hurry()

    def hurry(self) -> None:
        """What is waited for is due."""
        self.program.sql("UPDATE nwc_attempt SET next_at = now() WHERE closed_at IS NULL")
        self.program.sql("UPDATE topup SET next_check_at = now() WHERE next_check_at IS NOT NULL")

    def has_missed_the_relay(self) -> bool:
        """Whether the newest attempt could not be sent and waits to be sent again: a moment earlier it may be sending."""
        return bool(
            self.program.sql(
                "SELECT 1 FROM nwc_attempt WHERE state = 'invoiced' AND reason = 'unreached' AND next_at > now()"
            )
        )

    def until_settled(self, seconds: float = 60) -> None:
        eventually(lambda: self.state() == "settled", seconds)

    def is_at_its_end(self) -> bool:
        """Whether the newest attempt is settled, or will be by nobody but a person: it counts as sent, and BTCPay knows no payment."""
        ((state, looks),) = self.program.sql("SELECT state, looks FROM nwc_attempt ORDER BY created_at DESC LIMIT 1")
        return state == "settled" or (state == "unknown" and int(looks) > 0)

    def check(self) -> None:
        """Every invoice was paid at most once and credited once if it was; the books add up."""
        everything = self.drive("invoices")
        for invoice in everything:
            assert sum(len(method["payments"]) for method in invoice["paymentMethods"]) <= 1, invoice
        settled_usd = sum(Decimal(each["amount"]) for each in everything if each["status"] == "Settled")
        assert self.balance() == settled_usd * Decimal("1.05") - self.spent_usd
        assert self.program.answer("audit")["findings"] == []


@pytest.fixture
def shop() -> Iterator[Shop]:
    with installation() as program:
        program.run()
        shop = Shop(program, dict(program.answer("demo")))
        shop.connect()
        yield shop
        shop.check()


def test_killed_while_it_waits_for_the_invoice(shop: Shop) -> None:
    shop.drive("down", mode="slow", methods=["POST"], seconds=60)
    shop.spend("0.5")
    eventually(lambda: len(shop.invoices()) == 1)
    assert shop.state() == "created"
    shop.crash_and_come_back()
    shop.until_settled()
    assert (len(shop.invoices()), shop.asked_to_pay()) == (1, 1)


async def test_killed_while_the_relay_is_away(shop: Shop, tmp_path: Path) -> None:
    relay = RealRelay(tmp_path, free_ports(1)[0])
    await relay.start()
    try:
        await asyncio.to_thread(shop.drive, "wallet", relays=[relay.url])
        await asyncio.to_thread(shop.connect)
        await relay.stop()
        await asyncio.to_thread(shop.spend, "0.5")
        await asyncio.to_thread(eventually, shop.has_missed_the_relay, 30)
        await asyncio.to_thread(shop.crash_and_come_back)
        await asyncio.to_thread(eventually, shop.has_missed_the_relay, 30)
        await relay.start()
        await asyncio.to_thread(shop.hurry)
        await asyncio.to_thread(shop.until_settled)
        assert (len(shop.invoices()), shop.asked_to_pay()) == (1, 1)
    finally:
        await relay.stop()


def test_killed_while_a_wallet_that_pays_says_nothing(shop: Shop) -> None:
    shop.drive("lose-events", from_now_on=True)
    shop.drive("wallet", behaviour="loses_answer")
    shop.spend("0.5")
    eventually(lambda: len(shop.drive("wallet")["payments"]) == 1)
    assert shop.state() == "sent"
    shop.crash_and_come_back()
    shop.until_settled()
    assert (len(shop.invoices()), shop.asked_to_pay()) == (1, 1)


def test_killed_while_a_wallet_that_does_not_pay_says_nothing(shop: Shop) -> None:
    shop.drive("wallet", behaviour="silent", methods=["pay_invoice"])
    shop.spend("0.5")
    eventually(lambda: shop.asked_to_pay() == 1)
    assert shop.state() == "sent"
    shop.drive("wallet", behaviour="pays")
    shop.crash_and_come_back()
    eventually(lambda: shop.state() == "unknown")
    for _ in range(3):
        shop.hurry()
        time.sleep(4)  # longer than the jobs' interval: they look, and send nothing
    assert (shop.state(), len(shop.invoices()), shop.asked_to_pay()) == ("unknown", 1, 1)
    assert shop.balance() == Decimal("4.75")


def test_killed_while_a_payment_is_unknown(shop: Shop) -> None:
    shop.drive("wallet", behaviour="refuses", code="PAYMENT_FAILED")
    shop.spend("0.5")
    eventually(lambda: shop.state() == "unknown")
    shop.crash_and_come_back()
    (invoice,) = shop.invoices()
    shop.drive(f"invoices/{invoice['id']}/pay", amount=None)
    shop.hurry()
    shop.until_settled()
    assert (len(shop.invoices()), shop.asked_to_pay()) == (1, 1)


async def test_killed_between_the_wallets_word_and_btcpays(shop: Shop, tmp_path: Path) -> None:
    relay = RealRelay(tmp_path, free_ports(1)[0])
    await relay.start()
    try:
        await asyncio.to_thread(shop.drive, "wallet", relays=[relay.url])
        await asyncio.to_thread(shop.connect)
        await asyncio.to_thread(shop.drive, "lose-events", from_now_on=True)
        await relay.stop()  # so that BTCPay goes blind between the invoice and its payment, for certain
        await asyncio.to_thread(shop.spend, "0.5")
        await asyncio.to_thread(eventually, shop.has_missed_the_relay, 30)
        await asyncio.to_thread(shop.drive, "down", mode="error", methods=["GET"])
        await relay.start()
        await asyncio.to_thread(shop.hurry)
        await asyncio.to_thread(eventually, lambda: shop.state() == "paid_reported", 60)
        assert await asyncio.to_thread(shop.balance) == Decimal("4.75")
        await asyncio.to_thread(shop.crash_and_come_back)
        await asyncio.to_thread(shop.until_settled)
        assert (len(shop.invoices()), shop.asked_to_pay()) == (1, 1)
    finally:
        await relay.stop()


def test_killed_at_any_moment_it_pays_once(shop: Shop) -> None:
    """Killed between writing down that it sends and sending, it can't know that nothing was sent: it never sends again."""
    seen = []
    for number, milliseconds in enumerate(AFTER_MS, 1):
        shop.spend(str(shop.balance() - Decimal("4.5")))
        time.sleep(milliseconds / 1000)
        seen.append(shop.state())
        shop.crash_and_come_back()
        # An attempt that was not even begun is begun by the safety net, a minute after the one before.
        shop.program.sql("UPDATE nwc_attempt SET created_at = created_at - interval '1 minute'")
        shop.program.sql("UPDATE nwc_connection SET not_before = NULL")
        eventually(lambda number=number: len(shop.invoices()) == number and shop.is_at_its_end(), 90)  # type: ignore[misc]
        if shop.state() == "unknown":
            assert shop.balance() == Decimal("4.5")
            shop.drive(f"invoices/{shop.invoices()[0]['id']}/pay", amount=None)
            seen[-1] += ", never paid by the wallet"
            shop.hurry()
            shop.until_settled()
        assert shop.balance() == Decimal(15)
        assert shop.asked_to_pay() <= number
    print(f"killed in {seen}")
