"""`run`: one parent that keeps PostgreSQL, HTTP workers and the sandbox alive, and does the jobs itself.

Children hold a pipe to the parent as their standard input: when the parent is gone, however it went,
they read the end of it and stop.
"""

import asyncio
import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from prometheus_client import REGISTRY

from app.admin.tokens import create_token, verify_service
from app.gateway.settings import GatewaySettings, GatewaySettingsError
from app.gateway.settings import port as gateway_port
from app.kernel import tracing
from app.kernel.embedded import EmbeddedError, EmbeddedPostgres
from app.kernel.errors import InvalidToken
from app.kernel.logs import log
from app.kernel.settings import FROM_FILES, Settings, SettingsError, private_append, private_write, variables
from app.migrations import MigrationError, check, head, is_sharded, migrate
from app.pricing.starter import ensure_starter
from app.serve import App, Connections, Limits, Server, http_server, networks, raise_descriptor_limit
from app.web.processes import FOLDER, NAME, Processes
from app.wiring import House, build

_SOCKET_VARIABLE: Final = "SATMETER_SOCKET"
_GRACE_SECONDS: Final = 25
"""For what is under way when we stop: longer than the longest question to a payment backend."""
_UPLOAD_SECONDS: Final = 300
"""For 25 MB over a slow line."""
_GATEWAY_PER_ADDRESS: Final = 5_000
Only = Literal["http", "jobs"]
"""A part of `run`, for where each has a place of its own."""
Say = Callable[[str], None]
Schedule = Callable[[House], AsyncIOScheduler]
WhenReady = Callable[[str, Callable[[], bool]], object]
"""Told the database's URL, and how to know that we are stopping by now."""


@dataclass(slots=True)
class Child:
    """A process of ours: what it serves, on which socket, with which environment."""

    role: str
    listener: socket.socket
    environ: dict[str, str] = field(repr=False)
    metrics: socket.socket | None = None
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0

    def start(self) -> None:
        sockets = [self.listener, *([self.metrics] if self.metrics is not None else [])]
        fds = [each.fileno() for each in sockets]
        self.process = subprocess.Popen(  # noqa: S603 - ourselves
            [sys.executable, "-m", "app", *(("gateway",) if self.role == "gateway" else ("serve", self.role))],
            stdin=subprocess.PIPE, pass_fds=fds, env=self.environ | {_SOCKET_VARIABLE: ",".join(map(str, fds))},
            start_new_session=True,
        )  # fmt: skip
        self.started_at = time.monotonic()

    def restart_if_dead(self) -> None:
        """At most once a second, so that a child that cannot start does not spin."""
        assert self.process is not None
        if self.process.poll() is not None and time.monotonic() - self.started_at > 1:
            log.error("child.died", job=self.role, status=self.process.returncode)
            self.start()

    def ask_to_stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()

    def hurry(self) -> None:
        """What a second Ctrl-C says to it."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)

    def wait(self, seconds: float) -> None:
        if self.process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdin is not None
        self.process.stdin.close()


@contextlib.contextmanager
def database(settings: Settings, say: Say = lambda _: None) -> Iterator[tuple[str, EmbeddedPostgres | None]]:
    """The database's URL, for as long as the block runs: yours, or the embedded one, started if it is not running."""
    if settings.database_url is not None:
        yield settings.database_url, None
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it, too, passes through the `finally`
    say(f"Starting PostgreSQL in {settings.data_dir} ...")
    server = EmbeddedPostgres(settings.data_dir)
    url = server.start()
    try:
        yield url, server
    finally:
        server.stop()


def bring_to_head(settings: Settings, url: str, say: Say) -> None:
    """Migrate on a newcomer's machine; in production only check, because a migration is the operator's decision.

    Raises MigrationError.
    """
    if not settings.is_production:
        if migrate(url, settings.database_pooler):
            say(f"Migrated the database to {head()}.")
    else:
        check(url, settings.database_pooler)
    if settings.meter_batch != "account" and is_sharded(url):
        raise MigrationError("the database is sharded by account (Citus): set METER_BATCH=account")


