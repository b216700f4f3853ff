"""The front page: a shop that sells calls. What they cost, how they are paid, and how to begin."""

from collections.abc import Sequence
from typing import Final

from htpy import Node, a, button, div, h2, li, p, section, small, span, table, tbody, td, th, thead, tr, ul
from htpy import form as form_
from litestar import get
from litestar.di import NamedDependency
from litestar.params import FromQuery

from app.console.shell import Frame, Page, card, empty
from app.console.words import amount, count
from app.kernel.db import Database
from app.kernel.money import JsonNumber
from app.kernel.settings import Settings
from app.pricing.api import ModelView, models_of
from app.pricing.catalogue import Catalogues
from app.topups.gateway import Gateways
from app.topups.methods import METHODS, Method

_SHOWN: Final = 12
_KINDS: Final = {"chat": "Text", "image": "Images", "video": "Video", "audio": "Speech", "embedding": "Embeddings"}
_UNITS: Final = {
    "images": "an image", "characters": "a character", "audio_seconds": "a second of sound", "video_seconds": "a second of film",
    "pixels": "a pixel", "queries": "a query", "requests": "a call",
}  # fmt: skip
_LEADS: Final = (
    ("/docs", "How to begin, and the whole API"),
    ("/llms.txt", "The same for agents, in one short page"),
    ("/openapi.json", "The same for programs"),
    ("/v1/prices", "Every price as data"),
    ("/health/ready", "Whether it runs"),
)


@get("/")
async def front(
    frame: NamedDependency[Frame], settings: NamedDependency[Settings], db: NamedDependency[Database],
    catalogues: NamedDependency[Catalogues], gateways: NamedDependency[Gateways], models: FromQuery[str] = "",
) -> Page:  # fmt: skip
    """What a newcomer sees. The prices are those that a call would be asked now."""
    sold = await models_of(catalogues, db, None)
    ways = [METHODS[each] for each in METHODS if each in gateways.methods]
    return frame.answer(
        f"{settings.service_name}: models by the call",
        *front_page(frame, sold, ways, shows_all=models == "all"),
        wide=True,
    )


def front_page(frame: Frame, sold: Sequence[ModelView], ways: Sequence[Method], *, shows_all: bool) -> Sequence[Node]:
    return (
        _promise(frame),
        card(_prices(sold, shows_all=shows_all), title="What a call costs"),
        div(class_="columns")[card(_ways(ways), title="How it is paid"), card(_beginning(), title="How it begins")],
        card(
            ul[(li[a(href=there)[there], f": {words}."] for there, words in _LEADS)],
            title="For programs, and for those who write them",
        ),
    )


def _promise(frame: Frame) -> Node:
    return section(class_="promise")[
        p(class_="lead")[
            "Open an account without a name, put money on it with Lightning or coins, and pay for the calls you make: nothing else."
        ],
        div(class_="acts")[
            form_(method="post", action="/console/open")[frame.guard(), button["Open an account"]],
            a(href="/console", class_="button outline")["Sign in"],
            a(href="/docs", class_="button outline")["Read the docs"],
        ],
    ]


def _prices(sold: Sequence[ModelView], *, shows_all: bool) -> Node:
    if not sold:
        return empty("No model has a price here yet. Whoever runs this service imports a price sheet.")
    kinds = [kind for kind in _KINDS if any(each.type == kind for each in sold)]
    kinds += sorted({each.type for each in sold} - set(kinds))
    tables = [_table(kind, [each for each in sold if each.type == kind], shows_all=shows_all) for kind in kinds]
    is_cut = not shows_all and any(sum(each.type == kind for each in sold) > _SHOWN for kind in kinds)
    return div[tables, is_cut and p[a(href="/?models=all")[f"All {count(len(sold), 'model')} and their prices"]]]


def _table(kind: str, models: Sequence[ModelView], *, shows_all: bool) -> Node:
    shown = models if shows_all else models[:_SHOWN]
    per_token = any("input_per_1M_tokens" in each.pricing or "output_per_1M_tokens" in each.pricing for each in shown)
    heads = ("Model", "Input, 1M tokens", "Output, 1M tokens", "Other") if per_token else ("Model", "Price")
    return section[
        h2[_KINDS.get(kind, kind.capitalize())],
        div(class_="table", tabindex="0", role="region", aria_label=f"Prices: {_KINDS.get(kind, kind)}")[
            table(class_="prices")[
                thead[tr[(th(scope="col", class_="n" if place else None)[name] for place, name in enumerate(heads))]],
                tbody[(_row(each, per_token=per_token) for each in shown)],
            ]
        ],
    ]


def _row(model: ModelView, *, per_token: bool) -> Node:
    others = [f"{_usd(price)} {_UNITS[name]}" for name, price in model.pricing.items() if name in _UNITS]
    name = td[model.name, model.context_length is not None and small[f" {_thousands(model.context_length)} context"]]
    if not per_token:
        return tr[name, td(class_="n")[(", ".join(others)) or "by what is asked"]]
    into, out = (model.pricing.get(f"{each}_per_1M_tokens") for each in ("input", "output"))
    return tr[
        name,
        (td(class_="n")["–" if price is None else _usd(price)] for price in (into, out)),
        td(class_="n")[", ".join(others)],
    ]


def _usd(price: JsonNumber) -> str:
    """As it stands in the catalogue, with cents."""
    whole, _, fraction = bytes(price).decode().partition(".")
    return f"${whole}.{fraction.ljust(2, '0')}"


def _thousands(tokens: int) -> str:
    return f"{tokens // 1_000_000}M" if tokens >= 1_000_000 and tokens % 1_000_000 < 100_000 else f"{tokens // 1000}K"


def _ways(ways: Sequence[Method]) -> Node:
    if not ways:
        return empty("Nothing can be paid here yet.")
    return ul(class_="plain")[(li[_way(each)] for each in ways)]


def _way(method: Method) -> Sequence[Node]:
    least = amount(method.limits["USD"].least, "USD")
    bonus = method.bonus_percent > 0 and span(class_="pill good")[f"{method.bonus_percent} % on top"]
    return method.display_name, small[f" from {least} "], bonus


def _beginning() -> Node:
    return ul(class_="plain")[
        li["Open an account: you are shown its credit id once. Keep it."],
        li["Put as little as ten cents on it. Lightning takes a second."],
        li["Point your program at us: it is OpenAI's and Anthropic's API, with your key."],
    ]


handlers = (front,)
