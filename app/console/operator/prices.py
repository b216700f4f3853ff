"""*Prices*: what is sold now, a new sheet with what it would change, its activation, the rules on top, and the margins."""

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any, Final

import msgspec
from htpy import Node, a, button, code, details, div, label, option, p, select, summary
from htpy import form as form_
from htpy import input as input_
from litestar import get, post
from litestar.di import NamedDependency
from litestar.params import FromPath, FromQuery
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.api.prices import FeeRequest, MarkupRequest, OverrideRequest, put
from app.admin.margins import Margin, margins
from app.admin.prices import noting
from app.console.forms import Form
from app.console.operator.accounts import Done
from app.console.operator.acting import (
    ACTIVATE,
    END_RULE,
    FEE,
    IMPORT,
    MARKUP,
    OVERRIDE,
    READ,
    act,
    acting,
    line,
    may,
    pill,
    sheet,
)
from app.console.session import Operator
from app.console.shell import SAID, Frame, Page, card, labelled, problem
from app.console.words import about, count, moment
from app.kernel.db import Database, Row
from app.kernel.errors import AppError, InvalidField, NotFound
from app.kernel.reading import read
from app.kernel.settings import Settings
from app.pricing import commands
from app.pricing.catalogue import Change, Diff, active_version, diff, prices_of, versions
from app.pricing.importer import read_prices
from app.pricing.quote import rounded_text
from app.pricing.rows import Dimension, PriceRow, explained

MAX_FILE_BYTES: Final = 8 * 1024 * 1024
SAID.update(
    {
        "activated": "New calls are priced by it, from a few seconds on. Calls that began keep their prices.",
        "rule-made": "It holds from a few seconds on.",
        "rule-ended": "It ends in a few seconds. What calls have cost stays.",
    }
)
_RULES: Final[dict[str, tuple[str, type[OverrideRequest | MarkupRequest | FeeRequest]]]] = {
    "override": (OVERRIDE, OverrideRequest), "markup": (MARKUP, MarkupRequest), "fee": (FEE, FeeRequest),
}  # fmt: skip
"""By what right each rule is made, and what it takes."""
_WHOLE: Final = ("per_units", "min_input_tokens")
_SHOWN: Final = 100
_VERSIONS: Final = 20
_PER: Final = ((10**6, "a million of them"), (1000, "a thousand"), (1, "one"))
_SCOPES: Final = {
    "default": "Every call",
    "provider": "A provider's calls",
    "model": "A model's calls",
    "account": "An account's calls",
}


@dataclass(frozen=True, slots=True)
class Sold:
    """What the page shows: the sheets, the rules, the margins, and some prices of the active sheet."""

    versions: Sequence[Row]
    active: int | None
    rules: Sequence[dict[str, Any]]
    margins: Sequence[Margin]
    prices: Sequence[PriceRow]
    all_prices: int
    model: str


# --- doors ------------------------------------------------------------------------------------------


@get("/operator/prices")
async def prices(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    model: FromQuery[str] = "",
) -> Page:  # fmt: skip
    acting(operator, READ)
    return await _shown(frame, operator, db, model)


@post("/operator/prices/import", request_max_body_size=MAX_FILE_BYTES)
async def import_file(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    """A file becomes a draft; nothing is sold by it yet."""
    admin = acting(operator, IMPORT)
    try:
        name, file = form.file("file")
        draft = await asyncio.to_thread(read_prices, file)

        async def effect(session: AsyncSession) -> Done:
            made = await commands.import_prices(session, draft, name)
            await noting(settings.pepper, admin)(session, "import", made.data)
            return Done(str(made.data["version"]))

        made = await form.once.do(Done, effect)
    except InvalidField as error:
        return await _shown(frame, operator, db, "", error)
    return frame.see(f"/operator/prices/{made.told}")


@get("/operator/prices/{version:int}")
async def show_version(
    operator: NamedDependency[Operator], frame: NamedDependency[Frame], db: NamedDependency[Database],
    version: FromPath[int],
) -> Page:  # fmt: skip
    acting(operator, READ)
    return await _version_shown(frame, operator, db, version)


@post("/operator/prices/{version:int}/activate")
async def activate(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings], version: FromPath[int],
) -> Page:  # fmt: skip
    """Leaps and drops are refused unless they were looked at and allowed."""
    admin = acting(operator, ACTIVATE)

    async def effect(session: AsyncSession) -> Done:
        made = await commands.make_active(
            session, version, allow_drops=form.has("allow_drops"), allow_leaps=form.has("allow_leaps")
        )
        await noting(settings.pepper, admin)(session, "activate", made.data)
        return Done()

    try:
        await form.once.do(Done, effect)
    except AppError as error:
        if error.status != 422:
            raise
        return await _version_shown(frame, operator, db, version, error)
    return frame.see("/operator/prices", "activated")


