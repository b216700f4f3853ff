"""Nobody reaches our network with a wallet's connection string: what is not public is refused, unheard and unsaid."""

import asyncio
import ipaddress
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import cast

import nostr_sdk as sdk
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.asyncio.client import ClientConnection

from app.adapters import relay as relays
from app.adapters.addresses import NotAllowed, RelayUrl, is_public, read_relay_url, resolve_by_system
from app.adapters.nip47 import NwcWallets, WalletPatience
from app.adapters.nip47_wire import UNREACHABLE
from app.adapters.nostr import MAX_EVENT_BYTES, MAX_TAG_CHARS, MAX_TAG_FIELDS, MAX_TAGS, sign_event
from app.adapters.relay import Dialler, RelayFailed, RelayPatience, dial_with
from app.autotopup.wallet import Connection, Encryption, PayOutcome, PayReply, WalletUnreachable, WalletUri
from app.kernel.errors import WalletSilent
from tests.adapters.fake_relay import FakeRelay, Json

PUBLIC = "93.184.215.14"
PUBKEY = sdk.Keys.generate().public_key().to_hex()
SECRET = sdk.Keys.generate().secret_key().to_hex()
QUICK = WalletPatience(answer_seconds=5, info_seconds=5, relay=RelayPatience(connect_seconds=5, address_seconds=2))

NAMES = {
    "public.example": [PUBLIC],
    "loopback.example": ["127.0.0.1"],
    "loopback6.example": ["::1"],
    "lan.example": ["192.168.1.10"],
    "lan10.example": ["10.0.0.1"],
    "lan172.example": ["172.31.255.254"],
    "cgnat.example": ["100.64.0.1"],
    "link.example": ["169.254.169.254"],
    "link6.example": ["fe80::1%eth0"],
    "ula.example": ["fd00::1"],
    "mapped.example": ["::ffff:127.0.0.1"],
    "nat64.example": ["64:ff9b::7f00:1"],
    "6to4.example": ["2002:7f00:1::1"],
    "zero.example": ["0.0.0.0"],
    "multicast.example": ["224.0.0.1"],
    "mixed.example": [PUBLIC, "10.0.0.1"],
    "mixed-last.example": [PUBLIC, "2606:2800:21f:cb07:6820:80da:af6b:8b2c", "fd00::1"],
    "many.example": [f"93.184.215.{number}" for number in range(40)],
    "nothing.example": [],
    "garbage.example": ["not an address"],
}

# Names that would lead to a public address, and are refused for what they are.
UNHEARD = ("relay", "localhost", "relay.localhost", "relay.local", "metadata.google.internal",
           "router.home.arpa", "router.lan", "hidden.onion", "book.example", "2130706433", "127.1", "0x7f000001")  # fmt: skip

