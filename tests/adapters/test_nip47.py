"""Wallets over relays: what is asked and how often, and what each answer means.

Most tests go over a small relay that counts and can misbehave; the last part over a real one (nostr-relay), with
nostr-sdk's own client beside ours at the same wallet.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import nostr_sdk as sdk
import pytest

from app.adapters.nip47 import NwcWallets, WalletPatience
from app.adapters.nip47_wire import MAX_RELAYS, REFUSALS, Info, newest_info, read_info
from app.adapters.nostr import Event, read_event
from app.adapters.relay import RelayPatience
from app.autotopup.wallet import (
    Connection,
    Encryption,
    PayOutcome,
    PayReply,
    SignedRequest,
    Wallets,
    WalletUnreachable,
    WalletUnsuitable,
    WalletUri,
)
from app.kernel.errors import InvalidField, WalletSilent
from tests.adapters.fake_relay import FakeRelay
from tests.adapters.fake_wallet import (
    ZEROS,
    FakeWallet,
    Invoice,
    Json,
    Reply,
    Request,
    after,
    altered,
    an_invoice,
    behave,
    both,
    refuse,
    result,
    say,
    stay_silent,
)
from tests.integration.real_relay import RealRelay
from tests.program import free_ports

# An answer that comes is waited for as long as it takes on a busy machine; silence is cut short where it is the point.
PATIENT = WalletPatience(
    pay_seconds=60, pay_stagger_seconds=30, answer_seconds=30, stagger_seconds=20, reconnect_seconds=0.05
)
BRIEF = replace(
    PATIENT, pay_seconds=3, answer_seconds=3, relay=RelayPatience(publish_seconds=0.5, subscribe_seconds=0.5)
)
HASTY = replace(PATIENT, pay_stagger_seconds=0.1, stagger_seconds=0.1)
BOTH = (Encryption.NIP44, Encryption.NIP04)


def wallets(patience: WalletPatience = PATIENT, network: str = "bcrt") -> NwcWallets:
    return NwcWallets(allow_private_relays=True, lightning_network=network, patience=patience)


def connection(wallet: FakeWallet, encryption: Encryption = Encryption.NIP44) -> Connection:
    return Connection(wallets().parse(wallet.uri), encryption)


def signed(connected: Connection, invoice: Invoice) -> SignedRequest:
    return wallets().sign_payment(connected, invoice.text, datetime.now(UTC) + timedelta(minutes=15))


async def pay(
    wallet: FakeWallet,
    invoice: Invoice | None = None,
    *,
    encryption: Encryption = Encryption.NIP44,
    patience: WalletPatience = PATIENT,
) -> PayReply:
    """One payment, of an invoice that the wallet can pay unless one is given."""
    known = invoice or wallet.knows(an_invoice())
    connected = connection(wallet, encryption)
    return await wallets(patience).pay(connected, signed(connected, known), known.payment_hash)


@pytest.fixture
async def relay() -> AsyncIterator[FakeRelay]:
    async with FakeRelay() as relay:
        yield relay


@pytest.fixture
async def wallet(relay: FakeRelay) -> AsyncIterator[FakeWallet]:
    async with FakeWallet(relay.url) as wallet:
        yield wallet


def as_event(event: Mapping[str, Any]) -> Event | None:
    return read_event(json.dumps(event).encode(), {})


def test_the_adapter_is_what_the_domain_asks_for() -> None:
    assert isinstance(wallets(), Wallets)


# The URI

PUBKEY = sdk.Keys.generate().public_key().to_hex()
SECRET = sdk.Keys.generate().secret_key().to_hex()
NPUB = sdk.PublicKey.parse(PUBKEY).to_bech32()
NSEC = sdk.SecretKey.parse(SECRET).to_bech32()
RELAY = "wss://relay.example.com"


def masked(uri: str) -> str:
    """The same in each process, unlike the keys in it."""
    for key, name in ((PUBKEY, "P"), (SECRET, "S"), (NPUB, "N"), (NSEC, "X")):
        uri = uri.replace(key, name).replace(key[:-1], name.lower()).replace(key[:-2], name.lower())
    return uri


def parse(uri: str) -> WalletUri:
    return NwcWallets(allow_private_relays=False, lightning_network="bc").parse(uri)


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?relay={quote(RELAY, safe='')}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect:{PUBKEY}?relay={RELAY}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostrwalletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostrwalletconnect:{PUBKEY}?relay={RELAY}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"NOSTR+WalletConnect://{PUBKEY.upper()}?relay={RELAY}&secret={SECRET.upper()}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"  nostr+walletconnect://{PUBKEY}/?relay={RELAY}&secret={SECRET}\n", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?secret={SECRET}&relay=wss://a.example&relay=wss%3A%2F%2Fb.example%2F&relay=wss://a.example",
         WalletUri(PUBKEY, ("wss://a.example", "wss://b.example/"), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?relay=wss://a.example/v1?k=1&secret={SECRET}", WalletUri(PUBKEY, ("wss://a.example/v1?k=1",), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&lud16=me%2Bsats@example.com",
         WalletUri(PUBKEY, (RELAY,), SECRET, "me+sats@example.com")),
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&lud16=me+sats@example.com",
         WalletUri(PUBKEY, (RELAY,), SECRET, "me+sats@example.com")),
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&lud16=<script>", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&name=Hub&icon", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{NPUB}?relay={RELAY}&secret={NSEC}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{NPUB.upper()}/?relay={RELAY}&secret={SECRET}", WalletUri(PUBKEY, (RELAY,), SECRET)),
        (f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={NSEC}", WalletUri(PUBKEY, (RELAY,), SECRET)),
    ],
)  # fmt: skip
def test_a_connection_string_is_read_in_every_form_that_wallets_give_it(uri: str, expected: WalletUri) -> None:
    assert parse(uri) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "hello",
        f"https://{PUBKEY}?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{PUBKEY}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}",
        f"nostr+walletconnect://{PUBKEY}?secret={SECRET}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret=",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET[:-1]}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret=0x{SECRET}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}0",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}%0a",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={'00' * 32}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={'ff' * 32}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&secret={'11' * 32}",
        f"nostr+walletconnect://{PUBKEY[:-2]}?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{'ff' * 32}?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://user@{PUBKEY}?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{PUBKEY}:443?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}#fragment",
        f"nostr+walletconnect://{PUBKEY}?relay={'&relay='.join(f'wss://r{n}.example' for n in range(MAX_RELAYS + 1))}&secret={SECRET}",
        f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}&lud16={'a' * 5000}",
        f"nostr+walletconnect://npub1{'q' * 58}?relay={RELAY}&secret={SECRET}",
        f"nostr+walletconnect://{NSEC}?relay={RELAY}&secret={NSEC}",
        f"nostr+walletconnect://{NPUB}?relay={RELAY}&secret={NPUB}",
        f"nostr+walletconnect://{NPUB[:-1]}?relay={RELAY}&secret={NSEC}",
        f"nostr+walletconnect://{NPUB}?relay={RELAY}&secret={NSEC[:-1]}{'p' if NSEC[-1] == 'q' else 'q'}",
        f"nostr+walletconnect://{NPUB}q?relay={RELAY}&secret={NSEC}",
    ],
    ids=lambda uri: masked(uri)[:50],
)
def test_what_is_no_connection_string_is_refused_without_being_repeated(uri: str) -> None:
    with pytest.raises(InvalidField) as refusal:
        parse(uri)
    assert refusal.value.param == "nwc_url"
    assert SECRET not in str(refusal.value)
    assert NSEC not in str(refusal.value)
    assert PUBKEY not in str(refusal.value)
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize(
    "relay", ["ws://relay.example.com", "wss://user:pw@relay.example.com", "wss://127.0.0.1", "relay.example.com", ""]
)
def test_a_relay_that_is_none_for_us_is_refused_like_one_that_cannot_be_reached(relay: str) -> None:
    with pytest.raises(WalletSilent) as refusal:
        parse(f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&relay={relay}&secret={SECRET}")
    assert refusal.value.message == WalletSilent().message
    assert refusal.value.param == "nwc_url"


def test_a_secret_is_in_no_repr() -> None:
    uri = parse(f"nostr+walletconnect://{PUBKEY}?relay={RELAY}&secret={SECRET}")
    request = wallets().sign_payment(Connection(uri, Encryption.NIP44), "lnbc1", datetime.now(UTC))
    for shown in (uri, Connection(uri, Encryption.NIP44), request, wallets()):
        assert SECRET not in repr(shown) + str(shown)


# BOLT11


@pytest.mark.parametrize("network", ["bc", "tb", "tbs", "bcrt"])
def test_an_invoice_is_read(network: str) -> None:
    at = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
    invoice = an_invoice(123_456_789, network, expiry_seconds=900, at=at)
    for text in (invoice.text, invoice.text.upper()):
        found = wallets().read_invoice(text)
        assert (found.network, found.amount_msat, found.payment_hash) == (network, 123_456_789, invoice.payment_hash)
        assert found.expires_at == at + timedelta(minutes=15)


@pytest.mark.parametrize("left_out", ["min_final_cltv_expiry", "expire_time", "features", "payment_secret"])
def test_an_invoice_is_read_without_what_its_node_may_leave_out(left_out: str) -> None:
    at = datetime(2026, 11, 20, 12, 0, 0, tzinfo=UTC)
    invoice = an_invoice(7_000_000, "bc", at=at, without=left_out)
    found = wallets().read_invoice(invoice.text)
    assert (found.network, found.amount_msat, found.payment_hash) == ("bc", 7_000_000, invoice.payment_hash)
    life = timedelta(hours=1) if left_out == "expire_time" else timedelta(minutes=15)  # BOLT11's own default
    assert found.expires_at == at + life


def test_an_invoice_without_a_payment_hash_is_none() -> None:
    with pytest.raises(ValueError):
        wallets().read_invoice(an_invoice(7_000_000, without="payment_hash").text)


def test_an_invoice_without_an_amount_has_none() -> None:
    assert wallets().read_invoice(an_invoice(None).text).amount_msat is None


def test_what_is_no_invoice_is_a_value_error_and_nothing_else() -> None:
    good = an_invoice().text
    bad = ["", "1", "lnbc", "lnbc1", "lnbc1pj", "é" * 90, good[:-1], good + "q", good[:60] + good[61:], "x" + good]
    bad += [
        good[0].upper() + good[1:],
        "lightning:" + good,
        good * 30,
        good.replace("lnbcrt", "lnbc"),
        good.replace("lnbcrt", "lnxx"),
    ]
    bad += [good[:at] + ("q" if good[at] != "q" else "p") + good[at + 1 :] for at in range(8, len(good), 7)]
    for text in bad:
        with pytest.raises(ValueError):
            wallets().read_invoice(text)


def test_a_part_of_a_millisatoshi_is_refused_and_not_cut_off() -> None:
    import bolt11 as library
    from bolt11.encode import encode

    whole = library.decode(an_invoice(1).text)
    text = encode(whole, "22" * 32)
    assert text.startswith("lnbcrt10p1")
    assert wallets().read_invoice(text).amount_msat == 1
    with pytest.raises(ValueError):
        wallets().read_invoice(text.replace("lnbcrt10p1", "lnbcrt11p1"))


# Requests


async def test_a_request_says_what_nip47_wants(relay: FakeRelay, wallet: FakeWallet) -> None:
    invoice = wallet.knows(an_invoice())
    expires_at = datetime.now(UTC) + timedelta(minutes=15)
    for encryption in BOTH:
        connected = connection(wallet, encryption)
        request = wallets().sign_payment(connected, invoice.text, expires_at)
        event = as_event(request.event)
        assert event is not None
        assert (event.kind, event.id, event.pubkey) == (
            23194,
            request.event_id,
            wallet.client_keys.public_key().to_hex(),
        )
        assert [
            ["p", wallet.pubkey],
            ["encryption", encryption.value],
            ["expiration", str(int(expires_at.timestamp()))],
        ] == event.tags
        assert invoice.text not in event.content
        read = wallet.read(dict(request.event))
        assert read is not None
        assert (read.method, read.params) == ("pay_invoice", {"invoice": invoice.text})


async def test_it_subscribes_to_the_answer_before_it_publishes(relay: FakeRelay, wallet: FakeWallet) -> None:
    relay.order.clear()
    relay.requests.clear()
    connected = connection(wallet)
    request = signed(connected, wallet.knows(an_invoice()))
    await wallets().pay(connected, request, "00" * 32)
    assert relay.order[:2] == ["REQ", "EVENT"]
    assert relay.requests == [{"kinds": [23195], "authors": [wallet.pubkey], "#e": [request.event_id]}]


# What answers mean


@pytest.mark.parametrize("encryption", BOTH)
async def test_a_wallet_that_pays_has_paid_with_proof(wallet: FakeWallet, encryption: Encryption) -> None:
    invoice = wallet.knows(an_invoice())
    reply = await pay(wallet, invoice, encryption=encryption)
    assert reply == PayReply(PayOutcome.PAID, is_proven=True, was_answered=True, was_published=True)
    assert wallet.paid == [invoice.text]
    assert wallet.requests[0].encryption == encryption.value


@pytest.mark.parametrize("encryption", BOTH)
@pytest.mark.parametrize("code", sorted(REFUSALS))
async def test_a_definite_refusal_is_one(wallet: FakeWallet, code: str, encryption: Encryption) -> None:
    wallet.will("pay_invoice", refuse(code, "not now"))
    reply = await pay(wallet, encryption=encryption)
    assert reply == PayReply(PayOutcome.REFUSED, code=code, message="not now", was_answered=True)


@pytest.mark.parametrize(
    "code", ["PAYMENT_FAILED", "INTERNAL", "OTHER", "NOT_FOUND", "SOMETHING_NEW", "quota_exceeded"]
)
async def test_any_other_error_leaves_it_unknown(wallet: FakeWallet, code: str) -> None:
    wallet.will("pay_invoice", refuse(code))
    reply = await pay(wallet)
    assert (reply.outcome, reply.code, reply.was_answered) == (PayOutcome.UNKNOWN, code, True)


def test_the_table_of_definite_refusals_is_the_reference_s() -> None:
    assert " ".join(sorted(REFUSALS)) == (
        "BAD_REQUEST EXPIRED INSUFFICIENT_BALANCE NOT_IMPLEMENTED QUOTA_EXCEEDED RATE_LIMITED RESTRICTED"
        " UNAUTHORIZED UNSUPPORTED_ENCRYPTION"
    )


@pytest.mark.parametrize(
    ("reply", "outcome"),
    [
        (result(preimage=ZEROS), PayOutcome.PAID),
        (result(preimage="11" * 32), PayOutcome.PAID),
        (result(preimage=""), PayOutcome.PAID),
        (result(preimage=None), PayOutcome.PAID),
        (result(preimage=5), PayOutcome.PAID),
        (result(fees_paid=1), PayOutcome.PAID),
        (result(), PayOutcome.PAID),
        (say('{"result_type":"pay_invoice","result":{},"error":{"code":"QUOTA_EXCEEDED"}}'), PayOutcome.UNKNOWN),
        (say('{"error":"no"}'), PayOutcome.UNKNOWN),
        (say('{"error":{"message":"no"}}'), PayOutcome.UNKNOWN),
        (say('{"error":{"code":5,"message":5}}'), PayOutcome.UNKNOWN),
        (say('{"error":{"code":"NOT A CODE"}}'), PayOutcome.UNKNOWN),
        (say('{"error":[]}'), PayOutcome.UNKNOWN),
    ],
)  # fmt: skip
async def test_an_answer_without_the_preimage_proves_nothing(
    wallet: FakeWallet, reply: Reply, outcome: PayOutcome
) -> None:
    wallet.will("pay_invoice", reply)
    found = await pay(wallet)
    assert (found.outcome, found.is_proven, found.was_answered) == (outcome, False, True)


async def test_a_preimage_proves_even_beside_an_error_and_in_capitals(wallet: FakeWallet) -> None:
    invoice = an_invoice()
    body = {"result_type": "pay_invoice", "result": {"preimage": invoice.preimage.upper()}, "error": {"code": "OTHER"}}
    wallet.will("pay_invoice", say(json.dumps(body)))
    assert (await pay(wallet, invoice)).is_proven


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        "hello",
        "[]",
        "5",
        "{}",
        '{"result":5}',
        '{"result":null,"error":null}',
        '{"result_type":"get_info","result":{}}',
        "[" * 5000,
    ],
    ids=lambda text: text[:20],
)
async def test_an_answer_that_makes_no_sense_is_waited_past(wallet: FakeWallet, garbage: str) -> None:
    wallet.will("pay_invoice", both(say(garbage or " "), behave))
    reply = await pay(wallet)
    assert reply == PayReply(PayOutcome.PAID, is_proven=True, was_answered=True)


async def test_garbage_alone_is_unknown_though_answered(wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", say("hello"))
    reply = await pay(wallet, patience=BRIEF)
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=True, was_published=True)


async def test_silence_is_unknown_and_not_answered(wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", stay_silent)
    reply = await pay(wallet, patience=BRIEF)
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=False, was_published=True)
    assert wallet.executed == ["pay_invoice"]


async def test_a_late_answer_is_not_waited_for(wallet: FakeWallet) -> None:
    may_pay = asyncio.Event()
    wallet.will("pay_invoice", after(may_pay.wait(), behave))
    invoice = wallet.knows(an_invoice())
    reply = await pay(wallet, invoice, patience=BRIEF)
    assert (reply.outcome, reply.was_answered) == (PayOutcome.UNKNOWN, False)
    may_pay.set()
    async with asyncio.timeout(20):
        while not wallet.paid:
            await asyncio.sleep(0.01)
    looked = await wallets().look_up(connection(wallet), invoice.payment_hash)
    assert (looked.is_proven, looked.was_answered) == (True, True)


async def test_of_two_answers_the_first_counts(wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", both(result(preimage=ZEROS), refuse("QUOTA_EXCEEDED")))
    assert (await pay(wallet)).outcome == PayOutcome.PAID
    wallet.will("pay_invoice", both(refuse("OTHER"), behave))
    assert (await pay(wallet)).code == "OTHER"


async def test_a_refusal_after_another_answer_is_none(wallet: FakeWallet) -> None:
    """The wallet has said something before that we could not read: it may have been that it pays."""
    wallet.will("pay_invoice", both(say("hello"), refuse("QUOTA_EXCEEDED")))
    reply = await pay(wallet)
    assert (reply.outcome, reply.code) == (PayOutcome.UNKNOWN, "QUOTA_EXCEEDED")


async def test_an_answer_needs_no_p_tag(wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", say('{"result":{}}', has_p=False))
    assert (await pay(wallet)).outcome == PayOutcome.PAID


@pytest.mark.parametrize(("asked", "answered"), [(Encryption.NIP44, "nip04"), (Encryption.NIP04, "nip44_v2")])
async def test_an_answer_is_decrypted_by_what_it_is(wallet: FakeWallet, asked: Encryption, answered: str) -> None:
    wallet.will("pay_invoice", say('{"error":{"code":"UNSUPPORTED_ENCRYPTION"}}', encryption=answered))
    reply = await pay(wallet, encryption=asked)
    assert (reply.outcome, reply.code) == (PayOutcome.REFUSED, "UNSUPPORTED_ENCRYPTION")


async def by_a_stranger(wallet: FakeWallet, request: Request) -> Sequence[Json]:
    """Somebody else's answer, signed as it should be, with their key."""
    stranger = sdk.Keys.generate()
    client = sdk.PublicKey.parse(request.client)
    content = stranger.nip44_encrypt(client, '{"result_type":"pay_invoice","result":{"preimage":"00"}}')
    return [wallet.event(23195, content, [["e", request.id], ["p", request.client]], stranger)]


