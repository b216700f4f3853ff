"""Every flow by keyboard alone, and without scripts: no click, nobody helps the focus, and it is always seen where it is."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.by import By

from tests.chromium import Person, browser, dearer_sheet, person, program
from tests.program import eventually

pytestmark = pytest.mark.slow
__all__ = ["browser", "person", "program"]


def test_a_customer_does_everything_by_keyboard_alone(person: Person) -> None:
    person.visit("/console/sign-in")
    person.tab_to("Open an account")
    person.key("Enter")
    person.sees("shown now and never again")
    found = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", person.text)
    assert found is not None
    person.tab_to("I have kept it: go on")
    person.key("Enter")
    person.sees("There is nothing to spend")
    person.tab_to("Sign out")
    person.key("Space")
    person.sees("You are signed out")
    person.tab_to(name="credential")
    person.type(found[0])
    person.key("Enter")
    person.sees("Balance")
    _top_up(person)
    _keys(person)
    _activity(person)
    _wallet(person)
    _another_credit_id(person)
    person.tab_to("Sign out")
    person.key("Enter")
    person.sees("You are signed out")


def _top_up(person: Person) -> None:
    person.tab_to("Top up")
    person.key("Enter")
    person.sees("How much")
    person.tab_to(name="pick")
    chosen = person.focus()["value"]
    person.key("ArrowRight")
    assert person.focus()["value"] != chosen
    person.tab_to("Pay with Bitcoin Lightning")
    person.key("Enter")
    person.sees("Send exactly")
    person.tab_to("Copy the invoice")
    person.key("Space")
    person.sees("Copied")
    assert person.focus()["words"] == "Copied"
    person.tab_to("Home", shift=True)


def _keys(person: Person) -> None:
    person.tab_to("Keys")
    person.key("Enter")
    person.sees("Make a key")
    person.tab_to(name="name")
    person.type("laptop")
    person.tab_to("Make a key")
    person.key("Enter")
    person.sees("Keep it")
    person.tab_to("Keys")
    person.key("Enter")
    person.sees("laptop")
    person.tab_to("laptop")
    person.key("Enter")
    person.sees("Revoke this key…")
    person.tab_to("Revoke this key…")
    person.key("Space")
    person.tab_to("Revoke it")
    person.key("Enter")
    person.sees("The key is revoked")


def _activity(person: Person) -> None:
    person.tab_to("Activity")
    person.key("Enter")
    person.sees("Of the last")
    person.tab_to(name="by")
    before = person.focus()["value"]
    person.key("ArrowRight")
    after = person.focus()["value"]
    assert after != before
    person.key("Enter")
    eventually(lambda: f"by={after}" in person.browser.current_url)


def _wallet(person: Person) -> None:
    person.tab_to("Auto top-up")
    person.key("Enter")
    person.sees("Connect")
    person.tab_to(name="nwc_url")
    person.type(person.wallet())
    person.tab_to("Connect")
    person.key("Enter")
    person.sees("The wallet is connected")
    person.tab_to("Disconnect…")
    person.key("Space")
    person.tab_to("Disconnect")
    person.key("Enter")
    person.sees("The wallet is disconnected")


def _another_credit_id(person: Person) -> None:
    person.tab_to("Account")
    person.key("Enter")
    person.sees("Take another credit id")
    person.tab_to("Take another credit id")
    person.key("Enter")
    person.sees("shown now and never again")
    person.tab_to("I have kept it: go on")
    person.key("Enter")
    person.sees("Take it along")


def test_an_operator_does_everything_by_keyboard_alone(person: Person, tmp_path: Path) -> None:
    account = person.account()
    made = person.topup(account, "btc", "20")
    person.drive(made["invoice_id"], "mark", status="Settled")
    person.visit("/operator/sign-in")
    person.tab_to(name="token")
    person.type(person.operator_token())
    person.key("Enter")
    person.sees("Since midnight, UTC")
    person.tab_to("Accounts")
    person.key("Enter")
    person.sees("Find")
    person.tab_to(name="q")
    person.type(account["credit_id"])
    person.key("Enter")
    person.sees("Credit or debit")
    person.tab_to("Freeze: allow no call any more", shift=True)
    person.tab_to(name="reason", shift=True)
    person.type("a key of theirs leaked")
    person.key("Enter")
    person.sees("Let it call again")
    _review(person)
    _prices(person, tmp_path)


def _review(person: Person) -> None:
    def waits() -> bool:
        person.visit("/operator/topups")
        return "marked settled by hand" in person.text

    eventually(waits, 60)
    person.tab_to("Bitcoin")
    person.key("Enter")
    person.sees("What is right?")
    person.tab_to(name="action")
    person.key("ArrowDown")
    person.key("ArrowUp")
    person.tab_to(name="reason")
    person.type("a test of ours")
    person.tab_to("Decide")
    person.key("Space")
    person.sees("Decided. The same finding does not come back.")


def _prices(person: Person, folder: Path) -> None:
    person.tab_to("Prices")
    person.key("Enter")
    person.sees("Import a sheet")
    person.tab_to(name="file")
    # The system's own window for files is not of the page.
    person.browser.find_element(By.CSS_SELECTOR, "main [name=file]").send_keys(dearer_sheet(folder))
    person.tab_to("Import, and see what it changes")
    person.key("Enter")
    person.sees("Leaps:")
    for name in ("allow_drops", "allow_leaps"):
        if person.browser.find_elements(By.NAME, name):
            person.tab_to(name=name)
            person.key("Space")
    person.tab_to("Sell by this sheet")
    person.key("Enter")
    person.sees("New calls are priced by it")
    person.tab_to("Ask a fee for a feature")
    person.key("Space")
    person.tab_to(name="feature")
    person.type("web")
    person.tab_to(name="price_usd")
    person.type("0.03")
    person.key("Enter")
    person.sees("$0.03 a call")


def test_no_page_holds_the_focus_or_hides_it(person: Person) -> None:
    account = person.account()
    made = person.topup(account, "ltc", "20")
    person.sign_in(account["credit_id"])
    person.sees("Balance")
    for path in (
        "/",
        "/console",
        "/console/topup",
        made["receipt_url"],
        "/console/keys",
        "/console/activity",
        "/console/autotopup",
        "/console/account",
    ):
        person.visit(path)
        assert person.walk() > 3
    person.sign_in_as_operator()
    for path in (
        "/operator",
        "/operator/accounts",
        "/operator/topups",
        "/operator/prices",
        "/operator/tokens",
        "/operator/audit",
    ):
        person.visit(path)
        assert person.walk() > 8
    for path in ("/", "/wallet", "/notices"):
        person.visit(f"http://127.0.0.1:{person.program.sandbox_port}{path}")
        assert person.walk() > 2


@pytest.fixture
def scriptless(person: Person) -> Iterator[Person]:
    """Somebody whose browser runs no scripts."""
    person.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    yield person
    person.browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_a_customer_does_everything_without_scripts(scriptless: Person) -> None:
    person = scriptless
    person.visit("/console/sign-in")
    person.press("Open an account")
    person.sees("shown now and never again")
    found = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", person.text)
    assert found is not None
    person.press("I have kept it: go on")
    person.press("Top up")
    person.press("Pay with Bitcoin Lightning")
    person.sees("Send exactly")
    assert person.browser.find_element(By.CSS_SELECTOR, "meta[http-equiv=refresh]").get_attribute("content") == "10"
    topup = person.asks("GET", "/topups", {"x-credit-id": found[0]})["data"][0]
    person.drive(topup["invoice_id"], "pay")

    def has_arrived() -> bool:
        person.browser.refresh()  # sooner than the page does by itself
        return "was added to the balance" in person.text

    eventually(has_arrived, 20)
    person.press("Keys")
    person.fill(name="laptop")
    person.press("Make a key")
    person.sees("Keep it")
    person.press("Keys")
    person.press("laptop")
    person.press("Revoke this key…")
    person.press("Revoke it")
    person.sees("The key is revoked")
    person.press("Activity")
    person.browser.find_element(By.CSS_SELECTOR, "input[name=by]:not(:checked) + span").click()
    person.press("Show")
    eventually(lambda: "by=" in person.browser.current_url)
    person.press("Auto top-up")
    person.fill(nwc_url=person.wallet())
    person.press("Connect")
    person.sees("The wallet is connected")
    person.press("Disconnect…")
    person.press("Disconnect")
    person.sees("The wallet is disconnected")
    person.press("Account")
    person.press("Take another credit id")
    person.sees("shown now and never again")
    person.press("I have kept it: go on")
    person.sees("Take it along")
    person.press("Sign out")
    person.sees("You are signed out")


def test_an_operator_does_everything_without_scripts(scriptless: Person) -> None:
    person = scriptless
    account = person.account()
    person.sign_in_as_operator()
    person.visit("/operator/accounts")
    person.fill(q=account["credit_id"])
    person.press("Find")
    person.sees("Credit or debit")
    person.fill(amount_usd="2.5", reason="goodwill")
    person.press("See what it does")
    person.press("Credit it")
    person.sees("Done, and written to the log.")
    person.visit("/operator/prices")
    person.press("Put a markup")
    person.fill(factor="1.1")
    person.press("Put it")
    person.sees("× 1.1")
    person.press("End")
    person.sees("It ends in a few seconds.")
    made = person.topup(account, "btc", "20")
    person.visit("/operator/topups?state=open")
    person.press("Bitcoin")
    person.press("What does it say now?")
    person.sees(made["invoice_id"])
