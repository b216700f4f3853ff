"""The app's own door, without a client's manners: any bytes can be sent, and requests really race."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final, cast
from urllib.parse import unquote

import httpx
import psycopg
from litestar import Litestar
from litestar.testing import AsyncTestClient

from app.admin.tokens import create_token
from app.kernel.settings import Settings
from app.main import create_app
from app.wiring import build
from tests.rig import Customer, Rig
from tests.wallets import FakeLightning, FakeWallets

JSON: Final = {"Content-Type": "application/json"}
NOT_BOOKS: Final = (
    "alembic_version",
    "audit_run",
    "figure",
    "idempotency",
    "rate_count",
    "webhook_delivery",
    "token_use",
)
"""Tables that a refused request may write to, or a job beside it: they count and remember, and are no money and no rights."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back, as bytes."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    cookies: tuple[str, ...] = ()
    """Set-Cookie lines; of other headers there is one of a name."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """The stable code of a refusal, None for anything else. OpenRouter's clients read the status in its place."""
        try:
            error = self.json["error"]
            return str(error["metadata"]["error_code"] if isinstance(error["code"], int) else error["code"])
        except (ValueError, KeyError, TypeError):
            return None


@dataclass(slots=True)
class Door:
    """The app in this very event loop. `rig` has the short words for it, over the same app."""

    app: Litestar
    rig: Rig
    secrets: set[str] = field(default_factory=set)
    """Credentials that may never be in a refusal."""

    async def ask(
        self,
        method: str,
        target: str,
        headers: Mapping[str, str | bytes] | Iterable[tuple[str, str]] | None = None,
        body: bytes | Sequence[bytes] | None = None,
        *,
        breaks_off: bool = False,
        client: str = "127.0.0.1",
    ) -> Answer:
        """Send a request. `body` as a sequence comes in chunks, without a Content-Length.

        `target` is percent-encoded, and decoded as uvicorn does it.
        """
        path, _, query = target.partition("?")
        lines = headers.items() if isinstance(headers, Mapping) else headers or ()
        wire = [(name.lower().encode(), _latin1(value)) for name, value in lines]
        if body is not None and not isinstance(body, bytes):
            wire.append((b"transfer-encoding", b"chunked"))
        if isinstance(body, bytes) and "content-length" not in {name.decode() for name, _ in wire}:
            wire.append((b"content-length", str(len(body)).encode()))
        if b"host" not in {name for name, _ in wire}:
            wire.append((b"host", b"testserver.local"))
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1", "method": method,
            "path": unquote(path), "raw_path": path.encode("latin-1"), "query_string": query.encode("latin-1"),
            "root_path": "", "scheme": "http", "headers": wire, "client": (client, 50000), "server": ("testserver", 80),
        }  # fmt: skip
        chunks = [body] if isinstance(body, bytes) else list(body or [])
        start: dict[str, Any] = {}
        received = bytearray()

        async def receive() -> dict[str, Any]:
            if chunks:
                chunk = chunks.pop(0)
                return {"type": "http.request", "body": chunk, "more_body": bool(chunks) or breaks_off}
            if breaks_off or start:
                return {"type": "http.disconnect"}
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                assert not start
                start.update(message)
            else:
                received.extend(message.get("body", b""))

        await self.app(cast("Any", scope), cast("Any", receive), send)
        headers_back = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}
        cookies = tuple(value.decode("latin-1") for name, value in start["headers"] if name.lower() == b"set-cookie")
        return Answer(start["status"], headers_back, bytes(received), cookies)

    async def race(self, asks: Iterable[Any]) -> list[Answer]:
        return list(await asyncio.gather(*asks))

    async def customer(self, usd: str = "0") -> Customer:
        """A customer whose credentials are watched for."""
        customer = await self.rig.customer(usd)
        self.secrets |= {customer.credit_id, customer.api_key}
        return customer

    async def service(self) -> dict[str, str]:
        headers = await self.rig.service()
        self.secrets.add(headers["Authorization"].split()[1])
        return headers

    async def admin(self) -> dict[str, str]:
        house = self.rig.house
        token = await create_token(house.db, house.settings.pepper, "admin", "operator")
        self.secrets.add(token)
        return {"Authorization": f"Bearer {token}"}