PAID: Reply = result(preimage=ZEROS)
FOREIGN: dict[str, Reply] = {
    "a stranger's": by_a_stranger,
    "one whose signature is not its own": altered(lambda event: event | {"sig": "11" * 64}, PAID),
    "one that claims the wallet's key": altered(lambda event: event | {"pubkey": PUBKEY}, PAID),
    "one changed after it was signed": altered(lambda event: event | {"content": event["content"][:-4] + "AAAA"}, PAID),
    "one with another id": altered(lambda event: event | {"id": "22" * 32}, PAID),
    "one to another request": altered(lambda event: event | {"tags": [["e", "33" * 32]]}, PAID),
    "one without a tag": altered(lambda event: event | {"tags": []}, PAID),
    "one that is no event": altered(lambda event: {"id": event["id"]}, PAID),
    "one of another kind": altered(lambda event: event | {"kind": 1}, PAID),
}


@pytest.mark.parametrize("name", FOREIGN)
async def test_an_answer_that_is_not_the_wallets_is_not_heard(relay: FakeRelay, wallet: FakeWallet, name: str) -> None:
    """Even from a relay that hands out everything to everybody."""

    async def insinuate(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        for event in await FOREIGN[name](wallet, request):
            await relay.send_to_all(event)
        return await refuse("QUOTA_EXCEEDED")(wallet, request)

    wallet.will("pay_invoice", insinuate)
    reply = await pay(wallet)
    assert (reply.outcome, reply.code) == (PayOutcome.REFUSED, "QUOTA_EXCEEDED")


async def test_the_wallets_own_words_about_something_else_are_not_heard(relay: FakeRelay, wallet: FakeWallet) -> None:
    async def insinuate(wallet: FakeWallet, request: Request) -> Sequence[Json]:
        other = replace(request, id="44" * 32)
        await relay.send_to_all((await PAID(wallet, other))[0])
        notification = wallet.encrypt('{"result":{}}', request.client, "nip44_v2")
        await relay.send_to_all(wallet.event(23197, notification, [["e", request.id]]))
        return await refuse("QUOTA_EXCEEDED")(wallet, request)

    wallet.will("pay_invoice", insinuate)
    assert (await pay(wallet)).outcome == PayOutcome.REFUSED


async def test_a_wallets_words_are_made_fit_to_be_shown_and_do_not_repeat_the_secret(wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", refuse("OTHER", f"\x1b[31mno\nno\u202e {wallet.secret} {'x' * 5000}"))
    reply = await pay(wallet)
    assert reply.message.startswith("[31mno no [secret] xxx")
    assert len(reply.message) <= 200
    assert wallet.secret not in repr(reply)


# Relays that fail


async def test_no_relay_means_not_published_and_soon_over() -> None:
    wallet = FakeWallet(f"ws://127.0.0.1:{free_ports(1)[0]}/")
    reply = await pay(wallet, an_invoice())
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=False, was_published=False)


async def test_a_relay_that_refuses_the_event_ends_the_wait(relay: FakeRelay, wallet: FakeWallet) -> None:
    relay.refuses = "blocked: not on the list"
    reply = await pay(wallet)
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=False, was_published=True, was_taken=False)
    assert wallet.executed == []


async def test_a_relay_that_serves_no_subscription_is_not_given_the_request(
    relay: FakeRelay, wallet: FakeWallet
) -> None:
    relay.closes_subscriptions = "restricted: not you"
    reply = await pay(wallet)
    assert reply.was_published is False
    assert wallet.executed == []


@pytest.mark.parametrize("words", ["error: the disk is full", "", "duplicate: had it"])
async def test_a_relay_that_is_not_clear_about_it_may_have_passed_it_on(
    relay: FakeRelay, wallet: FakeWallet, words: str
) -> None:
    relay.refuses, relay.is_lying = words, True
    assert (await pay(wallet)).is_proven


async def test_a_relay_that_never_says_eose_nor_ok_serves_all_the_same(relay: FakeRelay, wallet: FakeWallet) -> None:
    relay.sends_eose, relay.confirms = False, False
    patience = replace(PATIENT, relay=RelayPatience(subscribe_seconds=0.2, publish_seconds=0.2))
    assert (await pay(wallet, patience=patience)).is_proven


async def test_a_mute_relay_is_unknown() -> None:
    async with FakeRelay(is_mute=True) as mute:
        reply = await pay(FakeWallet(mute.url), an_invoice(), patience=BRIEF)
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=False, was_published=True)


