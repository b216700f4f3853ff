"""Bad input on every route gets its documented 4xx, never a 500, and changes nothing.

The routes come from the app itself: one that is added later fails here until it is in ROUTES.
"""

import asyncio
import base64
import hashlib
import json
import re
import unicodedata
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final, get_args
from urllib.parse import quote

import msgspec
import pytest
from litestar import Litestar
from litestar.routes import HTTPRoute
from openapi_schema_validator import OAS31Validator

from app.admin.api.prices import MAX_FILE_BYTES
from app.kernel.money import ReportedNumber
from app.kernel.security import new_secret
from app.kernel.settings import Settings
from app.main import create_app
from app.metering.api.reports import MAX_BODY_BYTES, CloudEvent
from app.metering.api.wire import SettleRequest
from app.pricing.starter import ensure_starter
from app.topups.receipt import receipt_token
from app.wiring import House
from tests.door import JSON, Answer, Books, Door, idempotency_key, opened, refusal_faults
from tests.rig import Customer, signature
from tests.wallets import NWC_URL, SECRET

LIMIT: Final = 64 * 1024
Headers = Mapping[str, str | bytes]


@dataclass(frozen=True, slots=True)
class Route:
    """How one route is asked well: who may ask, and with which body. `$name` is filled in by the world."""

    who: str = "nobody"
    body: Mapping[str, Any] | None = None
    refuses_unknown_fields: bool = False
    has_effect_once: bool = False
    """Takes an Idempotency-Key."""
    body_may_be_absent: bool = False
    takes_any_address: bool = False
    """And OPTIONS: what is under it is a gateway's client's own."""
    takes_any_path: bool = False
    """Whatever else stands after it is a name."""
    query: str = ""
    limit: int = LIMIT
    """How many bytes a body may have."""
    reads: type[msgspec.Struct] | None = None
    """What the handler reads by itself from a body that it takes raw: one of these, or a list of them."""
    is_like_another: bool = False
    """Reads the same as a route that is here: what is in a body need not be spoilt twice."""


_WORK: Final = {
    "cost_usd": 0.01, "outcome": "completed", "usage": {"input_tokens": 5}, "usage_estimated": False, "served_model": "m",
    "provider": "p", "features_used": ["web"], "upstream_id": "u", "upstream_model": "u", "provider_cost_usd": 0.01, "latency_ms": 5, "ttft_ms": 2,
    "attributes": {"quality": "hd"},
}  # fmt: skip
_CALL: Final = {"request_id": "$new", "api_key": "$api_key", "endpoint": "/chat", "model": "m", "max_cost_usd": "0.02"}
_EVENT: Final = {
    "specversion": "1.0", "id": "$new", "source": "/gateway/1", "type": "ai.usage", "subject": "s", "data": {**_WORK, "hold_id": "$hold_id", "attributes": {"size": "1024x1024"}},
}  # fmt: skip
_KEY: Final = {
    "name": "$new", "usage_limit_usd": 1.5, "reset_period": "daily", "expire_at": "2999-01-01T00:00:00Z",
    "scopes": ["spend"], "allowed_models": ["m"], "disabled": False,
    "max_usd_per_call": 1.5, "requests_per_minute": 60,
}  # fmt: skip
_MANAGED_KEY: Final = {
    "name": "$new", "limit": 1.5, "limit_reset": "daily", "expires_at": "2999-01-01T00:00:00Z", "disabled": False,
}  # fmt: skip

_WALLET: Final = {"nwc_url": NWC_URL, "threshold_usd": 5, "topup_amount_usd": 20, "max_per_day_usd": 100}

_BECAUSE: Final = Route(
    "admin", {"reason": "because"}, refuses_unknown_fields=True, has_effect_once=True, body_may_be_absent=True
)
_PRICE_FILE: Final = {
    "format": "satmeter-prices-1", "fees": {"web": "0.02"},
    "models": [{"model": "m", "provider": "p", "mode": "chat", "usd_per_million": {"input": "0.15", "output": "0.60"}}],
}  # fmt: skip


class PriceFileOfTests(msgspec.Struct):
    """The outermost level of the one we send; what a price file may be is its importer's to tell."""

    format: Any = None
    fees: Any = None
    models: Any = None


NPUB: Final = "npub1dergggklka99wwrs92yz8wdjs952h2ux2ha2ed598ngwu9w7a6fsh9xzpc"
ROUTES: Final[Mapping[tuple[str, str], Route]] = {
    ("GET", "/llms.txt"): Route(),
    ("GET", "/openapi.json"): Route(),
    ("GET", "/health/live"): Route(),
    ("GET", "/health/ready"): Route(),
    ("GET", "/metrics"): Route(),
    ("POST", "/accounts/create"): Route(body={"recovery": False, "amount": None, "currency": "USD"}, has_effect_once=True, body_may_be_absent=True),
    ("POST", "/accounts/rotate"): Route(
        "owner", {"overlap_seconds": 0}, has_effect_once=True, body_may_be_absent=True
    ),
    ("POST", "/accounts/recover"): Route(body={"recovery_code": "$recovery_code", "revoke_keys": False}, has_effect_once=True),
    ("GET", "/accounts/recovery"): Route("owner"),
    ("POST", "/accounts/recovery/code"): Route("owner", {"recovery_code": None}, has_effect_once=True, body_may_be_absent=True),
    ("DELETE", "/accounts/recovery/code"): Route("owner"),
    ("POST", "/accounts/recovery/nostr"): Route("owner", has_effect_once=True),
    ("DELETE", "/accounts/recovery/nostr"): Route("owner"),
    ("GET", "/accounts/events"): Route("owner"),
    ("DELETE", "/accounts"): Route("owner"),
    ("PUT", "/notices"): Route("owner", {"webhook_url": None, "npub": NPUB, "low_balance_usd": 5, "events": ["balance.low"]}),
    ("GET", "/notices"): Route("owner"),
    ("DELETE", "/notices"): Route("owner"),
    ("POST", "/notices/secret"): Route("owner", {"overlap_seconds": 60}, has_effect_once=True, body_may_be_absent=True),
    ("POST", "/notices/test"): Route("owner", has_effect_once=True),
    ("GET", "/notices/deliveries"): Route("owner"),
    ("POST", "/notices/deliveries/{notice_id:str}/replay"): Route("owner", has_effect_once=True),
    ("POST", "/credits/balance"): Route("anybody", {"credit_id": "$credit_id"}, body_may_be_absent=True),
    ("GET", "/credits/balance"): Route("anybody"),
    ("POST", "/credits/check-or-create"): Route(body={"credit_id": "$credit_id"}),
    ("GET", "/queries/history"): Route("anybody"),
    ("GET", "/activity"): Route("anybody"),
    ("GET", "/activity/{charge_id:str}/explain"): Route("anybody"),
    ("GET", "/api/v1/credits"): Route("anybody"),
    ("GET", "/api/v1/key"): Route("key"),
    ("GET", "/api/v1/auth/key"): Route("key"),
    ("GET", "/api/v1/activity"): Route("anybody"),
    ("GET", "/api/v1/generation"): Route("anybody", query="id=$charge_id"),
    ("GET", "/api/v1/models"): Route(),
    ("GET", "/api/v1/models/{model_id:path}"): Route(takes_any_path=True),
    ("GET", "/api/v1/keys"): Route("owner"),
    ("POST", "/api/v1/keys"): Route("owner", _MANAGED_KEY, has_effect_once=True),
    ("GET", "/api/v1/keys/{key_hash:str}"): Route("owner"),
    ("PATCH", "/api/v1/keys/{key_hash:str}"): Route("owner", _MANAGED_KEY),
    ("DELETE", "/api/v1/keys/{key_hash:str}"): Route("owner"),
    ("GET", "/keys"): Route("owner"),
    ("POST", "/keys"): Route("owner", _KEY, has_effect_once=True),
    ("GET", "/keys/{key_id:str}"): Route("owner"),
    ("PATCH", "/keys/{key_id:str}"): Route("owner", _KEY),
    ("DELETE", "/keys/{key_id:str}"): Route("owner"),
    ("GET", "/topup/payment-methods"): Route(),
    ("GET", "/v1/models"): Route(),
    ("GET", "/models"): Route(),
    ("GET", "/router/models"): Route(),
    ("GET", "/v1/media/models"): Route(),
    ("GET", "/v1/models/{model_id:path}"): Route(takes_any_path=True),
    ("GET", "/models/{model_id:path}"): Route(takes_any_path=True),
    ("GET", "/v1/prices"): Route(),
    ("POST", "/topup/create/{method:str}"): Route("anybody", {"amount": 20, "currency": "USD"}, has_effect_once=True),
    ("GET", "/topup/status/{invoice_id:str}"): Route("anybody"),
    ("GET", "/topups"): Route("anybody"),
    ("POST", "/topup/claim"): Route("anybody", {"txid": "$txid"}, has_effect_once=True),
    ("GET", "/topup/receipt/{invoice_id:str}"): Route("anybody"),
    ("POST", "/nwc-auto-topup/connect"): Route("owner", _WALLET, has_effect_once=True),
    ("GET", "/nwc-auto-topup"): Route("owner"),
    ("DELETE", "/nwc-auto-topup/connection"): Route("owner"),
    ("GET", "/nwc-auto-topup/attempts"): Route("owner"),
    ("POST", "/webhooks/{backend:str}"): Route("backend"),
    ("POST", "/v1/meter/authorize"): Route(
        "service", {**_CALL, "ttl_seconds": 60, "features": ["web"], "mode": "strict", "min_output_tokens": 1, "max_hold_usd": 0.02, "on_expiry": "captured"}, refuses_unknown_fields=True
    ),
    ("POST", "/v1/meter/verify"): Route("service", {"api_key": "$api_key", "model": "m"}, refuses_unknown_fields=True),
    ("POST", "/v1/meter/extend"): Route(
        "service", {"hold_id": "$hold_id", "ttl_seconds": 60, "captured_usd": 0.01}, refuses_unknown_fields=True
    ),
    ("POST", "/v1/meter/settle"): Route("service", {**_WORK, "hold_id": "$hold_id"}, refuses_unknown_fields=True),
    ("POST", "/v1/meter/settle/batch"): Route(
        "service", {"settles": [{**_WORK, "hold_id": "$hold_id"}]}, refuses_unknown_fields=True, limit=MAX_BODY_BYTES
    ),
    ("POST", "/v1/meter/events"): Route("service", _EVENT, limit=MAX_BODY_BYTES, reads=CloudEvent),
    ("POST", "/v1/meter/refund"): Route(
        "service", {"charge_id": "$charge_id", "amount_usd": 0.01, "reason": "r"}, refuses_unknown_fields=True
    ),
    ("POST", "/v1/meter/release"): Route("service", {"hold_id": "$hold_id", "reason": "r"}, refuses_unknown_fields=True),
    ("POST", "/v1/meter/charge"): Route("service", {**_CALL, **_WORK}, refuses_unknown_fields=True),
    **{
        (method, "/v1/meter/ext-authz" + path): Route("gateway", takes_any_address=True)
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD")
        for path in ("", "/{path:path}")
    },
    ("GET", "/admin/accounts"): Route("admin"),
    ("POST", "/admin/accounts"): Route("admin", has_effect_once=True),
    ("POST", "/admin/accounts/search"): Route("admin", {"q": "$api_key"}, refuses_unknown_fields=True, has_effect_once=True),
    ("GET", "/admin/accounts/{account_id:str}"): Route("admin"),
    ("POST", "/admin/accounts/{account_id:str}/freeze"): _BECAUSE,
    ("POST", "/admin/accounts/{account_id:str}/unfreeze"): replace(_BECAUSE, is_like_another=True),
    ("POST", "/admin/accounts/{account_id:str}/rotate"): replace(_BECAUSE, is_like_another=True),
    ("POST", "/admin/accounts/{account_id:str}/credit"): Route(
        "admin", {"amount_usd": 1, "reason": "because", "dry_run": False}, refuses_unknown_fields=True, has_effect_once=True
    ),
    ("POST", "/admin/accounts/{account_id:str}/debit"): Route(
        "admin", {"amount_usd": 1, "reason": "because", "dry_run": False, "below_floor": False}, refuses_unknown_fields=True, has_effect_once=True
    ),
    ("GET", "/admin/accounts/{account_id:str}/keys"): Route("admin"),
    ("POST", "/admin/accounts/{account_id:str}/keys"): Route("admin", _KEY, refuses_unknown_fields=True, has_effect_once=True),
    ("GET", "/admin/accounts/{account_id:str}/keys/{key_id:str}"): Route("admin"),
    ("PATCH", "/admin/accounts/{account_id:str}/keys/{key_id:str}"): Route("admin", _KEY, refuses_unknown_fields=True, is_like_another=True),
    ("DELETE", "/admin/accounts/{account_id:str}/keys/{key_id:str}"): Route("admin"),
    ("POST", "/admin/accounts/{account_id:str}/keys/{key_id:str}/disable"): replace(_BECAUSE, is_like_another=True),
    ("POST", "/admin/accounts/{account_id:str}/keys/{key_id:str}/enable"): replace(_BECAUSE, is_like_another=True),
    ("POST", "/admin/accounts/{account_id:str}/keys/{key_id:str}/revoke"): replace(_BECAUSE, is_like_another=True),
    ("POST", "/admin/accounts/{account_id:str}/close"): replace(_BECAUSE, is_like_another=True),
    ("GET", "/admin/prices"): Route("admin"),
    ("GET", "/admin/prices/rules"): Route("admin"),
    ("GET", "/admin/prices/{version:str}/diff"): Route("admin"),
    ("POST", "/admin/prices/import"): Route("admin", _PRICE_FILE, has_effect_once=True, limit=MAX_FILE_BYTES, reads=PriceFileOfTests),
    ("POST", "/admin/prices/{version:str}/activate"): Route(
        "admin", {"max_drop_percent": 50, "allow_drops": True, "max_leap_percent": 400, "allow_leaps": True}, refuses_unknown_fields=True,
        has_effect_once=True, body_may_be_absent=True,
    ),
    ("POST", "/admin/prices/overrides"): Route(
        "admin", {"model": "m", "dimension": "input", "price_usd": "0.5", "per_units": 1000, "provider": "p", "min_input_tokens": 0, "attributes": "quality=hd", "effective_from": "2999-01-01T00:00:00Z"},
        refuses_unknown_fields=True, has_effect_once=True,
    ),
    ("POST", "/admin/prices/markups"): Route(
        "admin", {"scope": "model", "subject": "m", "factor": 1.2, "per_request_usd": 0.01, "effective_from": "2999-01-01T00:00:00Z"},
        refuses_unknown_fields=True, has_effect_once=True,
    ),
    ("POST", "/admin/prices/fees"): Route(
        "admin", {"feature": "web", "price_usd": 0.02, "effective_from": "2999-01-01T00:00:00Z"}, refuses_unknown_fields=True, has_effect_once=True
    ),
    ("DELETE", "/admin/prices/rules/{rule_id:str}"): Route("admin"),
    ("GET", "/admin/tokens"): Route("admin"),
    ("POST", "/admin/tokens"): Route(
        "admin", {"kind": "admin", "name": "$new", "scopes": ["read"], "expires_at": "2030-01-01T00:00:00Z", "on_expiry": None},
        refuses_unknown_fields=True, has_effect_once=True,
    ),
    ("POST", "/admin/tokens/{token_id:str}/revoke"): replace(_BECAUSE, is_like_another=True),
    ("DELETE", "/admin/tokens/{token_id:str}"): Route("admin"),
    ("GET", "/admin/audit"): Route("admin"),
    ("GET", "/admin/audit/{audit_id:str}"): Route("admin"),
    ("GET", "/admin/audit-log"): Route("admin"),
    ("GET", "/admin/stats"): Route("admin"),
    ("GET", "/admin/topups"): Route("admin"),
    ("GET", "/admin/topups/unapplied"): Route("admin"),
    ("POST", "/admin/topups/{topup_id:str}/reconcile"): Route("admin", has_effect_once=True),
    ("POST", "/admin/topups/{topup_id:str}/resolve"): Route(
        "admin", {"action": "credit", "reason": "because", "amount_usd": 1, "finding_id": None}, refuses_unknown_fields=True, has_effect_once=True
    ),
}  # fmt: skip
WITH_BODY: Final = [key for key, route in ROUTES.items() if route.body is not None and not route.is_like_another]
WEBHOOK: Final = b'{"originalDeliveryId": "good", "type": "InvoiceCreated", "invoiceId": "nobodys"}'
PAGES: Final = ("/docs", "/console", "/operator", "/receipts")
"""For people in a browser, as is `/`: tests/console has their bad input."""

