"""What is kept of media and shown again: signatures, ranges, ages; and what callers may point to or send."""

import base64
import stat
import wave
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st

from app.adapters import addresses
from app.gateway import fetching
from app.gateway.errors import BodyTooLarge, InvalidField
from app.gateway.exchange import Exchange
from app.gateway.fetching import Fetcher, checked, is_public
from app.gateway.forms import File, Form, NotAForm, Written, read_form
from app.gateway.media import BadSignature, MediaStore, RangeRefused, new_generation
from app.gateway.recordings import check_format, held_seconds, told_seconds
from app.sandbox.answers.pictures import png
from app.sandbox.answers.sounds import mp3, mp3_size

DAY = 86_400
SPECIAL: tuple[Any, ...] = (*addresses._IPV4_SPECIAL, *addresses._IPV6_SPECIAL)
PICTURE = png("a picture", 8, 8)


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path / "media", "https://gateway.example", days=7)


def kept(store: MediaStore, content: bytes = PICTURE) -> tuple[str, dict[str, str], float]:
    """A kept file: its generation, its URL's query, and when its URL ends."""
    generation = new_generation()
    placing = store.place(generation, 0)
    placing.write(content)
    placing.keep()
    shown = store.shown(generation, 0)
    assert shown is not None
    query = {name: values[0] for name, values in parse_qs(urlsplit(shown.url).query).items()}
    return generation, query, float(query["exp"])


def test_a_signed_url_shows_its_file_until_it_ends(store: MediaStore) -> None:
    generation, query, ends = kept(store)
    shown = store.opened(generation, "0", **query, now=ends - 1)
    assert (shown.file.read(), shown.content_type) == (PICTURE, "image/png")
    shown.file.close()
    with pytest.raises(BadSignature):
        store.opened(generation, "0", **query, now=ends)


@pytest.mark.parametrize("field", ["generation", "n", "sig", "exp"])
def test_any_other_url_is_refused_as_a_missing_one_is(store: MediaStore, field: str) -> None:
    generation, query, ends = kept(store)
    other, other_query, _ = kept(store)
    asked: dict[str, Any] = {"generation": generation, "n": "0", **query}
    asked[field] = {"generation": other, "n": "1", "sig": other_query["sig"], "exp": str(int(ends) + 1)}[field]
    with pytest.raises(BadSignature):
        store.opened(**asked, now=ends - 1)


@pytest.mark.parametrize("id", ["../../etc", "gen_" + "g" * 32, "gen_" + "0" * 31, "", "gen_" + "0" * 32 + "/.."])
def test_no_path_leads_out_of_the_folder(store: MediaStore, id: str) -> None:
    with pytest.raises(BadSignature):
        store.opened(id, "0", store._signature(id, 0, 10), "10", now=0)


def test_urls_outlive_a_restart_and_the_key_is_its_owners_alone(store: MediaStore, tmp_path: Path) -> None:
    generation, query, ends = kept(store)
    again = MediaStore(tmp_path / "media", "https://gateway.example", days=7)
    again.opened(generation, "0", **query, now=ends - 1).file.close()
    assert stat.S_IMODE((tmp_path / "media" / "signing.key").stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("asked", "status", "content"),
    [
        (None, 200, b"0123456789"), ("bytes=0-0", 206, b"0"), ("bytes=2-5", 206, b"2345"), ("bytes=8-", 206, b"89"),
        ("bytes=-3", 206, b"789"), ("bytes=5-99", 206, b"56789"), ("bytes=-99", 206, b"0123456789"),
        ("bytes=0-1,3-4", 200, b"0123456789"), ("lines=1-2", 200, b"0123456789"), ("bytes=-", 200, b"0123456789"),
    ],
)  # fmt: skip
async def test_the_range_that_is_asked_for_is_what_comes(
    store: MediaStore, asked: str | None, status: int, content: bytes
) -> None:
    generation, query, ends = kept(store, b"0123456789")
    shown = store.opened(generation, "0", **query, now=ends - 1)
    with shown.file:
        found, headers, start, end = shown.part(asked)
        assert (found, b"".join([chunk async for chunk in shown.chunks(start, end)])) == (status, content)
    assert headers["content-length"] == str(len(content))
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["content-security-policy"].startswith("sandbox")
    assert headers["content-type"] == "application/octet-stream"


@pytest.mark.parametrize("asked", ["bytes=10-", "bytes=5-2", "bytes=-0"])
def test_a_range_that_is_not_there_is_416(store: MediaStore, asked: str) -> None:
    generation, query, ends = kept(store, b"0123456789")
    shown = store.opened(generation, "0", **query, now=ends - 1)
    with shown.file, pytest.raises(RangeRefused) as refused:
        shown.part(asked)
    assert refused.value.headers["content-range"] == "bytes */10"


