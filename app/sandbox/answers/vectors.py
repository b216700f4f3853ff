"""Embeddings: unit vectors made of a text's digest, as numbers or as base64 of little-endian floats."""

import base64
import hashlib
import math
import struct
from typing import Any

from .orders import Order
from .prompts import of_text
from .usage import Counts
from .wire import Answer, Call, json_answer

_DIMENSIONS = {"text-embedding-3-small": 1536, "text-embedding-3-large": 3072}


def answer_embeddings(call: Call, order: Order) -> Answer:
    asked = call.fields.get("input")
    inputs = asked if isinstance(asked, list) and asked and not isinstance(asked[0], int) else [asked]
    dimensions = call.fields.get("dimensions") or _DIMENSIONS.get(call.model, 256)
    data = [
        {"object": "embedding", "index": place, "embedding": _shown(_vector(each, dimensions), call)}
        for place, each in enumerate(inputs)
    ]
    tokens = sum(of_text(each, order).tokens for each in inputs)
    body: dict[str, Any] = {"object": "list", "data": data, "model": call.model}
    if order.usage != "none":
        body["usage"] = {"prompt_tokens": tokens, "total_tokens": tokens}
    return json_answer(body, counts=Counts(input_tokens=tokens))


def _vector(text: Any, dimensions: int) -> list[float]:
    digest = hashlib.shake_256(repr(text).encode("utf-8", "surrogatepass")).digest(dimensions)
    raw = [byte - 127.5 for byte in digest]
    length = math.sqrt(sum(each * each for each in raw))
    return [each / length for each in raw]


def _shown(vector: list[float], call: Call) -> Any:
    packed = struct.pack(f"<{len(vector)}f", *vector)
    if call.fields.get("encoding_format") == "base64":
        return base64.b64encode(packed).decode()
    return list(struct.unpack(f"<{len(vector)}f", packed))
