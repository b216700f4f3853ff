"""A small world in one process: the sandbox as backend, processes of ours that can be killed, wires that can be cut.

A process of ours is a House with its app behind wires of its own: one to the database, one to the backend. Killing it
cuts them for ever, so that nothing it would still do at the end, such as giving back a claim, can have any effect.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any, Final, TypeVar

import httpx
import psycopg
import pytest
from litestar import Litestar
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from app.adapters.asking import Patience
from app.adapters.btcpay import BtcpayGateway
from app.jobs import for_each_gateway
from app.kernel.errors import AppError
from app.kernel.settings import Settings
from app.main import create_app
from app.sandbox.btcpay import SandboxConfig, create_sandbox
from app.topups.credit import check_due
from app.topups.inbox import process_waiting
from app.wiring import House, build
from tests.sandbox.conftest import living

SECRET: Final = "whsec-of-the-world"
PATIENCE: Final = Patience(deadline_seconds=1.0, retries=1, backoff_seconds=0, cooldown_seconds=0.01)

T = TypeVar("T")
Send = Callable[[httpx.Request], Awaitable[httpx.Response]]
Commit = Callable[[str, Callable[[], Awaitable[None]]], Awaitable[None]]
"""What stands at a COMMIT: gets the transaction's SQL and how to let it through; may raise ConnectionError."""


class Wire(httpx.AsyncBaseTransport):
    """An httpx transport that asks a function."""

    def __init__(self, send: Send) -> None:
        self._send = send

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await request.aread()
        return await self._send(request)


async def call(app: Litestar, request: httpx.Request) -> httpx.Response:
    """Ask an app in this process. It goes on when its caller has given up, as a server does."""
    # A request object is read once; what comes twice on the wire is two.
    copy = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
    return await apart(_called(app, copy))


async def apart(work: Coroutine[Any, Any, T]) -> T:
    """Do it in a task of its own, which goes on when whoever waits for it is cancelled."""
    return await asyncio.shield(asyncio.create_task(work))


async def _called(app: Litestar, request: httpx.Request) -> httpx.Response:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)  # type: ignore[arg-type]
    try:
        response = await transport.handle_async_request(request)
        return httpx.Response(response.status_code, headers=response.headers, content=await response.aread())
    except AssertionError as error:  # httpx's way to say that an answer broke off
        raise httpx.RemoteProtocolError("the answer broke off") from error


class Backend:
    """The sandbox. A restart is another one on the same folder: what its webhooks' queues held is lost."""

    def __init__(self, folder: Path, deliver: Send) -> None:
        self._config = SandboxConfig(
            state_dir=folder, public_url="http://sandbox.test", store_id="Store", api_key="key",
            webhook_url="http://us.test/webhooks/btcpay", webhook_secret=SECRET, time_scale=0.0001,
        )  # fmt: skip
        self._deliver = deliver
        self._life = contextlib.AsyncExitStack()
        self._app: Litestar | None = None
        self.rates = {"BTC_USD": Decimal(65000), "LTC_USD": Decimal(80), "XMR_USD": Decimal(150)}
        self.restarts = 0

    async def start(self) -> None:
        config = replace(self._config, rates=self.rates)
        self._app = create_sandbox(config, webhook_transport=Wire(lambda letter: apart(self._delivered(letter))))
        await self._life.enter_async_context(living(self._app))

    async def stop(self) -> None:
        self._app = None
        await self._life.aclose()
        self._life = contextlib.AsyncExitStack()

    async def restart(self) -> None:
        self.restarts += 1
        await self.stop()
        await self.start()

    async def send(self, request: httpx.Request) -> httpx.Response:
        if self._app is None:
            raise httpx.ConnectError("the backend is not running")
        return await call(self._app, request)

    async def _delivered(self, letter: httpx.Request) -> httpx.Response:
        return await self._deliver(letter)

    async def drive(self, path: str, **body: Any) -> Any:
        """An act of the payer, the miners or the operator. Returns what the sandbox answers."""
        while self._app is None:  # it is just being restarted
            await asyncio.sleep(0.005)
        answer = await self.send(httpx.Request("POST", f"http://sandbox.test/sandbox/{path}", json=body))
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def look(self, path: str) -> Any:
        while self._app is None:
            await asyncio.sleep(0.005)
        return (await self.send(httpx.Request("GET", f"http://sandbox.test/sandbox/{path}"))).json()

    async def set_rates(self, **rates: str) -> None:
        """Move the exchange's rates, which a restart of the backend does not put back."""
        self.rates |= {pair: Decimal(rate) for pair, rate in rates.items()}
        await self.drive("rates", **rates)

    async def act(self, invoice_id: str, what: str, **body: Any) -> Any:
        return await self.drive(f"invoices/{invoice_id}/{what}", **body)

    async def invoices_of(self, order_id: str) -> list[Any]:
        return [one for one in await self.look("invoices") if one["metadata"].get("orderId") == order_id]

    async def all_told(self) -> None:
        """Wait until no webhook waits any more."""
        for _ in range(1000):
            if (await self.look(""))["waitingEvents"] == 0:
                return
            await asyncio.sleep(0.005)
        raise AssertionError("webhooks still wait after 5 s")