@pytest.mark.parametrize("content", [b"<svg onload='x'>", b"<html><script>", b"%PDF-1.7", b"PK\x03\x04"])
def test_what_a_browser_might_run_is_shown_as_bytes(store: MediaStore, content: bytes) -> None:
    generation, query, ends = kept(store, content)
    shown = store.opened(generation, "0", **query, now=ends - 1)
    shown.file.close()
    assert shown.content_type == "application/octet-stream"


def test_files_are_forgotten_when_their_days_are_over_and_half_written_ones_are_never_shown(store: MediaStore) -> None:
    generation, _, ends = kept(store)
    half = store.place(generation, 1)
    half.write(PICTURE)
    assert store.shown(generation, 1) is None
    half.drop()
    assert store.sweep(now=ends - 2 * DAY) == 0
    assert store.shown(generation, 0, now=ends) is None
    assert store.sweep(now=ends + DAY) == 1
    assert store.shown(generation, 0, now=0) is None


# --- what callers point to ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/a.png", "https://127.0.0.1/a.png", "https://[::1]/a", "https://localhost/a", "https://10.0.0.1/",
        "https://169.254.169.254/latest/meta-data", "https://example.com:8443/a", "https://user@example.com/a", "ftp://example.com/a",
        "https://metadata.google.internal/", "https://[::ffff:10.0.0.1]/", "https://[64:ff9b::a00:1]/", "https://intranet/a", "file:///etc/passwd",
        "https://exa mple.com/", "https://example.com\\@10.0.0.1/", "https://192.168.1.1./a", "", "https://", "//example.com/a", "https://0/",
    ],
)  # fmt: skip
def test_what_is_no_public_https_url_is_not_asked(url: str) -> None:
    with pytest.raises(InvalidField):
        checked(url, "image_url")


@given(st.ip_addresses())
def test_what_is_public_is_no_special_address(address: Any) -> None:
    if is_public(str(address)):
        assert address.is_global
        assert not any((address.is_private, address.is_loopback, address.is_link_local, address.is_multicast))


@given(st.ip_addresses() | st.sampled_from([each[0] for each in SPECIAL] + [each[-1] for each in SPECIAL]))
def test_the_gateway_and_the_service_which_share_no_code_judge_an_address_alike(address: Any) -> None:
    assert is_public(str(address)) == addresses.is_public(str(address))
    assert fetching._PRIVATE_NAMES == addresses._PRIVATE_NAMES


@pytest.mark.parametrize(
    "text",
    [
        "2002:7f00:1::",
        "2001:0:1::",
        "64:ff9b::7f00:1",
        "fe80::1%eth0",
        "::ffff:8.8.8.8",
        "fc00::1",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "2130706433",
    ],
)
def test_an_address_that_hides_another_is_not_public(text: str) -> None:
    assert not is_public(text)
    assert is_public("8.8.8.8")
    assert is_public("2606:4700::1111")


