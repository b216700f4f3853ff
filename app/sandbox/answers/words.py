"""Words that nobody thought: the text of an answer, made of the request alone, and how many tokens a text has.

A token is four bytes, the last one perhaps fewer. An answer is made of pieces of exactly four bytes, so a stream that
breaks off after n of them has produced n tokens, and whoever counts bytes ÷ 4 counts the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Final

TOKEN_BYTES: Final = 4
_OPENING: Final = "[sandbox, no model: these words were not thought by anybody] "
_LEAST: Final = 20
_MOST: Final = 60
"""How long an answer is, in tokens, of which nothing is said."""
_ROOTS: Final = (
    "the",
    "sun",
    "sea",
    "air",
    "oak",
    "elm",
    "fox",
    "owl",
    "bee",
    "ink",
    "map",
    "key",
    "cup",
    "day",
    "sky",
    "ice",
)
_BYTES_OF_FOUR: Final = ("🜁", "🌊", "🦉", "🔑")
_BYTES_OF_TWO: Final = "éßøñ"


def tokens_of(text: str) -> int:
    """How many tokens a text has."""
    return -(-len(text.encode("utf-8", "surrogatepass")) // TOKEN_BYTES)


def length_of(seed: str) -> int:
    """How long the answer to this is, in tokens."""
    return _LEAST + int.from_bytes(_digest(seed)[:4]) % (_MOST - _LEAST)


def pieces(seed: str, tokens: int, *, is_unicode: bool = False) -> list[str]:
    """An answer as so many pieces of one token each."""
    made = [_OPENING[at : at + TOKEN_BYTES] for at in range(0, len(_OPENING) // TOKEN_BYTES * TOKEN_BYTES, TOKEN_BYTES)]
    words = _unicode_words(seed) if is_unicode else _words(seed)
    while len(made) < tokens:
        made.append(next(words))
    return made[:tokens]


def in_pieces(text: str) -> list[str]:
    """A text of ASCII in pieces of one token each; the last one may be shorter."""
    return [text[at : at + TOKEN_BYTES] for at in range(0, len(text), TOKEN_BYTES)]


def until(parts: Sequence[str], stops: Sequence[str]) -> tuple[list[str], str | None]:
    """The pieces before the first stop sequence, and which one it was."""
    whole = "".join(parts)
    found = min(((whole.find(stop), stop) for stop in stops if stop and stop in whole), default=None)
    if found is None:
        return list(parts), None
    return in_pieces(whole[: found[0]]), found[1]


def digest_of(seed: str) -> str:
    """So many letters that stand for a text, the same for the same."""
    return hashlib.sha256(seed.encode("utf-8", "surrogatepass")).hexdigest()


def _digest(seed: str) -> bytes:
    return hashlib.sha256(seed.encode("utf-8", "surrogatepass")).digest()


def _words(seed: str) -> Iterator[str]:
    numbers = _digest(seed)
    while True:
        for number in numbers:
            yield _ROOTS[number % len(_ROOTS)] + (" " if number % 7 else ".")
        numbers = hashlib.sha256(numbers).digest()


def _unicode_words(seed: str) -> Iterator[str]:
    for place, word in enumerate(_words(seed)):
        yield (word, _BYTES_OF_FOUR[place % 4], _BYTES_OF_TWO[place % 4] * 2)[place % 3]
