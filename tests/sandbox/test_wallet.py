"""The wallet as NIP-47's clients meet it: nostr-sdk's, which knows nothing of us, and one of our own for bad manners."""

import asyncio
import hashlib
import json
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import bolt11 as bolt11_library
import nostr_sdk
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException

from app.sandbox.behaviour import State
from app.sandbox.ciphers import Scheme, padded_length, seal, seal_44, unseal, unseal_44
from app.sandbox.nostr import Event, public_key, read_event, sign
from tests.integration.real_relay import RealRelay
from tests.program import free_ports

from .conftest import Opener, Receiver, Shop, on_a_port

VECTORS = Path(__file__).parents[2].parent / "shared" / "data" / "nip44.vectors.json"
SCHEMES = [Scheme.NIP44, Scheme.NIP04]


async def an_invoice(shop: Shop, amount: str = "5") -> tuple[str, str]:
    """A new invoice's id, and its BOLT11; $5 are 7,692,308 msat at the sandbox's rate."""
    id = (await shop.create("BTC-LN", amount))["id"]
    return id, (await shop.methods(id))[0]["destination"]


async def paid_times(shop: Shop, id: str) -> int:
    return len((await shop.client.get(f"/sandbox/invoices/{id}")).json()["paymentMethods"][0]["payments"])


async def wallet(shop: Shop) -> Any:
    return (await shop.client.get("/sandbox/wallet")).json()


async def sdk(shop: Shop) -> nostr_sdk.NostrWalletConnect:
    return nostr_sdk.NostrWalletConnect(nostr_sdk.NostrWalletConnectUri.parse((await wallet(shop))["uri"]))


def to_pay(bolt11: str) -> nostr_sdk.PayInvoiceRequest:
    return nostr_sdk.PayInvoiceRequest(id=None, invoice=bolt11, amount=None)


def to_look_up(bolt11: str) -> nostr_sdk.LookupInvoiceRequest:
    return nostr_sdk.LookupInvoiceRequest(payment_hash=None, invoice=bolt11)


@dataclass
class Asker:
    """A client that can also ask badly: again, late, as somebody else, or in a way that cannot be read."""

    uri: str
    scheme: Scheme = Scheme.NIP44
    secret: str | None = None

    def __post_init__(self) -> None:
        parts = urlsplit(self.uri)
        query = parse_qs(parts.query)
        self.wallet, self.relay = parts.netloc, query["relay"][0]
        self.secret = self.secret or query["secret"][0]

    def request(self, method: str, expires_at: int | None = None, **params: Any) -> Event:
        return self.raw(json.dumps({"method": method, "params": params}), expires_at)

    def raw(self, text: str, expires_at: int | None = None) -> Event:
        assert self.secret is not None
        tags = [["p", self.wallet], ["encryption", self.scheme.value]]
        tags += [["expiration", str(expires_at)]] if expires_at else []
        return sign(self.secret, 23194, seal(self.scheme, self.secret, self.wallet, text), tags, int(time.time()))

    async def ask(self, event: Event, answers: int = 1, seconds: float = 10) -> list[Any]:
        """Publish and wait for so many answers, or for as long; an answer that cannot be read is None."""
        heard: list[Any] = []
        async with connect(self.relay, proxy=None) as socket:
            await socket.send(json.dumps(["REQ", "a", {"kinds": [23195], "#e": [event.id]}]))
            await socket.send(json.dumps(["EVENT", as_dict(event)]))
            try:
                async with asyncio.timeout(seconds):
                    while len(heard) < answers:
                        message = json.loads(await socket.recv())
                        if message[0] == "EVENT":
                            heard.append(self._read(read_event(message[2])))
            except TimeoutError:
                pass
        return heard

    def _read(self, event: Event) -> Any:
        assert self.secret is not None
        assert event.pubkey == self.wallet
        assert event.tag("p") == public_key(self.secret)
        try:
            return json.loads(unseal(self.scheme, self.secret, self.wallet, event.content))
        except ValueError:
            return None