class Names(AbstractResolver):
    """Says what it is told that names mean."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = addresses

    async def resolve(self, host: str, port: int = 0, family: Any = 0) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=each, port=port, family=family, proto=0, flags=0)
            for each in self.addresses
        ]

    async def close(self) -> None: ...


@pytest.mark.parametrize("addresses", [("127.0.0.1",), ("8.8.8.8", "127.0.0.1"), ("::1",), ()])
async def test_a_public_name_of_a_private_address_is_never_dialled(addresses: tuple[str, ...]) -> None:
    reached = []

    async def answer(request: web.BaseRequest) -> web.Response:
        reached.append(request)
        return web.Response(body=PICTURE)

    server = web.Server(answer)
    runner = web.ServerRunner(server)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    fetcher = Fetcher(Names(*addresses))
    with pytest.raises(InvalidField, match="could not be fetched"):
        await fetcher.picture("https://pictures.example.com/a.png")
    await fetcher.close()
    await runner.cleanup()
    assert reached == []


async def test_a_data_url_is_taken_as_it_is_and_only_pictures_are() -> None:
    fetcher = Fetcher()
    text = base64.b64encode(PICTURE).decode()
    assert await fetcher.picture(f"data:image/png;base64,{text}") == (PICTURE, "png")
    for bad in (
        f"data:text/html;base64,{text}",
        "data:image/png;base64,!!!",
        "data:image/png;base64,aGVsbG8=",
        7,
        None,
    ):
        with pytest.raises(InvalidField):
            await fetcher.picture(bad)
    await fetcher.close()


# --- what callers send ----------------------------------------------------------------------------


def form_exchange(body: bytes, content_type: str, chunk: int = 7) -> Exchange:
    parts = [body[at : at + chunk] for at in range(0, len(body), chunk)] or [b""]
    messages = [
        {"type": "http.request", "body": part, "more_body": place + 1 < len(parts)} for place, part in enumerate(parts)
    ]

    async def receive() -> Any:
        return messages.pop(0)

    async def send(_: Any) -> None: ...

    scope = {"method": "POST", "path": "/", "headers": [(b"content-type", content_type.encode())]}
    return Exchange(scope, receive, send)


def multipart(fields: list[tuple[str, str]], file: tuple[str, bytes]) -> tuple[bytes, str]:
    lines = [
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="%b"\r\nContent-Type: audio/mpeg\r\n\r\n%b\r\n'
        % (file[0].encode(), file[1])
    ]
    lines += [
        f'--b\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields
    ]
    return b"".join(lines) + b"--b--\r\n", "multipart/form-data; boundary=b"


async def test_a_form_is_read_with_its_file_first_and_written_again_as_it_was() -> None:
    body, kind = multipart(
        [("model", "whisper-1"), ("t[]", "word"), ("t[]", "segment")], ('a"\r.mp3', b"\x00\xff" * 50)
    )
    form = await read_form(form_exchange(body, kind))
    assert form.get("model") == "whisper-1"
    assert [value for name, value in form.fields if name == "t[]"] == ["word", "segment"]
    form.put("model", "other")
    for _ in range(2):  # as often as it is needed
        written = Written(form.fields, form.files)
        again = await read_form(form_exchange(b"".join([c async for c in written.chunks()]), written.content_type, 11))
        assert again.get("model") == "other"
        assert again.files[0].body.read() == b"\x00\xff" * 50
        again.close()
    form.close()


@pytest.mark.parametrize(
    ("body", "content_type", "error"),
    [
        (b"{}", "application/json", NotAForm), (b"", "multipart/form-data", NotAForm),
        (b"nonsense", "multipart/form-data; boundary=b", InvalidField),
        (b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhis', "multipart/form-data; boundary=b", InvalidField),
        (b'--b\r\nContent-Disposition: form-data; name="m"\r\n\r\n\xff\r\n--b--', "multipart/form-data; boundary=b", InvalidField),
    ],
)  # fmt: skip
async def test_what_is_no_form_is_refused(body: bytes, content_type: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await read_form(form_exchange(body, content_type))


async def test_a_file_larger_than_25_mb_is_refused_while_it_comes() -> None:
    body, kind = multipart([], ("a.mp3", bytes(25 * 1024 * 1024 + 1)))
    with pytest.raises(BodyTooLarge):
        await read_form(form_exchange(body, kind, 1 << 20))


def recording(name: str, content: bytes) -> Form:
    return Form(files=[File("file", name, "audio/mpeg", BytesIO(content), len(content))])


def test_how_long_a_recording_is_stands_in_its_container() -> None:
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((1, 2, 8000, 0, "NONE", ""))
        file.writeframes(bytes(8000 * 2 * 3))
    heard = recording("a.wav", sound.getvalue()).files[0]
    assert told_seconds(heard) == pytest.approx(3, abs=0.01)
    spoken = recording("a.mp3", b"".join(mp3(mp3_size(12)))).files[0]
    assert told_seconds(spoken) == pytest.approx(12, abs=0.1)
    noise = recording("a.webm", b"\x1aE\xdf\xa3" + bytes(4000)).files[0]
    assert told_seconds(noise) is None
    assert held_seconds(noise, None) == pytest.approx(2.002)


def test_a_container_that_claims_to_be_short_is_not_believed_below_what_its_bytes_last() -> None:
    sound = BytesIO()
    with wave.open(sound, "wb") as file:
        file.setparams((2, 4, 500_000_000, 0, "NONE", ""))
        file.writeframes(bytes(3_072_000))
    told = told_seconds(recording("a.wav", sound.getvalue()).files[0])
    assert told is None or told >= 2


@given(st.binary(max_size=2000), st.sampled_from(["a.mp3", "a.wav", "a.m4a", "a.webm", "a.ogg", "a.flac", "a.mp4"]))
def test_whatever_bytes_are_sent_their_length_is_a_number_or_unknown(content: bytes, name: str) -> None:
    told = told_seconds(recording(name, content).files[0])
    assert told is None or told > 0


@pytest.mark.parametrize("name", ["a.txt", "a.exe", "a.mp3.zip", "a", "a."])
def test_a_format_that_is_not_taken_is_refused(name: str) -> None:
    with pytest.raises(InvalidField) as refused:
        check_format(recording(name, b"hello, not audio").files[0])
    assert refused.value.param == "file"
    check_format(recording("A.MP3", b"").files[0])
    check_format(recording("a", b"ID3" + bytes(20)).files[0])
