"""Images: made and edited, as base64 or behind a URL of ours, with usage where GPT image models have it.

Source: OpenAI API reference, "Create image", "Create image edit".
"""

import base64
import time
from typing import Any, Final

from . import usage
from .ids import new_id
from .orders import Order
from .pictures import png, size_of
from .usage import Counts
from .wire import Answer, Call, json_answer, refusal
from .words import tokens_of

Files = dict[str, tuple[str, bytes]]
"""What can be fetched once it was made: content type and bytes, by name."""
_KEPT: Final = 200
_TOKENS: Final = {"low": 272, "medium": 1056, "high": 4160}
"""Of 1024x1024; in proportion for others. Source: OpenAI, "Image generation"."""
_TOKENS_OF_AN_INPUT: Final = 323


def answer_images(call: Call, order: Order, files: Files) -> Answer:
    fields = call.fields
    prompt = str(fields.get("prompt") or "")
    if not prompt:
        return refusal(400, "Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter")
    given = [upload for upload in call.uploads if upload.field in ("image", "image[]")]
    if call.path.endswith("/edits") and not given:
        return refusal(400, "Missing required parameter: 'image'.", "image", "missing_required_parameter")
    n = _number(fields.get("n"))
    width, height = size_of(str(fields.get("size") or ""))
    is_gpt = call.model.startswith("gpt-image")
    pictures = [png(f"{prompt}#{place}", width, height) for place in range(n)]
    counts = _counts(fields, n, width * height, len(given), is_gpt)
    as_text = is_gpt or fields.get("response_format") == "b64_json"
    data = [
        {"b64_json": base64.b64encode(each).decode()} if as_text else {"url": _kept(call, files, each)}
        for each in pictures
    ]
    if call.model.startswith("dall-e-3"):
        data = [each | {"revised_prompt": prompt} for each in data]
    body: dict[str, Any] = {"created": int(time.time()), "data": data}
    if is_gpt:
        quality = str(fields.get("quality") or "high").replace("auto", "high")
        body |= {"background": "opaque", "output_format": "png", "quality": quality, "size": f"{width}x{height}"}
        if order.usage != "none":
            body["usage"] = usage.image(counts)
    attributes = {name: str(fields[name]) for name in ("quality", "size") if fields.get(name)}
    return json_answer(body, counts=counts, attributes=attributes)


def _counts(fields: dict[str, Any], n: int, pixels: int, given: int, is_gpt: bool) -> Counts:
    if not is_gpt:
        return Counts(images=n)
    of_square = _TOKENS.get(str(fields.get("quality")), _TOKENS["high"])
    made = n * -(-of_square * pixels // 1024**2)
    read = given * _TOKENS_OF_AN_INPUT
    words = tokens_of(str(fields.get("prompt")))
    return Counts(
        images=n, input_tokens=words + read, image_input_tokens=read, output_tokens=made, image_output_tokens=made
    )


def _number(n: Any) -> int:
    text = str(n or 1)
    return min(int(text), 10) if text.isascii() and text.isdigit() and int(text) else 1


def _kept(call: Call, files: Files, picture: bytes) -> str:
    if len(files) >= _KEPT:
        files.pop(next(iter(files)))
    name = new_id("img-") + ".png"
    files[name] = ("image/png", picture)
    return f"{call.root}/sandbox/files/{name}"