class Process:
    """One process of ours. `send` is its wire to the backend; `at_commit` stands at every COMMIT it sends."""

    def __init__(
        self,
        settings: Settings,
        database_url: str,
        send: Send,
        *,
        at_commit: Commit | None = None,
    ) -> None:
        self._settings, self._database_url = settings, database_url
        self._send = send
        self._database = DatabaseWire(database_url, at_commit) if at_commit else None
        self._death = asyncio.Event()

    @property
    def is_dead(self) -> bool:
        return self._death.is_set()

    async def start(self) -> None:
        url = await self._database.open() if self._database else self._database_url
        self._client = httpx.AsyncClient(transport=Wire(self._to_backend))
        self.gateway = BtcpayGateway(
            base_url="http://sandbox.test", api_key="key", store_id="Store", webhook_secret=SECRET, client=self._client,
            patience=PATIENCE,
        )  # fmt: skip
        self.house: House = build(self._settings, url, gateway=self.gateway)
        await self.house.db.open()
        self.app = create_app(self.house)

    def kill(self) -> None:
        """As kill -9: from now on nothing of it has any effect."""
        self._death.set()
        if self._database:
            self._database.cut()

    async def close(self) -> None:
        await self.house.close()
        await self._client.aclose()
        if self._database:
            await self._database.close()

    async def ask(self, request: httpx.Request) -> httpx.Response:
        """What a client or the backend gets from us. Raises httpx.ConnectError when we are dead before the answer."""
        copy = httpx.Request(request.method, request.url, headers=request.headers, content=request.content)
        return await apart(self._until_death(_called(self.app, copy)))

    async def jobs(self, *, polls_first: bool = False) -> None:
        """One round of the clock's jobs; a failing one comes again, as in `app.jobs`."""
        for work in (check_due, process_waiting) if polls_first else (process_waiting, check_due):
            with contextlib.suppress(AppError, httpx.ConnectError):
                await self._until_death(for_each_gateway(self.house, work))

    async def _until_death(self, work: Coroutine[Any, Any, T]) -> T:
        """Do it as long as we live, and no longer. Raises httpx.ConnectError when we are dead before it is done."""
        doing, dying = asyncio.create_task(work), asyncio.create_task(self._death.wait())
        await asyncio.wait((doing, dying), return_when=asyncio.FIRST_COMPLETED)
        dying.cancel()
        if not self.is_dead:
            return await doing
        doing.cancel()
        await asyncio.gather(doing, return_exceptions=True)
        raise httpx.ConnectError("nobody is there any more")

    async def _to_backend(self, request: httpx.Request) -> httpx.Response:
        if self.is_dead:
            raise httpx.ConnectError("a dead process asks nobody")
        return await self._send(request)


class Owner:
    """The database's owner, who looks at the books and lets time pass."""

    def __init__(self, database_url: str) -> None:
        self._url = database_url

    async def start(self) -> None:
        # Not blocking the loop: a transaction that it waits for may be held up in this very process.
        self._conn = await psycopg.AsyncConnection.connect(self._url, autocommit=True)

    async def close(self) -> None:
        await self._conn.close()

    async def sql(self, statement: str, *params: Any) -> list[tuple[Any, ...]]:
        async with self._conn.cursor() as cursor:
            await cursor.execute(statement.encode(), params or None)
            return await cursor.fetchall() if cursor.description else []

    async def everything_is_due(self) -> None:
        """Let so much time pass that all that waits for its moment has come to it, but for what was put to rest."""
        await self.sql(
            """UPDATE topup SET next_check_at = now() WHERE next_check_at < now() + interval '2 hours';
               UPDATE webhook_delivery SET next_try_at = now() WHERE processed_at IS NULL;
               UPDATE idempotency SET claimed_until = now() - interval '1 second' WHERE answer IS NULL"""
        )

    async def put_to_rest(self) -> None:
        """Have the poller leave the top-ups there are alone for a day."""
        await self.sql("UPDATE topup SET next_check_at = now() + interval '1 day' WHERE next_check_at IS NOT NULL")


# --- the wire to the database ---------------------------------------------------------------------


