"""A customer's pages in Debian's Chromium, as a person does it: open an account, pay in five ways, make keys, connect a wallet."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By

from tests.console import axe
from tests.integration.test_browser import SCREENSHOTS
from tests.program import Program, eventually, installation

pytestmark = pytest.mark.slow
WIDE, NARROW = (1280, 900), (390, 844)
WAIT_SECONDS = 20
METHODS = {
    "btc-lightning": "Bitcoin Lightning", "btc": "Bitcoin", "ltc": "Litecoin", "lbtc": "Liquid Bitcoin", "xmr": "Monero",
}  # fmt: skip


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with installation() as made:
        made.run()
        yield made


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = found
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1280,900",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield made
    made.quit()


class Person:
    """Somebody at a browser: looks by words, presses, fills in; and keeps what the browser complained about."""

    def __init__(self, browser: webdriver.Chrome, program: Program) -> None:
        self.browser, self.program, self.complaints = browser, program, list[str]()

    def visit(self, path: str) -> None:
        self.browser.get(f"{self.program.base_url}{path}")
        self._listen()

    def press(self, words: str) -> None:
        """The first button or link with these words that can be seen."""
        xpath = f"//button[normalize-space()='{words}'] | //a[normalize-space()='{words}'] | //summary[normalize-space()='{words}']"
        seen = [each for each in self.browser.find_elements(By.XPATH, xpath) if each.is_displayed()]
        assert seen, f"nothing to press says {words!r} on {self.browser.current_url}:\n{self.text}"
        seen[0].click()
        self._listen()

    def fill(self, name: str, text: str) -> None:
        field = self.browser.find_element(By.CSS_SELECTOR, f"main [name={name}]")
        field.clear()
        field.send_keys(text)

    @property
    def text(self) -> str:
        return self.browser.find_element(By.TAG_NAME, "body").text

    def sees(self, words: str) -> None:
        def is_there() -> bool:
            try:
                return words in self.text
            except WebDriverException:  # the page is being drawn anew
                return False

        try:
            eventually(is_there, WAIT_SECONDS)
        except AssertionError:
            raise AssertionError(f"{words!r} is not on {self.browser.current_url}:\n{self.text}") from None
        self._listen()

    def sign_in(self, credential: str) -> None:
        self.visit("/console/sign-in")
        self.fill("credential", credential)
        self.press("Sign in")

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            height = self.browser.execute_script("return document.documentElement.scrollHeight")
            width = self.browser.execute_script("return document.documentElement.clientWidth")
            self.browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": width, "height": min(height, 3000), "deviceScaleFactor": 1, "mobile": False},
            )
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"console-{name}.png"))

    def looks(self, *, dark: bool, size: tuple[int, int]) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False},
        )

    def _listen(self) -> None:
        self.complaints += [
            entry["message"] for entry in self.browser.get_log("browser")  # type: ignore[no-untyped-call]
            if "Content Security Policy" in entry["message"] or "Uncaught" in entry["message"]
        ]  # fmt: skip


@pytest.fixture
def person(chromium: webdriver.Chrome, program: Program) -> Iterator[Person]:
    """With an empty jar. Whatever a test does, no page may break the policy."""
    chromium.delete_all_cookies()
    made = Person(chromium, program)
    made.looks(dark=False, size=WIDE)
    yield made
    assert made.complaints == []


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
    person.shoot("01-welcome")
    person.press("Sign out")
    person.sees("You are signed out")
    person.sign_in(credit_id)
    person.sees("Balance")
    assert credit_id not in person.browser.page_source


@pytest.mark.parametrize("method", METHODS)
def test_a_top_up_is_chosen_paid_and_seen_to_settle_without_a_reload(person: Person, method: str) -> None:
    credit_id = open_account(person)
    person.visit(f"/console/topup?method={method}")
    person.shoot(f"02-{method}-choose")
    person.press(f"Pay with {METHODS[method]}")
    person.sees("Send exactly")
    assert person.browser.find_element(By.CSS_SELECTOR, "img.qr").get_property("naturalWidth")
    person.shoot(f"03-{method}-to-pay")
    person.browser.execute_script("window.notReloaded = true")
    pay(person.program, credit_id, method)
    person.sees("was added to the balance")
    assert person.browser.execute_script("return window.notReloaded") is True
    person.shoot(f"04-{method}-paid")
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
    person.fill("name", "laptop")
    person.fill("limit_total", "5")
    person.press("Make a key")
    person.sees("Keep it")
    secret = re.search(r"sk-\w{49}", person.text)
    assert secret is not None
    person.visit("/console/keys")
    assert person.text.count("laptop") == 1
    assert secret[0] not in person.browser.page_source
    person.shoot("05-keys")
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
    person.fill("nwc_url", "nostr+walletconnect://nobody")
    person.press("Connect")
    assert person.browser.find_element(By.CSS_SELECTOR, "[role=alert]").is_displayed()
    with httpx.Client(base_url=f"http://127.0.0.1:{program.sandbox_port}", trust_env=False, timeout=15) as sandbox:
        connection = sandbox.get("/sandbox/wallet").json()["uri"]
    person.fill("nwc_url", connection)
    person.fill("threshold_usd", "5")
    person.press("Connect")
    person.sees("The wallet is connected")
    assert connection not in person.browser.page_source
    with httpx.Client(base_url=program.base_url, trust_env=False, timeout=15) as api:
        eventually(lambda: api.get("/credits/balance", headers={"x-credit-id": credit_id}).json()["balance"] > 5, 60)
    person.visit("/console/autotopup")
    person.sees("$10.50")
    person.shoot("06-autotopup")
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
    found: list[str] = []
    for path in _every_page(person, credit_id):
        for dark, size in ((False, WIDE), (True, NARROW)):
            person.looks(dark=dark, size=size)
            person.visit(path)
            over = person.browser.execute_script("return document.documentElement.scrollWidth > innerWidth")
            found += [f"{path} {'dark' if dark else 'light'} {size[0]}: {each}" for each in axe.serious(person.browser)]
            found += [f"{path} is wider than {size[0]} px"] * bool(over)
            person.shoot(f"{path.strip('/').split('?')[0].replace('/', '-')[:24]}-{'dark-390' if dark else 'light'}")
    assert found == []


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