def run(
    settings: Settings,
    say: Say,
    *,
    only: Only | None = None,
    when_ready: WhenReady | None = None,
    log_path: Path | None = None,
) -> None:
    """Run everything, or `only` a part of it, until SIGINT or SIGTERM.

    Raises SettingsError, EmbeddedError or MigrationError before it starts, and KeyboardInterrupt if it was stopped
    before it was ready."""
    if only is not None and (settings.uses_sandbox or settings.database_url is None):
        raise SettingsError(f"run --only {only} needs DATABASE_URL and BTCPAY_URL: ours belong to a whole `run`")
    from app.jobs import schedule  # half a second, while there is nothing yet to be stopped

    raise_descriptor_limit()
    tracing.start("jobs")  # before anything else is: it may not be installed
    listeners = {} if only == "jobs" else {"http": _listen(settings.host, settings.port, "PORT")}
    if settings.uses_sandbox:
        listeners["sandbox"] = _listen("127.0.0.1", settings.sandbox_port, "SANDBOX_PORT")
    if has_gateway(settings):
        listeners["gateway"] = _listen(settings.host, gateway_port(), "GATEWAY_PORT")
    metrics = None
    if settings.metrics_port is not None and "http" in listeners:
        metrics = _listen(settings.metrics_host, settings.metrics_port, "METRICS_PORT")
    with database(settings, say) as (url, server), _counters() as counters:
        bring_to_head(settings, url, say)
        environ = _child_environment(settings, url) | counters
        if "http" in listeners:
            say(f"Starting HTTP on {settings.host}, port {settings.port} ...")
        with _stderr_into(log_path):
            children = [Child("sandbox", listeners["sandbox"], environ)] if "sandbox" in listeners else []
            children += [
                Child("http", listeners["http"], environ | {NAME: f"http-{number}"}, metrics)
                for number in range(1, settings.workers + 1)
                if "http" in listeners
            ]
            ours = Processes.of(counters | {NAME: "jobs"})
            was_ready = asyncio.run(
                _supervise(
                    settings,
                    url,
                    server,
                    children,
                    listeners.get("gateway"),
                    when_ready,
                    ours,
                    schedule=None if only == "http" else schedule,
                )
            )
        if not was_ready:
            raise KeyboardInterrupt
        say("Stopping ...")


@contextlib.contextmanager
def _stderr_into(log_path: Path | None) -> Iterator[None]:
    """While the block runs, what we and our children log goes to a file, if one is given. Raises SettingsError."""
    if log_path is None:
        yield
        return
    try:
        log_file = private_append(log_path)
    except OSError as error:
        raise SettingsError(f"{log_path} cannot be written: {error.strerror}") from error
    terminal = os.dup(2)
    try:
        with log_file:
            os.dup2(log_file.fileno(), 2)
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)


@contextlib.contextmanager
def _counters() -> Iterator[dict[str, str]]:
    """A folder in which our processes tell each other what they count; where none can be made, each tells its own alone."""
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="satmeter-", ignore_cleanup_errors=True))
        except OSError:
            yield {}
            return
        yield {FOLDER: folder}


async def _supervise(
    settings: Settings,
    url: str,
    server: EmbeddedPostgres | None,
    children: list[Child],
    gateway: socket.socket | None,
    when_ready: WhenReady | None,
    ours: Processes,
    *,
    schedule: Schedule | None,
) -> bool:
    """Whether we were ready before we were told to stop."""
    stop, ready = _stop_on_signals(children), asyncio.Event()
    for child in children:
        child.start()
    house = build(settings, url)
    await house.db.open()
    if not settings.is_production:
        await ensure_starter(house.db)  # a newcomer's first prices; in production they are the operator's decision
    if gateway is not None:
        children.append(Child("gateway", gateway, _gateway_environment(await _gateway_token(settings, house))))
        children[-1].start()
    scheduler = schedule(house) if schedule is not None else None
    doors = [settings.port] if any(child.role == "http" for child in children) else []
    doors += [gateway_port()] if gateway is not None else []
    announcing = asyncio.create_task(_announce(settings, doors, when_ready, url, ready, stop))
    try:
        async with ours.written():
            while not stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stop.wait(), 0.5)
                await asyncio.to_thread(_keep_alive, server, children, stop)
    finally:
        announcing.cancel()
        if scheduler is not None:
            scheduler.shutdown(wait=False)
        await asyncio.to_thread(_stop_all, children, settings.drain_seconds)
        await house.close()
        tracing.stop()
    return ready.is_set()


def _keep_alive(server: EmbeddedPostgres | None, children: list[Child], stop: asyncio.Event) -> None:
    if stop.is_set():
        return
    try:
        if server is not None and server.revive():
            log.error("postgres.restarted", pid=server.pid)
    except EmbeddedError as error:
        log.error("postgres.does_not_start", error=str(error))
    for child in children:
        child.restart_if_dead()


