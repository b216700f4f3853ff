"""Who is looking at the pages: a sealed cookie, proved anew by every request; and the token that every form bears.

The cookie holds the credential that was shown, sealed with SEALING_KEYS: nobody but us can read it, and every request asks
the database whether it still holds, so that a revoked key or a rotated credit id ends its session at once. It never opens
the API, which looks at no cookie. Each role has a cookie of its own: an operator may be a customer too.

A `__Host-` cookie must be Secure. Chromium and Firefox take and send one on plain http where the host is this machine's own
(127.0.0.1, localhost: tried with Chromium 156); elsewhere plain http has a cookie without either, and production has https.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias
from urllib.parse import urlsplit

import msgspec
from litestar.datastructures import Cookie

from app.kernel.db import new_id
from app.kernel.security import Admin, Caller, UnsealError, equal
from app.kernel.settings import Settings
from app.keys.verify import MANAGES_KEYS

Role: TypeAlias = Literal["customer", "operator", "visitor"]
SESSION_SECONDS: Final = 12 * 3600


@dataclass(frozen=True, slots=True)
class Session:
    """What a cookie says. `secret` is the credential that was shown, empty for a visitor who showed none."""

    role: Role
    nonce: str
    began_at: int
    secret: str = field(repr=False, default="")

    @classmethod
    def begun(cls, role: Role, secret: str = "") -> "Session":
        return cls(role, new_id().hex, int(time.time()), secret)


@dataclass(frozen=True, slots=True)
class Customer:
    """A signed-in customer: whose account, with which of its credentials, which may be narrowed by scopes."""

    caller: Caller
    session: Session

    @property
    def is_owner(self) -> bool:
        """Whether this is the credit id, which may do everything on its account."""
        return self.caller.key_id is None

    @property
    def manages_keys(self) -> bool:
        """Whether this is the credit id, or a key that was given the scope of it: it has what it was not told of, but this."""
        return self.is_owner or (self.caller.scopes is not None and MANAGES_KEYS in self.caller.scopes)

    def may(self, scope: str) -> bool:
        return self.caller.scopes is None or scope in self.caller.scopes


@dataclass(frozen=True, slots=True)
class Operator:
    """A signed-in operator: an admin token, which may be narrowed by scopes."""

    admin: Admin
    session: Session

    def may(self, scope: str) -> bool:
        return self.admin.scopes is None or scope in self.admin.scopes


class SignedOut(Exception):
    """There is no session of this role, it is over, or its credential was revoked. `had_one` tells the two apart."""

    def __init__(self, role: Role, *, had_one: bool = False) -> None:
        super().__init__()
        self.role, self.had_one = role, had_one


def cookie_name(settings: Settings, role: Role) -> str:
    return f"{'__Host-' if is_secure(settings) else ''}{role}"


def is_secure(settings: Settings) -> bool:
    """Whether browsers take a Secure cookie from us."""
    parts = urlsplit(settings.public_url)
    host = parts.hostname or ""
    return parts.scheme == "https" or host in ("localhost", "::1") or host.startswith("127.")


def set_cookie(settings: Settings, session: Session) -> Cookie:
    """What begins this session."""
    payload = msgspec.json.encode((session.nonce, session.began_at, session.secret))
    sealed = settings.sealer.seal(payload, _sealed_as(session.role))
    return _cookie(settings, session.role, sealed, SESSION_SECONDS)


def end_cookie(settings: Settings, role: Role) -> Cookie:
    """What ends it."""
    return _cookie(settings, role, "", 0)


def read_session(
    settings: Settings, cookies: Mapping[str, str], role: Role, now: float | None = None
) -> Session | None:
    """The session of this role, None without one, for one that is over, and for a cookie that is not ours."""
    sealed = cookies.get(cookie_name(settings, role), "")
    try:
        payload = settings.sealer.open(sealed, _sealed_as(role))
        nonce, began_at, secret = msgspec.json.decode(payload, type=tuple[str, int, str])
    except (UnsealError, msgspec.MsgspecError):
        return None
    age_seconds = (time.time() if now is None else now) - began_at
    return Session(role, nonce, began_at, secret) if age_seconds < SESSION_SECONDS else None


def csrf_token(settings: Settings, session: Session) -> str:
    """What every form of this session must bear; tells nothing of the session or its secret."""
    return settings.pepper.tag(b"csrf", session.role.encode(), session.nonce.encode()).hex()


def is_csrf_token(settings: Settings, session: Session, text: str) -> bool:
    return equal(csrf_token(settings, session).encode(), text.encode())


def _cookie(settings: Settings, role: Role, value: str, seconds: int) -> Cookie:
    return Cookie(
        key=cookie_name(settings, role), value=value, path="/", max_age=seconds, secure=is_secure(settings), httponly=True, samesite="strict"
    )  # fmt: skip


def _sealed_as(role: Role) -> str:
    return f"session/{role}"
