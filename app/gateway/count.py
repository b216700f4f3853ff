"""How many tokens a text has, where nobody says: what a call is held for, and what one costs whose upstream told nothing.

tiktoken counts where it is installed and has the model's vocabulary on this machine (TIKTOKEN_CACHE_DIR); it is never
fetched. Else bytes / 4, rounded up, which is more than most texts have; of an answer no fewer than the pieces it came in.
"""

import hashlib
import importlib
import os
import re
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

_BYTES_PER_TOKEN: Final = 4
_TOKENS_PER_FILE: Final = 2_000
"""Of an image, a sound or a document within a prompt: more than providers count for most."""
_FILE: Final = re.compile(rb'(?:;base64,|"data"\s*:\s*")[A-Za-z0-9+/=\\_-]{1024,}')
_VOCABULARIES: Final = "https://openaipublic.blob.core.windows.net/encodings/{}.tiktoken"
Counter = Callable[[str], int]


def most_tokens(*raws: bytes) -> int:
    """For a hold: of JSON as it was sent. What surrounds a text in it stands for what a model adds to each message."""
    files, size = 0, 0
    for raw in raws:
        if len(raw) > 1024 and (b"base64" in raw or b'"data"' in raw):
            raw, found = _FILE.subn(b"", raw)
            files += found
        size += len(raw)
    return -(-size // _BYTES_PER_TOKEN) + files * _TOKENS_PER_FILE


def prompt_tokens(model: str, *raws: bytes) -> int:
    """For a charge, where an upstream does not say: of the texts in what was sent."""
    count, texts = counter(model), list[str]()
    for raw in raws:
        _collect(msgspec.json.decode(_FILE.sub(b"", raw) if b"base64" in raw else raw), texts)
    return sum(map(count, texts))


def _collect(value: Any, texts: list[str]) -> None:
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name not in ("role", "type", "id"):
                _collect(inner, texts)
    elif isinstance(value, list):
        for inner in value:
            _collect(inner, texts)


@lru_cache(maxsize=1024)
def counter(model: str) -> Counter:
    encoding = _tiktoken(model)
    if encoding is None:
        return lambda text: -(-len(text.encode("utf-8", "surrogatepass")) // _BYTES_PER_TOKEN)
    return lambda text: len(encoding.encode(text, disallowed_special=()))


def _tiktoken(model: str) -> Any | None:
    """The model's encoding, if all of it is here."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR", "")
    if not folder:
        return None
    try:
        tiktoken = importlib.import_module("tiktoken")
        name = tiktoken.encoding_name_for_model(model.rpartition("/")[2])
    except (ImportError, KeyError):
        return None
    file = hashlib.sha1(_VOCABULARIES.format(name).encode(), usedforsecurity=False).hexdigest()
    return tiktoken.get_encoding(name) if (Path(folder) / file).exists() else None