async def test_a_relay_that_wants_to_know_who_we_are_is_told(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url) as wallet:
        relay.wants_auth = True
        probed = await wallets().probe(wallets().parse(wallet.uri))
        assert probed.encryption == Encryption.NIP44
        assert (await pay(wallet)).is_proven
        assert set(relay.authenticated) == {wallet.client_keys.public_key().to_hex()}
        wallet.will("pay_invoice", refuse("QUOTA_EXCEEDED"))
        assert (await pay(wallet)).outcome == PayOutcome.REFUSED


async def test_a_relay_that_wants_to_know_only_who_writes_gets_the_event_again(
    relay: FakeRelay, wallet: FakeWallet
) -> None:
    """The first was refused for want of AUTH, so that the wallet has seen one."""
    relay.wants_auth, relay.is_open_to_readers = True, True
    relay.order.clear()
    wallet.will("pay_invoice", refuse("QUOTA_EXCEEDED"))
    assert (await pay(wallet)).outcome == PayOutcome.REFUSED
    assert relay.order == ["REQ", "EVENT", "EVENT", "EVENT"]  # the last is the answer
    assert wallet.executed == ["pay_invoice"]


async def test_a_relay_that_never_believes_us_gets_nothing(relay: FakeRelay, wallet: FakeWallet) -> None:
    relay.wants_auth = True
    uri = wallets().parse(wallet.uri)
    other_name = replace(uri, relays=(uri.relays[0].replace("127.0.0.1", "localhost"),))  # which AUTH then names
    connected = Connection(other_name, Encryption.NIP44)
    reply = await wallets().pay(connected, signed(connected, an_invoice()), "00" * 32)
    assert reply.was_published is False
    assert relay.authenticated == []