WRONG_TYPES: Final = (
    "null", "true", "false", "0", "-1", "1.5", "1e400", "1e999", "-0.0", "9" * 400, '""', '"x y"', '"' + "x" * 300 + '"', "[]", "[null]",
    "[[]]", '["' + "x" * 300 + '"]', "{}", '{"a": 1}', '"2020-01-01"', '"2999-01-01T00:00:00"', '"\U0001f600"', '"\\u0000"', '"0x10"',
)  # fmt: skip
NOT_MONEY: Final = (
    "true", "false", "[]", "{}", "[1]", '{"a": 1}', '""', '"x"', "-1", "-0", '"-0"', '"+1"', "1e3", "1E5", "1e999", "1e-3", '"1e5"', '"NaN"',
    '"Infinity"', '"-Infinity"', '"sNaN"', '"1_000"', '" 1 "', '"1 "', '"\\t1"', '"١٢"', '"１"', '"²"', '"0x10"', '"1,5"', '"1."', '".5"',
    "1234567890123", '"1234567890123"', "0.1234567890", '"0.1234567890"', "1" + "0" * 400, '"' + "9" * 400 + '"', '"1\\u0030"',
    "999999999999", '"$1"', '"1;DROP TABLE account"',
)  # fmt: skip
NOT_REPORTED: Final = (
    *(text for text in NOT_MONEY if text.strip('"') not in ("1e3", "1E5", "1e-3", "1e5", "0.1234567890")), "1e10", "-4.5e-05", '"1e"', '"1e1.5"',
    "1" + "0" * 40, "0." + "0" * 38 + "1", '"0x1e3"', '"1e+-3"', '"+1e3"', '"1E٣"',
)  # fmt: skip
"""Where a program reports a cost: exponents and many decimals are as programs write it."""
NOT_JSON: Final = (
    b"{", b'{"', b'{"a"', b'{"a":', b'{"a": 1', b"}", b"{'a': 1}", b'{"a": 1,}', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": -Infinity}',
    b'{"a": +1}', b'{"a": 01}', b'{"a": .5}', b'{"a": 1} x', b'{"a": 1}{"a": 1}', b'{"a": "\xff"}', b'{"a": "\xed\xa0\x80"}',
    b'{"a": "\\ud800"}', b'{"a": "\\udc00\\ud800"}', b'{"a": "\x00"}', b'\x00{"a": 1}', b'{"a": "\n"}', b'{"a": "\\x41"}', b'{"a": undefined}',
    b"// a\n{}", b"\xef\xbb\xbf{}", b"\xfe\xff\x00{\x00}", b"[" * 60_000, b'{"a":' * 10_000, b"a=1&b=2", b"<a/>", b"   ",
)  # fmt: skip
NOT_AN_OBJECT: Final = (b"[]", b'"x"', b"1", b"true", b"[{}]", b"1.5", b"[" * 500 + b"]" * 500)
NOT_UUIDS: Final = (
    "x", "0", "not-a-uuid", "%00", "a%00b", "%ff%fe", "%F0%9F%98%80", "'%20OR%20'1'='1", "1;DROP%20TABLE%20api_key", "%2e%2e", "..%5c",
    "%0d%0aSet-Cookie:%20a=1", "x" * 8000, "00000000-0000-0000-0000-00000000000g", "%7B%7D", "-1", "null", "%25s", "%E2%80%AE",
)  # fmt: skip


@dataclass(slots=True)
class World:
    """A customer with something of everything, a stranger with the same, and what was found wrong."""

    door: Door
    books: Books
    customer: Customer
    stranger: Customer
    service: Mapping[str, str]
    admin: Mapping[str, str]
    known: Mapping[str, str]
    theirs: Mapping[str, str]
    cases: int = 0
    faults: list[str] = field(default_factory=list)

    def headers(self, who: str) -> dict[str, str | bytes]:
        match who:
            case "owner" | "anybody":
                return dict(self.customer.owner)
            case "key":
                return dict(self.customer.key)
            case "service":
                return dict(self.service)
            case "gateway":
                return {"X-Service-Token": self.service["Authorization"].split()[1], **self.customer.key}
            case "admin":
                return dict(self.admin)
            case "backend":
                return {"BTCPay-Sig": signature(WEBHOOK)}
            case _:
                return {}

    def path(self, template: str) -> str:
        asked = template
        others = {"key_id": self.known["other_key_id"]} if asked.startswith("/admin/") else {}
        if asked.endswith("/revoke"):  # what is deleted must be there still
            others = {"key_id": self.known["last_key_id"], "token_id": self.known["last_token_id"]}
        for name, value in {**self.known, **others, "method": "btc", "backend": "btcpay"}.items():
            template = template.replace(f"{{{name}:str}}", value)
        target = template.replace("{path:path}", "v1/chat/completions").replace("{model_id:path}", "openai/gpt-4o")
        query = next((route.query for (_, path), route in ROUTES.items() if path == asked and route.query), "")
        return f"{target}?{query.replace('$charge_id', self.known['charge_id'])}" if query else target

    def body(self, route: Route) -> dict[str, Any]:
        filled: dict[str, Any] = self._filled(route.body or {})
        return filled

    def _filled(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: self._filled(inner) for name, inner in value.items()}
        if isinstance(value, list):
            return [self._filled(inner) for inner in value]
        if value == "$new":
            return uuid.uuid4().hex[:20]
        return self.known.get(value[1:], value) if isinstance(value, str) and value.startswith("$") else value

    async def refuse(
        self,
        what: str,
        key: tuple[str, str],
        status: int | set[int],
        code: str | None,
        *,
        body: bytes | Sequence[bytes] | None = None,
        headers: Headers | None = None,
        target: str | None = None,
        param: str | None = None,
        breaks_off: bool = False,
    ) -> Answer:
        """Ask, and note whatever is not as promised: the refusal's form, and that the books did not change."""
        method, template = key
        if headers is None:
            headers = self.headers(ROUTES[key].who) | JSON
        before = self.books.fingerprint()
        answer = await self.door.ask(method, target or self.path(template), headers, body, breaks_off=breaks_off)
        faults = refusal_faults(answer, status, code, self.door.secrets)
        found = "" if faults else answer.json["error"]["param"] or ""
        if param is not None and not faults and found != param and not found.startswith((f"{param}.", f"{param}[")):
            faults.append(f"param {answer.json['error']['param']!r}, not {param!r}")
        if moved := {after[0] for after in set(self.books.fingerprint()) - set(before)}:
            faults.append(f"the books changed: {', '.join(sorted(moved))}")
        self.note(what, key, answer, faults)
        return answer

    async def harmless(self, what: str, key: tuple[str, str], headers: Headers, target: str | None = None) -> Answer:
        """Ask; whatever comes back, it is no fault of ours and is well-formed."""
        body = None if key[0] == "GET" else WEBHOOK if ROUTES[key].who == "backend" else b"{}"
        answer = await self.door.ask(key[0], target or self.path(key[1]), headers, body)
        if answer.status == 202:
            await self.audited()
        faults = (
            [f"status {answer.status}"] * (answer.status >= 500) + ["no X-Request-Id"] * ("x-request-id" not in answer.headers)
            if answer.status < 400 or answer.status >= 500
            else refusal_faults(answer, answer.status, None, self.door.secrets)
        )  # fmt: skip
        self.note(what, key, answer, faults)
        return answer

    async def audited(self) -> None:
        """What was begun in the background has ended: what it writes is nobody's refused request's."""
        async with asyncio.timeout(60):
            while self.door.rig.sql("SELECT FROM audit_run WHERE state = 'running'"):
                await asyncio.sleep(0.02)

    def note(self, what: str, key: tuple[str, str], answer: Answer, faults: list[str]) -> None:
        self.cases += 1
        if faults:
            self.faults.append(f"{key[0]} {key[1]}: {what[:80]}: {'; '.join(faults)}: {answer.body[:160]!r}")

    def report(self) -> None:
        assert self.cases
        assert not self.faults, f"{len(self.faults)} of {self.cases} cases:\n" + "\n".join(self.faults[:40])


