"""A customer's pages in Debian's Chromium, as a person does it: open an account, pay in five ways, make keys, connect a wallet."""

import re

import httpx
import pytest
from selenium.webdriver.common.by import By

from tests.chromium import WAIT_SECONDS, Person, browser, person, program
from tests.program import Program, eventually

pytestmark = pytest.mark.slow
__all__ = ["browser", "person", "program"]
METHODS = {
    "btc-lightning": "Bitcoin Lightning", "btc": "Bitcoin", "ltc": "Litecoin", "lbtc": "Liquid Bitcoin", "xmr": "Monero",
}  # fmt: skip


def open_account(person: Person) -> str:
    person.visit("/console/sign-in")
    person.press("Open an account")
    person.sees("shown now and never again")
    found = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", person.text)
    assert found is not None
    person.press("I have kept it: go on")
    person.sees("There is nothing to spend")
    return found[0]


def test_a_newcomer_opens_an_account_pays_and_signs_in_again(person: Person) -> None:
    credit_id = open_account(person)
    person.shoot("console-01-welcome")
    person.press("Sign out")
    person.sees("You are signed out")
    person.sign_in(credit_id)
    person.sees("Balance")
    assert credit_id not in person.browser.page_source


@pytest.mark.parametrize("method", METHODS)
def test_a_top_up_is_chosen_paid_and_seen_to_settle_without_a_reload(person: Person, method: str) -> None:
    credit_id = open_account(person)
    person.visit(f"/console/topup?method={method}")
    person.shoot(f"console-02-{method}-choose")
    person.press(f"Pay with {METHODS[method]}")
    person.sees("Send exactly")
    assert person.browser.find_element(By.CSS_SELECTOR, "img.qr").get_property("naturalWidth")
    person.shoot(f"console-03-{method}-to-pay")
    person.browser.execute_script("window.notReloaded = true")
    pay(person.program, credit_id, method)
    person.sees("was added to the balance")
    assert person.browser.execute_script("return window.notReloaded") is True
    person.shoot(f"console-04-{method}-paid")
    person.press("Home")
    person.sees("may be spent now")


def pay(program: Program, credit_id: str, method: str) -> None:
    """The account's newest top-up from a wallet; and blocks, until it is settled."""
    with (
        httpx.Client(base_url=program.base_url, trust_env=False, timeout=15) as api,
        httpx.Client(base_url=f"http://127.0.0.1:{program.sandbox_port}", trust_env=False, timeout=15) as sandbox,
    ):
        topup = api.get("/topups", headers={"x-credit-id": credit_id}).json()["data"][0]
        invoice = f"/sandbox/invoices/{topup['invoice_id']}"
        sandbox.post(f"{invoice}/pay", json={}).raise_for_status()
        if method != "btc-lightning":
            sandbox.post(f"{invoice}/confirm", json={"blocks": 100}).raise_for_status()


def test_a_key_is_made_once_limited_changed_and_revoked(person: Person) -> None:
    open_account(person)
    person.visit("/console/keys")
    person.fill(name="laptop")
    person.fill(limit_total="5")
    person.press("Make a key")
    person.sees("Keep it")
    secret = re.search(r"sk-\w{49}", person.text)
    assert secret is not None
    person.visit("/console/keys")
    assert person.text.count("laptop") == 1
    assert secret[0] not in person.browser.page_source
    person.shoot("console-05-keys")
    person.press("laptop")
    person.sees("$0.00 of $5.00 used in all")
    person.press("Show the key")
    person.sees(secret[0])
    person.press("Switch off")
    person.sees("The key is switched off")
    person.press("Revoke this key…")
    person.press("Revoke it")
    person.sees("The key is revoked")
    assert "laptop" not in person.text


def test_a_wallet_is_connected_and_refills_the_balance_by_itself(person: Person) -> None:
    program = person.program
    credit_id = open_account(person)
    person.visit("/console/autotopup")
    person.fill(nwc_url="nostr+walletconnect://nobody")
    person.press("Connect")
    eventually(lambda: person.browser.find_elements(By.CSS_SELECTOR, "[role=alert]"), WAIT_SECONDS)
    connection = person.wallet()
    person.fill(nwc_url=connection)
    person.fill(threshold_usd="5")
    person.press("Connect")
    person.sees("The wallet is connected")
    assert connection not in person.browser.page_source
    with httpx.Client(base_url=program.base_url, trust_env=False, timeout=15) as api:
        eventually(lambda: api.get("/credits/balance", headers={"x-credit-id": credit_id}).json()["balance"] > 5, 60)
    person.visit("/console/autotopup")
    person.sees("$10.50")
    person.shoot("console-06-autotopup")
    person.press("Disconnect…")
    person.press("Disconnect")
    person.sees("The wallet is disconnected")


def test_a_lost_credit_id_is_replaced_and_the_session_goes_on(person: Person) -> None:
    before = open_account(person)
    person.visit("/console/account")
    person.press("Take another credit id")
    person.sees("shown now and never again")
    after = re.search(r"[0-9a-f]{8}-[0-9a-f-]{27}", person.text)
    assert after is not None
    assert after[0] != before
    person.press("I have kept it: go on")
    person.sees("Take it along")
    person.press("Sign out")
    person.sign_in(after[0])
    person.sees("Balance")


def test_every_page_is_fit_for_people_in_light_and_dark_narrow_and_wide(person: Person) -> None:
    credit_id = open_account(person)
    pages = [*_every_page(person, credit_id), "/console/recover"]
    faults = [
        fault
        for path in pages
        for fault in person.faults(path, f"console-{path.strip('/').split('?')[0].replace('/', '-')[:24]}")
    ]
    assert faults == []


def _every_page(person: Person, credit_id: str) -> list[str]:
    """The pages of an account that has called, was charged, has a key with a limit and a top-up to pay; and signing in."""
    program, owner = person.program, {"x-credit-id": credit_id}
    token = program.answer("token", "create", "--service", "pages")["token"]
    with httpx.Client(base_url=program.base_url, trust_env=False, timeout=15) as api:
        key = api.post(
            "/keys", headers=owner, json={"name": "web", "usage_limit_usd": 5, "reset_period": "daily"}
        ).json()["data"]
        call = {
            "request_id": "pages-1",
            "api_key": key["api_key"],
            "model": "gpt-4o-mini",
            "usage": {"input_tokens": 900, "output_tokens": 70},
        }
        api.post("/topup/create/btc-lightning", headers=owner, json={"amount": 5, "currency": "USD"}).raise_for_status()
        pay(program, credit_id, "btc-lightning")
        eventually(lambda: api.get("/credits/balance", headers=owner).json()["balance"] > 5, WAIT_SECONDS)
        api.post("/topup/create/ltc", headers=owner, json={"amount": 5, "currency": "USD"}).raise_for_status()
        api.post("/v1/meter/charge", headers={"Authorization": f"Bearer {token}"}, json=call).raise_for_status()
        (line,) = api.get("/queries/history", headers=owner).json()["data"]
    person.visit("/console/topup")
    topup = person.browser.find_element(By.CSS_SELECTOR, "tbody a").get_attribute("href") or ""
    return [
        "/console", "/console/topup", topup.removeprefix(program.base_url), "/console/keys", f"/console/keys/{key['_id']}",
        "/console/activity", "/console/activity?metric=calls&by=key&period=7", f"/console/charges/{line['id']}",
        "/console/autotopup", "/console/account", "/console/sign-in", "/console/nothing-here",
    ]  # fmt: skip