def as_dict(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in ("id", "pubkey", "created_at", "kind", "tags", "content", "sig")}


def code(answer: Any) -> str:
    assert answer["result"] is None
    return str(answer["error"]["code"])


def proves(answer: Any, bolt11: str) -> bool:
    preimage = bytes.fromhex(answer["result"]["preimage"])
    return hashlib.sha256(preimage).hexdigest() == bolt11_library.decode(bolt11).payment_hash


# --- a wallet like any other ---


@pytest.mark.parametrize("encryption", ["both", "nip44_v2", "nip04", "untold"])
async def test_another_librarys_client_connects_pays_and_looks_up(port: Shop, encryption: str) -> None:
    await port.world("wallet", encryption=encryption)
    client = await sdk(port)
    info = await client.get_info()
    assert (info.alias, info.network) == ("Sandbox wallet", "regtest")
    id, bolt11 = await an_invoice(port)
    paid = await client.pay_invoice(to_pay(bolt11))
    seen = await client.lookup_invoice(to_look_up(bolt11))
    assert paid.preimage == seen.preimage
    assert (seen.state, seen.amount) == (nostr_sdk.TransactionState.SETTLED, 7_692_308)
    assert (await client.get_balance()).balance == 2_000_000_000 - 7_692_308
    assert (await port.get(id))["status"] == "Settled"
    spoken = {request["encryption"] for request in (await wallet(port))["requests"]}
    assert spoken == {"nip44_v2" if encryption in ("both", "nip44_v2") else "nip04"}


async def test_the_wallet_shows_its_payments_and_requests_but_no_preimage(port: Shop) -> None:
    id, bolt11 = await an_invoice(port)
    await (await sdk(port)).pay_invoice(to_pay(bolt11))
    shown = await wallet(port)
    (payment,), (request,) = shown["payments"], shown["requests"]
    assert (payment["invoice_id"], payment["amount_msat"], payment["request_id"]) == (id, 7_692_308, request["id"])
    assert (request["method"], request["outcome"], request["repeats"]) == ("pay_invoice", "answered", 0)
    assert "preimage" not in payment


async def test_the_connection_and_what_was_done_survive_a_restart(tmp_path: Path, receiver: Receiver) -> None:
    async with on_a_port(tmp_path / "sandbox", receiver) as shop:
        before = await wallet(shop)
        _, bolt11 = await an_invoice(shop)
        asker = Asker(before["uri"])
        request = asker.request("pay_invoice", invoice=bolt11)
        assert proves((await asker.ask(request))[0], bolt11)
    async with on_a_port(tmp_path / "sandbox", receiver) as shop:
        after = await wallet(shop)
        assert parse_qs(urlsplit(after["uri"]).query)["secret"] == parse_qs(urlsplit(before["uri"]).query)["secret"]
        assert after["pubkey"] == before["pubkey"]
        assert len(after["payments"]) == 1
        again = Asker(after["uri"])
        assert await again.ask(request, seconds=0.5) == []
        assert (await wallet(shop))["requests"][0]["repeats"] == 1
        (found,) = await again.ask(again.request("lookup_invoice", invoice=bolt11))
        assert proves(found, bolt11)


async def test_the_secret_is_its_owners_alone(open_shop: Opener, tmp_path: Path) -> None:
    async with open_shop() as shop:
        uri = (await wallet(shop))["uri"]
    path = tmp_path / "sandbox" / "wallet" / "state.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    state = State("wallet-key", "client-key")
    assert "key" not in repr(state)
    assert uri.endswith(json.loads(path.read_bytes())["client_key"])


# --- refusals of its own ---