# `PORT` is where a server of ours listens. Every one of these must end the same way, and nothing must arrive there.
URLS = (
    # loopback, in every notation
    "wss://127.0.0.1:PORT",
    "wss://127.0.0.1:PORT/",
    "wss://127.0.0.2:PORT",
    "wss://127.1:PORT",
    "wss://127.0.1:PORT",
    "wss://127.000.000.001:PORT",
    "wss://0177.0.0.1:PORT",
    "wss://0x7f.0.0.1:PORT",
    "wss://0x7f000001:PORT",
    "wss://2130706433:PORT",
    "wss://017700000001:PORT",
    "wss://127.0.0.1.:PORT",
    "wss://0:PORT",
    "wss://0.0.0.0:PORT",
    "wss://[::1]:PORT",
    "wss://[0:0:0:0:0:0:0:1]:PORT",
    "wss://[::]:PORT",
    "wss://[::ffff:127.0.0.1]:PORT",
    "wss://[::ffff:7f00:1]:PORT",
    "wss://[::127.0.0.1]:PORT",
    "wss://[::1%25lo]:PORT",
    "wss://[::1%lo]:PORT",
    "wss://[fe80::1%25eth0]:PORT",
    "wss://::1:PORT",
    "wss://[127.0.0.1]:PORT",
    "wss://[::1",
    "wss://[]:PORT",
    # other networks that are not public
    "wss://10.0.0.1:PORT",
    "wss://172.16.0.1:PORT",
    "wss://192.168.0.1:PORT",
    "wss://100.64.0.1:PORT",
    "wss://169.254.169.254:PORT",
    "wss://192.0.2.1:PORT",
    "wss://198.18.0.1:PORT",
    "wss://198.51.100.1:PORT",
    "wss://203.0.113.1:PORT",
    "wss://224.0.0.1:PORT",
    "wss://255.255.255.255:PORT",
    "wss://[fd00::1]:PORT",
    "wss://[fe80::1]:PORT",
    "wss://[ff02::1]:PORT",
    "wss://[2002:7f00:1::]:PORT",
    "wss://[2001:0:4136:e378:8000:63bf:3fff:fdd2]:PORT",
    "wss://[64:ff9b::127.0.0.1]:PORT",
    "wss://[64:ff9b:1::7f00:1]:PORT",
    "wss://[2001:db8::1]:PORT",
    "wss://[100::1]:PORT",
    # names
    "wss://localhost:PORT",
    "wss://LOCALHOST:PORT",
    "wss://localhost.:PORT",
    "wss://relay.localhost:PORT",
    "wss://relay.local:PORT",
    "wss://metadata.google.internal:PORT",
    "wss://router.home.arpa:PORT",
    "wss://router.lan:PORT",
    "wss://hidden.onion:PORT",
    "wss://relay:PORT",
    *(f"wss://{name}:PORT" for name in NAMES if name != "public.example"),
    "wss://unknown.example:PORT",
    # letters that look like others, or turn into them
    "wss://127。0。0。1:PORT",
    "wss://127．0．0．1:PORT",
    "wss://①②⑦.0.0.1:PORT",
    "wss://localhosT\u200b:PORT",
    "wss://ⓛⓞⓒⓐⓛhost:PORT",
    "wss://public.example。:PORT",
    "wss://publi\u0441.example:PORT",
    "wss://boo\u212a.example:PORT",
    "wss://%6c%6f%63alhost:PORT",
    "wss://public.example%00.evil.example:PORT",
    # parts that a relay's URL has not
    "wss://user@127.0.0.1:PORT",
    "wss://user:password@public.example",
    "wss://public.example@127.0.0.1:PORT",
    "wss://127.0.0.1:PORT#@public.example",
    "wss://public.example/#fragment",
    "wss://127.0.0.1:PORT\\@public.example",
    "wss://public.example\\.evil.example",
    "wss:\\\\127.0.0.1:PORT",
    "wss:///127.0.0.1:PORT",
    "wss:127.0.0.1:PORT",
    "//127.0.0.1:PORT",
    "127.0.0.1:PORT",
    "wss://",
    "",
    " wss://public.example",
    "wss://public.example ",
    "wss://public.example/\r\nX-Header: 1",
    "wss://public.exa\tmple",
    "wss://public..example",
    "wss://-public.example",
    "wss://" + "a" * 64 + ".example",
    "wss://public.example/" + "a" * 600,
    # schemes
    "ws://127.0.0.1:PORT",
    "ws://public.example",
    "http://127.0.0.1:PORT",
    "https://127.0.0.1:PORT",
    "file:///etc/passwd",
    "gopher://127.0.0.1:PORT",
    "unix:///var/run/docker.sock",
    "wss+unix://127.0.0.1:PORT",
    "javascript:alert(1)",
    # ports
    "wss://public.example:0",
    "wss://public.example:22",
    "wss://public.example:25",
    "wss://public.example:80",
    "wss://public.example:65536",
    "wss://public.example:99999999",
    "wss://public.example:-1",
    "wss://public.example:+443",
    "wss://public.example:0443",
    "wss://public.example:",
    "wss://public.example:４４３",
    "wss://public.example:443:443",
)


@dataclass
class Trap:
    """A server on loopback that nobody must reach, and a count of every attempt to dial anything."""

    port: int
    arrived: int = 0
    dialled: list[tuple[str, str]] = field(default_factory=list)
    resolved: list[str] = field(default_factory=list)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.resolved.append(host)
        if host in UNHEARD:
            return [PUBLIC]
        if host not in NAMES:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        return NAMES[host]

    async def dial(self, url: RelayUrl, address: str) -> ClientConnection:
        self.dialled.append((url.text, address))
        return await dial_with()(url, address)

    def wallets(self) -> NwcWallets:
        return NwcWallets(
            allow_private_relays=False, lightning_network="bc", patience=QUICK, resolve=self.resolve, dial=self.dial
        )