# Drops and second relays: published once to each, whatever happens


async def test_when_a_relay_drops_us_we_come_back_to_listen_and_never_publish_again(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url, remembers=False) as wallet:
        may_pay = asyncio.Event()
        wallet.will("pay_invoice", after(may_pay.wait(), behave))
        connected, invoice = connection(wallet), wallet.knows(an_invoice())
        request = signed(connected, invoice)
        relay.requests.clear()
        waiting = asyncio.create_task(wallets().pay(connected, request, invoice.payment_hash))
        await relay.until(lambda: wallet.executed == ["pay_invoice"])
        for drops in range(1, 4):
            relay.drop(having="#e")
            await relay.until(lambda: len(relay.requests) == drops + 1)  # noqa: B023
        may_pay.set()
        reply = await waiting
        assert reply == PayReply(PayOutcome.PAID, is_proven=True, was_answered=True)
        assert relay.count(request.event_id) == 1
        assert wallet.paid == [invoice.text]
        assert len({json.dumps(query) for query in relay.requests}) == 1


async def test_a_drop_before_the_ok_is_not_a_reason_to_publish_again(relay: FakeRelay, wallet: FakeWallet) -> None:
    relay.confirms = False
    relay.drops_on = lambda event: event["kind"] == 23194
    relay.stores = True  # so that the answer is there when we come back
    connected, invoice = connection(wallet), wallet.knows(an_invoice())
    request = signed(connected, invoice)
    reply = await wallets().pay(connected, request, invoice.payment_hash)
    assert reply.is_proven
    assert relay.count(request.event_id) == 1
    assert wallet.executed == ["pay_invoice"]