@pytest.mark.parametrize("scheme", SCHEMES)
async def test_what_it_cannot_do_it_says_in_nip47s_codes(port: Shop, scheme: Scheme) -> None:
    asker = Asker((await wallet(port))["uri"], scheme)
    _, bolt11 = await an_invoice(port)
    for request, expected in (
        (asker.request("make_invoice", amount=1), "NOT_IMPLEMENTED"),
        (asker.request("pay_invoice"), "OTHER"),
        (asker.request("pay_invoice", invoice=bolt11, amount="much"), "OTHER"),
        (asker.request("pay_invoice", invoice="lnbc1nobodys"), "PAYMENT_FAILED"),
        (asker.request("lookup_invoice", invoice=bolt11), "NOT_FOUND"),
        (asker.request("lookup_invoice", payment_hash="00" * 32), "NOT_FOUND"),
        (asker.request("lookup_invoice"), "NOT_FOUND"),
    ):
        (answer,) = await asker.ask(request)
        assert code(answer) == expected


async def test_it_pays_no_more_than_it_has_and_than_its_budget(port: Shop) -> None:
    asker = Asker((await wallet(port))["uri"])
    id, bolt11 = await an_invoice(port)
    for limits, expected in (
        ({"balance_msat": 7_692_307}, "INSUFFICIENT_BALANCE"),
        ({"balance_msat": 8_000_000, "budget_msat": 7_692_307}, "QUOTA_EXCEEDED"),
    ):
        await port.world("wallet", **limits)
        (answer,) = await asker.ask(asker.request("pay_invoice", invoice=bolt11))
        assert code(answer) == expected
    assert await paid_times(port, id) == 0
    await port.world("wallet", budget_msat=7_692_308)
    (answer,) = await asker.ask(asker.request("pay_invoice", invoice=bolt11))
    assert proves(answer, bolt11)
    shown = await wallet(port)
    assert (shown["balance_msat"], shown["budget_msat"]) == (307_692, 0)


async def test_a_bolt11_is_paid_once_also_by_two_requests_at_once(port: Shop) -> None:
    asker = Asker((await wallet(port))["uri"])
    id, bolt11 = await an_invoice(port)
    requests = [asker.request("pay_invoice", invoice=bolt11) for _ in range(2)]
    answers = [answer for (answer,) in await asyncio.gather(*map(asker.ask, requests))]
    assert sorted(answer["error"] is None for answer in answers) == [False, True]
    assert await paid_times(port, id) == 1


async def test_a_request_repeated_is_carried_out_once(port: Shop) -> None:
    asker = Asker((await wallet(port))["uri"])
    request = asker.request("get_balance")
    assert len(await asker.ask(request)) == 1
    # The relay, too, keeps the answer for a while, as some do: whoever comes back finds it.
    assert len(await asker.ask(request)) == 1
    assert [each["method"] for each in (await wallet(port))["requests"]] == ["get_balance"]


async def test_a_strangers_key_is_unauthorized(port: Shop) -> None:
    stranger = Asker((await wallet(port))["uri"], secret="33" * 32)
    id, bolt11 = await an_invoice(port)
    (answer,) = await stranger.ask(stranger.request("pay_invoice", invoice=bolt11))
    assert code(answer) == "UNAUTHORIZED"
    assert await paid_times(port, id) == 0


async def test_a_scheme_it_does_not_speak_is_refused_in_the_one_it_speaks(port: Shop) -> None:
    uri = (await port.world("wallet", encryption="nip44_v2"))["uri"]
    asker, reader = Asker(uri, Scheme.NIP04), Asker(uri, Scheme.NIP44)
    request = asker.request("get_balance")
    (answer,) = await reader.ask(request)
    assert code(answer) == "UNSUPPORTED_ENCRYPTION"


async def test_what_expired_or_cannot_be_read_is_passed_over(port: Shop) -> None:
    asker = Asker((await wallet(port))["uri"])
    soon = int(time.time()) + 1
    for event in (asker.raw("no JSON"), asker.raw("[]"), asker.raw('{"method": 5}')):
        assert await asker.ask(event, seconds=0.3) == []
    assert {request["outcome"] for request in (await wallet(port))["requests"]} == {"unreadable"}
    late = asker.request("get_balance", expires_at=soon)
    await asyncio.sleep(max(soon - time.time(), 0))
    assert await asker.ask(late, seconds=0.3) == []
    assert len((await wallet(port))["requests"]) == 3


