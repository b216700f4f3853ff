"""Debian's Chromium and somebody who sits before it: with a mouse, by keyboard alone, without scripts, in the dark, at 390 px."""

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException, WebDriverException
from selenium.webdriver.common.by import By

from tests.console import axe
from tests.program import Program, eventually, installation

SCREENSHOTS = os.environ.get("SCREENSHOTS")
"""A folder to leave pictures in, for whoever wants to look."""
WIDE, NARROW = (1280, 900), (390, 844)
WAIT_SECONDS = 20
_KEYS: Final = {
    "Tab": ("Tab", 9, ""), "Enter": ("Enter", 13, "\r"), "Space": ("Space", 32, " "), "Escape": ("Escape", 27, ""),
    "ArrowDown": ("ArrowDown", 40, ""), "ArrowUp": ("ArrowUp", 38, ""), "ArrowRight": ("ArrowRight", 39, ""),
    "ArrowLeft": ("ArrowLeft", 37, ""), "End": ("End", 35, ""), "Home": ("Home", 36, ""),
}  # fmt: skip
_FOCUS: Final = """
const it = document.activeElement;
if (!it || it === document.body) return null;
const lines = each => {
  const look = getComputedStyle(each);
  return look.outlineStyle !== 'none' && parseFloat(look.outlineWidth) >= 1 || /[1-9]\\d*px/.test(look.boxShadow);
};
const box = it.getBoundingClientRect(), drawn = it.matches('.chips input') ? it.nextElementSibling : it;
const at = drawn.getBoundingClientRect();
return {
  words: (it.getAttribute('aria-label') || it.labels?.[0]?.textContent || it.textContent || '').trim().replace(/\\s+/g, ' '),
  name: it.name || '', value: it.type === 'radio' ? it.value : '', kind: it.tagName + (it.type ? ':' + it.type : ''),
  isVisible: lines(drawn) && at.width > 1 && at.height > 1 && at.bottom > 0 && at.top < innerHeight && at.right > 0,
  place: [...document.querySelectorAll('*')].indexOf(it),
};
"""
_SETTLED: Final = """
if (matchMedia('(prefers-color-scheme: dark)').matches !== arguments[0]) return false;
const gliding = document.getAnimations();
gliding.forEach(each => each.finish());
return gliding.length === 0;
"""
"""Whether the page looks as it will; what is in motion is brought to its end, which may set what hangs on it in motion."""
_SPECIMENS: Final = """
for (const group of document.querySelectorAll('section[data-group]'))
  [...group.querySelectorAll(':scope > section.card')].slice(2).forEach(each => each.remove());
for (const body of document.querySelectorAll('tbody'))
  [...body.querySelectorAll(':scope > tr')].slice(12).forEach(each => each.remove());
"""
"""A reference draws a hundred operations in one way: of each group two are looked at, and of a table twelve rows."""


@pytest.fixture(scope="module")
def program() -> Iterator[Program]:
    with installation() as made:
        made.run()
        yield made


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no chromium and chromedriver here; on Debian: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=900,1100",
        f"--user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):  # fmt: skip
        options.add_argument(flag)
    made = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
    yield made
    made.quit()


def dearer_sheet(folder: Path) -> str:
    """A file of prices that leap."""
    price = {"model": "gpt-4o-mini", "provider": "openai", "usd_per_million": {"input": "9", "output": "30"}}
    (sheet := folder / "sheet.json").write_text(json.dumps({"format": "satmeter-prices-1", "models": [price]}))
    return str(sheet)