async def test_a_refusal_after_a_drop_is_none(relay: FakeRelay) -> None:
    """A relay that comes back may hand out the request again: the refusal may be about the second execution."""
    async with FakeWallet(relay.url, remembers=False) as wallet:
        may_answer = asyncio.Event()
        wallet.will("pay_invoice", after(may_answer.wait(), refuse("INSUFFICIENT_BALANCE")))
        relay.requests.clear()
        waiting = asyncio.create_task(pay(wallet))
        await relay.until(lambda: wallet.executed == ["pay_invoice"])
        relay.drop(having="#e")
        await relay.until(lambda: len(relay.requests) == 2)
        may_answer.set()
        reply = await waiting
    assert (reply.outcome, reply.code) == (PayOutcome.UNKNOWN, "INSUFFICIENT_BALANCE")


async def test_the_second_relay_gets_the_same_signed_event_when_the_first_brings_no_answer() -> None:
    async with FakeRelay(is_mute=True) as mute, FakeRelay() as alive, FakeWallet(alive.url) as wallet:
        uri = wallets().parse(wallet.uri)
        connected = Connection(replace(uri, relays=(mute.url, alive.url)), Encryption.NIP44)
        invoice = wallet.knows(an_invoice())
        request = signed(connected, invoice)
        patience = replace(HASTY, relay=RelayPatience(subscribe_seconds=0.1))
        reply = await wallets(patience).pay(connected, request, invoice.payment_hash)
        assert reply.is_proven
        assert alive.count(request.event_id) == 1


