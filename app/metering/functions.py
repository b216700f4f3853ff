"""functions.sql as the program knows it: what to install, how each verb is called, what it is told of a call, and answers."""

import hashlib
import re
import sys
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final, LiteralString

import msgspec

_FUNCTION: Final = re.compile(
    r"^CREATE OR REPLACE FUNCTION (?P<name>\w+)\((?P<parameters>.*?)\)\s+RETURNS (?:TABLE \((?P<columns>.*?)\)|\w+(?:\[\])?)"
    r".*?AS \$\$(?P<body>.*?)\$\$;$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the file: its whole text, and what stands in its signature."""

    name: str
    text: str
    body: str
    parameters: Mapping[str, str]
    """Name without its `p_`, and type; those that may be left out are."""
    columns: Mapping[str, str]
    """What a row of it has, and the types."""

    @property
    def fingerprint(self) -> str:
        """What `migrate` leaves with an installed function, to see whether it is this one."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def call(self, prefix: str = "") -> LiteralString:
        """The call as SQL, each parameter named as the function names it, after `prefix`."""
        arguments = ", ".join(f"%({prefix}{name})s::{kind}" for name, kind in self.parameters.items())
        return f"{self.name}({arguments})"


def _declared(text: str | None) -> dict[str, str]:
    parts = (part.split(None, 1) for part in (text or "").split(",") if " DEFAULT " not in part and part.strip())
    return {sys.intern(name.removeprefix("p_")): kind.strip() for name, kind in parts}


FUNCTIONS: Final = {
    found["name"]: Function(
        found["name"], found[0], found["body"], _declared(found["parameters"]), _declared(found["columns"])
    )
    for found in _FUNCTION.finditer(Path(__file__).with_suffix(".sql").read_text())
}


BY_ACCOUNT: Final = "by_account"
"""The schema of the wrappers."""


def _of_account(function: Function) -> Function:
    """The same verb for calls of one account, whose id comes first: what Citus delegates by."""
    given = {"account": "uuid", **function.parameters}
    name = f"{BY_ACCOUNT}.{function.name}"
    parameters = ", ".join(f"p_{each} {kind}" for each, kind in given.items())
    columns = ", ".join(f"{each} {kind}" for each, kind in function.columns.items())
    passed = ", ".join(f"p_{each}" for each in function.parameters)
    body = f"\nBEGIN\n    RETURN QUERY SELECT * FROM public.{function.name}({passed});\nEND "
    text = (
        f"CREATE OR REPLACE FUNCTION {name}({parameters})\nRETURNS TABLE ({columns})\nLANGUAGE plpgsql AS $${body}$$;"
    )
    return Function(name, text, body, given, function.columns)


OF_ACCOUNT: Final = {name: _of_account(function) for name, function in FUNCTIONS.items() if function.columns}
"""By the name of a function that answers with rows, its wrapper for one account: METER_BATCH=account."""


def asking(name: str, *, by_account: bool) -> LiteralString:
    """A function's call as a statement; `by_account` its wrapper's, which takes the account's id too."""
    return f"SELECT * FROM {(OF_ACCOUNT if by_account else FUNCTIONS)[name].call()}"


# --- what a verb is told of a call: a field for each parameter of its function, but `lock` and `wait` --------------------
#
# Structs, which take a fifth of a dict's memory: thousands of calls may wait, and all of each is read again then.


class CallParams(msgspec.Struct, frozen=True, gc=False):
    """Of every call, and all that release is told."""

    account_id: uuid.UUID
    hold_id: uuid.UUID


class ExtendParams(CallParams, frozen=True, gc=False):
    ttl_seconds: int
    captured_nusd: int


class AuthorizeParams(CallParams, frozen=True, gc=False):
    key_id: uuid.UUID
    service: str
    request_id: str
    request_hash: bytes
    amount_nusd: int
    min_nusd: int
    model: str | None
    names: str | None
    endpoint: str | None
    price_version: int | None
    attributes: dict[str, str] | None
    made_at: datetime
    ttl_seconds: int
    on_expiry: str
    synchronous_commit: str


class ChargeParams(CallParams, frozen=True, gc=False):
    """Also what settle is told: it needs no money, and a call under a hold has no fingerprint."""

    key_id: uuid.UUID
    service: str
    request_id: str
    request_hash: bytes | None
    window_start: datetime | None
    needed_nusd: int | None
    model: str | None
    names: str | None
    endpoint: str | None
    charge_id: uuid.UUID
    cost_nusd: int
    at_least_hold: bool
    outcome: str
    served_model: str | None
    provider: str | None
    upstream_id: str | None
    upstream_model: str | None
    provider_cost_nusd: int | None
    latency_ms: int | None
    ttft_ms: int | None
    units: dict[str, Any] | None
    price_version: int | None
    lines: dict[str, Any] | None
    flags: str | None


# --- what a verb answers of a call: a field for each column of its function, but `item`, in their order ------------------


class CallAnswer(msgspec.Struct, frozen=True, gc=False):
    """Of any verb."""


class Bounded(CallAnswer, frozen=True, gc=False):
    """What the money says, and what bounds the key: the limit that leaves it the least, or of a call that is too dear what one
    may cost. Of a charge that was made, nothing of it is said."""

    verdict: str | None
    posted_nusd: int
    held_nusd: int
    floor_nusd: int
    limit_nusd: int | None
    spent_nusd: int | None
    key_held_nusd: int | None
    reset_at: datetime | None
    bound: str | None

    @property
    def left_nusd(self) -> int | None:
        """What the limit leaves; None where there is none, or it is one call's alone."""
        if self.limit_nusd is None or self.spent_nusd is None or self.key_held_nusd is None:
            return None
        return self.limit_nusd - self.spent_nusd - self.key_held_nusd


class AuthorizeAnswer(Bounded, frozen=True, gc=False):
    window_start: datetime
    expires_at: datetime
    made_at: datetime
    amount_nusd: int
    price_version: int | None
    state: str | None


class ChargeAnswer(Bounded, frozen=True, gc=False):
    cost_nusd: int
    balance_after_nusd: int
    held_after_nusd: int
    flags: str
    is_low: bool


class VerifyAnswer(Bounded, frozen=True, gc=False):
    available_nusd: int
    scopes: list[list[str] | None]
    allowed_models: list[list[str] | None]


class ReleaseAnswer(CallAnswer, frozen=True, gc=False):
    state: str | None
    captured_nusd: int
    posted_nusd: int
    held_nusd: int


class ExtendAnswer(CallAnswer, frozen=True, gc=False):
    state: str | None
    amount_nusd: int
    expires_at: datetime
    posted_nusd: int
    held_nusd: int
    floor_nusd: int
