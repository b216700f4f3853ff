"""The gateway's own settings: environment variables read once into one frozen object.

It shares HOST, PORT, DATA_DIR and LOG_LEVEL with the service, and knows none of its secrets. Every variable is
documented in README.md and deploy/.env.example; a test compares the three.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from app.gateway.upstreams import SHIPPED, Upstreams, UpstreamsError, read_upstreams

OWN: Final = (
    "GATEWAY_PORT", "GATEWAY_UPSTREAMS", "GATEWAY_METER_URL", "GATEWAY_SERVICE_TOKEN", "GATEWAY_PUBLIC_URL",
    "GATEWAY_ASK_SECONDS", "GATEWAY_CLAMP", "GATEWAY_CLIENT_GONE_SECONDS", "GATEWAY_MODELS_URL", "MEDIA_DAYS", "LOW_BALANCE_STATUS",
)  # fmt: skip
"""The variables that are the gateway's alone."""


class GatewaySettingsError(Exception):
    """A setting that cannot be used; the message says which, what was found and what would help."""


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Every setting, parsed. Secrets are kept out of the repr."""

    host: str
    port: int
    public_url: str
    data_dir: Path
    meter_url: str
    service_token: str = field(repr=False)
    upstreams: Upstreams
    ask_seconds: int = 2
    clamp: bool = True
    client_gone_seconds: int = 30
    low_balance_status: int = 402
    media_days: int = 7
    films_looked_for_every_seconds: float = 1.0
    log_level: str = "INFO"

    @property
    def folder(self) -> Path:
        """What the gateway keeps."""
        return self.data_dir / "gateway"


def load(environ: Mapping[str, str] = os.environ) -> GatewaySettings:
    """Raises GatewaySettingsError."""

    def text(name: str, default: str = "") -> str:
        return environ.get(name, "").strip() or default

    host, http_port = text("HOST", "127.0.0.1"), _number(text("PORT", "8080"), "PORT", 1, 65535)
    mine = port(environ)
    token = text("GATEWAY_SERVICE_TOKEN") or _in_file(text("GATEWAY_SERVICE_TOKEN_FILE"))
    if not token:
        raise GatewaySettingsError(
            "GATEWAY_SERVICE_TOKEN is not set; make one: python -m app token create --service gateway"
        )
    return GatewaySettings(
        host=host,
        port=mine,
        public_url=public_url(environ),
        data_dir=Path(text("DATA_DIR", "./.data")).resolve(),
        meter_url=_url(text("GATEWAY_METER_URL", f"http://{_authority(host)}:{http_port}"), "GATEWAY_METER_URL"),
        service_token=token,
        upstreams=upstreams(environ),
        ask_seconds=_number(text("GATEWAY_ASK_SECONDS", "2"), "GATEWAY_ASK_SECONDS", 1, 60),
        clamp=_switch(text("GATEWAY_CLAMP", "on"), "GATEWAY_CLAMP"),
        client_gone_seconds=_number(
            text("GATEWAY_CLIENT_GONE_SECONDS", "30"), "GATEWAY_CLIENT_GONE_SECONDS", 0, 86_400
        ),
        media_days=_number(text("MEDIA_DAYS", "7"), "MEDIA_DAYS", 1, 3650),
        low_balance_status=_status(text("LOW_BALANCE_STATUS", "402")),
        log_level=text("LOG_LEVEL", "INFO"),
    )


def _in_file(path: str) -> str:
    """How systemd and Docker hand a secret over."""
    try:
        return Path(path).read_text().strip() if path else ""
    except (OSError, UnicodeDecodeError) as error:
        raise GatewaySettingsError(f"GATEWAY_SERVICE_TOKEN_FILE={path} cannot be read") from error


def port(environ: Mapping[str, str] = os.environ) -> int:
    """Where the gateway listens. Raises GatewaySettingsError."""
    http_port = _number(environ.get("PORT", "").strip() or "8080", "PORT", 1, 65535)
    said = environ.get("GATEWAY_PORT", "").strip() or str(min(http_port + 2, 65535))
    return _number(said, "GATEWAY_PORT", 1, 65535)


def public_url(environ: Mapping[str, str] = os.environ) -> str:
    """Where callers reach the gateway. Raises GatewaySettingsError."""
    host = environ.get("HOST", "").strip() or "127.0.0.1"
    said = environ.get("GATEWAY_PUBLIC_URL", "").strip() or f"http://{_authority(host)}:{port(environ)}"
    return _url(said, "GATEWAY_PUBLIC_URL")


def upstreams(environ: Mapping[str, str]) -> Upstreams:
    """Those of GATEWAY_UPSTREAMS, or the shipped ones. Raises GatewaySettingsError."""
    path = Path(environ.get("GATEWAY_UPSTREAMS", "").strip() or SHIPPED)
    http_port = _number(environ.get("PORT", "").strip() or "8080", "PORT", 1, 65535)
    sandbox_port = environ.get("SANDBOX_PORT", "").strip() or str(min(http_port + 1, 65535))
    models_url = environ.get("GATEWAY_MODELS_URL", "").strip() or f"http://127.0.0.1:{sandbox_port}/models/v1"
    try:
        return read_upstreams(path, {**environ, "GATEWAY_MODELS_URL": models_url})
    except UpstreamsError as error:
        raise GatewaySettingsError(str(error)) from error


def _number(text: str, name: str, low: int, high: int) -> int:
    if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
        raise GatewaySettingsError(f"{name}={text!r} is not a whole number from {low} to {high}")
    return int(text)


def _switch(text: str, name: str) -> bool:
    if text not in ("on", "off"):
        raise GatewaySettingsError(f"{name}={text!r} is not one of on, off")
    return text == "on"


def _status(text: str) -> int:
    if text not in ("402", "429"):
        raise GatewaySettingsError(f"LOW_BALANCE_STATUS={text!r} is not one of 402, 429")
    return int(text)


def _url(text: str, name: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise GatewaySettingsError(f"{name} must be an http(s) URL without credentials or query")
    return text.rstrip("/")


def _authority(host: str) -> str:
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host  # noqa: S104 - compared, not bound
    return f"[{host}]" if ":" in host else host
