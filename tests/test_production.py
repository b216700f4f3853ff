"""What ENVIRONMENT=production refuses, as an operator meets it: one line that names the setting, and never a secret."""

import base64
import secrets
import string

import pytest

from app.kernel.production import is_placeholder, refusals, why_guessable
from app.kernel.settings import SettingsError, load
from tests.program import installation

PRODUCTION = {
    "ENVIRONMENT": "production",
    "DATABASE_URL": "postgresql://satmeter:a-password-of-its-own@127.0.0.1:1/satmeter",
    "PUBLIC_URL": "https://satmeter.example",
    "SECRET_PEPPER": secrets.token_urlsafe(48),
    "SEALING_KEYS": "k1:" + base64.b64encode(secrets.token_bytes(32)).decode(),
    "BTCPAY_URL": "https://btcpay.example",
    "BTCPAY_API_KEY": secrets.token_hex(20),
    "BTCPAY_STORE_ID": "9pQ2rT4vW6yZ8aBcDeFgHjKmNpQrStUvWxYz12345678",
    "BTCPAY_WEBHOOK_SECRET": secrets.token_urlsafe(24),
}
LNBITS = {
    "PAYMENT_METHODS": "btc-lightning:lnbits",
    "LNBITS_URL": "https://lnbits.example",
    "LNBITS_INVOICE_KEY": secrets.token_hex(16),
}


def _key(raw: bytes) -> str:
    return "k1:" + base64.b64encode(raw).decode()


