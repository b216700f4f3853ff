"""An LNbits server of a few lines that behaves: one wallet, real BOLT11 invoices, and it can be told to misbehave."""

import asyncio
import hashlib
import json
from collections import deque
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import bolt11
import httpx
from bolt11 import Bolt11, MilliSatoshi, Tag, TagChar, Tags

from app.adapters.asking import Patience
from app.adapters.lnbits import LnbitsGateway
from app.adapters.rates import FixedRateSource
from tests.adapters.fake_greenfield import Clock

URL = "https://lnbits.example"
KEY = "0123456789abcdef0123456789abcdef"
START = datetime(2026, 11, 20, 12, tzinfo=UTC)
_FILTERS = ("external_id", "payment_hash", "tag")


def a_bolt11(amount_msat: int, at: datetime, expiry_seconds: int | None, secret: bytes = b"secret") -> tuple[str, str]:
    """A payment hash and the BOLT11 that asks for it."""
    payment_hash = hashlib.sha256(secret).hexdigest()
    tags = Tags([Tag(TagChar.payment_hash, payment_hash), Tag(TagChar.payment_secret, "11" * 32)])
    tags.add(TagChar.description, "x")
    if expiry_seconds is not None:
        tags.add(TagChar.expire_time, expiry_seconds)
    invoice = Bolt11(currency="bc", amount_msat=MilliSatoshi(amount_msat), date=int(at.timestamp()), tags=tags)
    return payment_hash, bolt11.encode(invoice, "22" * 32)


class FakeLnbits:
    """Keeps payments, newest last; `next_answers` come first: responses, exceptions, or seconds to hang."""

    def __init__(self) -> None:
        self.requests: list[httpx.Request] = []
        self.next_answers: deque[httpx.Response | Exception | float] = deque()
        self.payments: list[dict[str, Any]] = []
        self.now = START
        self.changes: dict[str, Any] = {}
        """What the next payment made differs in."""
        self.ignored_filters: frozenset[str] = frozenset()

    def pay(self, payment_hash: str) -> None:
        self._payment(payment_hash).update(status="success", updated_at=self.now.isoformat())

    def wait(self, **time: float) -> None:
        self.now += timedelta(**time)

    def webhook(self, payment_hash: str) -> bytes:
        """As LNbits sends it: JSON within JSON."""
        return json.dumps(json.dumps(self._payment(payment_hash))).encode()

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        if self.next_answers:
            answer = self.next_answers.popleft()
            if isinstance(answer, httpx.Response):
                return answer
            if isinstance(answer, Exception):
                raise answer
            await asyncio.sleep(answer)
        return self._answer(request)

    def _answer(self, request: httpx.Request) -> httpx.Response:
        if request.headers.get("x-api-key") != KEY:
            return problem(404, "Wallet not found.")
        match request.method, request.url.path.split("/")[3:]:
            case "POST", ["payments"]:
                return httpx.Response(201, json=self._create(json.loads(request.content)))
            case "GET", ["wallet"]:
                return httpx.Response(200, json={"name": "shop", "balance": 0})
            case "GET", ["payments", "paginated"]:
                return httpx.Response(200, json=self._list(dict(request.url.params)))
            case "GET", ["payments", payment_hash]:
                return self._recheck(payment_hash)
        return httpx.Response(404, json={"detail": "Not Found"})

    def _create(self, asked: dict[str, Any]) -> dict[str, Any]:
        msat = int(asked["amount"]) * 1000
        payment_hash, text = a_bolt11(msat, self.now, asked["expiry"], str(len(self.payments)).encode())
        now = self.now.isoformat()
        payment = {
            "checking_id": payment_hash, "payment_hash": payment_hash, "wallet_id": "w", "amount": msat, "fee": 0, "bolt11": text,
            "status": "pending", "memo": asked["memo"], "expiry": "2026-11-20T12:15:00", "webhook": asked.get("webhook"),
            "time": now, "created_at": now, "updated_at": now, "labels": [], "tag": asked["extra"]["tag"],
            "extra": {**asked["extra"], "wallet_btc_rate": 64392.120000001}, "external_id": asked["external_id"],
        }  # fmt: skip
        self.payments.append(payment | self.changes)
        self.changes = {}
        return self.payments[-1]

    def _list(self, query: dict[str, str]) -> dict[str, Any]:
        wanted = {name: query[name] for name in _FILTERS if name in query and name not in self.ignored_filters}
        found = [one for one in self.payments if all(one.get(name) == value for name, value in wanted.items())]
        since = query.get("time[ge]")
        if since is not None:
            found = [one for one in found if datetime.fromisoformat(one["time"]) >= datetime.fromisoformat(since)]
        found = sorted(found, key=lambda one: one["time"])
        return {"data": found[: int(query["limit"])], "total": len(found)}

    def _recheck(self, payment_hash: str) -> httpx.Response:
        payment = self._payment(payment_hash)
        if payment["status"] == "pending" and self.now >= datetime.fromisoformat(payment["expiry"] + "+00:00"):
            payment["status"] = "failed"  # and nobody can pay it any more
        return httpx.Response(200, json={"paid": payment["status"] == "success", "details": payment})

    def _payment(self, payment_hash: str) -> dict[str, Any]:
        return next(one for one in self.payments if one["payment_hash"] == payment_hash)


def problem(http_status: int, detail: Any, **more: str) -> httpx.Response:
    return httpx.Response(http_status, json={"detail": detail, **more})


def a_gateway(fake: FakeLnbits, clock: Clock | None = None, **settings: Any) -> LnbitsGateway:
    """A gateway on the fake that lives by its clock and never waits between tries; a BTC is 64,000 USD."""
    values: dict[str, Any] = {
        "base_url": URL,
        "invoice_key": KEY,
        "rates": FixedRateSource({"BTC": Decimal(64_000)}, now=lambda: fake.now),
        "patience": Patience(backoff_seconds=0),
        "client": httpx.AsyncClient(transport=httpx.MockTransport(fake)),
        "monotonic": clock or Clock(),
        "now": lambda: fake.now,
    }
    return LnbitsGateway(**{**values, **settings})