class DatabaseWire:
    """A TCP proxy before PostgreSQL that knows when a COMMIT passes, and of what."""

    def __init__(self, database_url: str, at_commit: Commit) -> None:
        self._target = {key: str(value) for key, value in conninfo_to_dict(database_url).items()}
        self._at_commit = at_commit
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._is_cut = False

    async def open(self) -> str:
        """Begin to listen; returns where, as a conninfo."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        ours = {"host": "127.0.0.1", "port": str(port), "sslmode": "disable", "gssencmode": "disable"}
        return make_conninfo("", **{**self._target, **ours})

    def cut(self) -> None:
        """Break every connection and take no new one."""
        self._is_cut = True
        if self._server is not None:
            self._server.close()
        for connection in list(self._connections):
            connection.cut()

    async def close(self) -> None:
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:  # it was on its way when we closed
            writer.transport.abort()
            return
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        host, port = self._target.get("host", "127.0.0.1"), self._target.get("port", "5432")
        up = (
            await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
            if host.startswith("/")
            else await asyncio.open_connection(host, int(port))
        )
        connection = _Connection((reader, writer), up, self._at_commit)
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)
            self._tasks.discard(task)


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One client's connection, passed on message by message on the way up and as it comes on the way down."""

    def __init__(self, client: Stream, server: Stream, at_commit: Commit) -> None:
        self._client, self._server = client, server
        self._at_commit = at_commit
        self._statements: dict[bytes, bytes] = {}
        self._said: list[bytes] = []
        self._answered = asyncio.Event()
        self._withheld: bytearray | None = None

    async def run(self) -> None:
        down = asyncio.create_task(self._pass_down())
        try:
            await self._pass_up()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self.cut()
            self._answered.set()
            await asyncio.gather(down, return_exceptions=True)
            for _, writer in (self._client, self._server):
                with contextlib.suppress(OSError):
                    await writer.wait_closed()

    def cut(self) -> None:
        for _, writer in (self._client, self._server):
            if writer.transport is not None:
                writer.transport.abort()

    async def _pass_up(self) -> None:
        reader, writer = self._client[0], self._server[1]
        length = await reader.readexactly(4)
        writer.write(length + await reader.readexactly(int.from_bytes(length) - 4))
        while True:
            head = await reader.readexactly(5)
            body = await reader.readexactly(int.from_bytes(head[1:]) - 4)
            text = self._text_of(head[:1], body)
            if text is not None and text.strip(b"\0 ;").upper().startswith(b"COMMIT"):
                await self._commit(head + body)
            else:
                if text is not None:
                    self._said = [] if text.upper().startswith(b"BEGIN") else [*self._said, text]
                writer.write(head + body)

    def _text_of(self, kind: bytes, body: bytes) -> bytes | None:
        """The SQL that a message asks to run; a prepared statement's is remembered by its name."""
        if kind == b"Q":
            return body
        if kind == b"P":
            name, text = body.split(b"\0", 2)[:2]
            self._statements[name] = text
        if kind == b"B":
            return self._statements.get(body.split(b"\0", 2)[1])
        return None

    async def _commit(self, message: bytes) -> None:
        said = b"\n".join(self._said).decode()
        self._said = []
        await self._at_commit(said, lambda: self._let_through(message))
        self._client[1].write(bytes(self._withheld or b""))
        self._withheld = None

    async def _let_through(self, message: bytes) -> None:
        """Have PostgreSQL commit, and keep its answer."""
        self._withheld = bytearray()
        self._answered.clear()
        self._server[1].write(message)
        await self._answered.wait()

    async def _pass_down(self) -> None:
        reader, writer = self._server[0], self._client[1]
        with contextlib.suppress(OSError):
            while chunk := await reader.read(65536):
                if self._withheld is None:
                    writer.write(chunk)
                    continue
                self._withheld += chunk
                if self._withheld[-6:-1] == b"Z\0\0\0\x05":  # ready for the next query
                    self._answered.set()
        self._answered.set()
        self.cut()


# --- words ----------------------------------------------------------------------------------------


def tell(config: pytest.Config, text: str) -> None:
    """Say it on the terminal, past pytest's capture; a worker that has none says it when it has done its share."""
    capture, reporter = (config.pluginmanager.get_plugin(name) for name in ("capturemanager", "terminalreporter"))
    if reporter is None:
        told: list[str] = getattr(config, "workeroutput", {}).setdefault("told", [])
        told.append(text)
        return
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        reporter.ensure_newline()
        reporter.write_line(text)


@contextlib.asynccontextmanager
async def running(*parts: Any) -> AsyncIterator[None]:
    """Start what has `start`, and at the end stop or close it, the last first."""
    async with contextlib.AsyncExitStack() as stack:
        for part in parts:
            await part.start()
            stack.push_async_callback(part.stop if isinstance(part, Backend) else part.close)
        yield