GUESSABLE = [
    "p" * 43, "0" * 64, "ab" * 20, "abc123" * 8, "0123456789abcdef" * 4, string.ascii_letters, "9876543210zyxwvutsrqponmlkjihgfedcba",
    "a" * 60 + "bcdefghi", "00000000111111112222222233333333",
]  # fmt: skip
PLACEHOLDERS = [
    "change-me-change-me-change-me-change-me", "CHANGEME" * 6, "change_this_to_something_random_please", "<at least 32 random bytes, base64>",
    "your-secret-goes-here-your-secret-goes-here", "REPLACE_ME_WITH_32_RANDOM_BYTES_OR_MORE", "placeholder placeholder placeholder 123",
    "${SECRET_PEPPER_FROM_THE_VAULT_OF_OURS}", "this.is.my.secret.pepper.for.production",
]  # fmt: skip
NO_KEYS = [
    bytes(32), b"\xff" * 32, b"\x01\x02" * 16, bytes(range(32)), bytes(range(255, 223, -1)), b"0123456789abcdef0123456789abcdef",
    b"this is a sealing key of 32 byte", bytes(31) + b"\x07", secrets.token_bytes(8) * 4, secrets.token_bytes(4) + bytes(28),
]  # fmt: skip
REFUSED = [
    *[("SECRET_PEPPER", {"SECRET_PEPPER": text}) for text in GUESSABLE + PLACEHOLDERS],
    *[("SEALING_KEYS", {"SEALING_KEYS": _key(raw)}) for raw in NO_KEYS],
    ("SEALING_KEYS", {"SEALING_KEYS": f"{PRODUCTION['SEALING_KEYS']},k0:{base64.b64encode(bytes(32)).decode()}"}),
    *[("METRICS_TOKEN", {"METRICS_TOKEN": text}) for text in ["m" * 32, "short", "your-metrics-token-here"]],
    *[("PUBLIC_URL", {"PUBLIC_URL": url}) for url in ["http://satmeter.example", "HTTP://satmeter.example", "http://127.0.0.1:8080"]],
    *[("BTCPAY_URL", {"BTCPAY_URL": url}) for url in ["http://btcpay.example", "http://127.0.0.1:8081", "http://[::1]:49392"]],
    *[
        ("LNBITS_URL", LNBITS | {"LNBITS_URL": url})
        for url in ["http://lnbits.example", "http://10.0.0.7:5000", "http://localhost:5000", "Http://lnbits.example"]
    ],
    *[
        ("LNBITS_INVOICE_KEY", LNBITS | {"LNBITS_INVOICE_KEY": key})
        for key in ["change-me", "", "YOUR_INVOICE_KEY", "<invoice key>", "Place_Holder", "invoice-key-here"]
    ],
    *[
        (name, {name: text})
        for name in ("BTCPAY_API_KEY", "BTCPAY_WEBHOOK_SECRET", "BTCPAY_STORE_ID")
        for text in ["changeme", "<from BTCPay>", "your-api-key"]
    ],
    *[("DATABASE_URL", {"DATABASE_URL": f"postgresql://satmeter:{word}@db/satmeter"}) for word in ["change-me", "CHANGE_ME", "replaceme"]],
    *[("RATE_FIXED", more | {"RATE_FIXED": "BTC:65000"}) for more in ({}, LNBITS)],
    ("RATE_URL", LNBITS | {"RATE_URL": "http://rates.example/{coin}"}),
    ("NWC_ALLOW_PRIVATE_RELAYS", {"NWC_ALLOW_PRIVATE_RELAYS": "on"}),
    ("NOTICE_ALLOW_PRIVATE", {"NOTICE_ALLOW_PRIVATE": "on"}),
    ("SANDBOX_LITECOIN_RPC", {"SANDBOX_LITECOIN_RPC": "http://u:p@127.0.0.1:1/wallet/x"}),
    ("SANDBOX_MONERO_WALLET_RPC", {"SANDBOX_MONERO_WALLET_RPC": "http://127.0.0.1:1"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "changes"), REFUSED)
def test_production_refuses_each_in_one_line_that_names_it_alone_and_no_secret(
    name: str, changes: dict[str, str]
) -> None:
    assert load(PRODUCTION).is_production
    assert load(PRODUCTION | LNBITS).is_production
    with pytest.raises(SettingsError) as refused:
        load(PRODUCTION | changes)
    said = str(refused.value)
    assert said.startswith(f"ENVIRONMENT=production refuses to start: {name} ")
    assert "\n" not in said
    assert said.count(";") <= 1, "one refusal, and what would help"
    for secret in (name, *PRODUCTION):
        value = (PRODUCTION | changes).get(secret, "")
        if ("SECRET" in secret or "KEY" in secret or "TOKEN" in secret) and len(value) > 9:
            assert value not in said


def test_what_is_random_is_never_called_guessable() -> None:
    """2,000 of each kind that openssl and BTCPay make; one in 10^14 sealing keys would be refused."""
    for _ in range(2000):
        for text in (
            secrets.token_urlsafe(32),
            secrets.token_hex(32),
            secrets.token_hex(16),
            secrets.token_urlsafe(20),
        ):
            assert not is_placeholder(text), text
            assert why_guessable(text) is None, text
        load_key = PRODUCTION | {"SEALING_KEYS": _key(secrets.token_bytes(32))}
        assert "SEALING_KEYS" not in "".join(_all_wrong(load_key))


def _all_wrong(environ: dict[str, str]) -> list[str]:
    return list(refusals(lambda name: environ.get(name, ""), {"btcpay"}))


@pytest.mark.long
@pytest.mark.parametrize("command", ["run", "migrate"])
def test_the_program_refuses_before_it_touches_anything(command: str) -> None:
    wrong = {
        "SECRET_PEPPER": "z" * 48, "SEALING_KEYS": _key(bytes(32)), "PUBLIC_URL": "http://satmeter.example", "RATE_FIXED": "BTC:65000",
        **LNBITS, "LNBITS_URL": "http://lnbits.example", "LNBITS_INVOICE_KEY": "change-me",
    }  # fmt: skip
    with installation() as program:
        done = program.command(command, **PRODUCTION | wrong)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1, done.stderr
        for name in wrong.keys() - {"PAYMENT_METHODS"}:
            assert f"{name} " in done.stderr
        assert "z" * 48 not in done.stderr
        assert not program.data_dir.exists()
