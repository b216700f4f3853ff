"""Images: made, or made of another, charged by the piece or its tokens, and kept for some days behind signed URLs."""

import asyncio
import base64
import binascii
import re
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
from app.gateway.paid import Gateway, Paid, targets_of
from app.gateway.upstreams import Target

MOST_IMAGES: Final = 10
_MOST_ANSWER_BYTES: Final = 256 * 1024 * 1024
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
        exchange.api_key()
        targets_of(gateway, wish.model, "edits")
        raw, kind = await gateway.fetcher.picture(url)
        wish.form = _form_of(body)
        wish.form.files = [File("image", f"image.{kind}", TYPES[kind], BytesIO(raw), len(raw))]
        return await _made(gateway, exchange, wish, "edits", None)
    return await _made(gateway, exchange, wish, "images", body)


async def edits(gateway: Gateway, exchange: Exchange) -> None:
    """POST /images/edits: a form, as OpenAI's clients send it, or JSON with `image_url`."""
    if "json" in exchange.headers.get("content-type", ""):
        return await generations(gateway, exchange)
    exchange.api_key()
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
    had = [(each, await _bytes_of(gateway, paid.target, each)) for each in said["data"]]
    pictures = [(each, picture) for each, picture in had if picture is not None]
    if not pictures:
        paid.unused("the provider's pictures could not be fetched", may_have_run=True)
        raise asking.failed("The pictures that the model's provider made could not be fetched")
    usage = usage_of(said.get("usage")) or Usage()
    charge = paid.charge(
        msgspec.structs.replace(usage, images=len(pictures)), attributes=_served(wish, said),
        upstream_id=response.headers.get("x-request-id"),
    )  # fmt: skip
    kept = await asyncio.to_thread(_keep, gateway.media, [picture for _, picture in pictures])
    data = [_shown_picture(wish, *pair, place) for pair, place in zip(pictures, kept, strict=True)]
    await exchange.answer(200, _shown(wish, said, data, await paid.cost_usd(charge), paid))


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


def _served(wish: Wish, said: dict[str, Any]) -> Attributes:
    """As it was asked for; where it was left to the provider, the quality that the provider says it took."""
    quality = wish.quality
    if quality is None and isinstance(said.get("quality"), str):
        quality = said["quality"]
    return Attributes(quality=quality, size=wish.size)


async def _read(response: aiohttp.ClientResponse, paid: Paid) -> dict[str, Any]:
    """The upstream's answer. Nothing is left held when it raises, and nothing charged: the caller has no picture."""
    raw = bytearray()
    try:
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > _MOST_ANSWER_BYTES:
                raise OSError("more than ten pictures have")
        said = msgspec.json.decode(raw)
        if not isinstance(said, dict) or not isinstance(said.get("data"), list) or not said["data"]:
            raise OSError("no pictures")
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        paid.unused("the provider sent no pictures", may_have_run=True)
        raise asking.failed("The model's provider sent no pictures") from None
    finally:
        response.close()
    return said


async def _bytes_of(gateway: Gateway, target: Target, item: Any) -> bytes | None:
    """One picture; None where it cannot be had, though it was made."""
    said = item if isinstance(item, dict) else {}
    try:
        if isinstance(said.get("b64_json"), str):
            return base64.b64decode(said["b64_json"])
        if isinstance(said.get("url"), str):
            return await _fetched(gateway, target, said["url"])
    except (binascii.Error, ValueError, Refusal, aiohttp.ClientError, TimeoutError, OSError):
        return None
    return None


async def _fetched(gateway: Gateway, target: Target, url: str) -> bytes:
    """From the upstream's own address, which its operator chose; from elsewhere as from any stranger's."""
    origin = "/".join(target.upstream.base_url.split("/", 3)[:3])
    if not url.startswith(origin + "/"):
        return (await gateway.fetcher.picture(url, "url"))[0]
    async with gateway.session.get(url, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=60)) as response:
        response.raise_for_status()
        return await response.content.read(64 * 1024 * 1024)


def _keep(media: MediaStore, pictures: list[bytes]) -> list[Kept]:
    generation = new_generation()
    kept = []
    for n, picture in enumerate(pictures):
        placing = media.place(generation, n)
        placing.write(picture)
        placing.keep()
        found = media.shown(generation, n)
        assert found is not None
        kept.append(found)
    return kept


def _shown_picture(wish: Wish, said: Any, picture: bytes, kept: Kept) -> dict[str, Any]:
    shown = {"b64_json": base64.b64encode(picture).decode()} if wish.wants_base64 else {"url": kept.url}
    revised = {"revised_prompt": said["revised_prompt"]} if isinstance(said, dict) and "revised_prompt" in said else {}
    return {**shown, "content_type": kept.content_type, **revised}


def _shown(wish: Wish, said: dict[str, Any], data: list[dict[str, Any]], cost_usd: Decimal | None, paid: Paid) -> bytes:
    """`cost` is what was charged; where billing cannot say so now, what is expected, and `cost_estimated` says that."""
    cost = paid.estimated_usd if cost_usd is None else cost_usd
    body: dict[str, Any] = {
        "created": said.get("created") or int(time.time()), "model": wish.model,
        "cost": msgspec.Raw(usd_text(int(cost * _NUSD)).encode()), "data": data,
    }  # fmt: skip
    if cost_usd is None:
        body["cost_estimated"] = True
    return msgspec.json.encode(body | ({"usage": said["usage"]} if isinstance(said.get("usage"), dict) else {}))
