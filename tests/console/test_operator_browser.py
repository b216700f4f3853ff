"""An operator's day and a payer's receipt in Debian's Chromium: as people do it, light and dark, wide and at 390 px."""

import re
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.chromium import WIDE, Person, browser, dearer_sheet, person, program
from tests.program import eventually

pytestmark = pytest.mark.slow
__all__ = ["browser", "person", "program"]
PAGES = (
    "/operator",
    "/operator/accounts",
    "/operator/topups",
    "/operator/prices",
    "/operator/tokens",
    "/operator/audit",
)
STATES = {
    "unpaid": "Waiting for your payment.", "partly": "Part of it has arrived:", "settled": "Paid. Thank you.",
    "expired": "Its time is over, and nothing has arrived.",
}  # fmt: skip
METHODS = {"btc-lightning": "10", "btc": "20", "ltc": "20", "lbtc": "20", "xmr": "20"}


def test_an_operator_finds_an_account_credits_it_and_decides_a_review(person: Person) -> None:
    account = person.account()
    made = person.topup(account, "btc", "20")
    person.drive(made["invoice_id"], "mark", status="Settled")
    person.sign_in_as_operator()
    person.visit("/operator/accounts")
    person.fill(q=account["credit_id"])
    person.press("Find")
    person.sees("Credit or debit")
    person.fill(amount_usd="2.5", reason="goodwill for Monday")
    person.press("See what it does")
    person.sees("Balance after")
    person.shoot("operator-confirm")
    person.press("Credit it")
    person.sees("Done, and written to the log.")
    eventually(lambda: person.visit("/operator/topups") or "marked settled by hand" in person.text, 30)  # type: ignore[func-returns-value]
    person.press("Bitcoin")
    person.sees("Order\nOurs")
    person.shoot("operator-review")
    assert person.faults(person.browser.current_url, "operator-topup") == []
    person.looks(dark=False, size=WIDE)
    person.fill(reason="a test of ours")
    person.press("Decide")
    person.sees("Decided. The same finding does not come back.")
    person.visit("/operator/audit")
    person.sees("account.credit")
    person.sees("topup.dismiss")


def test_an_operator_imports_a_sheet_and_sells_by_it(person: Person, tmp_path: Path) -> None:
    person.sign_in_as_operator()
    person.visit("/operator/prices")
    person.browser.find_element(By.CSS_SELECTOR, "main [name=file]").send_keys(dearer_sheet(tmp_path))
    person.press("Import, and see what it changes")
    person.sees("Leaps:")
    assert person.faults(person.browser.current_url, "operator-diff") == []
    person.looks(dark=False, size=WIDE)
    for box in person.browser.find_elements(By.CSS_SELECTOR, "main input[type=checkbox]"):
        box.click()
    person.press("Sell by this sheet")
    person.sees("New calls are priced by it")


def test_every_page_of_the_operator_is_fit_for_people(person: Person) -> None:
    person.sign_in_as_operator()
    faults = [fault for path in PAGES for fault in person.faults(path, path.strip("/").replace("/", "-"))]
    assert faults == []


def test_the_front_page_the_guides_and_the_sandbox_are_fit_for_people(person: Person) -> None:
    sandbox = f"http://127.0.0.1:{person.program.sandbox_port}"
    paid = person.topup(person.account(), "ltc", "20")
    person.drive(paid["invoice_id"], "expire")
    places = {
        "front": "/",
        "docs": "/docs",
        "sandbox-list": f"{sandbox}/",
        "sandbox-wallet": f"{sandbox}/wallet",
        "sandbox-expired": paid["checkout_url"],
    }
    faults = [fault for name, path in places.items() for fault in person.faults(path, name)]
    assert faults == []


@pytest.mark.parametrize("method", METHODS)
def test_a_receipt_is_paid_in_two_parts_and_draws_itself_anew(person: Person, method: str) -> None:
    made = person.topup(person.account(), method, METHODS[method])
    person.visit(made["receipt_url"])
    person.sees("Waiting for your payment.")
    assert person.browser.execute_script("return document.querySelector('.qr').naturalWidth > 0")
    person.browser.execute_script("window.unreloaded = true")
    due = made["crypto_amount_due"]
    person.drive(made["invoice_id"], "pay", amount=f"{due * 0.4:.8f}")
    person.sees("Part of it has arrived:")
    person.shoot(f"receipt-{method}-partly")
    found = re.search(r"([\d.]+) of ([\d.]+) [\w-]+; ([\d.]+)", person.text)
    assert found is not None
    person.drive(made["invoice_id"], "pay")
    if method != "btc-lightning":
        person.sees("waits for")
        person.drive(made["invoice_id"], "confirm", blocks=10)
    person.sees("Added to the balance")
    assert person.browser.execute_script("return window.unreloaded === true"), "it was loaded whole again"
    person.shoot(f"receipt-{method}-paid")


@pytest.mark.parametrize("method", ["btc-lightning", "ltc", "xmr"])
def test_a_receipt_is_fit_for_people_in_every_state(person: Person, method: str) -> None:
    account, faults = person.account(), []
    for state in ("unpaid", "partly", "settled", "expired"):
        made = person.topup(account, method, "20")
        if state == "partly":
            person.drive(made["invoice_id"], "pay", amount=f"{made['crypto_amount_due'] * 0.4:.8f}")
        elif state == "settled":
            person.drive(made["invoice_id"], "pay")
            if method != "btc-lightning":
                person.drive(made["invoice_id"], "confirm", blocks=10)
        elif state == "expired":
            person.drive(made["invoice_id"], "expire")
        person.visit(made["receipt_url"])
        person.sees(STATES[state])
        faults += person.faults(made["receipt_url"], f"receipt-{method}-{state}")
    assert faults == []


def test_a_late_and_an_overpaid_receipt_say_so(person: Person) -> None:
    late, over = (person.topup(person.account(), "ltc", "20") for _ in range(2))
    person.drive(late["invoice_id"], "expire")
    person.visit(late["receipt_url"])
    person.sees("Its time is over, and nothing has arrived.")
    person.drive(late["invoice_id"], "pay")
    person.drive(late["invoice_id"], "confirm", blocks=1)
    person.drive(over["invoice_id"], "pay", amount=f"{over['crypto_amount_due'] * 1.25:.8f}")
    person.drive(over["invoice_id"], "confirm", blocks=1)
    person.visit(over["receipt_url"])
    person.sees("More came than was asked")
    person.shoot("receipt-over")
