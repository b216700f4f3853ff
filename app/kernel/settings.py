"""The settings: environment variables read once into one frozen object.

Nothing set means a newcomer's machine: embedded PostgreSQL, the sandbox, secrets generated into
`DATA_DIR`, loopback only. `ENVIRONMENT=production` refuses every one of those conveniences.
Every variable is documented in README.md and deploy/.env.example; a test compares the three.
"""

import base64
import binascii
import contextlib
import ipaddress
import json
import os
import re
import secrets
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from app.kernel.connection import POOLERS
from app.kernel.errors import InvalidField
from app.kernel.money import parse_usd
from app.kernel.production import PLACEHOLDER as PLACEHOLDER
from app.kernel.production import refusals
from app.kernel.security import Pepper, Sealer

_METHODS = ("btc-lightning", "btc", "ltc", "lbtc", "xmr")
_OURS = (
    "secrets.json",
    "demo.json",
    "satmeter.log",
    "postgres.lock",
    "postgres.users",
    "postgres",
    "sandbox",
    "gateway",
)
"""What may lie in DATA_DIR."""
_JWT_SCOPES = ("spend", "balance", "topup", "activity", "keys")
_COIN = re.compile("BTC|LTC|LBTC|XMR")
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:[0-9]{1,5})?", re.ASCII)


FROM_FILES = (
    "DATABASE_URL", "DATABASE_READ_URL", "SECRET_PEPPER", "SEALING_KEYS", "BTCPAY_API_KEY", "BTCPAY_WEBHOOK_SECRET", "LNBITS_INVOICE_KEY",
    "METRICS_TOKEN", "NOTICE_WEBHOOK_URL", "NOTICE_WEBHOOK_SECRET",
)  # fmt: skip
"""The secrets, each of which may stand in a file that NAME_FILE names: systemd's and Docker's way to hand them over."""


class SettingsError(Exception):
    """A setting that cannot be used; the message says which, what was found and what would help."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting, parsed. Secrets are kept out of the repr."""

    environment: str
    host: str
    port: int
    public_url: str
    service_name: str
    service_url: str
    service_colour: str
    data_dir: Path
    database_url: str | None = field(repr=False)
    database_pooler: str
    database_read_url: str | None = field(repr=False)
    database_pool: int
    workers: int
    secret_pepper: str = field(repr=False)
    sealing_keys: tuple[tuple[str, bytes], ...] = field(repr=False)
    key_reveal: bool
    btcpay_url: str | None
    btcpay_api_key: str = field(repr=False)
    btcpay_store_id: str
    btcpay_webhook_secret: str = field(repr=False)
    payment_methods: tuple[tuple[str, str], ...]
    lnbits_url: str | None
    lnbits_invoice_key: str = field(repr=False)
    lnbits_webhook: bool
    rate_url: str
    rate_path: str
    rate_names: tuple[tuple[str, str], ...]
    rate_fixed: tuple[tuple[str, str], ...]
    sandbox_port: int
    sandbox_litecoin_rpc: str | None = field(repr=False)
    sandbox_monero_wallet_rpc: str | None = field(repr=False)
    nwc_auto_topup: bool
    nwc_allow_private_relays: bool
    notice_webhook_url: str = field(repr=False)
    notice_webhook_secret: str = field(repr=False)
    notice_npub: str
    notice_relays: tuple[str, ...]
    notice_allow_private: bool
    lightning_network: str
    meter_batch: str
    usage_partitions: str
    strict_provider: bool
    hold_sync_commit: bool
    ext_authz_hold_usd: str
    accounts_per_hour: int
    accounts_per_hour_per_block: int
    requests_per_minute_per_block: int
    requests_per_minute_per_credit_id: int
    requests_per_minute_per_key: int
    requests_per_minute_per_service: int
    requests_per_minute_per_admin: int
    reap_empty_days: int
    topups_waiting: int
    topups_per_hour: int
    topups_once_paid: int
    offers_per_minute: int
    offer_token_days: int
    offer_min_usd: str
    keyless_offer_usd: str
    jwt_issuer: str
    jwt_audience: tuple[str, ...]
    jwt_jwks: str
    jwt_claim: str
    jwt_scopes: tuple[str, ...]
    keys_per_account: int
    cors_origins: tuple[str, ...]
    trusted_proxies: str
    connections: int
    connections_per_address: int
    connections_kept_for: str
    drain_seconds: int
    metrics_token: str = field(repr=False)
    metrics_host: str
    metrics_port: int | None
    log_level: str

    @property
    def is_production(self) -> bool:
        return self.environment == "production"

    @property
    def uses_sandbox(self) -> bool:
        """Whether some method is taken by a BTCPay that was not given: then ours, which moves no money."""
        return self.btcpay_url is None and self.takes_with("btcpay")

    def takes_with(self, backend: str) -> bool:
        """Whether a payment method is taken by this backend."""
        return any(taken_by == backend for _, taken_by in self.payment_methods)

    @property
    def sandbox_url(self) -> str:
        return f"http://127.0.0.1:{self.sandbox_port}"

    @property
    def sandbox_relay_url(self) -> str:
        return f"ws://127.0.0.1:{self.sandbox_port}/relay"

    @property
    def ext_authz_hold_nusd(self) -> int:
        return parse_usd(self.ext_authz_hold_usd.encode(), "EXT_AUTHZ_HOLD_USD")

    @property
    def offer_min_nusd(self) -> int:
        return parse_usd(self.offer_min_usd.encode(), "OFFER_MIN_USD")

    @property
    def keyless_offer_nusd(self) -> int | None:
        """What whoever calls a model without any key is asked to pay for an account; None: they are refused."""
        return parse_usd(self.keyless_offer_usd.encode(), "KEYLESS_OFFER_USD") if self.keyless_offer_usd else None

    @property
    def pepper(self) -> Pepper:
        return Pepper(self.secret_pepper.encode())

    @property
    def sealer(self) -> Sealer:
        return Sealer(self.sealing_keys)