@post("/operator/prices/overrides")
async def put_override(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    return await _put(operator, form, frame, db, settings, "override")


@post("/operator/prices/markups")
async def put_markup(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    return await _put(operator, form, frame, db, settings, "markup")


@post("/operator/prices/fees")
async def put_fee(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    db: NamedDependency[Database], settings: NamedDependency[Settings],
) -> Page:  # fmt: skip
    return await _put(operator, form, frame, db, settings, "fee")


async def _put(operator: Operator, form: Form, frame: Frame, db: Database, settings: Settings, kind: str) -> Page:
    """A rule, once however often its form is sent; what it asks is read as the API reads it."""
    route, asked = _RULES[kind]
    admin = acting(operator, route)

    async def effect(session: AsyncSession) -> Done:
        made = await put(session, wish)
        await noting(settings.pepper, admin)(session, kind, made.data)
        return Done()

    try:
        wish = read(_as_json(form, asked), asked)
        await form.once.do(Done, effect)
    except AppError as error:
        if error.status not in (400, 422):
            raise
        return await _shown(frame, operator, db, "", error)
    return frame.see("/operator/prices", "rule-made")


def _as_json(form: Form, asked: type[msgspec.Struct]) -> bytes:
    """What was filled in, as a program would send it; what was left empty is left out. Times are UTC."""
    told: dict[str, Any] = {name: form.text(name) for name in asked.__struct_fields__ if form.has(name)}
    told |= {name: int(told[name]) for name in _WHOLE if re.fullmatch(r"\d{1,15}", told.get(name, ""), re.ASCII)}
    if "effective_from" in told:
        told["effective_from"] += "Z" if told["effective_from"].count(":") == 2 else ":00Z"
    return msgspec.json.encode(told)


@post("/operator/prices/rules/{rule_id:uuid}/end")
async def end_rule(
    operator: NamedDependency[Operator], form: NamedDependency[Form], frame: NamedDependency[Frame],
    settings: NamedDependency[Settings], rule_id: FromPath[Any],
) -> Page:  # fmt: skip
    admin = acting(operator, END_RULE)

    async def effect(session: AsyncSession) -> Done:
        made = await commands.end_rule(session, str(rule_id))
        await noting(settings.pepper, admin)(session, "end", made.data)
        return Done()

    await form.once.do(Done, effect)
    return frame.see("/operator/prices", "rule-ended")


async def _shown(frame: Frame, operator: Operator, db: Database, model: str, error: AppError | None = None) -> Page:
    async def work(session: AsyncSession) -> Sold:
        active = await active_version(session)
        sold = [] if active is None else await prices_of(session, active)
        wanted = [each for each in sold if model.lower() in each.model.lower()]
        rules = (await commands.list_rules(session)).data["rules"]
        earned = await margins(session, datetime.now(UTC))
        return Sold(await versions(session), active, rules, earned, wanted[:_SHOWN], len(wanted), model)

    page = prices_page(frame, operator, await db.transaction(work), error)
    return frame.answer("Prices", *page, wide=True, status=200 if error is None else error.status)


async def _version_shown(
    frame: Frame, operator: Operator, db: Database, version_id: int, error: AppError | None = None
) -> Page:
    async def work(session: AsyncSession) -> tuple[Row, int | None, Diff]:
        version = next((each for each in await versions(session) if each["id"] == version_id), None)
        if version is None:
            raise NotFound("No such price version")
        active = await active_version(session)
        return version, active, await diff(session, active, version_id)

    page = version_page(frame, operator, *await db.transaction(work), error)
    return frame.answer(f"Price sheet {version_id}", *page, wide=True, status=200 if error is None else error.status)


# --- pages ------------------------------------------------------------------------------------------


def prices_page(frame: Frame, operator: Operator, sold: Sold, error: AppError | None) -> Sequence[Node]:
    return (
        error is not None and problem(error),
        card(_versions(sold), title="Sheets"),
        may(operator, IMPORT) and card(_importing(frame), title="Import a sheet"),
        card(_margins(sold.margins), title="Margins by model, yesterday and today, UTC"),
        card(_rules(frame, operator, sold.rules), title="Prices of your own, markups and fees"),
        _making(frame, operator),
        card(_prices(sold), title="Sold now"),
    )


def _versions(sold: Sold) -> Node:
    rows: list[Node] = [
        line(
            a(href=f"/operator/prices/{each['id']}")[f"Sheet {each['id']}"], _version_state(each, sold.active), each["source"], each["note"],
            f"{each['models']:,}", f"{each['prices']:,}", moment(each["created_at"]), numbers="4 5",
        )
        for each in sold.versions[:_VERSIONS]
    ]  # fmt: skip
    none = "No sheet was imported yet: nothing is sold by the catalogue. Proxies may still say what calls cost."
    return sheet("Sheet|State|Format|File|#Models|#Prices|Imported", rows, none)


def _version_state(version: Row, active: int | None) -> Node:
    if version["id"] == active:
        return pill("Sold by", "good")
    return pill("Draft", "wait") if version["activated_at"] is None else pill("Earlier")


def _importing(frame: Frame) -> Node:
    file = input_(name="file", type="file", accept=".json,application/json", required=True)
    hint = "LiteLLM's price file, genai-prices', or one of your own; JSON, at most 8 MB. Nothing is sold by it until it is activated."
    return form_(method="post", action="/operator/prices/import", enctype="multipart/form-data")[
        frame.guard(), labelled("Price file", file, hint), button["Import, and see what it changes"]
    ]


def _margins(found: Sequence[Margin]) -> Node:
    rows: list[Node] = [
        line(
            each.model or "none named", f"{each.calls:,}", about(each.charged_nusd), f"{each.known_calls:,}",
            about(each.provider_nusd) if each.known_calls else "–", about(each.margin_nusd) if each.known_calls else "–",
            _share(each), numbers="1 2 3 4 5 6",
        )
        for each in found
    ]  # fmt: skip
    none = "No call in 24 hours. What a provider asked is known where the proxy tells provider_cost_usd."
    return sheet("Model|#Calls|#Charged|#Cost known of|#Providers asked|#Margin|#Share", rows, none)


def _share(margin: Margin) -> Node:
    if margin.permille is None:
        return "–"
    return pill(f"{margin.permille / 10:.1f} %", "bad" if margin.permille < 0 else "good")


def _rules(frame: Frame, operator: Operator, rules: Sequence[dict[str, Any]]) -> Node:
    rows: list[Node] = [
        line(
            each["kind"].capitalize(), _whose(each), _asks(each), moment(datetime.fromisoformat(each["effective_from"])),
            may(operator, END_RULE) and act(frame, f"/operator/prices/rules/{each['id']}/end", "End"),
        )
        for each in rules
    ]  # fmt: skip
    return sheet("What|Of|Asks|Since|", rows, "Calls are sold at the sheet's own prices.")


def _whose(rule: dict[str, Any]) -> str:
    if rule["kind"] == "fee":
        return f"calls that use {rule['feature']}"
    if rule["kind"] == "override":
        seller = f" of {rule['provider']}" if rule["provider"] else ""
        least = f", from {rule['min_input_tokens']:,} input tokens" if rule["min_input_tokens"] else ""
        asked = f", {rule['attributes']}" if rule["attributes"] else ""
        return f"{rule['model']}{seller}, {rule['dimension'].replace('_', ' ')}{least}{asked}"
    return "every call" if rule["scope"] == "default" else f"{rule['scope']} {rule['subject']}"


def _asks(rule: dict[str, Any]) -> str:
    if rule["kind"] == "markup":
        extra = f" and ${rule['per_request_usd']} a call" if rule["per_request_usd"] not in ("0", None) else ""
        return f"× {rule['factor']}{extra}"
    if rule["kind"] == "fee":
        return f"${rule['price_usd']} a call"
    return _each(Dimension(rule["dimension"]), Fraction(rule["price_usd"]))


def _making(frame: Frame, operator: Operator) -> Node:
    """The forms for a rule of each kind, as far as the token may make them."""
    forms = (
        (OVERRIDE, "Ask a price of your own", _overriding), (MARKUP, "Put a markup", _marking), (FEE, "Ask a fee for a feature", _asking),
    )  # fmt: skip
    made = [details[summary[words], draw(frame)] for route, words, draw in forms if may(operator, route)]
    return len(made) > 0 and card(
        p(class_="quiet")[
            "Each ends the one like it before, and stands in the log. Calls that began keep their prices."
        ],
        *made,
        title="Change what is asked",
    )


def _overriding(frame: Frame) -> Node:
    counted = select(name="dimension")[(option(value=each.value)[each.value.replace("_", " ")] for each in Dimension)]
    units = select(name="per_units")[(option(value=str(each))[words] for each, words in _PER)]
    return act(
        frame, "/operator/prices/overrides", "Ask this price",
        div(class_="row")[
            labelled("Model", input_(name="model", required=True, maxlength="200")),
            labelled("Provider", input_(name="provider", maxlength="200"), "Empty: whoever serves it."),
            labelled("What is counted", counted),
            labelled("Price, USD", input_(name="price_usd", required=True, inputmode="decimal", maxlength="22"), "0 is free of charge."),
            labelled("For", units),
            labelled("From input tokens", input_(name="min_input_tokens", inputmode="numeric", maxlength="12"), "For longer calls only; empty: all."),
            labelled("Only calls asked like this", input_(name="attributes", maxlength="500"), "Such as quality=hd;size=1024x1024."),
            _since(),
        ],
        look="",
    )  # fmt: skip


def _marking(frame: Frame) -> Node:
    whose = select(name="scope")[(option(value=value)[words] for value, words in _SCOPES.items())]
    return act(
        frame, "/operator/prices/markups", "Put it",
        div(class_="row")[
            labelled("On", whose),
            labelled("Which", input_(name="subject", maxlength="200"), "The provider, the model or the account's id."),
            labelled("Factor", input_(name="factor", inputmode="decimal", value="1", maxlength="11"), "1.2 is 20 % on top."),
            labelled("On each call, USD", input_(name="per_request_usd", inputmode="decimal", value="0", maxlength="22")),
            _since(),
        ],
        look="",
    )  # fmt: skip


def _asking(frame: Frame) -> Node:
    return act(
        frame, "/operator/prices/fees", "Ask this fee",
        div(class_="row")[
            labelled("Feature", input_(name="feature", required=True, maxlength="200"), "As the proxy names it, such as web."),
            labelled("On each call that uses it, USD", input_(name="price_usd", required=True, inputmode="decimal", maxlength="22")),
            _since(),
        ],
        look="",
    )  # fmt: skip


def _since() -> Node:
    hint = "Empty: in a few seconds."
    return labelled("Holds from, UTC", input_(name="effective_from", type="datetime-local"), hint)


def _prices(sold: Sold) -> Node:
    rows: list[Node] = [
        line(
            each.model, each.provider or "any", each.dimension.value.replace("_", " "), _asked(each),
            each.attributes or (f"from {each.tier_min:,} tokens" if each.tier_min else ""), numbers="3",
        )
        for each in sold.prices
    ]  # fmt: skip
    finding = form_(method="get", action="/operator/prices")[
        labelled("Model", input_(name="model", type="search", value=sold.model, maxlength="200")),
        button(class_="outline small")["Show"],
    ]
    told = (
        sold.all_prices > len(sold.prices)
        and p(class_="quiet")[f"The first {len(sold.prices)} of {sold.all_prices:,}; name a model to see its own."]
    )
    return div[finding, told, sheet("Model|Provider|What|#Price|For", rows, "Nothing is sold under that name.")]


def _asked(price: PriceRow) -> str:
    return _each(price.dimension, Fraction(price.price_pusd, price.per_units) / 10**12)


def _each(dimension: Dimension, each_usd: Fraction) -> str:
    """For a million tokens, or for one of anything else."""
    if "token" in explained(dimension):
        return f"${rounded_text(each_usd * 10**6, 12)} / 1M"
    return f"${rounded_text(each_usd, 15)} each"


def version_page(
    frame: Frame, operator: Operator, version: Row, active: int | None, found: Diff, error: AppError | None
) -> Sequence[Node]:
    drops, leaps = found.drops(), found.leaps()
    is_active = version["id"] == active
    return (
        error is not None and problem(error),
        card(
            p[
                f"{count(version['models'], 'model')} and {count(version['prices'], 'price')} from {version['source']}, {version['note']}, ",
                "imported ", moment(version["created_at"]), ". ", _version_state(version, active),
            ],
            p["Against ", "nothing" if active is None else a(href=f"/operator/prices/{active}")[f"sheet {active}"],
              f": {count(len(found.changed), 'price')} changed, {len(found.added):,} new, {len(found.removed):,} gone."],
            not is_active and may(operator, ACTIVATE) and _activating(frame, version, drops, leaps),
        ),
        len(drops) > 0 and card(_changes(drops, "bad"), title=f"Drops: {count(len(drops), 'price')} that fall by more than half, or are gone"),
        len(leaps) > 0 and card(_changes(leaps, "bad"), title=f"Leaps: {count(len(leaps), 'price')} that rise fivefold, or appear"),
        card(_changes(found.changed, ""), title="Changed"),
        card(_changes(found.added, ""), title="New"),
        card(_changes(found.removed, ""), title="Gone"),
    )  # fmt: skip


def _activating(frame: Frame, version: Row, drops: Sequence[Change], leaps: Sequence[Change]) -> Node:
    return act(
        frame, f"/operator/prices/{version['id']}/activate", "Sell by this sheet",
        len(drops) > 0 and label[input_(type="checkbox", name="allow_drops", value="yes"), f" I looked at the {count(len(drops), 'drop')}: they are right"],
        len(leaps) > 0 and label[input_(type="checkbox", name="allow_leaps", value="yes"), f" I looked at the {count(len(leaps), 'leap')}: they are right"],
        look="",
    )  # fmt: skip


def _changes(changes: Sequence[Change], look: str) -> Node:
    rows: list[Node] = [
        line(
            code[each.key[0]], each.key[1] or "any", each.key[2].replace("_", " "), each.old_usd or "–", each.new_usd or "–",
            pill(_percent(each), look), numbers="3 4 5",
        )
        for each in changes[:_SHOWN]
    ]  # fmt: skip
    told = (
        len(changes) > _SHOWN
        and p(class_="quiet")[
            f"The first {_SHOWN} of {len(changes):,}; GET /admin/prices/{{version}}/diff has them all."
        ]
    )
    return div[told, sheet("Model|Provider|What|#Was, USD a unit|#Will be|#Change", rows, "None.")]


def _percent(change: Change) -> str:
    text = change.percent
    return f"{'+' if text[0].isdigit() else ''}{text.replace('-', '−')} %" if text[-1].isdigit() else text


handlers = (prices, import_file, show_version, activate, put_override, put_markup, put_fee, end_rule)