@pytest.fixture
async def trap() -> AsyncIterator[Trap]:
    caught = Trap(0)

    async def arrive(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        caught.arrived += 1
        writer.close()

    server = await asyncio.start_server(arrive, "127.0.0.1", 0)
    caught.port = server.sockets[0].getsockname()[1]
    yield caught
    server.close()
    await server.wait_closed()


async def refusal(wallets: NwcWallets, relay: str) -> str:
    """What somebody is told who gives us this relay, at whichever step."""
    uri = f"nostr+walletconnect://{PUBKEY}?relay={_quoted(relay)}&secret={SECRET}"
    try:
        await wallets.probe(wallets.parse(uri))
    except (WalletSilent, WalletUnreachable) as error:
        return str(error)
    return "let in"


def _quoted(text: str) -> str:
    return "".join(f"%{byte:02x}" for byte in text.encode())


@pytest.mark.parametrize("url", URLS, ids=lambda url: url.encode("ascii", "backslashreplace").decode()[:60])
async def test_a_relay_that_is_not_public_is_refused_in_the_same_words_and_never_dialled(trap: Trap, url: str) -> None:
    relay = url.replace("PORT", str(trap.port))
    assert await refusal(trap.wallets(), relay) == UNREACHABLE
    # The same, where it was stored before the rules were what they are now.
    stored = WalletUri(PUBKEY, (relay,), SECRET)
    with pytest.raises(WalletUnreachable) as probed:
        await trap.wallets().probe(stored)
    assert str(probed.value) == UNREACHABLE
    connection = Connection(stored, Encryption.NIP44)
    request = trap.wallets().sign_payment(connection, "lnbc1", datetime.now(UTC) + timedelta(minutes=15))
    paid = await trap.wallets().pay(connection, request, "00" * 32)
    assert (paid.outcome, paid.was_published, paid.was_answered) == (PayOutcome.UNKNOWN, False, False)
    assert trap.dialled == []
    assert trap.arrived == 0


def test_the_table_is_long_enough_to_be_worth_something() -> None:
    assert len(set(URLS)) == len(URLS) >= 60


async def test_a_relay_that_is_public_and_down_gets_the_same_words(trap: Trap) -> None:
    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        trap.dialled.append((url.text, address))
        raise ConnectionRefusedError

    wallets = NwcWallets(allow_private_relays=False, lightning_network="bc", resolve=trap.resolve, dial=dial)
    assert await refusal(wallets, "wss://public.example") == UNREACHABLE
    assert trap.dialled == [("wss://public.example", PUBLIC)]


async def test_the_address_that_was_judged_is_the_one_that_is_dialled(trap: Trap) -> None:
    """A name server that answers otherwise the second time (DNS rebinding) is not asked a second time."""
    answers = [[PUBLIC], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        trap.dialled.append((url.text, address))
        raise ConnectionRefusedError

    dialler = Dialler(allow_private=False, resolve=resolve, dial=dial)
    with pytest.raises(RelayFailed):
        async with dialler.open("wss://rebinding.example", SECRET):
            pass
    assert trap.dialled == [("wss://rebinding.example", PUBLIC)]
    assert len(answers) == 1


async def test_every_connection_is_judged_anew(trap: Trap) -> None:
    answers = [[PUBLIC], ["127.0.0.1"]]

    async def resolve(host: str, port: int) -> Sequence[str]:
        return answers.pop(0)

    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        trap.dialled.append((url.text, address))
        raise ConnectionRefusedError

    dialler = Dialler(allow_private=False, resolve=resolve, dial=dial)
    for _ in range(2):
        with pytest.raises(RelayFailed):
            async with dialler.open("wss://rebinding.example", SECRET):
                pass
    assert [address for _, address in trap.dialled] == [PUBLIC]
    assert answers == []


@pytest.mark.parametrize("where", ["inside", "itself"])
async def test_a_redirect_is_not_followed(where: str) -> None:
    async with FakeRelay() as inside, FakeRelay() as outside:
        outside.redirects_to = inside.url if where == "inside" else "/elsewhere"
        with pytest.raises(RelayFailed):
            async with Dialler(allow_private=True).open(outside.url, SECRET):
                pass
        assert outside.connections == 1
        assert inside.connections == 0


async def test_no_proxy_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, trap: Trap) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "ws_proxy", "wss_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{trap.port}")
    monkeypatch.delenv("no_proxy", raising=False)
    async with FakeRelay() as relay, Dialler(allow_private=True).open(relay.url, SECRET):
        assert relay.connections == 1
    assert trap.arrived == 0