async def test_a_relay_that_is_down_costs_no_time() -> None:
    async with FakeRelay() as alive, FakeWallet(alive.url) as wallet:
        wallet.relays = [f"ws://127.0.0.1:{free_ports(1)[0]}/", alive.url]
        reply = await pay(wallet)  # long before the 30 s after which the second relay is tried besides the first
    assert reply.is_proven


async def test_the_second_relay_is_left_alone_when_the_first_answers() -> None:
    async with FakeRelay() as first, FakeRelay() as second, FakeWallet([first.url, second.url]) as wallet:
        assert (await pay(wallet)).is_proven
        assert [event["kind"] for event in second.published] == [13194]


async def test_a_refusal_counts_for_less_when_two_relays_had_the_request() -> None:
    """Two connections without a common memory: the wallet may have been asked twice, and refuse only the second."""
    async with (
        FakeRelay() as first,
        FakeRelay() as second,
        FakeWallet([first.url, second.url], remembers=False) as wallet,
    ):
        wallet.will("pay_invoice", stay_silent, refuse("INSUFFICIENT_BALANCE"))
        reply = await pay(wallet, patience=HASTY)
    assert (reply.outcome, reply.code) == (PayOutcome.UNKNOWN, "INSUFFICIENT_BALANCE")
    assert wallet.executed == ["pay_invoice", "pay_invoice"]


async def test_a_refusal_by_the_second_relay_is_certain_if_the_first_refused_the_event() -> None:
    async with FakeRelay() as first, FakeRelay() as second, FakeWallet([first.url, second.url]) as wallet:
        first.refuses = "blocked: no"
        wallet.will("pay_invoice", refuse("INSUFFICIENT_BALANCE"))
        reply = await pay(wallet)
    assert reply.outcome == PayOutcome.REFUSED


async def test_fifty_payments_at_once_are_each_paid_once(relay: FakeRelay, wallet: FakeWallet) -> None:
    invoices = [wallet.knows(an_invoice()) for _ in range(50)]
    replies = await asyncio.gather(*(pay(wallet, invoice) for invoice in invoices))
    assert all(reply.is_proven for reply in replies)
    assert sorted(wallet.paid) == sorted(invoice.text for invoice in invoices)


async def test_a_cancelled_payment_leaves_nothing_running(relay: FakeRelay, wallet: FakeWallet) -> None:
    wallet.will("pay_invoice", stay_silent)
    before = asyncio.all_tasks()
    waiting = asyncio.create_task(pay(wallet))
    await relay.until(lambda: wallet.executed == ["pay_invoice"])
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await relay.until(lambda: not any(having_e(client.queries) for client in relay._clients))
    assert not [task for task in asyncio.all_tasks() - before if "_converse" in repr(task)]


def having_e(queries: dict[str, Json]) -> bool:
    return any("#e" in query for query in queries.values())