# --- and as it was told ---


async def asked_to_pay(port: Shop, answers: int = 1, seconds: float = 10, **orders: Any) -> tuple[list[Any], int, str]:
    """The answers to a request to pay, how often the invoice was paid by then, and its BOLT11."""
    uri = (await port.world("wallet", **orders))["uri"]
    id, bolt11 = await an_invoice(port)
    asker = Asker(uri)
    heard = await asker.ask(asker.request("pay_invoice", invoice=bolt11), answers, seconds)
    return heard, await paid_times(port, id), bolt11


@pytest.mark.parametrize("wanted", ["QUOTA_EXCEEDED", "RATE_LIMITED", "EXPIRED", "A_CODE_OF_TOMORROW"])
async def test_it_refuses_with_any_code(port: Shop, wanted: str) -> None:
    (answer,), paid, _ = await asked_to_pay(port, behaviour="refuses", code=wanted)
    assert (code(answer), paid) == (wanted, 0)


async def test_it_refuses_other_methods_too_if_told_so(port: Shop) -> None:
    asker = Asker((await port.world("wallet", behaviour="refuses", code="RESTRICTED", methods=["get_info"]))["uri"])
    assert code((await asker.ask(asker.request("get_info")))[0]) == "RESTRICTED"
    assert (await asker.ask(asker.request("get_balance")))[0]["error"] is None


async def test_it_is_silent_to_everything(port: Shop) -> None:
    heard, paid, _ = await asked_to_pay(port, seconds=0.3, behaviour="silent")
    assert (heard, paid) == ([], 0)
    asker = Asker((await wallet(port))["uri"])
    assert await asker.ask(asker.request("get_info"), seconds=0.3) == []
    await port.world("wallet", behaviour="pays")
    assert len(await asker.ask(asker.request("get_info"))) == 1


async def test_it_pays_and_loses_the_answer_but_can_be_asked(port: Shop) -> None:
    heard, paid, bolt11 = await asked_to_pay(port, seconds=0.3, behaviour="loses_answer")
    assert (heard, paid) == ([], 1)
    asker = Asker((await wallet(port))["uri"])
    assert proves((await asker.ask(asker.request("lookup_invoice", invoice=bolt11)))[0], bolt11)


async def test_it_pays_at_once_and_answers_late(port: Shop) -> None:
    began = time.monotonic()
    (answer,), paid, bolt11 = await asked_to_pay(port, behaviour="answers_late", delay_seconds=0.4)
    assert time.monotonic() - began >= 0.4
    assert (proves(answer, bolt11), paid) == (True, 1)


async def test_it_pays_late(port: Shop) -> None:
    uri = (await port.world("wallet", behaviour="pays_late", delay_seconds=0.6))["uri"]
    id, bolt11 = await an_invoice(port)
    asker = Asker(uri)
    asking = asyncio.create_task(asker.ask(asker.request("pay_invoice", invoice=bolt11)))
    async with asyncio.timeout(10):
        while not (await wallet(port))["requests"]:
            await asyncio.sleep(0.01)
    assert await paid_times(port, id) == 0
    assert proves((await asking)[0], bolt11)
    assert await paid_times(port, id) == 1


async def test_it_answers_twice_and_pays_once(port: Shop) -> None:
    (one, two), paid, bolt11 = await asked_to_pay(port, 2, behaviour="answers_twice")
    assert (one, proves(two, bolt11), paid) == (two, True, 1)


@pytest.mark.parametrize(("behaviour", "pays"), [("wrong_preimage", 1), ("zero_preimage", 1), ("lies", 0)])
async def test_it_shows_a_preimage_that_proves_nothing(port: Shop, behaviour: str, pays: int) -> None:
    (answer,), paid, bolt11 = await asked_to_pay(port, behaviour=behaviour)
    assert (proves(answer, bolt11), paid) == (False, pays)