async def test_tls_and_the_host_header_keep_the_name_while_the_address_is_dialled(
    certificate: tuple[ssl.SSLContext, ssl.SSLContext],
) -> None:
    server, client = certificate

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.1"]

    async with FakeRelay(tls=server) as relay:
        dialler = Dialler(allow_private=True, resolve=resolve, dial=dial_with(client))
        async with dialler.open(f"wss://relay.example:{relay.port}/", SECRET) as connected:
            assert await connected.subscribe({"kinds": [1]})
        assert relay.hosts == [f"relay.example:{relay.port}"]
        for url, trusted in (
            (f"wss://other.example:{relay.port}/", client),
            (f"wss://relay.example:{relay.port}/", None),
        ):
            with pytest.raises(RelayFailed):
                async with Dialler(allow_private=True, resolve=resolve, dial=dial_with(trusted)).open(url, SECRET):
                    pass


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS for relay.example, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "relay.example")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("relay.example")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "relay.pem"
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(pem + built.public_bytes(serialization.Encoding.PEM))
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(path)
    return server, ssl.create_default_context(cafile=str(path))


async def test_a_name_with_several_addresses_is_tried_in_their_order_until_one_answers() -> None:
    tried = []

    async def resolve(host: str, port: int) -> Sequence[str]:
        return ["127.0.0.9", "127.0.0.8", "127.0.0.1"]

    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        tried.append(address)
        if address != "127.0.0.1":
            raise ConnectionRefusedError
        return await dial_with()(url, address)

    async with FakeRelay() as relay:
        dialler = Dialler(allow_private=True, resolve=resolve, dial=dial)
        async with dialler.open(f"ws://relay.example:{relay.port}/", SECRET):
            assert tried == ["127.0.0.9", "127.0.0.8", "127.0.0.1"]


async def test_the_system_resolves_names_to_addresses_alone() -> None:
    assert set(await resolve_by_system("localhost", 443)) <= {"127.0.0.1", "::1"}
    with pytest.raises(OSError):
        await resolve_by_system("nothing.invalid", 443)


async def test_names_that_never_answer_keep_no_connected_wallet_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    answered = threading.Event()

    def getaddrinfo(host: str, port: int, **_: int) -> list[tuple[int, int, int, str, tuple[str, int]]]:
        if host == "never.example":
            answered.wait()
            raise socket.gaierror(socket.EAI_AGAIN, "no answer")
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    wallets = NwcWallets(allow_private_relays=True, lightning_network="bc", patience=QUICK)
    brief = replace(QUICK, pay_seconds=1, relay=replace(QUICK.relay, publish_seconds=1))
    paying = NwcWallets(allow_private_relays=True, lightning_network="bc", patience=brief)
    never = WalletUri(PUBKEY, ("ws://never.example:7000",), SECRET)

    async def pay(uri: WalletUri, by: NwcWallets) -> PayReply:
        connection = Connection(uri, Encryption.NIP44)
        request = by.sign_payment(connection, "lnbc1", datetime.now(UTC) + timedelta(minutes=15))
        return await by.pay(connection, request, "00" * 32)

    try:
        async with FakeRelay() as relay, asyncio.TaskGroup() as group:
            strangers = [group.create_task(wallets.probe(never)) for _ in range(50)]
            others = [group.create_task(pay(never, wallets)) for _ in range(20)]
            await asyncio.sleep(0.1)
            assert (await pay(WalletUri(PUBKEY, (f"ws://relay.example:{relay.port}",), SECRET), paying)).was_published
            for task in (*strangers, *others):
                task.cancel()
    finally:
        answered.set()


# What a relay may send