@dataclass(slots=True)
class LastingDoor(Door):
    """A rotation or a recovery that was done is undone again: the credentials that everything is asked with go on to hold."""

    kept: list[tuple[Any, ...]] = field(default_factory=list)

    def keep(self) -> None:
        self.kept = self.rig.sql(
            "SELECT secret_hash, kind, account_id, key_id, proof FROM credential WHERE kind <> 'api_key'"
        )

    async def ask(self, method: str, target: str, *args: Any, **more: Any) -> Answer:
        answer = await Door.ask(self, method, target, *args, **more)
        if answer.status == 200 and method == "POST" and target in ("/accounts/rotate", "/accounts/recover"):
            theirs = [one[2] for one in self.kept]
            self.rig.sql("DELETE FROM credential WHERE kind <> 'api_key' AND account_id = ANY(%s)", theirs)
            for one in self.kept:
                self.rig.sql(
                    "INSERT INTO credential (secret_hash, kind, account_id, key_id, proof) VALUES (%s, %s, %s, %s, %s)",
                    *one,
                )
        return answer


@pytest.fixture
async def world(clean: str, settings: Settings) -> AsyncIterator[World]:
    async with opened(clean, settings) as made_door:
        door = LastingDoor(made_door.app, made_door.rig, made_door.secrets)
        with Books(clean) as books:
            await ensure_starter(door.rig.house.db)
            customer, stranger = await door.customer("51"), await door.customer("51")  # one of them is spent
            ours, theirs = await _belongings(door, customer), await _belongings(door, stranger)
            admin = await door.admin()
            ours |= await _operated(door, admin)
            door.keep()
            made = World(door, books, customer, stranger, await door.service(), admin, ours, theirs)
            door.secrets.add(SECRET)
            yield made
            made.report()


async def _operated(door: Door, admin: Mapping[str, str]) -> dict[str, str]:
    """An account without money, with two keys, and whatever else operators do something to."""

    async def made(path: str, **body: Any) -> Any:
        answer = await door.ask("POST", path, {**admin, **JSON}, json.dumps(body).encode())
        assert answer.status == 201, answer.body
        return answer.json

    account = await made("/admin/accounts")
    door.secrets |= {account["credit_id"], account["api_key"]}
    keys = [await made(f"/admin/accounts/{account['account_id']}/keys", name=name) for name in ("one", "two")]
    tokens = [await made("/admin/tokens", kind="service", name=name) for name in ("one", "two")]
    door.secrets |= {key["data"]["api_key"] for key in keys} | {token["token"] for token in tokens}
    rule = await made("/admin/prices/fees", feature="search", price_usd=0.01)
    audit_id = str(uuid.uuid4())
    door.rig.sql("INSERT INTO audit_run (id, admin, state, finished_at) VALUES (%s, 'ops', 'failed', now())", audit_id)
    return {
        "account_id": account["account_id"], "other_key_id": keys[0]["data"]["_id"], "last_key_id": keys[1]["data"]["_id"],
        "token_id": tokens[0]["about"]["id"], "last_token_id": tokens[1]["about"]["id"], "rule_id": rule["id"],
        "version": "1", "audit_id": audit_id,
    }  # fmt: skip


async def _belongings(door: Door, customer: Customer) -> dict[str, str]:
    key, managed = await door.rig.new_key(customer), await door.rig.new_key(customer)
    door.secrets |= {key["api_key"], managed["api_key"]}
    invoice_id = await door.rig.topup(customer, "20")
    [(topup_id, account_id)] = door.rig.sql("SELECT id, account_id FROM topup WHERE invoice_id = %s", invoice_id)
    door.rig.sql("UPDATE topup SET review = 'marked' WHERE id = %s", topup_id)
    [(txid,)] = door.rig.sql("SELECT payment_id FROM payment WHERE account_id = %s", account_id)
    await door.rig.client.put("/notices", headers=customer.owner, json={"npub": NPUB, "events": ["balance.low"]})
    notice = (await door.rig.client.post("/notices/test", headers=customer.owner)).json()
    code = (await door.rig.client.post("/accounts/recovery/code", headers=customer.owner)).json()["recovery_code"]
    charge = await door.rig.meter("charge", request_id=uuid.uuid4().hex, api_key=customer.api_key, cost_usd=1)
    return {
        "topup_id": str(topup_id),
        "txid": txid,
        "notice_id": notice["id"],
        "recovery_code": code,
        "token": receipt_token(door.rig.house.settings.pepper, account_id, topup_id),
        "credit_id": customer.credit_id,
        "api_key": customer.api_key,
        "key_id": key["_id"],
        "key_name": key["name"],
        "key_hash": hashlib.sha256(managed["api_key"].encode()).hexdigest(),
        "invoice_id": invoice_id,
        "hold_id": (await door.rig.authorize(customer.api_key, "1"))["hold_id"],
        "charge_id": charge.json()["charge_id"],
    }


def _routes(app: Litestar) -> Iterator[tuple[str, str, Any]]:
    for route in app.routes:
        if isinstance(route, HTTPRoute) and route.path != "/" and not route.path.startswith(PAGES):
            for handler in route.route_handlers:
                for method in handler.http_methods:
                    if method != "OPTIONS":
                        yield method, route.path, handler


def _struct(app: Litestar, key: tuple[str, str]) -> Any:
    """The struct that the route's body is read into."""
    if (reads := ROUTES[key].reads) is not None:
        return reads
    handler = next(handler for method, path, handler in _routes(app) if (method, path) == key)
    assert handler.parsed_data_field is not None
    annotation = handler.parsed_data_field.annotation
    return next(
        one for one in (annotation, *get_args(annotation)) if isinstance(one, type) and issubclass(one, msgspec.Struct)
    )


def _inner_struct(annotation: Any) -> Any:
    found = (annotation, *get_args(annotation))
    return next((one for one in found if isinstance(one, type) and issubclass(one, msgspec.Struct)), None)


def _wrong_values(annotation: Any, *, all_values: bool = False) -> Iterator[str]:
    """JSON that is not of a field's type; or any that is tried."""
    if annotation in (msgspec.Raw, ReportedNumber):
        yield from NOT_MONEY if annotation is msgspec.Raw else NOT_REPORTED
        return
    for text in WRONG_TYPES:
        if all_values:
            yield text
            continue
        try:
            msgspec.json.decode(text, type=annotation)
        except msgspec.ValidationError:
            yield text
        except msgspec.DecodeError as error:
            raise AssertionError(f"{text} is not JSON") from error


def _spoilt(
    body: Mapping[str, Any], struct: Any, at: tuple[str, ...] = (), *, all_values: bool = False
) -> Iterator[tuple[str, bytes, str | None]]:
    """The body with each field in turn, however deep, of each wrong type: what was done, the body, and what is to blame."""
    for item in msgspec.structs.fields(struct):
        path = (*at, item.encode_name)
        name = ".".join(path)
        for raw in _wrong_values(item.type, all_values=all_values):
            # A NUL is found in the text as it came, before any field is known.
            yield f"{name}={raw}", _with(body, path, raw), None if "\\u0000" in raw else name
        if (inner := _inner_struct(item.type)) is not None:
            yield from _spoilt(body, inner, path, all_values=all_values)


def _with(body: Mapping[str, Any], path: Sequence[str], raw_value: str) -> bytes:
    """The body with one field, however deep, replaced by raw JSON text."""
    whole = dict(body)
    inner = whole
    for name in path[:-1]:
        inner[name] = dict(inner.get(name) or {})
        inner = inner[name]
    inner[path[-1]] = "$here"
    return json.dumps(whole).replace('"$here"', raw_value).encode()


# --- every route is here -----------------------------------------------------------------------------


async def test_every_route_of_the_app_has_its_bad_input_tested(house: House) -> None:
    app = create_app(house)
    found = {(method, path) for method, path, _ in _routes(app)}
    assert found == set(ROUTES), "put the new route into ROUTES, and it is tested"
    for method, path, handler in _routes(app):
        takes_body = handler.parsed_data_field is not None
        assert takes_body == (ROUTES[method, path].body is not None), f"{method} {path}: ROUTES is wrong about its body"
        once = "once" in handler.parsed_fn_signature.parameters
        assert once == ROUTES[method, path].has_effect_once, (
            f"{method} {path}: ROUTES is wrong about its Idempotency-Key"
        )


async def test_every_field_of_every_request_is_in_the_good_body_that_is_spoilt(house: House) -> None:
    app = create_app(house)
    for key in WITH_BODY:
        body = ROUTES[key].body
        assert body is not None
        fields = {item.encode_name for item in msgspec.structs.fields(_struct(app, key))}
        # These exclude a field that is there; as wrong as can be they are tried all the same.
        assert fields - set(body) <= {
            "api_key",
            "api_key_hash",
            "request_id",
            "estimate",
            "lightning_invoice",
            "payment_hash",
            "limits",
            "topup_offer",
            "payment_proof",
        }, f"{key}: put the new field into its good body"
        assert not set(body) - fields


async def test_every_route_works_when_it_is_asked_well(world: World) -> None:
    for key in sorted(
        ROUTES,
        key=lambda key: (
            key[1].endswith("/close"),
            key[1] in ("/accounts", "/accounts/rotate", "/accounts/recover"),
            key[0] == "DELETE",
            key[1] == "/v1/meter/release",
        ),
    ):
        route = ROUTES[key]
        body = WEBHOOK if route.who == "backend" else json.dumps(world.body(route)).encode() if route.body else b"{}"
        headers = world.headers(route.who) | JSON
        answer = await world.door.ask(key[0], world.path(key[1]), headers, body if key[0] != "GET" else None)
        # The one hold that there is was settled by the route before.
        fine = _NOT_DONE.get(
            key, {409} if key[1] == "/v1/meter/release" else {202} if key[1] == "/admin/audit" else {200, 201}
        )
        faults = [f"status {answer.status}"] * (answer.status not in fine)
        if key[1] in ("/v1/meter/settle/batch", "/v1/meter/events") and answer.json.get("refused") != 0:
            faults.append("an item is refused")
        world.note("asked well", key, answer, faults)


