"""NIP-47's words and what they mean: the connection URI, the info event, requests, answers. Pure.

What comes from a wallet is read leniently where it is only information, and strictly where it would mean "paid" or
"surely not paid". Source: NIP-47 as of July 2026, and what Alby Hub, LNbits and Zeus were seen to do.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import unquote

import bech32
import msgspec

from app.adapters import nip44
from app.adapters.addresses import NotAllowed, read_relay_url
from app.adapters.nostr import Event, decrypt_nip04, encrypt_nip04, is_nip04, shared_x
from app.adapters.reading import plain
from app.autotopup.wallet import Encryption, LookupReply, PayOutcome, PayReply, WalletUnsuitable, WalletUri
from app.kernel.errors import InvalidField, WalletSilent

INFO_KIND: Final = 13194
REQUEST_KIND: Final = 23194
RESPONSE_KIND: Final = 23195

MAX_URI_CHARS: Final = 4096
MAX_RELAYS: Final = 5

# One sentence for every relay that we do not, may not or cannot reach: whoever tries addresses learns nothing.
UNREACHABLE: Final = WalletSilent().message
NOT_A_URI: Final = (
    "nwc_url must be a wallet's connection string: "
    f"nostr+walletconnect://<public key>?relay=wss://…&secret=<secret key>, with 1 to {MAX_RELAYS} relays"
)

# The codes that mean that surely nothing was paid, if they are all that a wallet ever said. PAYMENT_FAILED, INTERNAL
# and OTHER are not among them: wallets say so of payments that are in flight, or were made before.
REFUSALS: Final = frozenset(
    {
        "INSUFFICIENT_BALANCE",
        "QUOTA_EXCEEDED",
        "RATE_LIMITED",
        "NOT_IMPLEMENTED",
        "UNSUPPORTED_ENCRYPTION",
        "RESTRICTED",
        "UNAUTHORIZED",
        "EXPIRED",
        "BAD_REQUEST",
    }
)

_SCHEME: Final = re.compile(r"(?:nostr\+walletconnect|nostrwalletconnect):(?://)?", re.IGNORECASE)
_KEY: Final = re.compile(r"[0-9a-fA-F]{64}")
_LUD16: Final = re.compile(r"[A-Za-z0-9._+-]{1,64}@[A-Za-z0-9.-]{1,253}")
_CODE: Final = re.compile(r"[A-Za-z0-9_]{1,64}")
_SEPARATORS: Final = re.compile(r"[\s,]+")
_TEST_NETWORKS: Final = frozenset({"testnet", "testnet3", "testnet4", "signet", "mutinynet", "regtest"})


@dataclass(frozen=True, slots=True)
class Info:
    """What a wallet's info event offers."""

    methods: frozenset[str]
    encryptions: frozenset[Encryption]


@dataclass(frozen=True, slots=True)
class Answer:
    """A wallet's answer to a request: its `result`, its error, or both. `code` is "" if the error has none that is one."""

    result: Mapping[str, Any] | None = field(default=None, repr=False)
    code: str | None = None
    message: str = ""


# The URI


def parse_uri(uri: str, *, allow_private: bool) -> WalletUri:
    """Raises InvalidField, with no part of the URI in its text.

    Raises WalletSilent for a relay that is none for us: the very answer that one gets which cannot be reached.
    """
    key, fields = _split(uri)
    pubkey, secret = _read_key(key, "npub"), _read_key(_only(fields.get("secret", [])) or "", "nsec")
    if pubkey is None or secret is None:
        raise _not_a_uri()
    try:
        shared_x(secret, pubkey)  # keys that are not on the curve would fail at the first request only
    except ValueError:
        raise _not_a_uri() from None
    lud16 = _only(fields.get("lud16", []))
    return WalletUri(
        pubkey=pubkey,
        relays=_relays(fields.get("relay", []), allow_private=allow_private),
        secret=secret,
        lud16=lud16 if lud16 is not None and _LUD16.fullmatch(lud16) else None,
    )