@pytest.mark.parametrize(
    "words",
    [
        "",
        "{",
        "[]",
        "[1]",
        "null",
        '["EVENT"]',
        '["OK"]',
        '["EVENT","x",{}]',
        "[" * 100_000,
        '["AUTH",5]',
        '["NOTICE","no"]',
        '"' + "a" * 1000,
    ],
    ids=lambda words: words[:12],
)
async def test_rubbish_from_a_relay_is_passed_over(words: str) -> None:
    async with FakeRelay(flood=(words,)) as relay, Dialler(allow_private=True).open(relay.url, SECRET) as connected:
        assert await connected.subscribe({"kinds": [1]})


async def test_a_message_that_is_too_large_ends_the_connection() -> None:
    flood = ('["NOTICE","' + "a" * relays.MAX_MESSAGE_BYTES + '"]',)
    async with FakeRelay(flood=flood) as relay, Dialler(allow_private=True).open(relay.url, SECRET) as connected:
        with pytest.raises(RelayFailed):
            await connected.subscribe({"kinds": [1]})


async def test_a_relay_that_says_too_much_is_left() -> None:
    many = tuple('["NOTICE","talk"]' for _ in range(relays.MAX_MESSAGES + 1))
    large = tuple('["NOTICE","' + "a" * 500_000 + '"]' for _ in range(3))
    for flood in (many, large):
        async with FakeRelay(flood=flood) as relay, Dialler(allow_private=True).open(relay.url, SECRET) as connected:
            with pytest.raises(RelayFailed):
                await connected.subscribe({"kinds": [1]})


def signed_event(kind: int = 1, secret: str = SECRET, tags: Sequence[Sequence[str]] = (), content: str = "") -> Json:
    return sign_event(secret, kind=kind, content=content, tags=tags)


STRANGER = sdk.Keys.generate().secret_key().to_hex()
BIG = MAX_TAG_CHARS


@pytest.mark.parametrize(
    "event",
    [
        signed_event(kind=2),
        signed_event(secret=STRANGER),
        {**signed_event(), "id": "00" * 32},
        {**signed_event(), "content": "another"},
        signed_event(content="a" * MAX_EVENT_BYTES),
        signed_event(tags=[["e"]] * (MAX_TAGS + 1)),
        signed_event(tags=[["e"] * (MAX_TAG_FIELDS + 1)]),
        signed_event(tags=[["e", "a" * (BIG + 1)]]),
        signed_event(tags=[["e", "a" * BIG]] * 17),
        {**signed_event(), "tags": [[]] * 40_000},
        {**signed_event(), "tags": "e"},
    ],
)
async def test_an_event_that_was_not_asked_for_or_is_too_large_is_passed_over(event: Json) -> None:
    wanted = signed_event(tags=[["e", "a" * BIG]] * 15, content="a" * 100_000)
    async with FakeRelay() as relay, Dialler(allow_private=True).open(relay.url, SECRET) as connected:
        await connected.subscribe({"kinds": [1], "authors": [wanted["pubkey"]]})
        for each in (event, wanted):
            await relay.send_to_all(each)
        assert (await connected.next_event()).id == wanted["id"]
        assert connected.stored() == []


class Chatter:
    """A connection on which the next message has always arrived already; it counts those that were taken."""

    taken = 0

    async def recv(self, **_: bool) -> bytes:
        self.taken += 1
        return b'["NOTICE","talk"]'

    async def send(self, text: str) -> None:
        pass

    async def __aenter__(self) -> "Chatter":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass


async def test_a_relay_that_talks_without_a_pause_keeps_nobody_else_from_their_turn() -> None:
    chatter, seen = Chatter(), []

    async def dial(url: RelayUrl, address: str) -> ClientConnection:
        return cast("ClientConnection", chatter)

    async def others() -> None:
        while True:
            seen.append(chatter.taken)
            await asyncio.sleep(0)

    async with Dialler(allow_private=True, dial=dial).open("ws://127.0.0.1", SECRET) as connected:
        task = asyncio.create_task(others())
        with pytest.raises(RelayFailed):
            await connected.subscribe({"kinds": [1]})
        task.cancel()
    assert set(seen) >= set(range(1, relays.MAX_MESSAGES))


