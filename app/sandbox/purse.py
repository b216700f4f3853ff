"""The wallet's page: what connects it, what is in it, how it behaves, what it paid and what it was asked."""

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Final, TypeVar

import segno
from litestar import MediaType, Response, Router, get, post
from litestar.response import Redirect

from .behaviour import Behaviour, ordered
from .errors import SandboxError
from .given import Call, TheWallet
from .paper import HEADERS, copied, moment, page
from .wallet import SHOWN, Heard, Payment, Wallet
from .wire import read_decimal

WORDS: Final = {
    Behaviour.PAYS: "Pays, as it should",
    Behaviour.REFUSES: "Refuses, and says why",
    Behaviour.SILENT: "Does nothing and says nothing",
    Behaviour.LOSES_ANSWER: "Pays, and says nothing",
    Behaviour.ANSWERS_LATE: "Pays at once, says so late",
    Behaviour.PAYS_LATE: "Pays late",
    Behaviour.ANSWERS_TWICE: "Pays once, says so twice",
    Behaviour.WRONG_PREIMAGE: "Pays, and shows a wrong proof",
    Behaviour.ZERO_PREIMAGE: "Pays, and shows zeros as proof",
    Behaviour.LIES: "Does not pay, and says that it did",
    Behaviour.GARBAGE: "Pays, and answers what nobody can read",
}
_MSAT_PER_SAT: Final = 1000
Kept = TypeVar("Kept", Payment, Heard)


@get("/wallet", media_type=MediaType.HTML)
async def wallet_page(wallet: TheWallet) -> str:
    return _page(wallet)


@post("/wallet", status_code=303, media_type=MediaType.HTML)
async def change(request: Call, wallet: TheWallet) -> Response[str] | Redirect:
    """The form was sent. What cannot be is said on the page."""
    form = await request.form()
    try:
        sats = read_decimal(str(form.get("balance_sats", "")).strip(), "balance_sats")
        wanted = {"behaviour": str(form.get("behaviour", "")), "balance_msat": int(sats * _MSAT_PER_SAT)}
        await wallet.become(ordered(wallet.state, json.dumps(wanted).encode()))
    except SandboxError as error:
        return Response(_page(wallet, error.message), status_code=error.status, media_type=MediaType.HTML)
    return Redirect("wallet", status_code=303)


router = Router("/", route_handlers=[wallet_page, change], response_headers=HEADERS)


def _page(wallet: Wallet, problem: str = "") -> str:
    state = wallet.state
    notice = f"<p class=problem role=alert>{escape(problem)}</p>" if problem else ""
    svg = segno.make(wallet.uri, error="l", micro=False).svg_inline(
        border=2, omitsize=True, dark="#12161c", light="#fff"
    )
    main = f"""<main class=wide>{notice}<section class=card><header><div><h1>Wallet</h1>
<p class=quiet>A Lightning wallet that pays the sandbox's invoices, asked over Nostr Wallet Connect.</p></div>
<div class=state><span class=coins>{_sats(state.balance_msat)}</span><span class=quiet>{WORDS[state.behaviour]}</span></div></header>
<div class=pay><div class=qr>{svg}</div><div class=what><p class=label>Connect it with</p>
{copied(wallet.uri, "uri", "the wallet's connection")}
<p class=quiet>Paste it where auto top-up asks for a wallet, or scan it. It spends from this wallet.</p></div></div></section>
{_controls(wallet)}
<h2>Paid</h2>{_table("Nothing was paid yet.", ("When", "Amount", "Invoice"), map(_paid, _newest(wallet.payments)))}
<h2>Asked</h2>{_table("Nobody has asked yet.", ("When", "What", "What came of it"), map(_asked, _newest(wallet.heard)))}</main>"""
    return page("Wallet", main, here="Wallet", is_wide=True)


def _newest(kept: Mapping[str, Kept]) -> list[Kept]:
    return list(kept.values())[: -SHOWN - 1 : -1]


def _controls(wallet: Wallet) -> str:
    options = "".join(
        f"<option value={each.value}{' selected' if each is wallet.state.behaviour else ''}>{words}</option>"
        for each, words in WORDS.items()
    )
    return f"""<details class=controls open><summary>Sandbox controls</summary>
<form method=post class=told><label>How it behaves<select name=behaviour>{options}</select></label>
<label>What is in it, in satoshis<input name=balance_sats inputmode=numeric value={wallet.state.balance_msat // _MSAT_PER_SAT}></label>
<button class=main>Have it so</button></form></details>"""


def _sats(amount_msat: int) -> str:
    whole, rest = divmod(amount_msat, _MSAT_PER_SAT)
    return f"{whole:,}{f'.{rest:03}' if rest else ''} sat"


def _table(empty: str, names: tuple[str, ...], rows: Iterable[str]) -> str:
    cells = "".join(rows)
    head = "".join(f"<th>{name}</th>" for name in names)
    if not cells:
        return f"<p class=quiet>{empty}</p>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"


def _paid(paid: Payment) -> str:
    invoice = f"<a href='i/{paid.invoice_id}'>{escape(paid.invoice_id)}</a>"
    return f"<tr><td>{moment(paid.at)}</td><td class=r>{_sats(paid.amount_msat)}</td><td class=long>{invoice}</td></tr>"


def _asked(heard: Heard) -> str:
    again = f", asked {heard.repeats + 1} times" if heard.repeats else ""
    return f"<tr><td>{moment(heard.at)}</td><td>{escape(heard.method or 'nothing that can be read')}</td><td class=long>{escape(heard.outcome)}{again}</td></tr>"