async def test_it_pays_and_answers_garbage(port: Shop) -> None:
    heard, paid, _ = await asked_to_pay(port, 2, behaviour="garbage")
    assert (heard, paid) == ([None, None], 1)


@pytest.mark.parametrize("orders", [{"behaviour": "sulks"}, {"delay_seconds": -1}, {"delay_seconds": "long"},
                                    {"relays": ["http://127.0.0.1"]}, {"balance_msat": 0.5}, {"mood": 1}])  # fmt: skip
async def test_a_wrong_order_is_refused_and_changes_nothing(shop: Shop, orders: dict[str, Any]) -> None:
    before = await wallet(shop)
    answer = await shop.client.post("/sandbox/wallet", json=orders)
    assert answer.status_code == 422, answer.text
    assert await wallet(shop) == before


# --- other relays ---


async def abilities(url: str) -> str | None:
    """What the relay there knows of a wallet; None while nobody answers."""
    try:
        async with connect(url, proxy=None) as socket:
            await socket.send(json.dumps(["REQ", "i", {"kinds": [13194]}]))
            message = json.loads(await socket.recv())
            return str(message[2]["content"]) if message[0] == "EVENT" else None
    except (OSError, WebSocketException):
        return None


async def test_it_listens_on_another_relay_and_comes_back_when_that_does(port: Shop, tmp_path: Path) -> None:
    relay = RealRelay(tmp_path, free_ports(1)[0])
    await relay.start()
    try:
        await port.world("wallet", relays=[relay.url])
        assert relay.url.rstrip("/") in parse_qs(urlsplit((await wallet(port))["uri"]).query)["relay"][0]
        for visit in (1, 2):
            async with asyncio.timeout(30):
                while await abilities(relay.url) is None:
                    await asyncio.sleep(0.05)
            asker = Asker((await wallet(port))["uri"])
            _, bolt11 = await an_invoice(port)
            assert proves((await asker.ask(asker.request("pay_invoice", invoice=bolt11), seconds=30))[0], bolt11)
            assert len((await wallet(port))["payments"]) == visit
            await relay.restart()
    finally:
        await relay.stop()


# --- the encryption itself ---


def test_nip44_is_as_its_authors_vectors_say() -> None:
    if not VECTORS.exists():
        pytest.skip("nip44.vectors.json is not beside this checkout")
    vectors = json.loads(VECTORS.read_text())["v2"]
    for case in vectors["valid"]["encrypt_decrypt"]:
        key = bytes.fromhex(case["conversation_key"])
        assert seal_44(key, case["plaintext"], bytes.fromhex(case["nonce"])) == case["payload"]
        assert unseal_44(key, case["payload"]) == case["plaintext"]
    for length, padded in vectors["valid"]["calc_padded_len"]:
        assert padded_length(length) == padded
    for case in vectors["invalid"]["decrypt"]:
        with pytest.raises(ValueError):
            unseal_44(bytes.fromhex(case["conversation_key"]), case["payload"])


@pytest.mark.parametrize("text", ["x", "ünï✓", "y" * 5000])
def test_another_library_reads_what_we_write_and_we_what_it_writes(text: str) -> None:
    ours, theirs = "11" * 32, nostr_sdk.Keys.generate()
    other = theirs.public_key().to_hex()
    me = nostr_sdk.PublicKey.parse(public_key(ours))
    written = nostr_sdk.nip44_encrypt(theirs.secret_key(), me, text, nostr_sdk.Nip44Version.V2)
    assert unseal(Scheme.NIP44, ours, other, written) == text
    assert nostr_sdk.nip44_decrypt(theirs.secret_key(), me, seal(Scheme.NIP44, ours, other, text)) == text


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("payload", ["", "?iv=", "x?iv=y", "AA==?iv=AA==", "A" * 132, "#" + "A" * 200, "ü" * 200])
def test_what_is_not_encrypted_is_a_value_error(scheme: Scheme, payload: str) -> None:
    with pytest.raises(ValueError):
        unseal(scheme, "11" * 32, public_key("22" * 32), payload)