_NOT_DONE: Final = {
    ("POST", "/accounts/recovery/nostr"): {422}, ("DELETE", "/accounts/recovery/nostr"): {404}, ("DELETE", "/accounts"): {422},
    ("POST", "/notices/secret"): {404}, ("DELETE", "/notices"): {204},
}  # fmt: skip
"""What needs a signature or an empty account, and is done in tests/test_recovery.py; or a webhook, in tests/notices."""


# --- bodies ------------------------------------------------------------------------------------------


async def test_a_field_of_the_wrong_type_is_422_naming_it(world: World) -> None:
    for key in (key for key in WITH_BODY if ROUTES[key].reads is not PriceFileOfTests):
        for what, body, param in _spoilt(world.body(ROUTES[key]), _struct(world.door.app, key)):
            await world.refuse(what, key, 422, "invalid_field", body=body, param=param)


async def test_the_contract_takes_a_value_of_a_field_exactly_if_the_server_does(world: World) -> None:
    """By its form: what depends on prices, balances or the time of day no schema can tell."""
    contract = (await world.door.ask("GET", "/openapi.json")).json
    wrong = []
    for key in (key for key in WITH_BODY if ROUTES[key].reads is not PriceFileOfTests):
        method, template = key
        operation = contract["paths"][template.replace(":str", "")][method.lower()]
        takes = OAS31Validator(_whole(contract, operation["requestBody"]["content"]["application/json"]["schema"]))
        good = world.body(ROUTES[key])
        for what, body, _ in _spoilt(good, _struct(world.door.app, key), all_values=True):
            try:
                value = json.loads(body)
            except ValueError:
                continue
            if NO_SCHEMA_TELLS.search(what) or what.startswith("settles=["):  # where each item has its own verdict
                continue
            answer = await world.door.ask(method, world.path(template), world.headers(ROUTES[key].who) | JSON, body)
            is_refused = answer.status == 422 and answer.code == "invalid_field"
            if takes.is_valid(value) is is_refused and not (
                is_refused and answer.json["message"].startswith(BEYOND_A_SCHEMA)
            ):
                wrong.append(f"{method} {template} {what[:60]}: {answer.status} {answer.body[:120]!r}")
            world.cases += 1
    assert wrong == [], f"{len(wrong)} of {world.cases}:\n" + "\n".join(wrong[:40])


NO_SCHEMA_TELLS: Final = re.compile(r"=(-?\d[\d.]*[eE]|-0|\d+\.\d{10,}$|.*\\u0030)")
"""How a number is spelled: an exponent, a minus before nothing, zeros at the end, a digit escaped. The value is what a schema sees."""

BEYOND_A_SCHEMA: Final = (
    "Text may not contain NUL characters", "recovery_code is not this account's",
    "Send recovery_code, or Authorization: Nostr with a signed event; one of them", "usage_limit_usd and limits say different things",
    "webhook_url must be https://", "npub is not a Nostr public key", "events: there is none named",
)  # fmt: skip
"""What is refused for another reason than the field's form."""


def _whole(contract: Any, schema: Any) -> Any:
    moved = json.dumps({"$defs": contract["components"]["schemas"], "allOf": [schema]})
    return json.loads(moved.replace("#/components/schemas/", "#/$defs/"))


QUERIES: Final[Mapping[str, tuple[str, ...]]] = {
    "limit": ("1", "100", "0", "101", "-1", "null", "", "x", "1e1", "5.0", "+5", " 5", "٥", "5_0", "0x5", "5" * 20),
    "api_key_id": (str(uuid.UUID(int=1)), str(uuid.UUID(int=1)).upper(), uuid.UUID(int=1).hex, "null", "None", "NULL", "", "x", f"{{{uuid.UUID(int=1)}}}", f"urn:uuid:{uuid.UUID(int=1)}"),
    "status": ("completed", "partial", "null", "Null", "", "Completed", "x", "completed "),
    "from": ("2026-01-01", "2026-01-01T00:00:00Z", "2026-01-01T00:00", "2026-01-01T00:00:00.5+02:00", "null", "", "20260101", "2026-W01-1", "2026-1-1", "yesterday", "0", "2026-01-01Z", "٢٠٢٦-٠١-٠١"),
    "to": ("2026-01-01", "2026-01-01 10:00:00", "null", "", "2026-01", "2026-01-01T10"),
    "model": ("gpt-4o", "null", "", "x" * 200, "x" * 201, "a\nb", "a\x7f", "é"),
    "endpoint": ("/v1/x", "null", "", "x" * 201, "\x00"),
    "all_keys": ("true", "false", "null", "", "maybe", "2"),
    "cursor": ("null", "", "=", "a b", "a+b", "x" * 1201, "é", "%"),
}  # fmt: skip


async def test_the_contract_takes_a_query_exactly_if_the_server_does(world: World) -> None:
    contract, wrong = (await world.door.ask("GET", "/openapi.json")).json, []
    for path, item in contract["paths"].items():
        for parameter in item.get("get", {}).get("parameters", ()):
            if parameter["in"] != "query" or path.startswith("/v1/meter") or parameter["name"] not in QUERIES:
                continue
            key = next(key for key in ROUTES if key[0] == "GET" and re.sub(r":(str|int|uuid)", "", key[1]) == path)
            for text in QUERIES[parameter["name"]]:
                query = f"?{parameter['name']}={quote(text)}"
                answer = await world.door.ask("GET", world.path(key[1]) + query, world.headers(ROUTES[key].who))
                if OAS31Validator(parameter["schema"]).is_valid(_read(text, parameter["schema"])) is (answer.status == 422):  # fmt: skip
                    wrong.append(f"{path}{query[:60]}: {answer.status}")
                assert answer.status in (200, 422)
                world.cases += 1
    assert wrong == []


def _read(text: str, schema: Mapping[str, Any]) -> Any:
    """A query's text as a client that was made from the contract would have it."""
    if schema["type"] == "integer" and re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return {"true": True, "false": False}.get(text, text) if schema["type"] == "boolean" else text


async def test_what_is_not_asked_for_or_stands_twice_in_a_query_is_422(world: World) -> None:
    for key, query, param in (
        (("GET", "/queries/history"), "modle=x", "modle"), (("GET", "/queries/history"), "limit=5&limit=6", "limit"),
        (("GET", "/queries/history"), "Limit=5", "Limit"), (("GET", "/activity"), "group=day", "group"), (("GET", "/topups"), "status=New", "status"),
        (("GET", "/admin/topups"), "account=x", "account"), (("GET", "/v1/prices"), "modle=x", "modle"), (("GET", "/keys"), "show_key=true&show_key=false", "show_key"),
        (("POST", "/v1/meter/authorize"), "dry_run=true", "dry_run"), (("POST", "/v1/meter/settle/batch"), "x=", "x"),
        (("GET", "/activity/{charge_id:str}/explain"), "a=1", "a"), (("POST", "/admin/topups/{topup_id:str}/reconcile"), "force=1", "force"),
    ):  # fmt: skip
        body = json.dumps(world.body(ROUTES[key])).encode() if key[0] == "POST" else None
        await world.refuse(
            query, key, 422, "invalid_field", target=f"{world.path(key[1])}?{query}", body=body, param=param
        )
    for path in (
        "/keys?show_key=false&show_key=false", "/v1/models?client_version=0.1", "/api/v1/models?supported_parameters=tools&sort=newest",
        f"/api/v1/keys?workspace_id={uuid.uuid4()}", "/docs?utm_source=mail", "/?utm_source=mail", "/llms.txt?x=1", "/openapi.json?x=1", "/metrics?x=1", "/health/live?x=1",
    ):  # fmt: skip
        assert (await world.door.ask("GET", path, world.customer.owner)).status == 200, path


async def test_no_route_of_ours_passes_over_a_parameter_that_it_does_not_know(world: World) -> None:
    """But for pages, monitors, webhooks and gateways' subrequests: there it is somebody else's, and changes nothing."""
    is_theirs = re.compile(r"/(health|metrics|llms.txt|openapi.json|webhooks|v1/meter/ext-authz)")
    for key, route in ROUTES.items():
        if is_theirs.match(key[1]):
            continue
        target = world.path(key[1])
        target += f"{'&' if '?' in target else '?'}utm=1"
        body = json.dumps(world.body(route)).encode() if route.body is not None else None
        await world.refuse("utm", key, 422, "invalid_field", target=target, body=body, param="utm")


async def test_a_missing_field_is_422_naming_it(world: World) -> None:
    for key in WITH_BODY:
        body, struct = world.body(ROUTES[key]), _struct(world.door.app, key)
        required = [item.encode_name for item in msgspec.structs.fields(struct) if item.required]
        required += {"/keys": ["name"]}.get(key[1], [])
        for name in required:
            less = {other: value for other, value in body.items() if other != name}
            await world.refuse(f"no {name}", key, 422, "invalid_field", body=json.dumps(less).encode(), param=name)
        if required:
            await world.refuse("{}", key, 422, "invalid_field", body=b"{}")
        world.cases += 1


async def test_work_without_what_it_used_or_cost_is_422(world: World) -> None:
    for verb in ("settle", "charge"):
        key = ("POST", f"/v1/meter/{verb}")
        body = {name: value for name, value in world.body(ROUTES[key]).items() if name not in ("usage", "cost_usd")}
        for less in (body, body | {"usage": None, "cost_usd": None}):
            await world.refuse("nothing", key, 422, "invalid_field", body=json.dumps(less).encode(), param="usage")
    key = ("POST", "/v1/meter/events")
    nothing = world.body(ROUTES[key]) | {"data": {"hold_id": world.known["hold_id"]}}
    await world.refuse("nothing", key, 422, "invalid_field", body=json.dumps(nothing).encode(), param="data.usage")


async def test_a_bad_item_among_many_gets_the_verdict_that_it_would_have_got_alone(world: World) -> None:
    event, settle = (
        world.body(ROUTES["POST", "/v1/meter/events"]), {**_WORK, "hold_id": world.known["hold_id"]}
    )  # fmt: skip
    more = [b"null", b"5", b"[]", b"{}", b'"x"', b"[" * 400 + b"]" * 400]
    for struct, good, around in (
        (SettleRequest, settle, (b'{"settles": [', b"]}")), (CloudEvent, event, (b"[", b"]"))
    ):  # fmt: skip
        key = ("POST", "/v1/meter/events" if struct is CloudEvent else "/v1/meter/settle/batch")
        # What cannot be told from the rest of the text is refused with the whole: NUL, and text that is no JSON.
        cases = [case for case in _spoilt(good, struct) if case[2] is not None]
        cases += [(repr(body[:20]), body, None) for body in more]
        before = world.books.fingerprint()
        for start in range(0, len(cases), 400):
            part = cases[start : start + 400]
            body = around[0] + b", ".join(each for _, each, _ in part) + around[1]
            answer = await world.door.ask("POST", key[1], world.headers("service") | JSON, body)
            assert answer.status == 200, answer.body[:300]
            assert (answer.json["charged"], answer.json["refused"]) == (0, len(part)), answer.body
            for (what, _, param), verdict in zip(part, answer.json["results"], strict=True):
                found = verdict["error"]["param"] or ""
                faults = [f"status {verdict['status']}"] * (verdict["status"] not in (400, 422))
                if param is not None and not f"{found}[".startswith((f"{param}.", f"{param}[")):
                    faults.append(f"param {found!r}, not {param!r}")
                world.note(what, key, answer, faults)
        assert world.books.fingerprint() == before
        no_text = json.dumps(good).replace('"u"', '"\\ud800"').encode()
        await world.refuse("a surrogate", key, 400, "malformed_json", body=around[0] + no_text + around[1])