def variables() -> tuple[str, ...]:
    """The names of the environment variables, in the order they are documented."""
    return tuple(item.name.upper() for item in fields(Settings))


def load(environ: Mapping[str, str] = os.environ) -> Settings:
    """Read and check the settings. May create DATA_DIR and its generated secrets.

    Raises SettingsError.
    """
    read = _Reader(with_files_read(environ))
    environment = read.choice("ENVIRONMENT", "development", ("development", "production"))
    production = environment == "production"
    methods = _payment_methods(read.text("PAYMENT_METHODS", ",".join(f"{method}:btcpay" for method in _METHODS)))
    if any(backend == "lnbits" for _, backend in methods) and not read.text("LNBITS_URL", ""):
        raise SettingsError("PAYMENT_METHODS names lnbits, but LNBITS_URL is not set; see deploy/.env.example")
    if production:
        _refuse_conveniences(read, {backend for _, backend in methods})
    data_dir = Path(read.text("DATA_DIR", "./.data")).resolve()
    made = {} if production else _generated(data_dir)

    def a_minute(of: str, in_production: int) -> int:
        return read.number(f"REQUESTS_PER_MINUTE_PER_{of}", in_production if production else 0, 0, 10**9)

    host, port = read.text("HOST", "127.0.0.1"), read.number("PORT", 8080, 1, 65535)
    return Settings(
        environment=environment,
        host=host,
        port=port,
        public_url=_url(read.text("PUBLIC_URL", f"http://{_authority(host)}:{port}"), "PUBLIC_URL"),
        service_name=_name(read.text("SERVICE_NAME", "Satmeter"), "SERVICE_NAME"),
        service_url=_url(read.text("SERVICE_URL", ""), "SERVICE_URL"),
        service_colour=_colour(read.text("SERVICE_COLOUR", "#2f5bea"), "SERVICE_COLOUR"),
        data_dir=data_dir,
        database_url=read.text("DATABASE_URL", "") or None,
        database_pooler=read.choice("DATABASE_POOLER", POOLERS[0], POOLERS),
        database_read_url=read.text("DATABASE_READ_URL", "") or None,
        database_pool=read.number("DATABASE_POOL", 8, 2, 200),
        workers=read.number("WORKERS", 1, 1, 64),
        secret_pepper=_pepper(read.text("SECRET_PEPPER", made.get("SECRET_PEPPER", ""))),
        sealing_keys=_sealing_keys(read.text("SEALING_KEYS", made.get("SEALING_KEYS", ""))),
        key_reveal=read.switch("KEY_REVEAL", True),
        btcpay_url=_url(read.text("BTCPAY_URL", ""), "BTCPAY_URL") or None,
        btcpay_api_key=read.text("BTCPAY_API_KEY", made.get("BTCPAY_API_KEY", "")),
        btcpay_store_id=read.text("BTCPAY_STORE_ID", made.get("BTCPAY_STORE_ID", "")),
        btcpay_webhook_secret=read.text("BTCPAY_WEBHOOK_SECRET", made.get("BTCPAY_WEBHOOK_SECRET", "")),
        payment_methods=methods,
        lnbits_url=_url(read.text("LNBITS_URL", ""), "LNBITS_URL") or None,
        lnbits_invoice_key=read.text("LNBITS_INVOICE_KEY", ""),
        lnbits_webhook=read.switch("LNBITS_WEBHOOK", True),
        rate_url=read.text("RATE_URL", "https://api.coinbase.com/v2/prices/{coin}-USD/spot"),
        rate_path=read.text("RATE_PATH", "data.amount"),
        rate_names=_pairs(read.text("RATE_NAMES", "BTC:BTC"), "RATE_NAMES", _COIN, re.compile(r"[A-Za-z0-9]{1,20}")),
        rate_fixed=_pairs(read.text("RATE_FIXED", ""), "RATE_FIXED", _COIN, re.compile(r"\d{1,9}(\.\d{1,9})?")),
        sandbox_port=read.number("SANDBOX_PORT", min(port + 1, 65535), 1, 65535),
        sandbox_litecoin_rpc=_node_url(read.text("SANDBOX_LITECOIN_RPC", ""), "SANDBOX_LITECOIN_RPC"),
        sandbox_monero_wallet_rpc=_node_url(read.text("SANDBOX_MONERO_WALLET_RPC", ""), "SANDBOX_MONERO_WALLET_RPC"),
        nwc_auto_topup=read.switch("NWC_AUTO_TOPUP", True),
        nwc_allow_private_relays=read.switch("NWC_ALLOW_PRIVATE_RELAYS", False),
        notice_webhook_url=read.text("NOTICE_WEBHOOK_URL", ""),
        notice_webhook_secret=_notice_secret(read),
        notice_npub=read.text("NOTICE_NPUB", ""),
        notice_relays=_relays(read.text("NOTICE_RELAYS", "wss://relay.damus.io,wss://nos.lol")),
        notice_allow_private=read.switch("NOTICE_ALLOW_PRIVATE", False),
        lightning_network=read.choice("LIGHTNING_NETWORK", _network(read, methods), ("bc", "tb", "tbs", "bcrt")),
        meter_batch=read.choice("METER_BATCH", "on", ("on", "off", "account")),
        usage_partitions=read.choice("USAGE_PARTITIONS", "month", ("month", "day")),
        strict_provider=read.switch("STRICT_PROVIDER", False),
        hold_sync_commit=read.switch("HOLD_SYNC_COMMIT", True),
        ext_authz_hold_usd=_positive_usd(read.text("EXT_AUTHZ_HOLD_USD", "0.01"), "EXT_AUTHZ_HOLD_USD"),
        accounts_per_hour=read.number("ACCOUNTS_PER_HOUR", 10_000 if production else 1_000_000, 1, 10**9),
        accounts_per_hour_per_block=read.number("ACCOUNTS_PER_HOUR_PER_BLOCK", 30 if production else 100_000, 1, 10**9),
        requests_per_minute_per_block=a_minute("BLOCK", 600),
        requests_per_minute_per_credit_id=a_minute("CREDIT_ID", 600),
        requests_per_minute_per_key=a_minute("KEY", 1200),
        requests_per_minute_per_service=a_minute("SERVICE", 1_000_000),
        requests_per_minute_per_admin=a_minute("ADMIN", 600),
        reap_empty_days=read.number("REAP_EMPTY_DAYS", 90, 0, 36_500),
        topups_waiting=read.number("TOPUPS_WAITING", 10, 1, 10**6),
        topups_per_hour=read.number("TOPUPS_PER_HOUR", 30, 1, 10**6),
        topups_once_paid=read.number("TOPUPS_ONCE_PAID", 100, 1, 10**6),
        offers_per_minute=read.number("OFFERS_PER_MINUTE", 60, 1, 10**6),
        offer_token_days=read.number("OFFER_TOKEN_DAYS", 30, 1, 36_500),
        offer_min_usd=_offer_usd(read.text("OFFER_MIN_USD", "1"), "OFFER_MIN_USD"),
        keyless_offer_usd=_offer_usd(read.text("KEYLESS_OFFER_USD", ""), "KEYLESS_OFFER_USD"),
        **_jwt(read),
        keys_per_account=read.number("KEYS_PER_ACCOUNT", 1000, 1, 10**6),
        cors_origins=_origins(read.text("CORS_ORIGINS", "*")),
        trusted_proxies=_networks(read.text("TRUSTED_PROXIES", ""), "TRUSTED_PROXIES"),
        connections=read.number("CONNECTIONS", 10_000, 16, 1_000_000),
        connections_per_address=read.number("CONNECTIONS_PER_ADDRESS", 1_000, 1, 1_000_000),
        connections_kept_for=_networks(read.text("CONNECTIONS_KEPT_FOR", ""), "CONNECTIONS_KEPT_FOR"),
        drain_seconds=read.number("DRAIN_SECONDS", 5 if production else 0, 0, 600),
        metrics_token=_token(read.text("METRICS_TOKEN", ""), "METRICS_TOKEN"),
        metrics_host=read.text("METRICS_HOST", "127.0.0.1"),
        metrics_port=_metrics_port(read, port),
        log_level=read.choice("LOG_LEVEL", "INFO", ("DEBUG", "INFO", "WARNING", "ERROR")),
    )