class Person:
    """Looks by words, presses, fills in; and keeps what the browser complained about."""

    def __init__(self, browser: webdriver.Chrome, program: Program) -> None:
        self.browser, self.program, self.complaints = browser, program, list[str]()

    # --- with a mouse -------------------------------------------------------------------------------

    def visit(self, path: str) -> None:
        self.browser.get(path if path.startswith("http") else f"{self.program.base_url}{path}")
        self._listen()

    def press(self, words: str) -> None:
        """The first button or link with these words that can be seen, on the page rather than around it."""
        said = f"[normalize-space()='{words}']"
        there = " | ".join(f"//main//{each}{said}" for each in ("button", "a", "summary"))
        around = " | ".join(f"//{each}{said}" for each in ("button", "a"))

        def is_pressed() -> bool:
            for xpath in (there, around):
                for each in self.browser.find_elements(By.XPATH, xpath):
                    with contextlib.suppress(StaleElementReferenceException):  # it was of the page before
                        if each.is_displayed():
                            each.click()
                            return True
            return False

        self._wait(is_pressed, f"nothing to press says {words!r}")

    def fill(self, **fields: str) -> None:
        for name, text in fields.items():
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

        self._wait(is_there, f"{words!r} is not there")

    def _wait(self, is_true: Callable[[], bool], otherwise: str) -> None:
        try:
            eventually(is_true, WAIT_SECONDS)
        except AssertionError:
            raise AssertionError(f"{otherwise}, on {self.browser.current_url}:\n{self.text}") from None
        self._listen()

    def sign_in(self, credential: str) -> None:
        self.visit("/console/sign-in")
        self.fill(credential=credential)
        self.press("Sign in")

    def sign_in_as_operator(self) -> None:
        self.visit("/operator/sign-in")
        self.fill(token=self.operator_token())
        self.press("Sign in")
        self.sees("Since midnight, UTC")

    def operator_token(self) -> str:
        return str(self.program.answer("token", "create", "--admin", f"ops-{secrets.token_hex(8)}")["token"])

    # --- by keyboard --------------------------------------------------------------------------------

    def key(self, name: str, *, shift: bool = False) -> None:
        code, number, text = _KEYS[name]
        pressed = {
            "key": text if name == "Space" else name,
            "code": code,
            "windowsVirtualKeyCode": number,
            "modifiers": 8 * shift,
        }
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.browser.execute_cdp_cmd("Input.dispatchKeyEvent", pressed | down)
        self.browser.execute_cdp_cmd("Input.dispatchKeyEvent", pressed | {"type": "keyUp"})

    def type(self, text: str) -> None:
        for letter in text:
            self.browser.execute_cdp_cmd("Input.dispatchKeyEvent", {"type": "char", "text": letter})

    def focus(self) -> Any:
        """What has the keyboard; None where nothing has. It must be seen that it has."""
        found = self.browser.execute_script(_FOCUS)
        assert found is None or found["isVisible"], (
            f"it is not seen that {found} has the focus, on {self.browser.current_url}"
        )
        return found

    def tab_to(self, words: str = "", *, name: str = "", shift: bool = False) -> None:
        """On with Tab until something with these words, or a field of this name, has the focus."""
        passed = []
        for _ in range(150):
            found = self.focus()
            if found and (found["name"] == name if name else found["words"] == words):
                return
            passed.append(found and (found["words"][:30] or found["name"]))
            self.key("Tab", shift=shift)
        raise AssertionError(f"no Tab leads to {words or name!r} on {self.browser.current_url}: {passed}")

    def walk(self) -> int:
        """Through everything that can be reached, once around: how many stops. A trap never comes back to where it began."""
        stops: list[int] = []
        self.key("Tab")
        for _ in range(400):
            found = self.focus()
            if stops and (found is None or found["place"] == stops[0]):
                return len(stops)
            if found is not None:
                assert found["place"] not in stops, f"caught at {found} on {self.browser.current_url}"
                stops.append(found["place"])
            self.key("Tab")
        raise AssertionError(f"Tab never comes around on {self.browser.current_url}")

    # --- how a page looks ---------------------------------------------------------------------------

    def looks(self, *, dark: bool, size: tuple[int, int]) -> None:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
        self._sized(*size)

    def shoot(self, name: str) -> None:
        if SCREENSHOTS:
            height = self.browser.execute_script("return document.documentElement.scrollHeight")
            width = self.browser.execute_script("return document.documentElement.clientWidth")
            self._sized(width, min(height, 3000))
            self.browser.save_screenshot(str(Path(SCREENSHOTS) / f"{name}.png"))

    def faults(self, path: str, name: str) -> list[str]:
        """What is wrong with a page in light and dark, wide and narrow: loaded once, and looked at four times."""
        self.looks(dark=False, size=WIDE)
        self.visit(path)
        found = []
        for dark, size in ((False, WIDE), (True, WIDE), (True, NARROW), (False, NARROW)):
            self.looks(dark=dark, size=size)
            self.shoot(f"{name}-{'dark' if dark else 'light'}-{size[0]}")
            self._sized(*size)
            # Colours glide from light to dark, and one that is on its way is no page's.
            eventually(lambda dark=dark: self.browser.execute_script(_SETTLED, dark), WAIT_SECONDS)  # type: ignore[misc]
            width = self.browser.execute_script("return document.scrollingElement.scrollWidth")
            found += [f"{path} is {width} px wide at {size[0]}"] * (width > size[0])
            if (dark, size) == (False, WIDE):
                self.browser.execute_script(_SPECIMENS)
                axe.bring(self.browser)
            # Names, roles and order are the same in the dark: there colours alone are looked at.
            found += [
                f"{path} {'dark' if dark else 'light'} {size[0]}: {each}"
                for each in axe.serious(self.browser, colours_alone=dark)
            ]
        self._listen()
        return found

    def _sized(self, width: int, height: int) -> None:
        self.browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False},
        )

    def _listen(self) -> None:
        self.complaints += [
            entry["message"] for entry in self.browser.get_log("browser")  # type: ignore[no-untyped-call]
            if "Content Security Policy" in entry["message"] or "Uncaught" in entry["message"]
        ]  # fmt: skip

    # --- what happens elsewhere ---------------------------------------------------------------------

    def account(self) -> Any:
        return self.asks("POST", "/accounts/create")

    def topup(self, account: Any, method: str, usd: str) -> Any:
        wish = {"amount": usd, "currency": "USD"}
        return self.asks("POST", f"/topup/create/{method}", {"x-credit-id": account["credit_id"]}, wish)

    def asks(self, method: str, path: str, headers: Any = None, body: Any = None) -> Any:
        """The API, as a program."""
        url = f"{self.program.base_url}{path}"
        with httpx.Client(trust_env=False, timeout=15) as client:
            return client.request(method, url, headers=headers, json=body).raise_for_status().json()

    def wallet(self) -> str:
        """The connection of the sandbox's wallet."""
        url = f"http://127.0.0.1:{self.program.sandbox_port}/sandbox/wallet"
        return str(httpx.get(url, trust_env=False, timeout=15).raise_for_status().json()["uri"])

    def drive(self, invoice_id: str, act: str, **body: Any) -> None:
        """The sandbox's payer and its chain."""
        url = f"http://127.0.0.1:{self.program.sandbox_port}/sandbox/invoices/{invoice_id}/{act}"
        httpx.post(url, json=body, trust_env=False, timeout=15).raise_for_status()


@pytest.fixture
def person(browser: webdriver.Chrome, program: Program) -> Iterator[Person]:
    """With an empty jar. Whatever a test does, no page may break the policy."""
    browser.delete_all_cookies()
    made = Person(browser, program)
    made.looks(dark=False, size=WIDE)
    yield made
    assert made.complaints == []
