"""What ENVIRONMENT=production refuses: everything that a newcomer gets for nothing, and secrets that are none.

Each refusal names the variable, what was found and what would help, and never repeats a secret.
"""

import base64
import binascii
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Final

PLACEHOLDER: Final = "change-me"
"""What our own examples say."""
_LATER: Final = r"change(me|this|it)|replace(me|this|it|with)|place?holder"
_WORDS: Final = re.compile(
    _LATER
    + r"|insert(your|here)|fill(this)?in|your\w{0,12}(secret|key|pepper|token|password|api)|password|donotuse|hunter2"
    r"|(example|default|sample|insecure|dummy|test|my|super)(secret|pepper|key|token)|(key|secret|token|pepper|id)(goes)?here"
)
"""What somebody writes who means to come back, without what stands between words."""
_BRACKETED: Final = re.compile(r"[<>{}]|\$\w|\.\.\.|…")
_LEAST_SYMBOLS: Final = 8
_LEAST_BYTES: Final = 16
_LEAST_TOKEN: Final = 16
_NEEDED: Final = ("DATABASE_URL", "PUBLIC_URL", "SECRET_PEPPER", "SEALING_KEYS")
_NEEDED_OF: Final = {
    "btcpay": ("BTCPAY_URL", "BTCPAY_API_KEY", "BTCPAY_STORE_ID", "BTCPAY_WEBHOOK_SECRET"),
    "lnbits": ("LNBITS_INVOICE_KEY",),
}
_HELP: Final = {
    "SECRET_PEPPER": "openssl rand -base64 48 makes one",
    "SEALING_KEYS": 'echo "k1:$(openssl rand -base64 32)" makes one',
    "BTCPAY_WEBHOOK_SECRET": "take the one that BTCPay made for the store's webhook",
    "BTCPAY_API_KEY": "make one in BTCPay, under Account, API Keys",
    "BTCPAY_STORE_ID": "BTCPay shows it in the store's settings",
    "LNBITS_INVOICE_KEY": "LNbits shows the wallet's invoice key under API keys",
    "METRICS_TOKEN": "openssl rand -base64 32 makes one",
    "DATABASE_URL": "put the database's own password into it",
}
Text = Callable[[str], str]
"""A variable's text, empty where it is not set."""


def refusals(text: Text, backends: Collection[str]) -> Iterator[str]:
    """All that is wrong with these settings for production, where `backends` take payments: a clause for each."""
    yield from _missing(text, backends)
    yield from _placeholders(text)
    yield from _guessable(text)
    yield from _overheard(text)
    for name in ("SANDBOX_LITECOIN_RPC", "SANDBOX_MONERO_WALLET_RPC"):
        if text(name):
            yield f"{name} is set (the sandbox is for development); unset it"
    if text("RATE_FIXED"):
        yield (
            "RATE_FIXED is set (for development only: coins would be credited at a rate that stands still); unset it, and"
            " RATE_URL is asked"
        )
    if text("NOTICE_ALLOW_PRIVATE") == "on":
        yield "NOTICE_ALLOW_PRIVATE is on (customers could have us call into your network); turn it off"
    if text("NWC_ALLOW_PRIVATE_RELAYS") == "on":
        yield "NWC_ALLOW_PRIVATE_RELAYS is on (customers could have us call into your network); turn it off"


def _missing(text: Text, backends: Collection[str]) -> Iterator[str]:
    for name in _NEEDED:
        if not text(name):
            yield f"{name} is not set"
    for backend, names in _NEEDED_OF.items():
        for name in names if backend in backends else ():
            if not text(name):
                yield f"{name} is not set" + " (the sandbox is for development)" * (backend == "btcpay")


def _placeholders(text: Text) -> Iterator[str]:
    for name, helps in _HELP.items():
        # A database's password is its own business: any character may be in it, and its server says whether it is right.
        is_one = re.search(_LATER, _bare(text(name))) if name == "DATABASE_URL" else is_placeholder(text(name))
        if is_one:
            yield f"{name} still has its placeholder; {helps}"


