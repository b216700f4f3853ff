"""An operator's day and a payer's receipt in Debian's Chromium: as people do it, light and dark, wide and at 390 px."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

from tests.console import axe
from tests.integration.test_browser import SCREENSHOTS, browser, program
from tests.program import Program, eventually

pytestmark = pytest.mark.slow
__all__ = ["browser", "program"]
WIDE, NARROW = (1280, 900), (390, 844)
PAGES = (
    "/operator",
    "/operator/accounts",
    "/operator/topups",
    "/operator/prices",
    "/operator/tokens",
    "/operator/audit",
)
METHODS = {"btc-lightning": "10", "btc": "20", "ltc": "20", "lbtc": "20", "xmr": "20"}
_WATCH = (
    "document.addEventListener('securitypolicyviolation', one => (window.broken ??= []).push(one.violatedDirective))"
)


class Desk:
    """A browser with short words for it."""

    def __init__(self, browser: webdriver.Chrome, program: Program) -> None:
        self.browser, self.program = browser, program
        self.client = httpx.Client(base_url=program.base_url, trust_env=False, timeout=15)

    def look(self, *, dark: bool, size: tuple[int, int]) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )

    def visit(self, path: str) -> None:
        self.browser.get(path if path.startswith("http") else self.program.base_url + path)

    @property
    def text(self) -> str:
        return self.browser.find_element(By.TAG_NAME, "body").text

    def sees(self, words: str) -> None:
        def is_there() -> bool:
            try:
                return words in self.text
            except WebDriverException:  # the page is being drawn anew
                return False

        eventually(is_there, 20)

    def press(self, words: str) -> None:
        xpath = f"//main//button[normalize-space()='{words}'] | //main//a[normalize-space()='{words}']"
        [first, *_] = [each for each in self.browser.find_elements(By.XPATH, xpath) if each.is_displayed()]
        first.click()

    def fill(self, **fields: str) -> None:
        for name, text in fields.items():
            field = self.browser.find_element(By.CSS_SELECTOR, f"main [name={name}]")
            field.clear()
            field.send_keys(text)

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            height = self.browser.execute_script("return document.documentElement.scrollHeight")
            width = self.browser.execute_script("return document.documentElement.clientWidth")
            self.look_at(width, min(height, 2600))
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def look_at(self, width: int, height: int) -> None:
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def is_fit(self, path: str, name: str) -> list[str]:
        """What is wrong with a page, light and dark and at 390 px."""
        faults = []
        for dark, size in ((False, WIDE), (True, WIDE), (False, NARROW)):
            self.look(dark=dark, size=size)
            self.visit(path)
            self.shoot(f"{name}-{'dark' if dark else 'light'}-{size[0]}")
            self.look(dark=dark, size=size)
            faults += [f"{path} dark={dark} {size[0]}: {each}" for each in axe.serious(self.browser)]
            if self.browser.execute_script("return document.documentElement.scrollWidth > window.innerWidth"):
                faults.append(f"{path} is wider than {size[0]} px")
        return faults + [
            entry["message"] for entry in self.browser.get_log("browser")  # type: ignore[no-untyped-call]
            if "Content Security Policy" in entry["message"] or "Uncaught" in entry["message"]
        ]  # fmt: skip

    def account(self) -> Any:
        return self.client.post("/accounts/create").json()

    def topup(self, account: Any, method: str, usd: str) -> Any:
        wish = {"amount": usd, "currency": "USD"}
        return self.client.post(
            f"/topup/create/{method}", headers={"x-credit-id": account["credit_id"]}, json=wish
        ).json()

    def drive(self, invoice_id: str, act: str, **body: Any) -> None:
        url = f"http://127.0.0.1:{self.program.sandbox_port}/sandbox/invoices/{invoice_id}/{act}"
        httpx.post(url, json=body, trust_env=False, timeout=15).raise_for_status()


@pytest.fixture
def desk(browser: webdriver.Chrome, program: Program) -> Iterator[Desk]:
    browser.delete_all_cookies()
    made = Desk(browser, program)
    made.look(dark=False, size=WIDE)
    yield made
    made.client.close()


def sign_in(desk: Desk, *scopes: str) -> None:
    name = f"ops-{len(scopes)}-{abs(hash(scopes)) % 10**6}-{id(desk) % 10**6}"
    narrowed = ("--scopes", ",".join(scopes)) if scopes else ()
    token = desk.program.answer("token", "create", "--admin", name, *narrowed)["token"]
    desk.visit("/operator/sign-in")
    desk.fill(token=token)
    desk.press("Sign in")
    desk.sees("Since midnight, UTC")


def test_an_operator_finds_an_account_credits_it_and_decides_a_review(desk: Desk) -> None:
    account = desk.account()
    made = desk.topup(account, "btc", "20")
    desk.drive(made["invoice_id"], "mark", status="Settled")
    sign_in(desk)
    desk.visit("/operator/accounts")
    desk.fill(q=account["credit_id"])
    desk.press("Find")
    desk.sees("Credit or debit")
    desk.fill(amount_usd="2.5", reason="goodwill for Monday")
    desk.press("See what it does")
    desk.sees("Balance after")
    desk.shoot("operator-confirm")
    desk.press("Credit it")
    desk.sees("Done, and written to the log.")
    eventually(lambda: desk.visit("/operator/topups") or "marked settled by hand" in desk.text, 30)  # type: ignore[func-returns-value]
    desk.press("Bitcoin")
    desk.sees("Order\nOurs")
    desk.shoot("operator-review")
    assert desk.is_fit(desk.browser.current_url, "operator-topup") == []
    desk.look(dark=False, size=WIDE)
    desk.fill(reason="a test of ours")
    desk.press("Decide")
    desk.sees("Decided. The same finding does not come back.")
    desk.visit("/operator/audit")
    desk.sees("account.credit")
    desk.sees("topup.dismiss")


def test_an_operator_imports_a_sheet_and_sells_by_it(desk: Desk, tmp_path: Path) -> None:
    dearer = {
        "format": "satmeter-prices-1",
        "models": [{"model": "gpt-4o-mini", "provider": "openai", "usd_per_million": {"input": "9", "output": "30"}}],
    }
    (tmp_path / "sheet.json").write_text(json.dumps(dearer))
    sign_in(desk)
    desk.visit("/operator/prices")
    desk.browser.find_element(By.CSS_SELECTOR, "main [name=file]").send_keys(str(tmp_path / "sheet.json"))
    desk.press("Import, and see what it changes")
    desk.sees("Leaps:")
    assert desk.is_fit(desk.browser.current_url, "operator-diff") == []
    desk.look(dark=False, size=WIDE)
    for box in desk.browser.find_elements(By.CSS_SELECTOR, "main input[type=checkbox]"):
        box.click()
    desk.press("Sell by this sheet")
    desk.sees("New calls are priced by it")


def test_every_page_of_the_operator_is_fit_for_people(desk: Desk) -> None:
    sign_in(desk)
    faults = [fault for path in PAGES for fault in desk.is_fit(path, path.strip("/").replace("/", "-"))]
    assert faults == []


def test_the_front_page_the_guides_and_the_sandbox_are_fit_for_people(desk: Desk) -> None:
    sandbox = f"http://127.0.0.1:{desk.program.sandbox_port}"
    paid = desk.topup(desk.account(), "ltc", "20")
    desk.drive(paid["invoice_id"], "expire")
    places = {
        "front": "/",
        "docs": "/docs",
        "sandbox-list": f"{sandbox}/",
        "sandbox-wallet": f"{sandbox}/wallet",
        "sandbox-expired": paid["checkout_url"],
    }
    faults = [fault for name, path in places.items() for fault in desk.is_fit(path, name)]
    assert faults == []


@pytest.mark.parametrize("method", METHODS)
def test_a_receipt_is_paid_in_two_parts_and_draws_itself_anew(desk: Desk, method: str) -> None:
    made = desk.topup(desk.account(), method, METHODS[method])
    desk.visit(made["receipt_url"])
    desk.sees("Waiting for your payment.")
    assert desk.browser.execute_script("return document.querySelector('.qr').naturalWidth > 0")
    desk.browser.execute_script("window.unreloaded = true")
    due = made["crypto_amount_due"]
    desk.drive(made["invoice_id"], "pay", amount=f"{due * 0.4:.8f}")
    desk.sees("Part of it has arrived:")
    desk.shoot(f"receipt-{method}-partly")
    if method == "xmr":
        assert desk.is_fit(made["receipt_url"], "receipt-partly") == []
        desk.look(dark=False, size=WIDE)
        desk.browser.execute_script("window.unreloaded = true")
    found = re.search(r"([\d.]+) of ([\d.]+) [\w-]+; ([\d.]+)", desk.text)
    assert found is not None
    desk.drive(made["invoice_id"], "pay")
    if method != "btc-lightning":
        desk.sees("waits for")
        desk.drive(made["invoice_id"], "confirm", blocks=10)
    desk.sees("Added to the balance")
    assert desk.browser.execute_script("return window.unreloaded === true"), "it was loaded whole again"
    desk.shoot(f"receipt-{method}-paid")


def test_a_late_and_an_overpaid_receipt_say_so(desk: Desk) -> None:
    late, over = (desk.topup(desk.account(), "ltc", "20") for _ in range(2))
    desk.drive(late["invoice_id"], "expire")
    desk.visit(late["receipt_url"])
    desk.sees("Its time is over, and nothing has arrived.")
    desk.drive(late["invoice_id"], "pay")
    desk.drive(late["invoice_id"], "confirm", blocks=1)
    desk.drive(over["invoice_id"], "pay", amount=f"{over['crypto_amount_due'] * 1.25:.8f}")
    desk.drive(over["invoice_id"], "confirm", blocks=1)
    desk.visit(over["receipt_url"])
    desk.sees("More came than was asked")
    desk.shoot("receipt-over")
