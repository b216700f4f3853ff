"""What a payer sees: a top-up of each method, paid from the sandbox's page in a real browser."""

import contextlib
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from tests.chromium import SCREENSHOTS, browser, program
from tests.program import Program, eventually

pytestmark = pytest.mark.slow
__all__ = ["browser", "program"]
CASES = [
    ("btc-lightning", "SATS", "10000", Decimal("6.825")),
    ("btc", "USD", "20", Decimal(20)),
    ("ltc", "LTC", "0.5", Decimal(40)),
    ("lbtc", "USD", "5", Decimal(5)),
    ("xmr", "XMR", "0.1", Decimal(15)),
]


def _shoot(browser: webdriver.Chrome, name: str) -> None:
    if SCREENSHOTS:
        browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))


def _balance(client: httpx.Client, account: Any) -> Decimal:
    text = client.get("/credits/balance", headers={"x-credit-id": account["credit_id"]}).json()["balance"]
    return Decimal(str(text))


@pytest.mark.parametrize(("method", "currency", "amount", "credit"), CASES)
def test_a_top_up_is_paid_from_the_sandbox_page(
    program: Program, browser: webdriver.Chrome, method: str, currency: str, amount: str, credit: Decimal
) -> None:
    with httpx.Client(base_url=program.base_url, trust_env=False, timeout=15) as client:
        account = client.post("/accounts/create").json()
        topup = client.post(
            f"/topup/create/{method}",
            headers={"x-credit-id": account["credit_id"]},
            json={"amount": amount, "currency": currency},
        ).json()
        browser.get(topup["checkout_url"])
        assert browser.find_element(By.CSS_SELECTOR, ".qr svg").is_displayed()
        _shoot(browser, f"{method}-1-to-pay")
        browser.get(topup["receipt_url"])
        assert browser.find_element(By.CSS_SELECTOR, "img.qr").is_displayed()
        _shoot(browser, f"{method}-2-receipt-open")
        browser.get(topup["checkout_url"])
        _press(browser, "pay")
        eventually(lambda: method == "btc-lightning" or _confirmed(browser, client, account, topup), 60)
        _wait(browser).until(lambda page: "Paid, thank you" in page.page_source)
        _shoot(browser, f"{method}-3-paid")
        eventually(lambda: _balance(client, account) == credit)
        browser.get(topup["receipt_url"])
        assert "Paid. Thank you." in browser.page_source
        assert not browser.find_elements(By.CSS_SELECTOR, "img.qr")
        _shoot(browser, f"{method}-4-receipt")


def _state(client: httpx.Client, account: Any, topup: Any) -> Any:
    return client.get(f"/topup/status/{topup['invoice_id']}", headers={"x-credit-id": account["credit_id"]}).json()


def _confirmed(browser: webdriver.Chrome, client: httpx.Client, account: Any, topup: Any) -> bool:
    """Whether it is settled; otherwise one more block is found, however often that takes a click."""
    if _state(client, account, topup)["status"] == "Settled":
        return True
    with contextlib.suppress(WebDriverException):  # the page is being drawn anew under our finger
        _press(browser, "confirm")
    return False


def _wait(browser: webdriver.Chrome) -> WebDriverWait[webdriver.Chrome]:
    """A page that is being drawn anew has nothing to read yet, which chromedriver tells in several ways."""
    return WebDriverWait(browser, 15, ignored_exceptions=[WebDriverException])


def _press(browser: webdriver.Chrome, act: str) -> None:
    """Press the first button on the page that does this, opening the sandbox controls if it is in there."""
    [*found] = browser.find_elements(
        By.CSS_SELECTOR, f"button[name=act][value={act}], form:has(input[value={act}]) button"
    )
    if not found:
        browser.refresh()
        return
    if not found[0].is_displayed():
        browser.find_element(By.TAG_NAME, "summary").click()
    found[0].click()
