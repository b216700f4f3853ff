"""Images: made, or made of another, charged by the piece or its tokens, and kept for some days behind signed URLs."""

import asyncio
import base64
import binascii
import mmap
import re
import tempfile
import time
from dataclasses import dataclass
from decimal import Decimal
from io import BytesIO
from typing import Any, Final

import aiohttp
import msgspec

from app.client import Attributes, Estimate, Usage
from app.client.usage import usage_of
from app.gateway import asking
from app.gateway.costs import usd_text
from app.gateway.count import most_tokens
from app.gateway.errors import InvalidField, Refusal
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import number_of, text_of, words_of
from app.gateway.forms import File, Form, Written, read_form
from app.gateway.inference import NOT_SENT_ON, sent_on
from app.gateway.media import TYPES, Kept, MediaStore, new_generation
from app.gateway.paid import Gateway, Paid, check_caller, targets_of
from app.gateway.upstreams import Target

MOST_IMAGES: Final = 10
_MOST_ANSWER_BYTES: Final = 256 * 1024 * 1024
_MOST_PICTURE_BYTES: Final = 64 * 1024 * 1024
_ENCODED_AT_ONCE_BYTES: Final = 3 * 64 * 1024
_FETCHED_WITHIN: Final = aiohttp.ClientTimeout(total=60)
_NUSD: Final = 10**9
_RATIO: Final = re.compile(r"([1-9][0-9]?):([1-9][0-9]?)", re.ASCII)
_SIZES: Final = {
    "gpt-image": ("1024x1024", "1536x1024", "1024x1536"),
    "dall-e-3": ("1024x1024", "1792x1024", "1024x1792"),
}
"""Square, wide and high, of models that take no ratio. Source: OpenAI API reference, "Create image"."""
_INPUT_IMAGE_TOKENS: Final = 6_400
"""More than OpenAI counts for an input picture at high fidelity. Source: OpenAI, "Image generation", input image tokens."""


@dataclass(slots=True)
class Wish:
    """What pictures were asked for, however it was asked."""

    model: str
    prompt: str
    n: int
    quality: str | None
    size: str | None
    wants_base64: bool
    form: Form | None = None
    """With the pictures to begin with, for an edit."""

    @property
    def attributes(self) -> Attributes:
        """Its price's words, as far as they were said."""
        return Attributes(quality=self.quality, size=self.size)


async def generations(gateway: Gateway, exchange: Exchange) -> None:
    """POST /images/generations; with `image_url` an edit of that picture."""
    body = await exchange.json()
    wish = _wish(body)
    url = words_of(body, "image_url")
    if url is not None:
        targets_of(gateway, wish.model, "edits")
        await check_caller(gateway, exchange)
        raw, kind = await gateway.fetcher.picture(url)
        wish.form = _form_of(body)
        wish.form.files = [File("image", f"image.{kind}", TYPES[kind], BytesIO(raw), len(raw))]
        return await _made(gateway, exchange, wish, "edits", None)
    return await _made(gateway, exchange, wish, "images", body)


async def edits(gateway: Gateway, exchange: Exchange) -> None:
    """POST /images/edits: a form, as OpenAI's clients send it, or JSON with `image_url`."""
    if "json" in exchange.headers.get("content-type", ""):
        return await generations(gateway, exchange)
    await check_caller(gateway, exchange)
    form = await read_form(exchange)
    try:
        wish = _wish(form.as_body())
        wish.form = form
        if not any(each.field in ("image", "image[]") and each.size for each in form.files):
            raise InvalidField("image is missing", param="image")
        await _made(gateway, exchange, wish, "edits", None)
    finally:
        form.close()


def _wish(body: Body) -> Wish:
    """Raises InvalidField."""
    model = text_of(body, "model")
    if bytes(body.get("stream", b"")) in (b"true", b'"true"'):
        raise InvalidField("images are not streamed here: leave stream out", param="stream")
    form = words_of(body, "response_format") or "url"
    if form not in ("url", "b64_json"):
        raise InvalidField("response_format is url or b64_json", param="response_format")
    size, quality = words_of(body, "size"), words_of(body, "quality")
    return Wish(
        model, text_of(body, "prompt"), number_of(body, "n", 1, 1, MOST_IMAGES),
        None if quality in (None, "auto") else quality, None if size in (None, "auto") else sized(model, str(size)),
        form == "b64_json",
    )  # fmt: skip


