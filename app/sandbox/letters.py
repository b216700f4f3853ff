"""A receiver of notices: it keeps what is posted to it, checks the signature as Standard Webhooks has it, and shows it.

It is told the signing secret, as any receiver is by whoever set its address. In memory: a restart forgets.
"""

import base64
import binascii
import hashlib
import hmac
import json
import time
from collections import deque
from collections.abc import Mapping
from html import escape
from typing import Any, Final, TypeAlias

from litestar import MediaType, Response, Router, get, post
from litestar.di import NamedDependency
from msgspec import Struct

from .errors import Invalid
from .given import Call
from .paper import HEADERS, moment, page
from .wire import read_object

SHOWN: Final = 100
TOLERANCE_SECONDS: Final = 300
"""How old a timestamp may be: a notice that somebody recorded is not told again later."""


class Letter(Struct, frozen=True):
    """A notice as it came. `at` is in unix seconds, `copies` how often it came before."""

    id: str
    type: str
    body: str
    is_signed: bool
    at: int
    copies: int


class Letters:
    """What came, newest first."""

    def __init__(self) -> None:
        self.kept: deque[Letter] = deque(maxlen=SHOWN)
        self._secrets: deque[bytes] = deque(maxlen=20)

    def trust(self, secret: str) -> None:
        """Letters signed with this are real. Raises Invalid."""
        try:
            self._secrets.append(base64.b64decode(secret.removeprefix("whsec_"), validate=True))
        except (binascii.Error, ValueError):
            raise Invalid(("secret", "not whsec_ and base64")) from None

    def take(self, headers: Mapping[str, str], body: bytes) -> Letter:
        """Raises Invalid for what is no notice."""
        told = read_object(body)
        letter_id = headers.get("webhook-id", "")
        copies = sum(each.id == letter_id for each in self.kept)
        letter = Letter(
            letter_id, str(told.get("type", "")), body.decode("utf-8", "replace"), self._is_signed(headers, body), int(time.time()), copies
        )  # fmt: skip
        self.kept.appendleft(letter)
        return letter

    def _is_signed(self, headers: Mapping[str, str], body: bytes) -> bool:
        stamp = headers.get("webhook-timestamp", "")
        if not (stamp.isascii() and stamp.isdigit() and abs(time.time() - int(stamp)) <= TOLERANCE_SECONDS):
            return False
        content = f"{headers.get('webhook-id', '')}.{stamp}.".encode() + body
        wanted = {
            "v1," + base64.b64encode(hmac.digest(secret, content, hashlib.sha256)).decode() for secret in self._secrets
        }
        return any(each in wanted for each in headers.get("webhook-signature", "").split(" "))


TheLetters: TypeAlias = NamedDependency[Letters]


@post("/notices", status_code=204)
async def receive(request: Call, letters: TheLetters) -> None:
    """Where an account's `webhook_url` leads in `make run`."""
    letters.take(request.headers, await request.body())


@get("/notices", media_type=MediaType.HTML)
async def letters_page(letters: TheLetters) -> Response[str]:
    rows = "".join(map(_row, letters.kept))
    table = (
        f"<table><thead><tr><th>When</th><th>What</th><th>Signature</th><th>Said</th></tr></thead><tbody>{rows}</tbody></table>"
        if rows
        else "<p class=quiet>No notice has come yet.</p>"
    )
    main = f"""<main class=wide><section class=card><header><div><h1>Notices</h1>
<p class=quiet>What the demo's account was told: Satmeter posts its notices here, signed.</p></div></header></section>{table}</main>"""
    return Response(page("Notices", main, here="Notices", is_wide=True), headers=HEADERS, media_type=MediaType.HTML)


@get("/sandbox/notices")
async def list_letters(letters: TheLetters) -> list[dict[str, Any]]:
    """The same for programs."""
    return [
        {
            "id": each.id,
            "type": each.type,
            "signed": each.is_signed,
            "copies": each.copies,
            "body": json.loads(each.body),
        }
        for each in letters.kept
    ]


@post("/sandbox/notices/secret", status_code=204)
async def trust(request: Call, letters: TheLetters) -> None:
    letters.trust(str(read_object(await request.body()).get("secret", "")))


router = Router("/", route_handlers=[receive, letters_page, list_letters, trust])


def _row(letter: Letter) -> str:
    verdict = "valid" if letter.is_signed else "not signed by who it should be"
    again = f", {letter.copies + 1} times" if letter.copies else ""
    return f"<tr><td>{moment(letter.at)}</td><td>{escape(letter.type)}{again}</td><td>{verdict}</td><td class=long>{escape(letter.body)}</td></tr>"