def _split(uri: str) -> tuple[str, dict[str, list[str]]]:
    """The wallet's key and the fields behind it. A `+` stays one, unlike in a form: an address may have it."""
    text = uri.strip()
    scheme = _SCHEME.match(text)
    if scheme is None or len(text) > MAX_URI_CHARS or "#" in text:
        raise _not_a_uri()
    key, _, query = text[scheme.end() :].partition("?")
    fields: dict[str, list[str]] = {}
    for item in query.split("&"):
        name, _, value = item.partition("=")
        fields.setdefault(name, []).append(unquote(value))
    return key.removesuffix("/"), fields


def _read_key(text: str, kind: str) -> str | None:
    """A key's 32 bytes as lower-case hex, from hex or from NIP-19's npub or nsec; None if it is no such key.

    Each kind in its own place only: whoever puts a secret where the public key goes has pasted the wrong text.
    """
    if _KEY.fullmatch(text):
        return text.lower()
    prefix, words = bech32.bech32_decode(text)
    data = bech32.convertbits(words, 5, 8, False) if prefix == kind and words else None
    return bytes(data).hex() if data and len(data) == 32 else None


def _relays(texts: Sequence[str], *, allow_private: bool) -> tuple[str, ...]:
    """The relays in lower case, each once, in their order."""
    if not 1 <= len(texts) <= MAX_RELAYS:
        raise _not_a_uri()
    try:
        return tuple(dict.fromkeys(read_relay_url(text, allow_private=allow_private).text for text in texts))
    except NotAllowed:
        raise WalletSilent(param="nwc_url") from None


def _only(values: Sequence[str]) -> str | None:
    """The value that is given, None if there is none or they differ."""
    return values[0] if len(set(values)) == 1 else None


def _not_a_uri() -> InvalidField:
    return InvalidField(NOT_A_URI, param="nwc_url")


# What a wallet offers


def info_query(wallet: str) -> dict[str, Any]:
    return {"kinds": [INFO_KIND], "authors": [wallet], "limit": 1}


def newest_info(events: Sequence[Event], wallet: str) -> Info | None:
    """What the wallet's newest info event says, whatever else a relay sent."""
    ours = [event for event in events if event.kind == INFO_KIND and event.pubkey == wallet]
    newest = max(ours, key=lambda event: event.created_at, default=None)
    return None if newest is None else read_info(newest)


def read_info(event: Event) -> Info:
    """Old Alby wallets put commas between the methods. No `encryption` tag means NIP-04, unless an old `v` tag is there."""
    methods = frozenset(filter(None, _SEPARATORS.split(event.content)))
    if not (words := _words(event, "encryption")):
        words = {"nip04"} | ({"nip44_v2"} if "1.0" in _words(event, "v") else set())
    return Info(methods, frozenset(one for one in Encryption if one.value in words))


def _words(event: Event, tag: str) -> set[str]:
    return {word for values in event.tagged(tag) for value in values for word in _SEPARATORS.split(value) if word}


# Requests


def request_content(
    uri: WalletUri, encryption: Encryption, method: str, params: Mapping[str, Any]
) -> tuple[str, list[list[str]]]:
    """The encrypted content of a request, and its tags."""
    text = msgspec.json.encode({"method": method, "params": params}).decode()
    tags = [["p", uri.pubkey], ["encryption", encryption.value]]
    if encryption is Encryption.NIP04:
        return encrypt_nip04(uri.secret, uri.pubkey, text), tags
    return nip44.encrypt(text, nip44.conversation_key(uri.secret, uri.pubkey)), tags


def response_query(wallet: str, request_id: str) -> dict[str, Any]:
    """By the request it answers: a filter on our own key would lose the answers of wallets that set no `p` tag."""
    return {"kinds": [RESPONSE_KIND], "authors": [wallet], "#e": [request_id]}


def is_response(event: Event, wallet: str, request_id: str) -> bool:
    return event.kind == RESPONSE_KIND and event.pubkey == wallet and [request_id] in [e[:1] for e in event.tagged("e")]


# Answers


def read_answer(event: Event, uri: WalletUri, method: str) -> Answer | None:
    """What a wallet's response says, None if it cannot be decrypted or is no answer to this method."""
    try:
        body = msgspec.json.decode(_decrypted(event.content, uri))
    except (ValueError, RecursionError):  # CannotDecrypt is a ValueError
        return None
    if not isinstance(body, dict) or body.get("result_type", method) not in (method, None, ""):
        return None
    result, error = body.get("result"), body.get("error")
    if not isinstance(result, dict):
        result = None
    return None if result is None and error is None else Answer(result, *_read_error(error, uri))