@pytest.mark.parametrize("times", [2, 250, 1000])
async def test_a_relay_that_wants_auth_over_and_over_is_left_without_a_word_on_it(times: int) -> None:
    patience = WalletPatience(
        pay_seconds=2, answer_seconds=2, info_seconds=2, relay=RelayPatience(subscribe_seconds=0.5, publish_seconds=0.5)
    )
    wallets = NwcWallets(allow_private_relays=True, lightning_network="bc", patience=patience)
    async with FakeRelay(closes_subscriptions="auth-required: again", closes_times=times) as relay:
        assert await refusal(wallets, relay.url) == UNREACHABLE
        connection = Connection(WalletUri(PUBKEY, (relay.url,), SECRET), Encryption.NIP44)
        request = wallets.sign_payment(connection, "lnbc1", datetime.now(UTC) + timedelta(minutes=15))
        paid = await wallets.pay(connection, request, "00" * 32)
    assert (paid.outcome, paid.was_published, paid.was_answered) == (PayOutcome.UNKNOWN, False, False)


async def test_a_server_that_takes_a_connection_and_is_silent_is_left_in_time() -> None:
    held: list[asyncio.StreamWriter] = []

    async def hold(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        held.append(writer)

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    patience = RelayPatience(connect_seconds=0.5, address_seconds=0.3)
    with pytest.raises(RelayFailed):
        async with Dialler(allow_private=True, patience=patience).open(f"ws://127.0.0.1:{port}/", SECRET):
            pass
    for writer in held:
        writer.close()
    server.close()
    await server.wait_closed()


# Pure


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address) | st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address))
@settings(deadline=None, max_examples=500)
def test_what_we_call_public_the_standard_library_calls_global(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not address.is_multicast


@pytest.mark.parametrize(
    "address", ["2606:4700::1111%eth0", "", "localhost", "1.1.1", "16843009", "01.1.1.1", "1.1.1.1/32", " 1.1.1.1"]
)
def test_what_is_no_plain_address_is_not_public(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize("network", [
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24", "192.0.2.0/24",
    "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4",
    "::/128", "::1/128", "::/96", "::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/32", "2001:2::/48",
    "2001:10::/28", "2001:20::/28", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
])  # fmt: skip
def test_neither_end_of_a_special_network_is_public(network: str) -> None:
    found = ipaddress.ip_network(network)
    assert not is_public(str(found[0]))
    assert not is_public(str(found[-1]))
    assert not is_public(str(found[found.num_addresses // 2]))


@pytest.mark.parametrize(
    "address", ["1.1.1.1", "93.184.215.14", "100.63.255.255", "100.128.0.0", "2606:4700::1111", "2a00:1450::1"]
)
def test_an_address_of_the_internet_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("wss://relay.example.com", RelayUrl("wss://relay.example.com", True, "relay.example.com", 443, False)),
        ("WSS://Relay.Example.COM/Path", RelayUrl("wss://relay.example.com/Path", True, "relay.example.com", 443, False)),
        ("wss://relay.example.com:8443/v1?Key=a", RelayUrl("wss://relay.example.com:8443/v1?Key=a", True, "relay.example.com", 8443, False)),
        ("wss://xn--bcher-kva.example", RelayUrl("wss://xn--bcher-kva.example", True, "xn--bcher-kva.example", 443, False)),
        ("wss://1.1.1.1/", RelayUrl("wss://1.1.1.1/", True, "1.1.1.1", 443, True)),
        ("wss://[2606:4700::1111]:443", RelayUrl("wss://[2606:4700::1111]:443", True, "2606:4700::1111", 443, True)),
    ],
)  # fmt: skip
def test_a_public_relays_url_is_read(text: str, expected: RelayUrl) -> None:
    assert read_relay_url(text, allow_private=False) == expected


@pytest.mark.parametrize(
    "text", ["ws://127.0.0.1:7000", "ws://localhost:80/", "wss://relay:22", "ws://[::1]:7000", "ws://10.0.0.1"]
)
def test_in_development_any_host_and_port_will_do(text: str) -> None:
    assert read_relay_url(text, allow_private=True).text == text


@pytest.mark.parametrize(
    "text", ["http://127.0.0.1", "ws://user@127.0.0.1", "ws://127.0.0.1/#x", "ws://127.1", "ws://127.0.0.1:0"]
)
def test_the_grammar_holds_in_development_too(text: str) -> None:
    with pytest.raises(NotAllowed):
        read_relay_url(text, allow_private=True)
