"""This machine: its disks, its secrets and their age, what a gateway could not tell yet, and how we look from outside."""

import asyncio
import shutil
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from app.client.spool import SpoolFile
from app.doctor.lines import Line, duration, fault, ok, warning
from app.kernel.db import row, rows
from app.kernel.errors import DatabaseUnavailable
from app.wiring import House

_LOW_PERCENT, _FULL_PERCENT = 15, 5
_LOW_BYTES, _FULL_BYTES = 2 * 10**9, 5 * 10**8
OLD_DAYS: Final = 365
_SOON_DAYS: Final = 14
_CERTIFICATE_DAYS: Final = 14
_WAITS_SECONDS: Final = 600
_ANSWER_SECONDS: Final = 10
_TOKENS: Final = """
    SELECT kind, name, extract(epoch FROM now() - created_at)::float / 86400 AS days,
           extract(epoch FROM expires_at - now())::float / 86400 AS left_days
    FROM (SELECT 'service' AS kind, name, created_at, NULL::timestamptz AS expires_at FROM service_token WHERE revoked_at IS NULL
          UNION ALL SELECT 'admin', name, created_at, expires_at FROM admin_token WHERE revoked_at IS NULL) AS token
    ORDER BY kind, name, created_at"""
_SEALED: Final = """
    SELECT count(*) AS count FROM (
        SELECT sealed_secret FROM api_key WHERE sealed_secret IS NOT NULL AND deleted_at IS NULL
        UNION ALL SELECT sealed_secret FROM nwc_connection) AS sealed
    WHERE sealed_secret NOT LIKE :current"""


async def look(house: House, _: str) -> list[Line]:
    lines = [*_disks(house), *_spool(house.settings.data_dir / "gateway" / "spool", time.time())]
    try:
        return [*lines, *await _secrets(house)]
    except DatabaseUnavailable:
        return [*lines, warning("secrets", "their age is in the database, which cannot be asked")]


# Disks


def _disks(house: House) -> Iterator[Line]:
    folder = house.settings.data_dir
    while not folder.exists():
        folder = folder.parent
    usage = shutil.disk_usage(folder)
    yield disk_line(str(folder), usage.total, usage.free)


def disk_line(folder: str, total_bytes: int, free_bytes: int) -> Line:
    percent = free_bytes * 100 / max(total_bytes, 1)
    found = f"{free_bytes / 1e9:.1f} GB ({percent:.0f} %) free under {folder}"
    if percent < _FULL_PERCENT or free_bytes < _FULL_BYTES:
        return fault("disk", found, "make room now: see PRODUCTION.md, Disk full")
    if percent < _LOW_PERCENT or free_bytes < _LOW_BYTES:
        return warning("disk", found, "make room: export and drop old months (usage export, usage drop)")
    return ok("disk", found)


# What a gateway on this machine owes us


def _spool(folder: Path, now: float) -> Iterator[Line]:
    """A process writes its file all the time; one whose file stands still with something in it is stuck, or gone."""
    if not folder.is_dir():
        return
    owed, oldest = 0, 0.0
    for path in folder.glob("*.spool"):
        try:
            with path.open("rb") as file:
                waiting = len(SpoolFile.read_only(file.fileno()).live)
            age = now - path.stat().st_mtime
        except OSError:
            continue  # it was told and removed just now
        owed += waiting
        oldest = max(oldest, age if waiting else 0)
    refused = folder / "refused.jsonl"
    if refused.exists() and (count := len(refused.read_bytes().splitlines())):
        yield warning("gateway.refused", f"{count} calls could not be settled and are kept in {refused}", "look at each, settle or write off, then remove the file")  # fmt: skip
    if owed and oldest > _WAITS_SECONDS:
        yield fault("gateway.spool", f"{owed} calls are not told to us, and nothing moved for {duration(oldest)}", "start the gateway: it tells what its predecessor owed")  # fmt: skip
    else:
        yield ok("gateway.spool", f"{owed} calls under way or being told")


# Secrets