def _decrypted(content: str, uri: WalletUri) -> str:
    """By what it is, not by what we asked in: Alby Hub answers in NIP-44 what it could not decrypt."""
    if is_nip04(content):
        return decrypt_nip04(uri.secret, uri.pubkey, content)
    return nip44.decrypt(content, nip44.conversation_key(uri.secret, uri.pubkey))


def _read_error(error: Any, uri: WalletUri) -> tuple[str | None, str]:
    """Its code and its text, fit to be shown to the wallet's owner."""
    if error is None:
        return None, ""
    given = error if isinstance(error, dict) else {"message": error}
    code, message = given.get("code"), given.get("message")
    words = plain(message).replace(uri.secret, "[secret]")[:200] if isinstance(message, str) else ""
    return code if isinstance(code, str) and _CODE.fullmatch(code) else "", words


def is_preimage(preimage: Any, payment_hash: str) -> bool:
    """Whether it hashes to the payment hash: LNbits shows zeros where it has none, others nothing or something else."""
    if not isinstance(preimage, str) or not _KEY.fullmatch(preimage):
        return False
    return hashlib.sha256(bytes.fromhex(preimage)).hexdigest() == payment_hash.lower()


def pay_reply(answer: Answer, payment_hash: str, *, is_certain: bool) -> PayReply:
    """What an answer to `pay_invoice` means. `is_certain`: it is the first answer to a request that left us only once.

    Without that, a refusal may be about the second execution of a request whose first is still being paid.
    """
    if answer.result is not None and is_preimage(answer.result.get("preimage"), payment_hash):
        return PayReply(PayOutcome.PAID, is_proven=True, was_answered=True)
    if answer.code is None:
        return PayReply(PayOutcome.PAID, was_answered=True)
    is_refusal = answer.code in REFUSALS and answer.result is None and is_certain
    outcome = PayOutcome.REFUSED if is_refusal else PayOutcome.UNKNOWN
    return PayReply(outcome, code=answer.code or None, message=answer.message, was_answered=True)


def lookup_reply(answer: Answer | None, payment_hash: str) -> LookupReply:
    preimage = answer.result.get("preimage") if answer is not None and answer.result is not None else None
    return LookupReply(is_proven=is_preimage(preimage, payment_hash), was_answered=answer is not None)


# What a wallet says of itself


def check_usable(answer: Answer, lightning_network: str) -> None:
    """Whether `get_info`'s answer lets us pay. Raises WalletUnsuitable.

    LNbits says mainnet wherever it is, so a network is held against a wallet only if it is a test network and ours is
    not. NOT_IMPLEMENTED is as good as an answer: the wallet knows this key.
    """
    if answer.code is not None and answer.code != "NOT_IMPLEMENTED":
        raise WalletUnsuitable(f"the wallet refuses this connection ({answer.code or 'no code'}); make a new one in it")
    network = (answer.result or {}).get("network")
    if lightning_network == "bc" and isinstance(network, str) and network.lower() in _TEST_NETWORKS:
        raise WalletUnsuitable("the wallet is on a test network; payments here are real bitcoin")


def offered_methods(answer: Answer, info: Info | None) -> frozenset[str]:
    """What this connection may do, by `get_info`, which knows its permissions; else what the info event says."""
    listed = (answer.result or {}).get("methods")
    methods = frozenset(one for one in listed if isinstance(one, str)) if isinstance(listed, list) else frozenset()
    return methods or (info.methods if info is not None else frozenset())


def read_alias(answer: Answer) -> str | None:
    alias = (answer.result or {}).get("alias")
    return plain(alias)[:100] or None if isinstance(alias, str) else None


def read_balance(answer: Answer | None) -> int | None:
    """In millisatoshis, None if it does not say."""
    balance = (answer.result or {}).get("balance") if answer is not None else None
    is_amount = isinstance(balance, int) and not isinstance(balance, bool) and balance >= 0
    return balance if is_amount else None