async def test_nothing_is_logged_of_a_payment(wallet: FakeWallet, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await pay(wallet)
    assert wallet.secret not in caplog.text
    assert not [record for record in caplog.records if record.name in ("relay", "websockets.client")]


# Looking up


async def test_a_lookup_proves_by_the_preimage_alone(wallet: FakeWallet) -> None:
    invoice = wallet.knows(an_invoice())
    connected = connection(wallet)
    unpaid = await wallets().look_up(connected, invoice.payment_hash)
    assert (unpaid.is_proven, unpaid.was_answered) == (False, True)
    await pay(wallet, invoice)
    paid = await wallets().look_up(connected, invoice.payment_hash)
    assert (paid.is_proven, paid.was_answered) == (True, True)


@pytest.mark.parametrize(
    "reply",
    [result(state="settled"), result(preimage=ZEROS, settled_at=1), result(preimage="", state="settled"), refuse("NOT_FOUND"), refuse("INTERNAL")],
)  # fmt: skip
async def test_a_lookup_that_only_says_so_proves_nothing(wallet: FakeWallet, reply: Reply) -> None:
    wallet.will("lookup_invoice", reply)
    found = await wallets().look_up(connection(wallet), an_invoice().payment_hash)
    assert (found.is_proven, found.was_answered) == (False, True)


async def test_a_lookup_nobody_answers_is_not_answered(wallet: FakeWallet) -> None:
    wallet.will("lookup_invoice", stay_silent)
    found = await wallets(BRIEF).look_up(connection(wallet), an_invoice().payment_hash)
    assert (found.is_proven, found.was_answered) == (False, False)
    away = Connection(
        replace(wallets().parse(wallet.uri), relays=(f"ws://127.0.0.1:{free_ports(1)[0]}/",)), Encryption.NIP44
    )
    assert (await wallets().look_up(away, an_invoice().payment_hash)).was_answered is False


# Getting to know a wallet


def probing(wallet: FakeWallet, patience: WalletPatience = PATIENT, network: str = "bcrt") -> Any:
    return wallets(patience, network).probe(wallets().parse(wallet.uri))


@pytest.mark.parametrize(
    ("encryptions", "tags_encryption", "expected"),
    [
        (("nip44_v2", "nip04"), True, Encryption.NIP44),
        (("nip04", "nip44_v2"), True, Encryption.NIP44),
        (("nip44_v2",), True, Encryption.NIP44),
        (("nip04",), True, Encryption.NIP04),
        (("nip04",), False, Encryption.NIP04),
    ],
)
@pytest.mark.parametrize("separator", [" ", ",", ", "])
async def test_a_wallet_is_talked_to_in_the_best_way_it_offers(
    relay: FakeRelay, encryptions: tuple[str, ...], tags_encryption: bool, expected: Encryption, separator: str
) -> None:
    async with FakeWallet(
        relay.url, encryptions=encryptions, tags_encryption=tags_encryption, separator=separator
    ) as wallet:
        found = await probing(wallet)
        assert found.encryption == expected
        assert found.methods == {"pay_invoice", "get_balance", "get_info", "lookup_invoice"}
        assert (found.alias, found.balance_msat) == ("fake", 1_000_000_000)
        assert {request.encryption for request in wallet.requests} == {expected.value}
        assert "pay_invoice" not in wallet.executed


async def test_a_wallet_without_an_info_event_is_tried_in_nip44_first(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url, announces=False) as wallet:
        assert (await probing(wallet)).encryption == Encryption.NIP44
        assert wallet.executed[0] == "get_info"


async def test_a_wallet_without_an_info_event_is_tried_in_nip04_next_and_never_with_a_payment(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url, announces=False, encryptions=("nip04",)) as wallet:
        patience = replace(PATIENT, answer_seconds=3)
        assert (await probing(wallet, patience)).encryption == Encryption.NIP04
        assert set(wallet.executed) == {"get_info", "get_balance"}
    assert sum(event["kind"] == 23194 for event in relay.published) == 3


async def test_a_wallet_that_says_it_speaks_another_encryption_is_asked_in_it(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url) as wallet:
        wallet.will("get_info", refuse("UNSUPPORTED_ENCRYPTION"))
        assert (await probing(wallet)).encryption == Encryption.NIP04


@pytest.mark.parametrize(
    ("methods", "network", "ours", "words"),
    [
        (("get_info",), "mainnet", "bc", "may not pay"),
        (("pay_invoice", "get_info"), "testnet", "bc", "test network"),
        (("pay_invoice", "get_info"), "regtest", "bc", "test network"),
        (("pay_invoice", "get_info"), "Signet", "bc", "test network"),
    ],
)
async def test_a_wallet_that_cannot_be_used_is_told_why(
    relay: FakeRelay, methods: tuple[str, ...], network: str, ours: str, words: str
) -> None:
    async with FakeWallet(relay.url, methods=methods, network=network) as wallet:
        with pytest.raises(WalletUnsuitable, match=words):
            await probing(wallet, network=ours)


@pytest.mark.parametrize(
    ("network", "ours"), [("mainnet", "bc"), ("mainnet", "bcrt"), ("regtest", "bcrt"), ("", "bc"), ("bitcoin", "bc")]
)
async def test_a_wallet_may_be_on_our_network_or_say_what_it_likes_in_development(
    relay: FakeRelay, network: str, ours: str
) -> None:
    """LNbits says mainnet wherever it is."""
    async with FakeWallet(relay.url, network=network) as wallet:
        assert "pay_invoice" in (await probing(wallet, network=ours)).methods


@pytest.mark.parametrize("code", ["UNAUTHORIZED", "RESTRICTED", "EXPIRED", "INTERNAL"])
async def test_a_wallet_that_refuses_the_key_is_unsuitable(wallet: FakeWallet, code: str) -> None:
    wallet.will("get_info", refuse(code))
    with pytest.raises(WalletUnsuitable, match=code):
        await probing(wallet)


async def test_a_wallet_without_get_info_has_still_shown_that_it_knows_us(wallet: FakeWallet) -> None:
    wallet.will("get_info", refuse("NOT_IMPLEMENTED"))
    wallet.will("get_balance", refuse("RESTRICTED"))
    found = await probing(wallet)
    assert (found.alias, found.balance_msat) == (None, None)
    assert "pay_invoice" in found.methods


async def test_what_the_connection_may_do_counts_for_more_than_what_the_wallet_can(wallet: FakeWallet) -> None:
    wallet.will("get_info", result(methods=["get_balance", "get_info"]))
    with pytest.raises(WalletUnsuitable, match="may not pay"):
        await probing(wallet)


async def test_a_wallet_that_speaks_none_of_our_encryptions_is_unsuitable(relay: FakeRelay) -> None:
    async with FakeWallet(relay.url, encryptions=("nip99",)) as wallet:
        with pytest.raises(WalletUnsuitable, match="neither"):
            await probing(wallet)


async def test_every_way_not_to_be_reached_has_the_same_words(relay: FakeRelay) -> None:
    said = set()
    async with FakeRelay(is_mute=True) as mute, FakeWallet(relay.url) as silent:
        silent.will("get_info", stay_silent)
        away = FakeWallet(relay.url, announces=False)
        for wallet in (FakeWallet(f"ws://127.0.0.1:{free_ports(1)[0]}/"), FakeWallet(mute.url), silent, away):
            with pytest.raises(WalletUnreachable) as refusal:
                await probing(wallet, replace(BRIEF, answer_seconds=0.7, info_seconds=0.7))
            said.add(str(refusal.value))
    assert said == {WalletSilent().message}


async def test_the_info_event_is_the_wallets_newest_whatever_a_relay_sends(wallet: FakeWallet) -> None:
    stranger = sdk.Keys.generate()
    old = as_event(wallet.event(13194, "get_info", []))
    new = as_event(wallet.event(13194, "pay_invoice", [["encryption", "nip44_v2"]]))
    forged = as_event(wallet.event(13194, "everything", [], stranger))
    other = as_event(wallet.event(1, "words", []))
    assert old is not None
    assert new is not None
    assert forged is not None
    assert other is not None
    import msgspec

    newer = msgspec.structs.replace(new, created_at=old.created_at + 5)
    found = newest_info([newer, old, forged, other], wallet.pubkey)
    assert found == Info(frozenset({"pay_invoice"}), frozenset({Encryption.NIP44}))
    assert newest_info([forged, other], wallet.pubkey) is None


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ([], {Encryption.NIP04}),
        ([["encryption", "nip44_v2 nip04"]], set(BOTH)),
        ([["encryption", "nip44_v2", "nip04"]], set(BOTH)),
        ([["encryption", "nip44_v2,nip04"]], set(BOTH)),
        ([["encryption"]], {Encryption.NIP04}),
        ([["encryption", ""]], {Encryption.NIP04}),
        ([["encryption", "nip44_v3"]], set()),
        ([["v", "0.0 1.0"]], set(BOTH)),
        ([["v", "0.0"]], {Encryption.NIP04}),
        ([["v", "1.0"], ["encryption", "nip04"]], {Encryption.NIP04}),
    ],
)
def test_encryptions_are_read_as_wallets_have_written_them(tags: list[list[str]], expected: set[Encryption]) -> None:
    event = as_event(FakeWallet(RELAY).event(13194, "pay_invoice", tags))
    assert event is not None
    assert read_info(event).encryptions == expected