@asynccontextmanager
async def opened(
    url: str, settings: Settings, *, now: Callable[[], float] = time.time, **changed: Any
) -> AsyncIterator[Door]:
    """The app over an empty database, with some settings changed; afterwards the books are audited."""
    settings, btcpay = replace(settings, **changed), FakeLightning()
    house = build(settings, url, gateway=btcpay, wallets=FakeWallets(btcpay))
    app = create_app(house, now=now)
    transport = httpx.ASGITransport(cast("Any", app), raise_app_exceptions=False)
    await house.db.open()
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://testserver.local") as client:
            rig = Rig(cast("AsyncTestClient[Any]", client), house, url)
            yield Door(app, rig)
            await rig.audit()
    finally:
        await house.close()


class Books:
    """A fingerprint of every table, for seeing that nothing changed."""

    def __init__(self, url: str) -> None:
        self._conn = psycopg.connect(url, autocommit=True)
        tables = [
            name
            for (name,) in self._conn.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1")
            if name not in NOT_BOOKS
        ]
        assert {"account", "api_key", "entry", "hold", "topup"} <= set(tables)
        one = "SELECT {1} AS name, count(*), md5(coalesce(string_agg(t::text, '|' ORDER BY t::text), '')) FROM {0} AS t"
        # In an order: the branches of a UNION ALL come as they are done, and large tables are done in parallel.
        self._statement = " UNION ALL ".join(one.format(f'"{name}"', f"'{name}'") for name in tables) + " ORDER BY name"

    def __enter__(self) -> "Books":
        return self

    def __exit__(self, *_: object) -> None:
        self._conn.close()

    def fingerprint(self) -> list[tuple[Any, ...]]:
        return self._conn.execute(self._statement.encode()).fetchall()


def refusal_faults(answer: Answer, status: int | set[int], code: str | None, secrets: Iterable[str]) -> list[str]:
    """What is wrong with a refusal: its status, code, the one documented body, its headers; and secrets in it."""
    statuses = status if isinstance(status, set) else {status}
    faults = [f"status {answer.status}, not {status}"] * (answer.status not in statuses)
    try:
        body = answer.json
    except ValueError:
        return [*faults, f"body is not JSON: {answer.body[:100]!r}"]
    if not isinstance(body, dict) or set(body) != {"error", "message", "statusCode"}:
        return [*faults, f"body has another shape: {str(body)[:200]}"]
    error = body["error"]
    faults += [f"error has {sorted(error)}"] * (set(error) - {"metadata"} != {"message", "type", "code", "param"})
    faults += [f"code {answer.code}, not {code}"] * (code is not None and answer.code != code)
    faults += ["code is another number than the status"] * (error["code"] not in (answer.code, answer.status))
    faults += ["message twice, and not the same"] * (error.get("message") != body["message"])
    faults += [f"message says nothing: {body['message']!r}"] * (len(body["message"]) < 8)
    faults += ["statusCode is not the status"] * (body["statusCode"] != answer.status)
    faults += ["no X-Request-Id"] * (not answer.headers.get("x-request-id"))
    faults += ["not JSON by its type"] * (not answer.headers.get("content-type", "").startswith("application/json"))
    faults += ["may be cached"] * (answer.headers.get("cache-control") != "no-store")
    faults += ["401 without WWW-Authenticate"] * (answer.status == 401 and "www-authenticate" not in answer.headers)
    faults += ["no Retry-After"] * (answer.status in (429, 503) and "retry-after" not in answer.headers)
    faults += ["a message too long to read"] * (len(body["message"]) > 600)
    text = answer.body.decode()
    return faults + ["a credential is echoed"] * any(secret in text for secret in secrets if len(secret) > 8)


def idempotency_key() -> dict[str, str]:
    return {"Idempotency-Key": uuid.uuid4().hex}


def _latin1(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode("latin-1")