async def test_a_body_that_is_no_object_or_no_json_is_refused(world: World) -> None:
    for key in WITH_BODY:
        route = ROUTES[key]
        for body in NOT_JSON:
            await world.refuse(repr(body[:40]), key, 400, "malformed_json", body=body)
        for body in NOT_AN_OBJECT:
            if route.reads is not None and body.startswith(b"[") and body != b"[]":
                continue  # a list, whose items each have their verdict
            await world.refuse(repr(body[:40]), key, 422, "invalid_field", body=body)
        good = json.dumps(world.body(route)).encode()
        for cut in range(1, len(good), max(1, len(good) // 12)):
            await world.refuse(f"cut at {cut}", key, 400, "malformed_json", body=good[:cut])
        await world.refuse("cut off", key, 400, "malformed_json", body=[good[:5]], breaks_off=True)
        if not route.body_may_be_absent:
            await world.refuse("empty", key, 400, "malformed_json", body=b"")
            await world.refuse("absent", key, 400, "malformed_json")
            await world.refuse("null", key, 422, "invalid_field", body=b"null")


async def test_text_that_unicode_or_postgresql_would_not_take_is_refused(world: World) -> None:
    for key in WITH_BODY:
        body, struct = world.body(ROUTES[key]), _struct(world.door.app, key)
        for item in msgspec.structs.fields(struct):
            name = item.encode_name
            await world.refuse(f"{name} NUL", key, 422, "invalid_field", body=_with(body, [name], '"a\\u0000b"'))
            await world.refuse(f"{name} surrogate", key, {400, 422}, None, body=_with(body, [name], '"a\\ud800b"'))
            await world.refuse(f"{name} raw NUL", key, {400, 422}, None, body=_with(body, [name], '"a\x00b"'))
            bad_utf8 = _with(body, [name], '"a?b"').replace(b"a?b", b"a\xffb")
            await world.refuse(f"{name} not UTF-8", key, {400, 422}, None, body=bad_utf8)
        deep = b'{"unknown": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
        await world.refuse("deep and unknown", key, {400, 422}, None, body=deep)


async def test_unknown_fields_are_refused_on_the_meter_and_ignored_elsewhere(world: World) -> None:
    for key in WITH_BODY:
        body = world.body(ROUTES[key]) | {"unknown_field": {"a": [1]}}
        if ROUTES[key].refuses_unknown_fields:
            await world.refuse(
                "unknown", key, 422, "invalid_field", body=json.dumps(body).encode(), param="unknown_field"
            )
            continue
        answer = await world.door.ask(
            key[0], world.path(key[1]), world.headers(ROUTES[key].who) | JSON, json.dumps(body).encode()
        )
        assert answer.status in _NOT_DONE.get(key, (200, 201)), answer.body
        world.cases += 1


async def test_of_a_key_given_twice_the_last_one_counts_and_is_checked(world: World) -> None:
    twice = b'{"amount": 20, "currency": "USD", "amount": -20}'
    await world.refuse(
        "amount twice", ("POST", "/topup/create/{method:str}"), 422, "invalid_field", body=twice, param="amount"
    )
    headers = world.headers("owner") | JSON
    answer = await world.door.ask("POST", "/keys", headers, b'{"name": 5, "name": "last"}')
    assert answer.status in (201, 422)


async def test_a_body_over_what_its_route_takes_is_413_however_it_is_sent(world: World) -> None:
    for key in ROUTES:
        if key[0] == "HEAD":  # is answered as GET, and its refusal has no body to look at
            continue
        limit = ROUTES[key].limit
        await world.refuse("announced", key, 413, "body_too_large", body=b"[" * (limit + 1))
        if ROUTES[key].body is not None:
            await world.refuse("fits", key, 400, "malformed_json", body=b" " * limit)
        await world.refuse("10 MB", key, 413, "body_too_large", body=b" " * 10_000_000)
        small = {"Content-Length": "99999999999999999"} | world.headers(ROUTES[key].who)
        await world.refuse("announced only", key, 413, "body_too_large", headers=small, body=b"{}")
        if ROUTES[key].body is not None or ROUTES[key].has_effect_once or ROUTES[key].who == "backend":
            await world.refuse("chunked", key, 413, "body_too_large", body=[b"[" * 1000] * 10_000)
            await world.refuse(
                "chunked, endless", key, 413, "body_too_large", body=[b" " * limit, b" "], breaks_off=True
            )
        for length in ("x", "-", "1e3", "²", "0x10", "9" * 5000):
            headers = world.headers(ROUTES[key].who) | {"Content-Length": length}
            await world.harmless(f"Content-Length: {length[:9]}", key, headers)


async def test_a_body_that_is_not_json_by_its_type_is_415(world: World) -> None:
    for key in WITH_BODY:
        good = json.dumps(world.body(ROUTES[key])).encode()
        for media_type in (
            "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "multipart/form-data", "application/xml",
            "application/msgpack", "application/jsonx", "text/html; charset=utf-8", "x" * 5000, "json", "/", "application/json+x", b"\xff\xfe",
        ):  # fmt: skip
            headers = world.headers(ROUTES[key].who) | {"Content-Type": media_type}
            await world.refuse(
                f"Content-Type: {media_type!r}", key, 415, "unsupported_media_type", headers=headers, body=good
            )


async def test_a_body_without_a_type_or_with_a_json_one_is_read(world: World) -> None:
    for headers in (
        {},
        *(
            {"Content-Type": kind}
            for kind in ("application/json;charset=utf-8", "APPLICATION/JSON", "application/vnd.x+json")
        ),
    ):
        good = json.dumps({"credit_id": world.customer.credit_id}).encode()
        assert (await world.door.ask("POST", "/credits/balance", headers, good)).status == 200
        world.cases += 1


# --- addresses, methods, headers -----------------------------------------------------------------------


async def test_another_method_is_405_and_another_address_404(world: World) -> None:
    for key in ROUTES:
        taken = {method for method, path in ROUTES if path == key[1]}
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "BREW", "get", "X" * 300} - taken:
            answer = await world.door.ask(method, world.path(key[1]), world.headers(ROUTES[key].who), b"{}")
            faults = refusal_faults(answer, 405, "method_not_allowed", world.door.secrets)
            faults += ["Allow does not say what is"] * (not taken <= set(answer.headers.get("allow", "").split(", ")))
            world.note(f"method {method}", key, answer, faults)
        for tail in ("/more", "/%00", "/..%2f..%2fetc%2fpasswd", "/" + "x" * 8000):
            target = world.path(key[1]) + tail
            if ROUTES[key].takes_any_address or ROUTES[key].query:
                continue
            if not target.startswith("/keys/") or target.count("/") > 2:
                await world.refuse(tail[:20], key, {404, 405, 422, 401}, None, target=target)
        options = await world.door.ask("OPTIONS", world.path(key[1]))
        if ROUTES[key].takes_any_address:
            assert options.status == 401  # a gateway would take 204 for a yes
            continue
        assert (options.status, options.body) == (204, b"")
        assert "x-request-id" in options.headers


async def test_an_unknown_address_is_404_with_the_documented_body(world: World) -> None:
    for target in (
        "/nope",
        "/v1",
        "/v1/meter",
        "/v1/meter/nope",
        "/%00",
        "/%ff",
        "/keys%00",
        "/keys/../keys/x/y",
        "/.env",
        "/" + "x" * 60_000,
    ):
        answer = await world.door.ask("GET", target)
        world.note(target[:40], ("GET", target[:40]), answer, refusal_faults(answer, 404, "not_found", ()))


async def test_hostile_headers_do_no_harm(world: World) -> None:
    for key in ROUTES:
        hostile: list[dict[str, str | bytes]] = [
            {"Accept": "text/html;q=x"}, {"Accept": b"\xff"}, {"Cookie": "a=" + "b" * 8000}, {"Cookie": b"\xff=;;=\x00"}, {"Range": "bytes=0-1"},
            {"X-Forwarded-For": "1;DROP TABLE account"}, {"traceparent": "00-" + "0" * 60}, {"X-Request-Id": "a\r\nSet-Cookie: b=1"},
            {"Accept-Encoding": "\x00"}, {"User-Agent": b"\xf0\x28\x8c\x28" * 2000}, {"Content-Encoding": "gzip"}, {"Expect": "100-continue"},
            {"Origin": "null"}, {"If-Match": '"x"'}, {"Upgrade": "websocket", "Connection": "Upgrade"}, {"X-Long": "x" * 60_000},
        ]  # fmt: skip
        for extra in hostile:
            if key[0] != "DELETE":
                answer = await world.harmless(str(extra)[:60], key, world.headers(ROUTES[key].who) | extra)
                assert "set-cookie" not in answer.headers
                assert "\n" not in answer.headers["x-request-id"]
        for host in (b"\xff", b"a b", b"a/b", b"", b"x" * 5000, b"a:99999999"):
            headers = world.headers("nobody") | {"Host": host}
            await world.harmless(f"Host {host[:9]!r}", key if key[0] == "GET" else ("GET", "/health/live"), headers)


async def test_odd_queries_do_no_harm(world: World) -> None:
    for name in ("show_key", "include_disabled"):
        for value in (
            "maybe",
            "2",
            "-1",
            "",
            "%00",
            "%ff",
            "null",
            "[]",
            "yes%20",
            "1e0",
            "x" * 8000,
            f"true&{name}=false",
        ):
            await world.harmless(f"?{name}={value}", ("GET", "/keys"), world.customer.owner, f"/keys?{name}={value}")
    for query in (
        "&&&",
        "=",
        "a=%zz",
        "%",
        "?" * 100,
        "&".join(f"a{n}=1" for n in range(3000)),
        "show_key",
        "show_key[]=1",
    ):
        await world.harmless(f"?{query[:20]}", ("GET", "/keys"), world.customer.owner, f"/keys?{query}")
    answer = await world.door.ask("GET", "/keys?show_key=maybe", world.customer.owner)
    assert not refusal_faults(answer, 422, "invalid_field", ())
    assert answer.json["error"]["param"] == "show_key"


# --- credentials -----------------------------------------------------------------------------------------


def _bad_credit_ids(credit_id: str) -> list[str | bytes]:
    bare, version_1, version_7 = credit_id.replace("-", ""), str(uuid.uuid1()), "018f4e9a-7c1b-7000-8000-0123456789ab"
    return [
        "", " ", bare, f"{{{credit_id}}}", f"urn:uuid:{credit_id}", f'"{credit_id}"', version_1, version_7, f" {credit_id}", f"{credit_id} ",
        f"{credit_id}\n", credit_id[:-1], f"{credit_id}0", str(uuid.uuid4()), str(uuid.UUID(int=0)), credit_id.replace("-", "\u00ad"),
        b"\xd9\xa1" * 18, "x" * 20_000, "' OR 1=1 --", f"{credit_id}\x00", f"{credit_id},{credit_id}", credit_id.replace("-", "_"),
    ]  # fmt: skip


def _bad_keys(key: str, prefix: str) -> list[str | bytes]:
    typo = key[:10] + ("A" if key[10] != "A" else "B") + key[11:]
    return [
        "", " ", typo, key[:-1], key + "0", key.upper(), key.replace(f"{prefix}-", ""), key[:-1] + ("0" if key[-1] != "0" else "1"),
        new_secret(prefix), new_secret("sk" if prefix != "sk" else "svc"), new_secret("adm"), "null", "undefined", "x" * 20_000, b"\xff\xfe",
        f"{key}\x00", f"{key} {key}", "' OR 1=1 --", f"{prefix}-" + "٠" * 0 + "0" * 49, key.replace("-", "_"), "Bearer",
    ]  # fmt: skip


async def test_every_bad_credential_of_a_customer_gets_the_same_401(world: World) -> None:
    for key in [key for key, route in ROUTES.items() if route.who == "anybody"]:
        body = {"amount": 20} if key[1].startswith("/topup/create") else {}
        sent = json.dumps(body).encode() if key[0] != "GET" else None
        messages = set()
        for bad in _bad_credit_ids(world.customer.credit_id):
            answer = await world.refuse(
                f"x-credit-id: {bad!r}", key, 401, "invalid_credit_id", headers={"x-credit-id": bad}, body=sent
            )
            messages.add(answer.body)
        assert len(messages) == 1
        messages = set()
        for bad in filter(lambda bad: bad not in ("", " "), _bad_keys(world.customer.api_key, "sk")):
            text = bad if isinstance(bad, bytes) else bad.encode()
            for headers in (
                {"Authorization": b"Bearer " + text},
                {"Authorization": b"Token " + text},
                {"x-api-key": text},
                {"api-key": text},
            ):
                answer = await world.refuse(f"{headers}", key, 401, "invalid_api_key", headers=headers, body=sent)
                messages.add(answer.body)
        assert len(messages) == 1
        for scheme in ("Basic", "Digest", "", "Bearer", "Bearer ", "Token", "bearer\t"):
            headers = {"Authorization": f"{scheme} ".encode()}
            await world.refuse(f"{headers}", key, 401, "invalid_api_key", headers=headers, body=sent)
        await world.refuse("nothing", key, 401, "invalid_api_key", headers={}, body=sent)


async def test_what_needs_the_credit_id_takes_nothing_else(world: World) -> None:
    for key in [key for key, route in ROUTES.items() if route.who == "owner"]:
        sent = json.dumps(world.body(ROUTES[key])).encode() if key[0] != "GET" else None
        for bad in _bad_credit_ids(world.customer.credit_id):
            both: dict[str, str | bytes] = {"x-credit-id": bad, **world.customer.key}
            await world.refuse(f"x-credit-id: {bad!r}", key, 401, "invalid_credit_id", headers=both, body=sent)
        for headers in (
            {},
            world.customer.key,
            {"x-api-key": world.customer.api_key},
            world.service,
            {"credit_id": world.customer.credit_id},
        ):
            await world.refuse(f"{list(headers)}", key, 401, "invalid_credit_id", headers=headers, body=sent)


async def test_proxies_and_operators_need_a_token_of_their_own_kind(world: World) -> None:
    # Of an operator's some: all are asked with each kind of credential in tests/admin/test_matrix.py.
    for key in (key for key, route in ROUTES.items() if route.who == "service" or key[1].startswith("/admin/topups")):
        sent = json.dumps(world.body(ROUTES[key])).encode()
        right, wrong = (world.service, world.admin) if ROUTES[key].who == "service" else (world.admin, world.service)
        token = right["Authorization"].split()[1]
        messages = set()
        for bad in _bad_keys(token, token[:3]):
            headers = {"Authorization": b"Bearer " + (bad if isinstance(bad, bytes) else bad.encode())}
            answer = await world.refuse(f"{headers}", key, 401, "invalid_token", headers=headers, body=sent)
            messages.add(answer.body)
        assert len(messages) == 1
        for others in (
            {},
            wrong,
            world.customer.key,
            world.customer.owner,
            {"x-api-key": token},
            {"Authorization": f"Token {token}"},
        ):
            await world.refuse(f"{list(others)}", key, 401, "invalid_token", headers=dict(others), body=sent)


async def test_the_credit_id_in_the_body_is_held_to_the_same_spelling(world: World) -> None:
    key = ("POST", "/credits/balance")
    for bad in _bad_credit_ids(world.customer.credit_id):
        if isinstance(bad, str) and "\x00" not in bad:
            body = json.dumps({"credit_id": bad}).encode()
            await world.refuse(f"credit_id {bad!r}", key, 401, "invalid_credit_id", body=body, headers=JSON)
    upper = world.customer.credit_id.upper()
    for answer in (
        await world.door.ask("POST", "/credits/balance", JSON, json.dumps({"credit_id": upper}).encode()),
        await world.door.ask("GET", "/credits/balance", {"x-credit-id": upper}),
    ):
        assert (answer.status, answer.json["balance"]) == (200, 50)


async def test_a_webhook_that_is_not_signed_is_401_and_leaves_nothing(world: World) -> None:
    key = ("POST", "/webhooks/{backend:str}")
    good = b'{"originalDeliveryId": "d", "type": "InvoiceSettled", "invoiceId": "i"}'
    signed = signature(good)
    for bad in (
        "",
        "sha256=",
        signed[:-1],
        signed.replace("sha256=", ""),
        signed.replace("sha256", "sha1"),
        f" {signed}",
        "x" * 20_000,
    ):
        await world.refuse(
            f"BTCPay-Sig: {bad[:20]}", key, 401, "invalid_signature", headers={"BTCPay-Sig": bad}, body=good
        )
    await world.refuse("no signature", key, 401, "invalid_signature", headers={}, body=good)
    await world.refuse("other body", key, 401, "invalid_signature", headers={"BTCPay-Sig": signed}, body=good + b" ")
    await world.refuse("no body", key, 401, "invalid_signature", headers={"BTCPay-Sig": signed})
    assert world.door.rig.sql("SELECT count(*) FROM webhook_delivery WHERE invoice_id = 'i'") == [(0,)]
    for backend in ("nope", "BTCPAY", "%00", "btcpay%20", "x" * 5000):
        await world.refuse(
            backend[:20],
            key,
            404,
            "not_found",
            target=f"/webhooks/{backend}",
            headers={"BTCPay-Sig": signed},
            body=good,
        )


# --- ids in addresses ------------------------------------------------------------------------------------


async def test_a_strangers_key_is_404_exactly_as_a_missing_one(world: World) -> None:
    for method in ("GET", "PATCH", "DELETE"):
        key = (method, "/keys/{key_id:str}")
        body = b'{"name": "new"}' if method == "PATCH" else None
        answers = set()
        for bad in (world.theirs["key_id"], str(uuid.uuid4()), world.stranger.credit_id, *NOT_UUIDS):
            answer = await world.refuse(f"id {bad[:40]}", key, 404, "key_not_found", target=f"/keys/{bad}", body=body)
            answers.add(answer.body)
        assert len(answers) == 1


async def test_a_strangers_invoice_is_404_exactly_as_a_missing_one(world: World) -> None:
    key = ("GET", "/topup/status/{invoice_id:str}")
    answers = set()
    for bad in (world.theirs["invoice_id"], str(uuid.uuid4()), world.known["invoice_id"].lower(), *NOT_UUIDS):
        answer = await world.refuse(f"id {bad[:40]}", key, 404, "invoice_not_found", target=f"/topup/status/{bad}")
        answers.add(answer.body)
    assert len(answers) == 1


async def test_an_operator_asking_for_no_topup_of_ours_gets_404(world: World) -> None:
    body = json.dumps({"action": "credit", "amount_usd": 1, "reason": "because"}).encode()
    for verb in ("reconcile", "resolve"):
        key = ("POST", f"/admin/topups/{{topup_id:str}}/{verb}")
        for bad in (str(uuid.uuid4()), world.known["invoice_id"], world.known["key_id"], *NOT_UUIDS):
            await world.refuse(f"id {bad[:40]}", key, 404, None, target=f"/admin/topups/{bad}/{verb}", body=body)


async def test_a_review_is_not_resolved_with_an_adjustment_that_makes_no_sense(world: World) -> None:
    key = ("POST", "/admin/topups/{topup_id:str}/resolve")
    for param, wrong in (
        ("amount_usd", {"action": "dismiss"}), ("amount_usd", {"amount_usd": 0}), ("amount_usd", {"amount_usd": None}), ("action", {"action": "gift"}),
        ("amount_usd", {"amount_usd": 10**11}), ("reason", {"reason": ""}), ("reason", {"reason": "x" * 501}), ("reason", {"reason": "a\nbc"}),
    ):  # fmt: skip
        body = json.dumps(world.body(ROUTES[key]) | dict(wrong)).encode()
        await world.refuse(str(wrong)[:60], key, 422, "invalid_field", body=body, param=param)


async def test_a_receipts_address_opens_that_receipt_and_no_other(world: World) -> None:
    good = world.known["token"]
    swapped = world.theirs["token"][:43] + good[43:]
    tampered = [good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :] for at in range(len(good))]
    assert (await world.door.ask("GET", f"/receipts/{good}")).status == 200
    for bad in (swapped, good[:-1], good + "A", *tampered, *NOT_UUIDS):
        answer = await world.door.ask("GET", f"/receipts/{bad}")
        assert answer.status == 404, bad[:40]
        assert len(bad) < 20 or bad not in answer.body.decode()
        world.cases += 1


