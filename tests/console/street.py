"""A browser of a test's own over the app's door: keeps cookies, fills in forms with their tokens, follows one redirect."""

import re
from dataclasses import dataclass, field
from html import unescape
from typing import Any
from urllib.parse import urlencode

from tests.door import Answer, Door

FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@dataclass(slots=True)
class Visitor:
    """Somebody with a browser. `cookies` is their jar."""

    door: Door
    cookies: dict[str, str] = field(default_factory=dict)

    async def get(self, path: str, **headers: str) -> Answer:
        return self._kept(await self.door.ask("GET", path, self._headers() | headers))

    async def post(self, path: str, fields: dict[str, Any], **headers: str) -> Answer:
        body = urlencode(fields, doseq=True).encode()
        return self._kept(await self.door.ask("POST", path, self._headers() | FORM | headers, body))

    async def submit(self, page: str, action: str, **fields: Any) -> Answer:
        """Load a page, fill in its form with this action, and send it."""
        return await self.post(action, hidden_of((await self.get(page)).body.decode(), action) | fields)

    async def sign_in(self, credential: str) -> Answer:
        return await self.submit("/console/sign-in", "/console/sign-in", credential=credential)

    async def sign_in_as_operator(self, token: str) -> Answer:
        return await self.submit("/operator/sign-in", "/operator/sign-in", token=token)

    def _headers(self) -> dict[str, str]:
        return {"Cookie": "; ".join(f"{name}={value}" for name, value in self.cookies.items())} if self.cookies else {}

    def _kept(self, answer: Answer) -> Answer:
        for line in answer.cookies:
            name, _, value = line.partition(";")[0].partition("=")
            self.cookies[name] = value.strip('"')
            if "max-age=0" in line.lower():
                del self.cookies[name]
        return answer


def hidden_of(page: str, action: str) -> dict[str, str]:
    """The hidden fields of the page's form that goes to this address."""
    found = re.search(rf'<form[^>]*action="{re.escape(action)}"[^>]*>(.*?)</form>', page, re.DOTALL)
    assert found, f"no form goes to {action}"
    return {name: unescape(value) for name, value in re.findall(r'<input type="hidden" name="([^"]*)" value="([^"]*)"', found[1])}  # fmt: skip