def sized(model: str, size: str) -> str:
    """A ratio as the size that this model has for it; any other size, and of other models, as it was said."""
    ratio = _RATIO.fullmatch(size)
    sizes = next((found for name, found in _SIZES.items() if model.rpartition("/")[2].startswith(name)), None)
    if ratio is None or sizes is None:
        return size
    wide, high = int(ratio[1]), int(ratio[2])
    return sizes[0] if wide == high else sizes[1] if wide > high else sizes[2]


def _form_of(body: Body) -> Form:
    """The simple fields of a JSON body, as a form has them."""
    read = {name: msgspec.json.decode(raw) for name, raw in body.items() if name != "image_url"}
    return Form(
        [
            (name, str(value))
            for name, value in read.items()
            if isinstance(value, str | int | float) and value is not True
        ]
    )


# --- made and paid --------------------------------------------------------------------------------


async def _made(gateway: Gateway, exchange: Exchange, wish: Wish, row: str, body: Body | None) -> None:
    targets = targets_of(gateway, wish.model, row)
    given = len(wish.form.files) if wish.form is not None else 0
    estimate = Estimate(
        images=wish.n, n=wish.n, quality=wish.quality, size=wish.size, image_input_tokens=given * _INPUT_IMAGE_TOKENS or None,
        input_tokens=most_tokens(wish.prompt.encode("utf-8", "surrogatepass")) + given * _INPUT_IMAGE_TOKENS,
    )  # fmt: skip
    paid = await Paid.held(gateway, exchange, targets[0], exchange.path, estimate)

    async def ask(target: Target) -> aiohttp.ClientResponse:
        path = "images/edits" if wish.form is not None else "images/generations"
        sent, kind = _sent(target, wish, body)
        return await asking.ask(gateway.session, target, path, sent, exchange.headers, content_type=kind)

    response = await paid.answer(targets, ask)
    said = await _read(response, paid)
    kept = await _kept(gateway, paid.target, said)
    if not kept:
        paid.unused("the provider's pictures could not be had", may_have_run=True)
        raise asking.failed("The pictures that the model's provider made could not be had")
    usage = usage_of(said.usage_object()) or Usage()
    charge = paid.charge(
        msgspec.structs.replace(usage, images=len(kept)), attributes=_served(wish, said),
        upstream_id=response.headers.get("x-request-id"),
    )  # fmt: skip
    await _shown(exchange, wish, said, kept, await paid.cost_usd(charge), paid)


def _sent(target: Target, wish: Wish, body: Body | None) -> tuple[Any, str]:
    """The request as the upstream takes it. Pictures come as base64: models that always send it must not be told so."""
    always = target.upstream_model.rpartition("/")[2].startswith(("gpt-image", "chatgpt-image"))
    form = None if always else "b64_json"
    if wish.form is None:
        assert body is not None
        changed = {
            "model": target.upstream_model,
            "response_format": form,
            "provider": None,
            "size": wish.size,
            "n": wish.n,
        }
        return sent_on(body, **changed), "application/json"
    wish.form.drop("response_format", "size", *NOT_SENT_ON)
    wish.form.put("model", target.upstream_model)
    for name, value in (("response_format", form), ("size", wish.size)):
        if value is not None:
            wish.form.put(name, value)
    written = Written(wish.form.fields, wish.form.files)
    return written.chunks(), written.content_type


def _served(wish: Wish, said: "_Said") -> Attributes:
    """As it was asked for; where it was left to the provider, the quality that the provider says it took."""
    quality = wish.quality
    if quality is None and isinstance(said.quality, str):
        quality = said.quality
    return Attributes(quality=quality, size=wish.size)


# --- what came ------------------------------------------------------------------------------------


_NOTHING: Final = msgspec.Raw(b"null")


class _Picture(msgspec.Struct):
    """One picture of an answer; its bytes stay where the answer lies."""

    b64_json: msgspec.Raw = _NOTHING
    url: str | None = None
    revised_prompt: str | None = None


class _Said(msgspec.Struct):
    """An upstream's answer, as far as it is read."""

    data: list[_Picture]
    created: Any = None
    quality: Any = None
    usage: msgspec.Raw = _NOTHING

    def usage_object(self) -> Any:
        return msgspec.json.decode(self.usage)


async def _read(response: aiohttp.ClientResponse, paid: Paid) -> _Said:
    """The upstream's answer, by way of a file: ten pictures are more than a call may take of memory.

    Nothing is left held when it raises, and nothing charged: the caller has no picture.
    """
    size = 0
    try:
        with tempfile.TemporaryFile() as file:
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > _MOST_ANSWER_BYTES:
                    raise OSError("more than ten pictures have")
                file.write(chunk)
            file.flush()
            if size:  # the map stays for as long as somebody looks at it
                return await asyncio.to_thread(_SAID.decode, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ))
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        pass
    finally:
        response.close()
    paid.unused("the provider sent no pictures", may_have_run=True)
    raise asking.failed("The model's provider sent no pictures")