async def _announce(
    settings: Settings,
    ports: list[int],
    when_ready: WhenReady | None,
    url: str,
    ready: asyncio.Event,
    stop: asyncio.Event,
) -> None:
    """Tell that we are up once every door answers."""
    while True:
        if all([await asyncio.to_thread(_answers, settings.host, port) for port in ports]):
            break
        await asyncio.sleep(0.1)
    log.info("run.ready", url=settings.public_url)
    ready.set()
    if when_ready is not None:
        await asyncio.to_thread(when_ready, url, stop.is_set)


def _answers(host: str, port: int) -> bool:
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=2) as conn:
        conn.settimeout(2)
        conn.sendall(b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        return conn.recv(12).endswith(b"200")
    return False


def _stop_all(children: list[Child], drain_seconds: int) -> None:
    """First who asks others, then whom they ask. From now on the listening sockets are the children's alone: one that
    we kept open would take connections that nobody serves."""
    for child in children:
        child.listener.close()
        if child.metrics is not None:
            child.metrics.close()
    for role in ("gateway", "http", "sandbox"):
        leaving = [child for child in children if child.role == role]
        for child in leaving:
            child.ask_to_stop()
        for child in leaving:
            child.wait((drain_seconds if role == "http" else 0) + _GRACE_SECONDS)


def _stop_on_signals(children: list[Child]) -> asyncio.Event:
    """A second Ctrl-C is passed on. SIGINT is left alone where it was ignored when we came, as by `nohup … &`."""
    stop = asyncio.Event()

    def heed(number: int) -> None:
        if stop.is_set() and number == signal.SIGINT:
            for child in children:
                child.hurry()
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            asyncio.get_running_loop().add_signal_handler(number, heed, number)
    return stop


def _listen(host: str, port: int, variable: str) -> socket.socket:
    """Bind before anything else is started, so that a taken port costs a newcomer one line and no wait."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise SettingsError(
            f"{variable}={port} cannot be used on {host}: {error.strerror}. {_way_out(error, variable, port)}"
        ) from error
    return listener


def _way_out(error: OSError, variable: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        other = port + 10 if port + 10 <= 65535 else port - 10
        return f"Stop the other program, or choose another port: {variable}={other} make run"
    if error.errno in (errno.EACCES, errno.EPERM):
        other = {"PORT": 8080, "SANDBOX_PORT": 8081, "GATEWAY_PORT": 8082, "METRICS_PORT": 9090}[variable]
        return (
            f"Ports below 1024 are not for ordinary users; choose a higher one, such as {variable}={other} make run,"
            " and put a reverse proxy in front of it"
        )
    return "HOST must be an address of this machine"


def _child_environment(settings: Settings, url: str) -> dict[str, str]:
    """The children read the same settings as we did, and our database."""
    environ = {name: value for name, value in os.environ.items() if name != "DATABASE_URL_FILE"}
    return environ | {"DATABASE_URL": url, "DATA_DIR": str(settings.data_dir)}


def has_gateway(settings: Settings) -> bool:
    """A newcomer gets one beside the service; an operator starts `gateway` where it belongs, with a token of its own."""
    return settings.uses_sandbox and not settings.is_production


async def _gateway_token(settings: Settings, house: House) -> str:
    """The service token of this machine's gateway: made once, and again where the database does not know it."""
    path = settings.data_dir / "gateway" / "token"
    path.parent.mkdir(mode=0o700, exist_ok=True)
    if path.exists():
        with contextlib.suppress(InvalidToken):
            token = path.read_text()
            await verify_service(house.db, settings.pepper, token)
            return token
    token = await create_token(house.db, settings.pepper, "service", "gateway")
    private_write(path, token)
    return token


def _gateway_environment(token: str) -> dict[str, str]:
    """Nothing of the service's own: no database, no pepper, no key of a payment backend."""
    kept = {"HOST", "PORT", "DATA_DIR", "LOG_LEVEL", "SANDBOX_PORT"}
    ours = {*variables(), *(f"{name}_FILE" for name in FROM_FILES)} - kept
    environ = {name: value for name, value in os.environ.items() if name not in ours}
    return {"GATEWAY_SERVICE_TOKEN": token} | environ


# --- the children ---------------------------------------------------------------------------------


def serve(role: str, settings: Settings) -> None:
    """A child's life: serve one application on the socket that the parent bound."""
    assert settings.database_url is not None
    if role == "http":
        tracing.start(os.environ.get(NAME, role))
    from app.main import Departure, create_app

    departure = Departure()
    app: App = create_app(build(settings, settings.database_url), departure) if role == "http" else _sandbox(settings)
    connections = Connections(_limits(settings).within(raise_descriptor_limit()))
    if role == "http":
        REGISTRY.register(connections)
    server = http_server(
        app,
        connections,
        ws="none" if role == "http" else "auto",
        lifespan="on",
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies or None,
        timeout_graceful_shutdown=_GRACE_SECONDS - 5,
    )
    if role == "http":
        server.drain_seconds = settings.drain_seconds
        departure.is_near = lambda: server.is_draining
    listeners = [socket.socket(fileno=int(fd)) for fd in os.environ[_SOCKET_VARIABLE].split(",")]
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:  # uvloop, where there is one
        runner.run(_serve_until_orphaned(server, connections, listeners))
    tracing.stop()


def serve_gateway(settings: GatewaySettings) -> None:
    """The gateway's life: on the socket that a parent bound, or on its own port until SIGTERM."""
    from app.gateway.app import create_gateway

    descriptors = raise_descriptor_limit()
    connections = Connections(
        Limits(body_seconds=_UPLOAD_SECONDS, per_address=_GATEWAY_PER_ADDRESS).within(descriptors)
    )
    server = http_server(
        create_gateway(settings), connections, ws="none", lifespan="on", timeout_graceful_shutdown=_GRACE_SECONDS - 5
    )
    has_parent = _SOCKET_VARIABLE in os.environ
    try:
        listener = (
            socket.socket(fileno=int(os.environ[_SOCKET_VARIABLE]))
            if has_parent
            else _listen(settings.host, settings.port, "GATEWAY_PORT")
        )
    except SettingsError as error:
        raise GatewaySettingsError(str(error)) from error
    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(_serve_gateway(server, connections, listener, has_parent=has_parent))


async def _serve_gateway(
    server: Server, connections: Connections, listener: socket.socket, *, has_parent: bool
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        if has_parent:
            await stack.enter_async_context(_watching_parent(server))
        await stack.enter_async_context(connections.watched())
        await server.serve(sockets=[listener])


def _limits(settings: Settings) -> Limits:
    """A reverse proxy's connections are its customers': they are not counted by address, and places are kept for them."""
    return Limits(
        connections=settings.connections,
        per_address=settings.connections_per_address,
        kept_for=networks(settings.trusted_proxies) + networks(settings.connections_kept_for),
    )


async def _serve_until_orphaned(server: Server, connections: Connections, listeners: list[socket.socket]) -> None:
    async with _watching_parent(server), connections.watched():
        await server.serve(sockets=listeners)


@contextlib.asynccontextmanager
async def _watching_parent(server: Server) -> AsyncIterator[None]:
    reader = asyncio.StreamReader()
    transport, _ = await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
    )

    async def watch() -> None:
        await reader.read()
        server.leave_at_once()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        transport.close()


def _sandbox(settings: Settings) -> App:
    from app.sandbox.btcpay import LEAST_PERMISSIONS, SandboxConfig, create_sandbox
    from app.sandbox.models import create_models

    config = SandboxConfig(
        state_dir=settings.data_dir / "sandbox",
        public_url=settings.sandbox_url,
        store_id=settings.btcpay_store_id,
        api_key=settings.btcpay_api_key,
        webhook_url=f"{_own_url(settings)}/webhooks/btcpay",
        webhook_secret=settings.btcpay_webhook_secret,
        litecoin_rpc=settings.sandbox_litecoin_rpc,
        monero_wallet_rpc=settings.sandbox_monero_wallet_rpc,
        permissions=LEAST_PERMISSIONS,
    )
    return _with_models(create_sandbox(config), create_models(settings.data_dir / "sandbox" / "models"))


def _with_models(sandbox: App, models: App) -> App:
    """The sandbox, with models that are none under /models."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        path = scope.get("path", "")
        if scope["type"] == "http" and path.startswith(("/models/", "/sandbox/files/")):
            await models(scope | {"path": path.removeprefix("/models")}, receive, send)
        else:
            await sandbox(scope, receive, send)

    return answer


def _own_url(settings: Settings) -> str:
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host  # noqa: S104 - compared, not bound
    return f"http://{f'[{host}]' if ':' in host else host}:{settings.port}"