def _guessable(text: Text) -> Iterator[str]:
    """Secrets of ours that are long enough and still no secret. What a backend gave us, it judges itself."""
    for name, least in (("SECRET_PEPPER", 0), ("METRICS_TOKEN", _LEAST_TOKEN)):
        found = text(name)
        if found and not is_placeholder(found) and (why := why_guessable(found, least)):
            yield f"{name} {why}; {_HELP[name]}"
    for key_id, key in _keys_in(text("SEALING_KEYS")):
        if why := _why_no_key(key):
            yield f"SEALING_KEYS has a key ({key_id}) that {why}; {_HELP['SEALING_KEYS']}"


def _overheard(text: Text) -> Iterator[str]:
    """What goes over the network where anybody between could read it, or answer instead."""
    reasons = {
        "PUBLIC_URL": "customers' keys would travel readable to all",
        "BTCPAY_URL": "a man in the middle could say that somebody paid",
        "LNBITS_URL": "a man in the middle could say that somebody paid",
        "RATE_URL": "a man in the middle could say what a coin is worth",
        "JWT_JWKS": "a man in the middle could sign for every customer",
    }
    found = {name: text(name) for name in reasons}
    found["JWT_JWKS"] = found["JWT_JWKS"] or text("JWT_ISSUER")
    for name, reason in reasons.items():
        if found[name].lower().startswith("http:"):
            yield f"{name} is plain http ({reason}); use https"


# --- secrets that are none ----------------------------------------------------------------------------


def is_placeholder(secret: str) -> bool:
    """Whether it is what an example says in a secret's place."""
    return bool(_WORDS.search(_bare(secret)) or _BRACKETED.search(secret))


def _bare(text: str) -> str:
    return re.sub(r"[\W_]", "", text.lower())


def why_guessable(secret: str, least_characters: int = 0) -> str | None:
    """What is wrong with a secret's text, None if it may be random: no statistics can tell more of so few characters."""
    if len(secret) < least_characters:
        return f"has {len(secret)} characters, of {least_characters} at least"
    if len(set(secret)) == 1:
        return "is one character over and over"
    if period := _period(secret):
        return f"is the same {period} characters over and over"
    if len(set(secret)) < _LEAST_SYMBOLS:
        return f"is made of {len(set(secret))} different characters"
    if _is_a_row([ord(symbol) for symbol in secret]):
        return "is characters in their own order"
    if _is_mostly_one(secret):
        return "is one character most of the time"
    return None


def _why_no_key(key: bytes) -> str | None:
    if len(set(key)) == 1:
        return "is one byte over and over"
    if period := _period(key):
        return f"is the same {period} bytes over and over"
    if _is_a_row(key):
        return "is bytes in their own order"
    if all(0x20 <= byte < 0x7F for byte in key):  # of 10^14 random keys one is
        return "is text and no random bytes"
    if len(set(key)) < _LEAST_BYTES or _is_mostly_one(key):
        return f"is made of {len(set(key))} different bytes"
    return None


def _period(text: str | bytes) -> int | None:
    """The length of what the whole is a repetition of, at least twice; the last time may be cut off."""
    return next((n for n in range(1, len(text) // 2 + 1) if text[n:] == text[:-n]), None)


def _is_a_row(symbols: Collection[int]) -> bool:
    """Whether most follow the one before at one distance, as in `abcdef…` and `0011223…`: of random ones few do."""
    steps = Counter(after - before for before, after in zip(list(symbols)[:-1], list(symbols)[1:], strict=True))
    _, often = steps.most_common(1)[0]
    return often * 2 > sum(steps.values())


def _is_mostly_one(symbols: str | bytes) -> bool:
    _, often = Counter(symbols).most_common(1)[0]
    return often * 2 > len(symbols)


def _keys_in(text: str) -> Iterator[tuple[str, bytes]]:
    """The keys that can be read; what cannot is refused by who needs them."""
    for item in filter(None, text.split(",")):
        key_id, _, encoded = item.strip().partition(":")
        try:
            key = base64.b64decode(encoded, validate=True)
        except binascii.Error:
            continue
        if len(key) == 32 and key_id.isalnum():
            yield key_id, key