_SAID: Final = msgspec.json.Decoder(_Said)


@dataclass(frozen=True, slots=True)
class _Shown:
    """A picture that is kept, and what the provider said of it."""

    kept: Kept
    revised_prompt: str | None


async def _kept(gateway: Gateway, target: Target, said: _Said) -> list[_Shown]:
    """Each picture that can be had, kept on disk, one after the other."""
    generation, shown = new_generation(), list[_Shown]()
    for picture in said.data[:MOST_IMAGES]:
        raw = await _bytes_of(gateway, target, picture)
        if raw is not None:
            kept = await asyncio.to_thread(_keep, gateway.media, generation, len(shown), raw)
            shown.append(_Shown(kept, picture.revised_prompt))
    return shown


async def _bytes_of(gateway: Gateway, target: Target, picture: _Picture) -> bytes | None:
    """One picture; None where it cannot be had, though it was made."""
    try:
        if bytes(memoryview(picture.b64_json)[:1]) == b'"':
            return await asyncio.to_thread(_decoded, picture.b64_json)
        return None if picture.url is None else await _fetched(gateway, target, picture.url)
    except (binascii.Error, ValueError, Refusal, aiohttp.ClientError, TimeoutError, OSError):
        return None


def _decoded(raw: msgspec.Raw) -> bytes:
    """Base64 as it stands in JSON. Raises ValueError."""
    text = memoryview(raw)[1:-1]
    found = binascii.a2b_base64(text if b"\\" not in bytes(text) else msgspec.json.decode(raw, type=str))
    if not found:
        raise ValueError("an empty picture")
    return found


async def _fetched(gateway: Gateway, target: Target, url: str) -> bytes:
    """From the upstream's own address, which its operator chose; from elsewhere as from any stranger's."""
    origin = "/".join(target.upstream.base_url.split("/", 3)[:3])
    if not url.startswith(origin + "/"):
        return (await gateway.fetcher.picture(url, "url"))[0]
    taken = bytearray()
    async with gateway.session.get(url, allow_redirects=False, timeout=_FETCHED_WITHIN) as response:
        response.raise_for_status()
        async for chunk in response.content.iter_any():
            taken += chunk
            if len(taken) > _MOST_PICTURE_BYTES:
                raise OSError("larger than any picture")
    return bytes(taken)


def _keep(media: MediaStore, generation: str, n: int, picture: bytes) -> Kept:
    placing = media.place(generation, n)
    placing.write(picture)
    placing.keep()
    found = media.shown(generation, n)
    assert found is not None
    return found


# --- shown ----------------------------------------------------------------------------------------


async def _shown(
    exchange: Exchange, wish: Wish, said: _Said, pictures: list[_Shown], cost_usd: Decimal | None, paid: Paid
) -> None:
    """`cost` is what was charged; where billing cannot say so now, what is expected, and `cost_estimated` says that."""
    cost = paid.estimated_usd if cost_usd is None else cost_usd
    head: dict[str, Any] = {
        "created": said.created if isinstance(said.created, int) else int(time.time()), "model": wish.model,
        "cost": msgspec.Raw(usd_text(int(cost * _NUSD)).encode()),
    }  # fmt: skip
    if cost_usd is None:
        head["cost_estimated"] = True
    if bytes(memoryview(said.usage)[:1]) == b"{":
        head["usage"] = said.usage
    if not wish.wants_base64:
        data = [{"url": each.kept.url, **_about(each)} for each in pictures]
        return await exchange.answer(200, msgspec.json.encode(head | {"data": data}))
    await exchange.start(200, {"content-type": "application/json"})
    await exchange.write(msgspec.json.encode(head)[:-1] + b',"data":[')
    for n, each in enumerate(pictures):
        await exchange.write((b"," if n else b"") + msgspec.json.encode(_about(each))[:-1] + b',"b64_json":"')
        with each.kept.path.open("rb") as file:
            while chunk := await asyncio.to_thread(file.read, _ENCODED_AT_ONCE_BYTES):
                await exchange.write(base64.b64encode(chunk))
        await exchange.write(b'"}')
    await exchange.end(b"]}")


def _about(shown: _Shown) -> dict[str, str]:
    revised = {} if shown.revised_prompt is None else {"revised_prompt": shown.revised_prompt}
    return {"content_type": shown.kept.content_type, **revised}