async def test_a_claim_names_one_payment_of_ones_own(world: World) -> None:
    key = ("POST", "/topup/claim")
    for body in (b"{}", b'{"txid": null}', b'{"txid": "aaaaaaaaaaaa", "payment_hash": "bbbbbbbbbbbb"}'):
        await world.refuse(repr(body), key, 422, "invalid_field", body=body)
    for proof in (world.theirs["txid"], "0" * 64, "' OR 1=1 --aaaa", "%%%%%%%%%%%%"):
        for name in ("txid", "payment_hash", "lightning_invoice"):
            body = json.dumps({name: proof}).encode()
            answer = await world.door.ask("POST", "/topup/claim", world.headers("owner") | JSON, body)
            world.note(f"{name} {proof}", key, answer, refusal_faults(answer, {404, 422}, None, world.door.secrets))
    assert await world.door.rig.balance(world.customer) == 50


async def test_a_page_has_1_to_100_rows_and_goes_on_from_a_cursor_of_ours(world: World) -> None:
    cursors = (
        "x",
        "",
        "%00",
        "%ff",
        "W10",
        "bnVsbA",
        "e30",
        "WyJ4IiwieSJd",
        "A" * 8000,
        "é",
        _cursor(["2026-01-01", str(uuid.uuid4())]),
    )
    for key in (("GET", "/topups"), ("GET", "/admin/topups")):
        for limit in (
            "0",
            "-1",
            "101",
            "1.5",
            "x",
            "",
            "%00",
            "9" * 30,
            "9" * 5000,
            "true",
            "%D9%A1",
            "0x10",
            "1_0",
        ):
            await world.refuse(
                f"limit {limit[:20]}", key, 422, "invalid_field", target=f"{key[1]}?limit={limit}", param="limit"
            )
        for cursor in cursors:
            await world.refuse(
                f"cursor {cursor[:20]}",
                key,
                422,
                "invalid_field",
                target=f"{key[1]}?cursor={quote(cursor, '%')}",
                param="cursor",
            )
        for position in (
            ["0001-01-01T00:00:00+23:59", str(uuid.uuid4())],
            ["9999-12-31T23:59:59-23:59", str(uuid.uuid4())],
        ):
            await world.harmless(
                f"cursor {position}", key, world.headers(ROUTES[key].who), f"{key[1]}?cursor={_cursor(position)}"
            )