async def _secrets(house: House) -> list[Line]:
    current = f"{house.settings.sealer.current_id}."
    sealed = await house.db.transaction(lambda session: row(session, _SEALED, current=f"{current}%"))
    tokens = await house.db.transaction(lambda session: rows(session, _TOKENS))
    assert sealed is not None
    return [
        sealing_line(sealed["count"], len(house.settings.sealing_keys)),
        *(line for token in tokens if (line := token_line(**token)) is not None),
        *_own_file(house),
    ]


def sealing_line(older: int, keys: int) -> Line:
    about = "secrets.sealing"
    if older:
        return warning(about, f"{older} secrets are sealed under an older key", "run `python -m app keys rotate`")
    if keys > 1:
        return warning(about, f"SEALING_KEYS has {keys} keys, and only the newest is used", "remove the older ones")
    return ok(about, "every kept secret is sealed under the key of SEALING_KEYS")


def token_line(kind: str, name: str, days: float, left_days: float | None) -> Line | None:
    """None for one that needs no word."""
    about, named = f"token.{kind}", f"the {kind} token {name}"
    if left_days is not None and left_days <= 0:
        return warning(about, f"{named} has expired", f"make another (token create --{kind}), and revoke it")
    if left_days is not None and left_days < _SOON_DAYS:
        return warning(
            about, f"{named} expires in {duration(left_days * 86_400)}", f"make another (token create --{kind})"
        )
    if days > OLD_DAYS:
        return warning(about, f"{named} is {days:.0f} days old", f"make another (token create --{kind}), and revoke it")
    return None


def _own_file(house: House) -> Iterator[Line]:
    path = house.settings.data_dir / "secrets.json"
    if house.settings.is_production or not path.exists():
        return
    if path.stat().st_mode & 0o077:
        yield fault("secrets.file", f"{path} can be read by others", f"chmod 600 {path}")


# From outside


async def look_from_outside(house: House, _: str) -> list[Line]:
    """Whoever answers at PUBLIC_URL must be us: an unsigned webhook is answered 401 there, by nobody else in these words."""
    url = urlsplit(house.settings.public_url)
    try:
        async with asyncio.timeout(_ANSWER_SECONDS):
            answer, days = await _asked(url.scheme == "https", url.hostname or "", url.port, url.path)
    except ssl.SSLCertVerificationError as error:
        return [fault("public_url", f"{house.settings.public_url} has no certificate that is believed: {error.verify_message}", "renew it (certbot renew)")]  # fmt: skip
    except (OSError, TimeoutError, EOFError) as error:
        return [fault("public_url", f"{house.settings.public_url} does not answer ({type(error).__name__})", "is Satmeter running, and may this machine ask itself from outside?")]  # fmt: skip
    if b"invalid_signature" not in answer:
        return [fault("public_url", f"at {house.settings.public_url} somebody else answers: {_first_line(answer)}", "see the reverse proxy")]  # fmt: skip
    lines = [ok("public_url", f"{house.settings.public_url} leads here")]
    if days is not None and days < _CERTIFICATE_DAYS:
        lines.append(warning("public_url.certificate", f"it expires in {duration(days * 86_400)}", "certbot renew"))
    return lines


async def _asked(is_tls: bool, host: str, port: int | None, path: str) -> tuple[bytes, float | None]:
    """The answer to an unsigned webhook, and for how many days the certificate is good."""
    reader, writer = await asyncio.open_connection(
        host, port or (443 if is_tls else 80), ssl=ssl.create_default_context() if is_tls else None
    )
    try:
        certificate = writer.get_extra_info("peercert")
        writer.write(
            f"POST {path}/webhooks/btcpay HTTP/1.1\r\nHost: {host}\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{{}}".encode()
        )
        return await reader.read(16_384), days_left(certificate, datetime.now(UTC)) if certificate else None
    finally:
        writer.close()


def days_left(certificate: dict[str, Any], now: datetime) -> float:
    return (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - now.timestamp()) / 86_400


def _first_line(answer: bytes) -> str:
    line = answer.split(b"\r\n", 1)[0].decode("latin-1")
    return "".join(letter for letter in line[:80] if letter.isprintable()) or "nothing"