# Over a real relay, and beside nostr-sdk


@pytest.fixture(scope="module")
async def real(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[RealRelay]:
    relay = RealRelay(tmp_path_factory.mktemp("relay"), free_ports(1)[0])
    await relay.start()
    yield relay
    await relay.stop()


SCRIPTS: dict[str, tuple[Reply, PayOutcome, str | None]] = {
    "pays": (behave, PayOutcome.PAID, None),
    "has no preimage": (result(preimage=ZEROS), PayOutcome.PAID, None),
    "answers twice": (both(PAID, refuse("OTHER")), PayOutcome.PAID, None),
    "answers without a p tag": (say('{"result":{}}', has_p=False), PayOutcome.PAID, None),
    "talks nonsense first": (both(say("hello"), PAID), PayOutcome.PAID, None),
    **{code: (refuse(code), PayOutcome.REFUSED, code) for code in sorted(REFUSALS)},
    **{code: (refuse(code), PayOutcome.UNKNOWN, code) for code in ("PAYMENT_FAILED", "INTERNAL", "OTHER", "NEW")},
}


@pytest.mark.parametrize("encryption", BOTH)
async def test_over_a_real_relay_every_answer_means_what_it_should(real: RealRelay, encryption: Encryption) -> None:
    async with FakeWallet(real.url, encryptions=(encryption.value,)) as wallet:
        found = await probing(wallet)
        assert found.encryption == encryption
        for name, (script, outcome, code) in SCRIPTS.items():
            wallet.will("pay_invoice", script)
            reply = await pay(wallet, encryption=encryption)
            assert (name, reply.outcome, reply.code, reply.was_answered) == (name, outcome, code, True)


async def test_over_a_real_relay_silence_is_unknown(real: RealRelay) -> None:
    async with FakeWallet(real.url) as wallet:
        wallet.will("pay_invoice", stay_silent)
        reply = await pay(wallet, patience=BRIEF)
    assert reply == PayReply(PayOutcome.UNKNOWN, was_answered=False, was_published=True)


@pytest.mark.parametrize("remembers", [True, False])
async def test_a_relay_that_restarts_in_the_middle_brings_the_answer_and_is_sent_nothing_again(
    real: RealRelay, remembers: bool
) -> None:
    """It hands out what it stored again; a wallet without a memory then executes again, but not because of us."""
    may_pay = asyncio.Event()
    async with FakeWallet(real.url, remembers=remembers) as wallet:
        wallet.will("pay_invoice", after(may_pay.wait(), behave))
        connected, invoice = connection(wallet), wallet.knows(an_invoice())
        request = signed(connected, invoice)
        waiting = asyncio.create_task(wallets().pay(connected, request, invoice.payment_hash))
        async with asyncio.timeout(30):
            while wallet.executed != ["pay_invoice"]:
                await asyncio.sleep(0.01)
        await real.stop()
        for listening in wallet._listening.values():
            listening.clear()
        await real.start()
        await wallet.until_listening()
        may_pay.set()
        if remembers:  # its first connection is gone, so it says it again over the new one
            answer = (await behave(wallet, wallet.requests[0]))[0]
            await publish(real.url, answer)
        reply = await waiting
    assert (reply.outcome, reply.is_proven) == (PayOutcome.PAID, True)
    assert {one.id for one in wallet.requests} == {request.event_id}


async def publish(url: str, event: Json) -> None:
    from websockets.asyncio.client import connect

    async with connect(url, proxy=None) as socket:
        await socket.send(json.dumps(["EVENT", event]))
        assert json.loads(await socket.recv())[2] is True


@pytest.mark.parametrize("encryption", BOTH)
async def test_nostr_sdks_client_and_ours_hear_the_same_from_the_same_wallet(
    real: RealRelay, encryption: Encryption
) -> None:
    async with FakeWallet(real.url, encryptions=(encryption.value,)) as wallet:
        theirs = sdk.NostrWalletConnect(sdk.NostrWalletConnectUri.parse(wallet.uri))
        ours, connected = wallets(), connection(wallet, encryption)
        about = await theirs.get_info()
        probed = await ours.probe(connected.uri)
        assert about.alias == probed.alias == "fake"
        assert (await theirs.get_balance()).balance == probed.balance_msat
        first, second = wallet.knows(an_invoice()), wallet.knows(an_invoice())
        paid = await theirs.pay_invoice(sdk.PayInvoiceRequest(id=None, invoice=first.text, amount=None))
        assert hashlib.sha256(bytes.fromhex(paid.preimage)).hexdigest() == first.payment_hash
        assert (await pay(wallet, second, encryption=encryption)).is_proven
        looked = await theirs.lookup_invoice(sdk.LookupInvoiceRequest(payment_hash=second.payment_hash, invoice=None))
        assert looked.preimage == second.preimage
        assert (await ours.look_up(connected, first.payment_hash)).is_proven
        wallet.will("pay_invoice", refuse("QUOTA_EXCEEDED"), refuse("QUOTA_EXCEEDED"))
        with pytest.raises(sdk.NostrSdkError, match="QuotaExceeded"):
            await theirs.pay_invoice(sdk.PayInvoiceRequest(id=None, invoice=first.text, amount=None))
        assert (await pay(wallet, encryption=encryption)).code == "QUOTA_EXCEEDED"
        assert {request.encryption for request in wallet.requests} == {encryption.value}