def with_files_read(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment with each secret that stands in a file. Raises SettingsError, which never shows one."""
    found = dict(environ)
    for name in FROM_FILES:
        path = environ.get(f"{name}_FILE", "").strip()
        if path and environ.get(name, "").strip():
            raise SettingsError(f"{name} and {name}_FILE are both set; keep one")
        if path:
            found[name] = _secret_in(Path(path), f"{name}_FILE")
    return found


def _notice_secret(read: "_Reader") -> str:
    """What signs the operator's own webhook: given, since nobody could show one that we made. Raises SettingsError."""
    secret = read.text("NOTICE_WEBHOOK_SECRET", "")
    if bool(secret) != bool(read.text("NOTICE_WEBHOOK_URL", "")):
        raise SettingsError(
            "NOTICE_WEBHOOK_URL and NOTICE_WEBHOOK_SECRET are set together, or neither; see deploy/.env.example"
        )
    try:
        if secret and not (
            secret.startswith("whsec_") and 24 <= len(base64.b64decode(secret[6:], validate=True)) <= 64
        ):
            raise ValueError
    except ValueError:
        raise SettingsError("NOTICE_WEBHOOK_SECRET is not whsec_ and 24 to 64 random bytes in base64") from None
    return secret


def _jwt(read: "_Reader") -> dict[str, Any]:
    """Whose JWTs stand for keys; nobody's where JWT_ISSUER is not set. Raises SettingsError."""
    issuer, audience = read.text("JWT_ISSUER", ""), _words(read.text("JWT_AUDIENCE", ""))
    scopes = _words(read.text("JWT_SCOPES", "spend"))
    if bool(issuer) != bool(audience) or (read.text("JWT_JWKS", "") and not issuer):
        raise SettingsError(
            "JWT_ISSUER and JWT_AUDIENCE are set together, or neither (then JWT_JWKS is for nothing); see deploy/.env.example"
        )
    if not scopes or set(scopes) - set(_JWT_SCOPES):
        raise SettingsError(f"JWT_SCOPES is a list of {', '.join(_JWT_SCOPES)} with commas between them")
    return {
        "jwt_issuer": issuer, "jwt_audience": audience, "jwt_claim": read.text("JWT_CLAIM", "sub"), "jwt_scopes": scopes,
        "jwt_jwks": _jwks(read.text("JWT_JWKS", f"{issuer.rstrip('/')}/.well-known/jwks.json")) if issuer else "",
    }  # fmt: skip


def _jwks(source: str) -> str:
    """A file that can be read, or an address."""
    if source.startswith(("http://", "https://")):
        parts = urlsplit(source)
        if not parts.hostname or parts.username or parts.fragment:
            raise SettingsError("JWT_JWKS must be an http(s) URL without user and fragment, or the path of a file")
    elif not Path(source).is_file():
        raise SettingsError(f"JWT_JWKS={source!r} is no file that is there, and no http(s) URL")
    return source


def _words(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _relays(text: str) -> tuple[str, ...]:
    relays = tuple(part.strip() for part in text.split(",") if part.strip())
    if not all(relay.startswith(("wss://", "ws://")) and len(relay) <= 512 for relay in relays):
        raise SettingsError("NOTICE_RELAYS is a list of wss:// addresses with commas between them")
    return relays


def _secret_in(path: Path, name: str) -> str:
    try:
        secret = path.read_text().strip()
    except OSError as error:
        raise SettingsError(f"{name}={path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise SettingsError(f"{name}={path} is no text") from error
    if not secret:
        raise SettingsError(f"{name}={path} is empty")
    return secret


class _Reader:
    """Reads one variable at a time, with an error that names it."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def text(self, name: str, default: str) -> str:
        return self._environ.get(name, "").strip() or default

    def choice(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        value = self.text(name, default)
        if value not in allowed:
            raise SettingsError(f"{name}={value!r} is not one of {', '.join(allowed)}")
        return value

    def switch(self, name: str, default: bool) -> bool:
        return self.choice(name, "on" if default else "off", ("on", "off")) == "on"

    def number(self, name: str, default: int, low: int, high: int) -> int:
        value = self.text(name, str(default))
        if not (value.isascii() and value.isdigit() and low <= int(value) <= high):
            raise SettingsError(f"{name}={value!r} is not a whole number from {low} to {high}")
        return int(value)


def _refuse_conveniences(read: _Reader, backends: set[str]) -> None:
    """Production starts with everything given, or not at all; says all that is wrong at once."""
    wrong = list(refusals(lambda name: read.text(name, ""), backends))
    if wrong:
        raise SettingsError(
            "ENVIRONMENT=production refuses to start: " + "; ".join(wrong) + ". See deploy/.env.example"
        )


def _generated(data_dir: Path) -> dict[str, str]:
    """The secrets of a development machine: made once, kept in DATA_DIR with mode 600."""
    path = data_dir / "secrets.json"
    try:
        data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        keep_private(data_dir)
        if not path.exists():
            private_write(path, json.dumps(_new_secrets(), indent=1))
        return dict(json.loads(path.read_text()))
    except OSError as error:
        raise SettingsError(
            f"DATA_DIR={data_dir} cannot be used by this user: {error.strerror or error}; choose another folder with DATA_DIR"
        ) from error
    except ValueError as error:
        raise SettingsError(
            f"{path} is damaged; restore it, or choose another DATA_DIR: without it this one's secrets cannot be read"
        ) from error


def _new_secrets() -> dict[str, str]:
    return {
        "SECRET_PEPPER": secrets.token_urlsafe(48),
        "SEALING_KEYS": f"dev1:{base64.b64encode(secrets.token_bytes(32)).decode()}",
        "BTCPAY_API_KEY": secrets.token_hex(20),
        "BTCPAY_STORE_ID": secrets.token_urlsafe(32),
        "BTCPAY_WEBHOOK_SECRET": secrets.token_urlsafe(24),
    }


def keep_private(data_dir: Path) -> None:
    """Close DATA_DIR, and whatever of ours an earlier version left open in it, to everybody else.

    Raises SettingsError for a folder that is everybody's.
    """
    if data_dir == Path(data_dir.anchor) or data_dir.stat().st_mode & stat.S_ISVTX:
        raise SettingsError(f"DATA_DIR={data_dir} is everybody's; choose a folder of its own with DATA_DIR")
    for path in (data_dir, *(data_dir / name for name in _OURS), *data_dir.glob("sandbox/**/*")):
        with contextlib.suppress(OSError):  # not there, or not ours to change
            mode = path.lstat().st_mode
            if mode & 0o077 and not stat.S_ISLNK(mode):
                path.chmod(stat.S_IMODE(mode) & 0o700)


def private_append(path: Path) -> IO[str]:
    """A file to add to, that only we can read. Raises OSError."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a")


def private_write(path: Path, text: str) -> None:
    """Write a file that only we can read, whole or not at all."""
    partial = path.with_name(f"{path.name}.{os.getpid()}")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)


def _pepper(text: str) -> str:
    if len(text.encode()) < 32:
        raise SettingsError(f"SECRET_PEPPER has {len(text.encode())} bytes; it needs 32 random ones or more")
    return text


def _sealing_keys(text: str) -> tuple[tuple[str, bytes], ...]:
    """`id:base64 of 32 bytes`, comma-separated, newest first: the first seals, all of them open."""
    keys = []
    for item in text.split(","):
        key_id, _, encoded = item.strip().partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            key = b""
        if not key_id.isalnum() or len(key) != 32:
            raise SettingsError("SEALING_KEYS must be id:key pairs, comma-separated, each key 32 bytes in base64")
        keys.append((key_id, key))
    if len({key_id for key_id, _ in keys}) != len(keys):
        raise SettingsError("SEALING_KEYS names the same id twice")
    return tuple(keys)


def _payment_methods(text: str) -> tuple[tuple[str, str], ...]:
    """`method:backend` pairs: the methods that are offered, each with who takes it."""
    pairs = _pairs(text, "PAYMENT_METHODS", re.compile("|".join(_METHODS)), re.compile("btcpay|lnbits"))
    if not pairs or any(backend == "lnbits" and method != "btc-lightning" for method, backend in pairs):
        raise SettingsError("PAYMENT_METHODS needs a method at least, and LNbits takes btc-lightning only")
    return pairs


def _token(text: str, name: str) -> str:
    """What can be sent as a Bearer token."""
    if text and not re.fullmatch(r"[!-~]+", text):
        raise SettingsError(f"{name} has characters that no header can carry; openssl rand -base64 32 makes one")
    return text


def _metrics_port(read: _Reader, port: int) -> int | None:
    found = read.number("METRICS_PORT", 0, 0, 65535) or None
    if found == port:
        raise SettingsError(f"METRICS_PORT={found} is PORT, where customers are; give it one of its own")
    return found


def _pairs(text: str, name: str, left: re.Pattern[str], right: re.Pattern[str]) -> tuple[tuple[str, str], ...]:
    """`a:b,c:d`, no left side twice."""
    pairs: list[tuple[str, str]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = item.partition(":")
        if not left.fullmatch(key) or not right.fullmatch(value) or key in dict(pairs):
            raise SettingsError(f"{name}: {item!r} is not a pair it takes, or stands twice; see deploy/.env.example")
        pairs.append((key, value))
    return tuple(pairs)


def _network(read: _Reader, methods: tuple[tuple[str, str], ...]) -> str:
    """The sandbox's Lightning is regtest's; whatever else is given is taken for the real one."""
    return "bc" if read.text("BTCPAY_URL", "") or ("btc-lightning", "btcpay") not in methods else "bcrt"


def _positive_usd(text: str, name: str) -> str:
    """With a hold of nothing, an account that has nothing would be let through."""
    try:
        is_positive = text.isascii() and parse_usd(text.encode(), name) > 0
    except InvalidField:
        is_positive = False
    if not is_positive:
        raise SettingsError(f"{name}={text!r} is not an amount in USD above 0, such as 0.01")
    return text


def _offer_usd(text: str, name: str) -> str:
    """What a Lightning top-up may be, or nothing."""
    if text and not 10**8 <= parse_usd(_positive_usd(text, name).encode(), name) <= 10**12:
        raise SettingsError(f"{name}={text!r} is not an amount from 0.1 to 1000 USD, which Lightning top-ups take")
    return text


def _name(text: str, name: str) -> str:
    if len(text) > 60 or not text.isprintable():
        raise SettingsError(f"{name} must have at most 60 characters, all of them printable")
    return text


def _colour(text: str, name: str) -> str:
    if not re.fullmatch(r"#[0-9a-fA-F]{6}", text, re.ASCII):
        raise SettingsError(f"{name}={text!r} is not a colour such as #2f5bea")
    return text.lower()


def _url(text: str, name: str) -> str:
    if not text:
        return ""
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise SettingsError(f"{name} must be an http(s) URL without credentials or query")
    return text.rstrip("/")


def _node_url(text: str, name: str) -> str | None:
    """A node's address may hold a password, so the message never repeats it."""
    try:
        parts = urlsplit(text)
        is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_address = False
    if text and not is_address:
        raise SettingsError(
            f"{name} must be an http(s) URL such as http://user:password@127.0.0.1:19443/wallet/merchant"
        )
    return text or None


def _origins(text: str) -> tuple[str, ...]:
    """Origins of web pages as browsers send them, comma-separated; `*` is all of them, `off` none."""
    found = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if found in (("*",), ("off",)):
        return found if found == ("*",) else ()
    for origin in found:
        if not _ORIGIN.fullmatch(origin):
            raise SettingsError(
                f"CORS_ORIGINS: {origin!r} is no origin such as https://app.example.com (no path, no slash at its end); or * or off"
            )
    return found


def _networks(text: str, name: str) -> str:
    """Addresses or networks, comma-separated."""
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            ipaddress.ip_network(item)
        except ValueError:
            raise SettingsError(f"{name}: {item!r} is not an IP address or network") from None
    return text


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