def _cursor(position: list[str]) -> str:
    return base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")


async def test_an_unknown_payment_method_is_422_naming_those_there_are(world: World) -> None:
    key = ("POST", "/topup/create/{method:str}")
    for bad in ("paypal", "BTC", "btc%20", "%00", "%ff", "btc-lightning%00", "x" * 8000, "%E2%80%AE", "..", "'--"):
        answer = await world.refuse(
            bad[:20], key, 422, "unknown_method", target=f"/topup/create/{bad}", body=b'{"amount": 20}'
        )
        assert "btc-lightning" in answer.json["message"]


async def test_a_hold_id_that_we_did_not_give_this_service_is_404(world: World) -> None:
    for verb in ("settle", "release", "extend"):
        key, good = ("POST", f"/v1/meter/{verb}"), world.known["hold_id"]
        more = {"cost_usd": 0.01} if verb == "settle" else {}
        alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
        tampered = [good[:at] + alphabet[alphabet.index(good[at]) ^ 1] + good[at + 1 :] for at in range(len(good))]
        tampered += [good[:-1] + last for last in alphabet if last != good[-1]]
        tampered += [
            good[:at] + extra + good[at:]
            for at in (0, 7, len(good))
            for extra in ("!", " ", "=", "==", "\n", "A", "é", "+", "/")
        ]
        tampered += [
            "",
            "x",
            "=" * 50,
            good[:-1],
            good[1:],
            good * 2,
            "é" * 100,
            str(uuid.uuid4()),
            "x" * 60_000,
            base64.b64encode(b"\x00" * 90).decode(),
        ]
        tampered += [good.replace("-", "+").replace("_", "/")] if set("-_") & set(good) else []
        for bad in tampered:
            body = json.dumps({"hold_id": bad, **more}).encode()
            await world.refuse(f"hold_id {bad[:40]}", key, 404, "hold_not_found", body=body)


async def test_another_services_hold_is_404(world: World) -> None:
    from app.admin.tokens import create_token

    house = world.door.rig.house
    other = await create_token(house.db, house.settings.pepper, "service", "other-proxy")
    headers: Headers = {"Authorization": f"Bearer {other}"} | JSON
    event = {**_EVENT, "data": {**_WORK, "hold_id": world.known["hold_id"]}}
    for verb, body in (
        ("settle", {"hold_id": world.known["hold_id"], "cost_usd": 0.01}), ("release", {"hold_id": world.known["hold_id"]}),
        ("extend", {"hold_id": world.known["hold_id"], "captured_usd": 2}), ("events", event),
    ):  # fmt: skip
        key = ("POST", f"/v1/meter/{verb}")
        await world.refuse("another's", key, 404, "hold_not_found", headers=headers, body=json.dumps(body).encode())
    refund = json.dumps({"charge_id": world.known["charge_id"]}).encode()
    await world.refuse("another's", ("POST", "/v1/meter/refund"), 404, "not_found", headers=headers, body=refund)
    before = world.books.fingerprint()
    settles = json.dumps({"settles": [{"hold_id": world.known["hold_id"], "cost_usd": 0.01}]}).encode()
    answer = await world.door.ask("POST", "/v1/meter/settle/batch", headers, settles)
    assert [each["status"] for each in answer.json["results"]] == [404]
    assert world.books.fingerprint() == before


async def test_a_charge_id_that_we_did_not_give_is_404(world: World) -> None:
    good = world.known["charge_id"]
    for bad in (
        "", "x", "=" * 50, good[:-1], good[1:], good * 2, good + "=", good + "A", good + "\n", f" {good}", "é" * 43, good.swapcase(), str(uuid.uuid4()),
        "A" * 43, base64.b64encode(b"\xff" * 32).decode(), "x" * 60_000, world.known["hold_id"], good[:21] + "+/" + good[23:],
    ):  # fmt: skip
        body = json.dumps({"charge_id": bad}).encode()
        await world.refuse(f"charge_id {bad[:40]}", ("POST", "/v1/meter/refund"), 404, "not_found", body=body)


async def test_a_refund_of_more_than_was_charged_or_of_another_amount_than_before_is_refused(world: World) -> None:
    key, charge = ("POST", "/v1/meter/refund"), {"charge_id": world.known["charge_id"]}
    for wrong in ("1.000000001", 0, "0.0", 10**9):
        body = json.dumps({**charge, "amount_usd": wrong}).encode()
        await world.refuse(f"amount {wrong}", key, 422, "invalid_field", body=body, param="amount_usd")
    half = json.dumps(charge | {"amount_usd": 0.5}).encode()
    assert (await world.door.ask("POST", key[1], world.headers("service") | JSON, half)).status == 200
    for amount in (None, 0.4, 0.6, 1):
        body = json.dumps({**charge, "amount_usd": amount}).encode()
        await world.refuse(f"then {amount}", key, 409, "already_refunded", body=body)


async def test_a_hold_that_is_settled_or_released_is_not_extended(world: World) -> None:
    for verb in ("settle", "release"):
        hold = {"hold_id": await _hold(world)}
        more = {"cost_usd": 0.01} if verb == "settle" else {}
        assert (await world.door.rig.meter(verb, **hold, **more)).status_code == 200
        body = json.dumps(hold | {"captured_usd": 1}).encode()
        await world.refuse(f"after {verb}", ("POST", "/v1/meter/extend"), 409, "hold_closed", body=body)


# --- what fields mean --------------------------------------------------------------------------------------

_NOW: Final = datetime.now(UTC)
BAD_KEYS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("name", {"name": ""}), ("name", {"name": "   "}), ("name", {"name": "x" * 26}), ("name", {"name": "é" * 26}), ("name", {"name": "e\u0301" * 26}),
    ("name", {"name": "a\nb"}), ("name", {"name": "a\tb"}), ("name", {"name": "a\x1bb"}), ("name", {"name": "a\x7fb"}), ("name", {"name": "a\x85b"}),
    ("name", {"name": "a\u202eb"}), ("name", {"name": "a\u2066b"}), ("name", {"name": "a\u200fb"}), ("name", {"name": "a\u200bb"}),
    ("name", {"name": "a\ufeffb"}), ("name", {"name": "a\u00adb"}), ("name", {"name": "a\u2028b"}), ("name", {"name": "a\ue000b"}),
    ("name", {"name": "a\U000e0041b"}), ("name", {"name": "a\uffffb"}), ("name", {"name": "\u3000\u2003"}),
    ("usage_limit_usd", {"usage_limit_usd": 0.009}), ("usage_limit_usd", {"usage_limit_usd": "0.009999999"}), ("usage_limit_usd", {"usage_limit_usd": 0}),
    ("usage_limit_usd", {"usage_limit_usd": 999999999999}), ("reset_period", {"usage_limit_usd": None}), ("reset_period", {"reset_period": "yearly"}),
    ("reset_period", {"reset_period": "day"}), ("reset_period", {"reset_period": "DAILY"}), ("reset_period", {"reset_period": ""}),
    ("expire_at", {"expire_at": "2020-01-01T00:00:00Z"}), ("expire_at", {"expire_at": (_NOW - timedelta(seconds=1)).isoformat()}),
    ("expire_at", {"expire_at": "9999-12-31T23:59:59-23:59"}), ("expire_at", {"expire_at": "0001-01-01T00:00:00+23:59"}),
    ("expire_at", {"expire_at": "2999-01-01T00:00:00"}), ("expire_at", {"expire_at": "2999-01-01"}), ("expire_at", {"expire_at": "tomorrow"}),
    ("expire_at", {"expire_at": "2999-02-30T00:00:00Z"}), ("expire_at", {"expire_at": "10000-01-01T00:00:00Z"}), ("expire_at", {"expire_at": 4102444800}),
    ("expire_at", {"expire_at": "2999-01-01T25:00:00Z"}), ("expire_at", {"expire_at": "2999-01-01T00:00:00+99:99"}), ("expire_at", {"expire_at": ""}),
    ("scopes", {"scopes": ["admin"]}), ("scopes", {"scopes": ["spend"] * 6}), ("scopes", {"scopes": "spend"}), ("scopes", {"scopes": [""]}),
    ("allowed_models", {"allowed_models": [""]}), ("allowed_models", {"allowed_models": ["a b"]}), ("allowed_models", {"allowed_models": ["é"]}),
    ("allowed_models", {"allowed_models": ["m"] * 201}), ("allowed_models", {"allowed_models": ["x" * 201]}), ("allowed_models", {"allowed_models": ["a\n"]}),
    ("requests_per_minute", {"requests_per_minute": 0}), ("requests_per_minute", {"requests_per_minute": True}), ("max_usd_per_call", {"max_usd_per_call": 0}),
    ("disabled", {"disabled": None}), ("disabled", {"disabled": "false"}), ("disabled", {"disabled": 0}),
)  # fmt: skip


async def test_a_key_that_cannot_be_is_422_naming_the_field(world: World) -> None:
    for key in [("POST", "/keys"), ("PATCH", "/keys/{key_id:str}")]:
        for param, wrong in BAD_KEYS:
            body = json.dumps(world.body(ROUTES[key]) | dict(wrong)).encode()
            await world.refuse(str(wrong)[:60], key, 422, "invalid_field", body=body, param=param)
        await world.refuse(
            "period alone",
            key,
            422,
            "invalid_field",
            body=b'{"name": "n", "reset_period": "daily"}',
            param="reset_period",
        )


async def test_a_taken_name_is_409_in_every_spelling_that_is_the_same_text(world: World) -> None:
    await world.door.rig.new_key(world.customer, name="café Ω")
    for key in (("POST", "/keys"), ("PATCH", "/keys/{key_id:str}")):
        for name in (
            "café Ω",
            "cafe\u0301 Ω",
            " café Ω ",
            "café \u2126",
            "\u00a0café Ω\u3000",
            unicodedata.normalize("NFD", "café Ω"),
        ):
            body = json.dumps({"name": name}).encode()
            await world.refuse(repr(name), key, 409, "name_taken", body=body, param="name")


async def test_names_that_look_dangerous_but_are_only_text_are_kept_as_they_are(world: World) -> None:
    for name in (
        "'; DROP TABLE api_key;--",
        "<script>alert(1)</script>",
        "%s %(a)s :b {c} ${d}",
        "\\u0000 \\ NULL",
        "名前 ключ 🔑",
        "x" * 25,
        "é" * 25,
    ):
        answer = await world.door.ask("POST", "/keys", world.customer.owner | JSON, json.dumps({"name": name}).encode())
        assert (answer.status, answer.json.get("data", {}).get("name")) == (201, name), answer.body
        world.cases += 1


