"""A form as its door sees it: fields as text, and the idempotency of its submit."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
from litestar import Request
from litestar.datastructures import UploadFile

from app.console.session import Session, is_csrf_token
from app.kernel.db import Database
from app.kernel.errors import InvalidField, MissingScope
from app.kernel.idempotency import Once
from app.kernel.money import JsonNumber
from app.kernel.ratelimit import blocks_of
from app.kernel.settings import Settings

_NOT_THE_WISH: Final = frozenset({"csrf", "once"})
_MOST_CHARACTERS: Final = 8000


class Forged(MissingScope):
    """This form is not from a page of yours, or that page is too old: go back, load it again, and send it once more."""


@dataclass(frozen=True, slots=True)
class Form:
    """What was filled in. Fields that are absent are empty texts."""

    fields: Mapping[str, tuple[str, ...]]
    once: Once
    files: Mapping[str, tuple[str, bytes]] = field(default_factory=dict)

    def text(self, name: str) -> str:
        return next(iter(self.fields.get(name, ())), "").strip()

    def texts(self, name: str) -> tuple[str, ...]:
        return self.fields.get(name, ())

    def has(self, name: str) -> bool:
        return bool(self.text(name))

    def file(self, name: str) -> tuple[str, bytes]:
        """A file's name and its bytes. Raises InvalidField where none was chosen."""
        if name not in self.files or not self.files[name][1]:
            raise InvalidField("Choose a file first.", param=name)
        return self.files[name]

    def number(self, name: str) -> JsonNumber:
        """As a program would have sent it, null where nothing was filled in, for the API's own reading."""
        return msgspec.Raw(msgspec.json.encode(self.text(name))) if self.has(name) else msgspec.Raw(b"null")


async def read_form(
    request: Request[Any, Any, Any], settings: Settings, db: Database, session: Session, who: str, payer: str
) -> Form:
    """Raises Forged for a form that does not bear the session's token; nothing of it was looked at then."""
    sent = await request.form()
    fields: dict[str, tuple[str, ...]] = {}
    files: dict[str, tuple[str, bytes]] = {}
    for name, value in sent.multi_items():
        if isinstance(value, UploadFile):  # as large as its door takes bodies
            files[name] = _printable(value.filename), await value.read()
            continue
        if not isinstance(value, str) or len(value) > _MOST_CHARACTERS or "\x00" in value:
            raise InvalidField(f"{name[:40]} is no text that a form has", param=name[:40])
        fields[name] = (*fields.get(name, ()), value)
    if not is_csrf_token(settings, session, next(iter(fields.get("csrf", ())), "")):
        raise Forged
    wish = [(name, values) for name, values in sorted(fields.items()) if name not in _NOT_THE_WISH]
    wish += [(name, (hashlib.sha256(body).hexdigest(),)) for name, (_, body) in sorted(files.items())]
    key = next(iter(fields.get("once", ())), "")
    return Form(
        fields,
        Once(
            db, settings.pepper, settings.sealer,
            scope=f"{request.method} {request.url.path}\x00{who}", secret=session.secret, payer=payer,
            key=key if 16 <= len(key) <= 64 and key.isalnum() and key.isascii() else None,
            request_hash=hashlib.sha256(msgspec.json.encode(wish)).digest(),
        ),
        files,
    )  # fmt: skip


def payer_of(request: Request[Any, Any, Any]) -> str:
    """On whom is counted what a stranger's forms keep."""
    return f"address/{blocks_of(request.client.host if request.client else 'unknown')[-1][0]}"


def _printable(name: str) -> str:
    """A file's name as it can stand in the books: its last part, one line."""
    return (
        "".join(letter for letter in name.replace("\\", "/").rpartition("/")[2] if letter.isprintable())[:200]
        or "a file"
    )