BAD_AMOUNTS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("amount_out_of_range", {"amount": 9.99}), ("amount_out_of_range", {"amount": "10000.000000001"}), ("amount_out_of_range", {"amount": 0}),
    ("amount_out_of_range", {"amount": "0.00009999", "currency": "BTC"}), ("amount_out_of_range", {"amount": "999999999"}),
    ("invalid_field", {"amount": "0.000100001", "currency": "BTC"}), ("invalid_field", {"amount": "1e-4", "currency": "BTC"}),
    ("unsupported_currency", {"currency": "EUR"}), ("unsupported_currency", {"currency": "uſd"}), ("unsupported_currency", {"currency": "XMR"}),
    ("unsupported_currency", {"currency": "US\u202eD"}), ("invalid_field", {"currency": ""}), ("invalid_field", {"currency": "U" * 11}),
    ("unsupported_currency", {"currency": "SATS"}), ("unsupported_currency", {"currency": "'--"}),
)  # fmt: skip


async def test_an_amount_that_cannot_be_paid_is_422(world: World) -> None:
    made = world.door.rig.btcpay.created
    for code, wrong in BAD_AMOUNTS:
        body = json.dumps({"amount": 20, "currency": "USD"} | dict(wrong)).encode()
        answer = await world.refuse(str(wrong), ("POST", "/topup/create/{method:str}"), 422, code, body=body)
        if code == "amount_out_of_range":
            assert set(answer.json["error"]["metadata"]) == {"min", "max", "currency"}
    assert world.door.rig.btcpay.created == made


async def test_a_fraction_of_a_satoshi_is_422(world: World) -> None:
    key = ("POST", "/topup/create/{method:str}")
    for amount in ("1000.5", '"1000.00000001"'):
        body = b'{"currency": "SATS", "amount": %s}' % amount.encode()
        await world.refuse(
            amount, key, 422, "invalid_field", target="/topup/create/btc-lightning", body=body, param="amount"
        )


BAD_CALLS: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("request_id", {"request_id": ""}), ("request_id", {"request_id": "a b"}), ("request_id", {"request_id": "x" * 65}),
    ("request_id", {"request_id": "a\n"}), ("request_id", {"request_id": "é"}), ("request_id", {"request_id": "a/b"}), ("request_id", {"request_id": " a"}),
    ("api_key_hash", {"api_key": None, "api_key_hash": "0" * 63}), ("api_key_hash", {"api_key": None, "api_key_hash": "g" * 64}),
    ("api_key_hash", {"api_key": None, "api_key_hash": "0" * 64 + "\n"}), ("api_key", {"api_key": None}), ("api_key", {"api_key_hash": "0" * 64}),
    ("endpoint", {"endpoint": "a\nb"}),
    ("max_cost_usd", {"max_cost_usd": "1000000000.000000001"}), ("max_cost_usd", {"max_cost_usd": 999999999999}),
)  # fmt: skip


async def test_a_call_that_cannot_be_metered_is_422_naming_the_field(world: World) -> None:
    for verb in ("authorize", "charge"):
        key = ("POST", f"/v1/meter/{verb}")
        for param, wrong in BAD_CALLS:
            body = json.dumps(world.body(ROUTES[key]) | dict(wrong)).encode()
            await world.refuse(str(wrong)[:60], key, 422, "invalid_field", body=body, param=param)
        more: list[tuple[str, dict[str, Any]]] = (
            [("ttl_seconds", {"ttl_seconds": ttl}) for ttl in (0, -1, 86_401, 10**30, "60", 1.5)]
            if verb == "authorize"
            else []
        )
        more += (
            [("max_cost_usd", {"cost_usd": 0.03}), ("usage", {"cost_usd": None, "usage": None})]
            if verb == "charge"
            else []
        )
        for param, wrong in more:
            body = json.dumps(world.body(ROUTES[key]) | dict(wrong)).encode()
            await world.refuse(str(wrong)[:60], key, 422, "invalid_field", body=body, param=param)


MINI: Final = "gpt-4o-mini"
BAD_ESTIMATES: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("max_cost_usd", {"max_cost_usd": 0.02}), ("max_cost_usd", {"estimate": None}), ("mode", {"estimate": None, "max_cost_usd": 1, "mode": "clamp"}),
    ("model", {"model": None}), ("features", {"features": ["web"] * 17}), ("features", {"features": [""]}),
    ("estimate.input_tokens", {"estimate": {"input_tokens": 10**12 + 1}}),
)  # fmt: skip
BAD_USES: Final[tuple[tuple[str, Mapping[str, Any]], ...]] = (
    ("served_model", {"served_model": None}), ("usage", {"served_model": "dall-e-3", "usage": {"images": 10**12}}),
    ("usage.output_tokens", {"usage": {"output_tokens": 10**12 + 1}}), ("features_used", {"features_used": ["web"] * 17}),
)  # fmt: skip


async def test_an_estimate_or_use_that_cannot_be_priced_is_422_naming_the_field(world: World) -> None:
    house = world.door.rig.house
    await ensure_starter(house.db)
    house.catalogues._fresh_until = None
    call = {"request_id": "new", "api_key": world.customer.api_key, "model": MINI, "estimate": {"input_tokens": 5}}
    for param, wrong in BAD_ESTIMATES:
        body = json.dumps(call | dict(wrong)).encode()
        await world.refuse(
            str(wrong)[:70], ("POST", "/v1/meter/authorize"), 422, "invalid_field", body=body, param=param
        )
    work = {"usage": {"input_tokens": 5}, "served_model": MINI}
    hold = {"hold_id": world.known["hold_id"]}
    for param, wrong in BAD_USES:
        used = work | dict(wrong)
        charge = {"request_id": "new", "api_key": world.customer.api_key}
        for verb, told, where in (
            ("settle", hold | used, param), ("charge", charge | used, param),
            ("events", {**_EVENT, "id": "1", "data": hold | used}, f"data.{param}"),
        ):  # fmt: skip
            key, body = ("POST", f"/v1/meter/{verb}"), json.dumps(told).encode()
            await world.refuse(str(wrong)[:70], key, 422, "invalid_field", body=body, param=where)


async def test_an_event_that_names_neither_a_hold_nor_a_key_is_422(world: World) -> None:
    for who in ({}, {"subject": ""}, {"subject": "0" * 63}, {"subject": "٠" * 64}, {"subject": "0" * 64 + "\n"}):
        body = json.dumps({**_EVENT, "subject": None, "id": "1", "data": _WORK, **who}).encode()
        await world.refuse(
            f"{who}", ("POST", "/v1/meter/events"), 422, "invalid_field", body=body, param="data.api_key_hash"
        )
    world.door.rig.house.catalogues._fresh_until = None
    key_hash = hashlib.sha256(world.customer.api_key.encode()).hexdigest()
    unsold = {
        **_EVENT,
        "id": "1",
        "subject": key_hash,
        "data": {"model": "nobody/sells-this", "usage": {"input_tokens": 5}},
    }
    body = json.dumps(unsold).encode()
    await world.refuse("not sold", ("POST", "/v1/meter/events"), 422, "model_not_priced", body=body, param="data.model")
    two = json.dumps({**_EVENT, "id": "1", "subject": "0" * 64, "data": {**_WORK, "api_key_hash": key_hash}}).encode()
    await world.refuse(
        "two keys", ("POST", "/v1/meter/events"), 422, "invalid_field", body=two, param="data.api_key_hash"
    )
    nobody = json.dumps({**_EVENT, "id": "1", "subject": "0" * 64, "data": _WORK}).encode()
    await world.refuse("nobody's key", ("POST", "/v1/meter/events"), 401, "invalid_api_key", body=nobody)


async def test_an_unknown_api_key_is_a_verdict_for_the_proxys_caller_and_holds_nothing(world: World) -> None:
    before = world.books.fingerprint()
    for verb in ("authorize", "charge"):
        route = ROUTES["POST", f"/v1/meter/{verb}"]
        secrets = [
            text.decode("latin-1") if isinstance(text, bytes) else text
            for text in _bad_keys(world.customer.api_key, "sk")
        ]
        callers: list[dict[str, str | None]] = [{"api_key": None, "api_key_hash": "0" * 64}]
        callers += [{"api_key": text} for text in secrets if "\x00" not in text]
        for who in callers:
            answer = await world.door.ask(
                "POST",
                f"/v1/meter/{verb}",
                world.headers("service") | JSON,
                json.dumps(world.body(route) | who).encode(),
            )
            assert (answer.status, answer.json["decision"], answer.json["status"]) == (200, "deny", 401), answer.body
            assert answer.json["error"]["code"] == "invalid_api_key"
            world.cases += 1
    assert world.books.fingerprint() == before


async def test_the_largest_amounts_are_a_verdict_or_a_422_and_never_overflow(world: World) -> None:
    most = "1000000000"
    answer = await world.door.rig.authorize(world.customer.api_key, most)
    assert (answer["decision"], answer["error"]["code"]) == ("deny", "insufficient_balance")
    statuses = []
    for _ in range(12):
        body = json.dumps({"hold_id": await _hold(world), "cost_usd": most}).encode()
        statuses.append(
            (await world.door.ask("POST", "/v1/meter/settle", world.headers("service") | JSON, body)).status
        )
        world.door.rig.sql("UPDATE account SET floor_nusd = -9000000000000000000")
    world.door.rig.sql("UPDATE account SET floor_nusd = 0")  # nobody decided it, as the audit would tell
    assert set(statuses) == {200, 422}
    world.cases += 1


async def test_the_largest_amounts_of_many_at_once_do_not_overflow_either(world: World) -> None:
    holds = [await _hold(world) for _ in range(12)]
    captured = [await world.door.rig.meter("extend", hold_id=hold, captured_usd=10**9) for hold in holds]
    assert {answer.status_code for answer in captured} == {200, 422}
    settles = [{"hold_id": hold, "cost_usd": 10**9} for hold in holds]
    answer = (await world.door.rig.meter("settle/batch", settles=settles)).json()
    assert {each["status"] for each in answer["results"]} == {200, 422}
    world.cases += 1


async def _hold(world: World) -> str:
    found = await world.door.rig.meter(
        "authorize", request_id=uuid.uuid4().hex, api_key=world.customer.api_key, max_cost_usd=0
    )
    return str(found.json().get("hold_id", world.known["hold_id"]))


# --- Idempotency-Key -----------------------------------------------------------------------------------------


async def test_a_malformed_idempotency_key_is_400(world: World) -> None:
    for key in [key for key, route in ROUTES.items() if route.has_effect_once]:
        body = json.dumps(world.body(ROUTES[key])).encode()
        for bad in (
            "", '""', "a" * 256, '"' + "a" * 256 + '"', "a b c d e f g h i j k", "é" * 20, b"\xff" * 20, 'a"b' * 10, '"' + "a" * 20, "a" * 20 + '"',
            '"a"b' * 10, "\x00" * 20, "a\tb" * 10, "x" * 60_000, '"',
        ):  # fmt: skip
            headers = world.headers(ROUTES[key].who) | JSON | {"Idempotency-Key": bad}
            await world.refuse(
                f"Idempotency-Key: {bad!r}",
                key,
                400,
                "malformed_header",
                headers=headers,
                body=body,
                param="Idempotency-Key",
            )


async def test_an_account_is_not_made_under_an_idempotency_key_that_can_be_guessed(world: World) -> None:
    for short in ("abc", '"abc"', "a" * 15):
        headers = {"Idempotency-Key": short}
        await world.refuse(
            short, ("POST", "/accounts/create"), 400, "malformed_header", headers=headers, param="Idempotency-Key"
        )
    assert (await world.door.ask("POST", "/accounts/create", idempotency_key())).status == 201


def test_the_addresses_tried_are_what_a_browser_would_send() -> None:
    assert all(quote(bad, safe="%;'=:-") == bad for bad in NOT_UUIDS)
