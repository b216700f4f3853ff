"""The operator's commands over the same verbs as the admin API: account | key | token | topup | stats | log. Each returns
tables and data, prints nothing."""

import argparse
import io
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeAlias, get_args

import msgspec
from rich.console import Console
from rich.table import Table
from sqlalchemy.ext.asyncio import AsyncSession

from app.admin import accounts, keys, topups
from app.admin.acts import acts, changed_by, clean_reason
from app.admin.scopes import SCOPES
from app.admin.stats import days_asked, stats
from app.admin.tokens import NewToken, TokenKind, default_expiry, list_tokens, make_token, revoke_token
from app.kernel.db import Database, Row
from app.kernel.errors import InvalidField
from app.kernel.money import parse_usd, usd_text
from app.kernel.pages import page_size
from app.kernel.reading import uuid_in
from app.kernel.security import Admin, OnExpiry, Pepper
from app.keys.issue import Keyring, NewKey, clean_name, list_keys
from app.keys.tables import ResetPeriod
from app.keys.tree import said_windows
from app.keys.verify import MANAGES_KEYS
from app.keys.verify import SCOPES as KEY_SCOPES
from app.ledger.statement import balance
from app.ledger.tables import AccountStatus
from app.topups.gateway import Gateways
from app.topups.review import ref_of

LIMIT: Final = 50
LEAST_LIMIT_NUSD: Final = 10_000_000
_PERIODS: Final = {"daily": ResetPeriod.DAILY, "weekly": ResetPeriod.WEEKLY, "monthly": ResetPeriod.MONTHLY}
DESTRUCTIVE: Final[Mapping[tuple[str, str], str]] = {
    ("account", "close"): "This ends the account {0} for ever.",
    ("account", "rotate"): "The credit id of {0} stops working, and whoever has it needs the new one.",
    ("account", "debit"): "This takes {1} USD from the account {0}.",
    ("key", "revoke"): "The key {1} of the account {0} stops working for ever.",
    ("token", "revoke"): "The token {0} stops working for ever.",
}
"""What cannot be undone, and takes something from somebody: asked about first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command says: to a person, and as one JSON object."""

    text: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Desk:
    """What an operator's verbs need of the house, and who they are."""

    db: Database
    pepper: Pepper
    keyring: Keyring
    gateways: Gateways
    admin: Admin
    issuer: str = ""
    """Whose JWTs stand for keys, if anybody's do."""


Add: TypeAlias = Callable[[str, str], argparse.ArgumentParser]
"""`add(verb, help)` makes a parser that has --json already."""
Run: TypeAlias = Callable[[Desk, argparse.Namespace], Awaitable[Answer]]


def add_account(add: Add) -> None:
    found = _paged(add("list", "the accounts, newest first"))
    found.add_argument("--status", choices=[each.value for each in AccountStatus])
    add("search", "whose is this? An id, credit id, key, invoice, address, payment hash or transaction").add_argument(
        "what", help="`-` reads it from standard input, so that a secret is in no history"
    )
    _of_account(add("show", "one account: balance, holds, keys, top-ups, entries"))
    _yes(add("create", "open an account; its two secrets are shown once"))
    for verb, says in (
        ("freeze", "allow none of its calls any more"), ("unfreeze", "allow them again"),
        ("close", "end an account with nothing on it"), ("rotate", "give it another credit id; the old one is refused at once"),
    ):  # fmt: skip
        _yes(_because(_of_account(add(verb, says))))
    for verb, says in (("credit", "add to its balance, as an entry"), ("debit", "take from its balance, as an entry")):
        moves = _yes(_of_account(add(verb, says)))
        moves.add_argument("amount_usd", metavar="USD")
        moves.add_argument("--reason", required=True, help="why: it stands in the log")
        moves.add_argument("--dry-run", action="store_true", help="say what would happen, and do nothing")
        if verb == "debit":
            moves.add_argument("--below-floor", action="store_true", help="take what is held or is not there too")


def add_key(add: Add) -> None:
    _paged(_of_account(add("list", "an account's keys, oldest first, revoked ones too")))
    made = _yes(_of_account(add("create", "make a key; it is shown once")))
    made.add_argument("name")
    changed = _yes(_of_key(add("set", "change a key; only what is named changes")))
    changed.add_argument("--name", dest="new_name")
    changed.add_argument("--enable", action="store_true", help="switch it on again")
    for each in (made, changed):
        each.add_argument("--limit", metavar="USD", help="what it may spend, or none")
        each.add_argument("--period", choices=[*_PERIODS, "none"], help="how often its limit starts anew")
        each.add_argument("--expires", metavar="TIME", help="such as 2027-01-01T00:00:00Z, or none")
        each.add_argument("--scopes", metavar="A,B", help=f"some of {', '.join(KEY_SCOPES)}; or all")
        each.add_argument("--per-call", metavar="USD", help="what one call may cost, or none")
        each.add_argument("--per-minute", metavar="N", help="how many calls it may begin in a minute, or none")
        each.add_argument("--models", metavar="A,B", help="the only models it may call; or all")
    _yes(_because(_of_key(add("disable", "switch a key off; `key set --enable` is the way back"))))
    _yes(_because(_of_key(add("revoke", "end a key for ever"))))


def add_token(add: Add) -> None:
    made = _yes(add("create", "make a token; it is shown once"))
    which = made.add_mutually_exclusive_group(required=True)
    which.add_argument("--service", metavar="NAME", help="for a proxy: may call /v1/meter/*")
    which.add_argument("--admin", metavar="NAME", help="for an operator: may call /admin/*")
    made.add_argument(
        "--on-expiry", choices=get_args(OnExpiry), default="captured",
        help="of a proxy's holds that it does not settle: charge what was captured (the default) or all that was held, or nothing",
    )  # fmt: skip
    made.add_argument("--scopes", metavar="A,B", help=f"of an operator's: some of {', '.join(SCOPES)} (all)")
    made.add_argument(
        "--expires-in", metavar="DAYS", help="or never; an operator's token expires after 90 days, a proxy's never"
    )
    found = _paged(add("list", "the tokens, newest first, with their last use"))
    found.add_argument("--kind", choices=get_args(TokenKind))
    found.add_argument("--state", choices=("live", "expired", "revoked"))
    _yes(_because(add("revoke", "end a token for ever"))).add_argument("token", metavar="TOKEN_ID")


def add_topup(add: Add) -> None:
    found = _paged(add("list", "top-ups by state; those that wait for a person if none is named"))
    found.add_argument("--state", choices=topups.STATES, default="review")
    found.add_argument("--account", metavar="ACCOUNT_ID")
    _paged(add("unapplied", "top-ups that were paid and are not credited"))
    _yes(add("reconcile", "ask the payment backend now, and credit what was paid")).add_argument(
        "topup", metavar="TOPUP_ID"
    )
    decided = _yes(add("resolve", "take a top-up off the queue"))
    decided.add_argument("topup", metavar="TOPUP_ID")
    decided.add_argument("action", choices=("dismiss", "credit", "debit"))
    decided.add_argument("--amount", metavar="USD", help="with credit or debit: how much to move as well")
    decided.add_argument("--reason", required=True, help="why: it stands in the log")
    decided.add_argument("--finding", metavar="FINDING_ID", help="only if this is what waits")


def add_stats(command: argparse.ArgumentParser) -> None:
    command.add_argument("--from", dest="since", metavar="DAY", help="such as 2026-01-01 (30 days ago)")
    command.add_argument("--to", dest="until", metavar="DAY", help="(today)")


def add_log(command: argparse.ArgumentParser) -> None:
    _paged(command)
    command.add_argument("--actor", help="such as cli:root")
    command.add_argument("--act", help="such as account.credit")
    command.add_argument("--target", help="an account's id, or another id as it stands in the log")


def _paged(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--limit", dest="limit_rows", type=int, default=LIMIT, metavar="N", help=f"1 to 100 ({LIMIT})")
    command.add_argument("--after", metavar="ID", help="go on after the last id that was shown")
    return command


def _of_account(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("account", metavar="ACCOUNT_ID")
    return command


def _of_key(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    _of_account(command).add_argument("key", metavar="KEY_ID")
    return command


def _because(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--reason", help="why: it stands in the log")
    return command


def _yes(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("--yes", action="store_true", help="do it without asking")
    return command


def question(group: str, args: argparse.Namespace) -> str | None:
    """What to ask before this is done; None where it can be undone, or nothing is done."""
    if group not in ("account", "key", "token", "topup"):
        return None
    words = DESTRUCTIVE.get((group, args.verb))
    if group == "topup" and args.verb == "resolve" and args.action == "debit":
        words = "This takes {1} USD from the account of the top-up {0}."
    if words is None or args.yes or getattr(args, "dry_run", False):
        return None
    named = [
        getattr(args, name)
        for name in ("account", "key", "token", "topup", "amount_usd", "amount")
        if getattr(args, name, None)
    ]
    return words.format(*named, "?")


async def run(desk: Desk, group: str, args: argparse.Namespace) -> Answer:
    """One command. Raises AppError with what is wrong."""
    return await VERBS[group, getattr(args, "verb", "")](desk, args)


# --- accounts ---------------------------------------------------------------------------------------


async def _list_accounts(desk: Desk, args: argparse.Namespace) -> Answer:
    status = None if args.status is None else AccountStatus(args.status)
    size, after = page_size(args.limit_rows), _after(args)
    found = await desk.db.transaction(lambda session: accounts.list_accounts(session, size, after, status))
    return _accounts(found)


async def _search(desk: Desk, args: argparse.Namespace) -> Answer:
    return _accounts(
        await desk.db.transaction(lambda session: accounts.search(session, desk.pepper, args.what, desk.issuer))
    )


def _accounts(found: Sequence[Row]) -> Answer:
    data = [_account(each) for each in found]
    columns = ("account_id", "status", "balance_usd", "held_usd", "available_usd", "keys", "created_at")
    return Answer(
        _table(data, (*columns, "matched") if any("matched" in each for each in data) else columns), {"accounts": data}
    )


def _account(account: Row) -> dict[str, Any]:
    posted, held, floor = account["posted_nusd"], account["held_nusd"], account["floor_nusd"]
    told = {
        "account_id": str(account["id"]), "status": account["status"], "balance_usd": usd_text(posted), "held_usd": usd_text(held),
        "available_usd": usd_text(max(0, posted - held - floor)), "floor_usd": usd_text(floor), "keys": account["keys"],
        "created_at": _time(account["created_at"]),
    }  # fmt: skip
    return told | ({"matched": account["matched"]} if "matched" in account else {})


async def _show(desk: Desk, args: argparse.Namespace) -> Answer:
    account_id = _uuid(args.account, "account")
    found = await desk.db.transaction(lambda session: accounts.show(session, account_id))
    data: dict[str, Any] = {
        "account": _account(found.account), "keys": [_key(key) for key in found.keys],
        "topups": [_topup(topup) for topup in found.topups],
        "holds": [
            {"id": str(hold["id"]), "service": hold["service"], "model": hold["model"], "hold_usd": usd_text(hold["amount_nusd"]),
             "expires_at": _time(hold["expires_at"])} for hold in found.holds
        ],
        "entries": [
            {"id": entry["id"], "kind": entry["kind"], "amount_usd": usd_text(entry["amount_nusd"]),
             "balance_after_usd": usd_text(entry["balance_after_nusd"]), "reference": entry["reference"],
             "created_at": _time(entry["created_at"])} for entry in found.entries
        ],
    }  # fmt: skip
    parts = [
        _table(
            [data["account"]],
            ("account_id", "status", "balance_usd", "held_usd", "available_usd", "floor_usd", "created_at"),
        )
    ]
    columns: dict[str, Sequence[str] | None] = {"keys": _KEY, "topups": _TOPUP, "holds": None, "entries": None}
    parts += [f"\n{name}\n{_table(data[name], columns[name])}" for name in columns if data[name]]
    return Answer("\n".join(parts), data)


async def _open(desk: Desk, args: argparse.Namespace) -> Answer:
    opened = await desk.db.transaction(lambda session: accounts.open_by(session, desk.keyring, desk.pepper, desk.admin))
    data = {"account_id": str(opened.account_id), "credit_id": opened.credit_id, "api_key": opened.api_key}
    text = f"account    {data['account_id']}\ncredit id  {opened.credit_id}\nAPI key    {opened.api_key}\nKeep both: they cannot be shown again."
    return Answer(text, data)


async def _set_status(desk: Desk, args: argparse.Namespace) -> Answer:
    verb = accounts.freeze if args.verb == "freeze" else accounts.unfreeze
    account_id, reason = _uuid(args.account, "account"), _reason(args)
    found = await desk.db.transaction(lambda session: verb(session, desk.pepper, desk.admin, account_id, reason))
    return Answer(f"The account {account_id} is {found['status']}.", _account(found))


async def _close(desk: Desk, args: argparse.Namespace) -> Answer:
    account_id, reason = _uuid(args.account, "account"), _reason(args)
    found = await desk.db.transaction(
        lambda session: accounts.close(session, desk.keyring, desk.pepper, desk.admin, account_id, reason)
    )
    return Answer(f"The account {account_id} is closed.", _account(found))


async def _rotate(desk: Desk, args: argparse.Namespace) -> Answer:
    account_id, reason = _uuid(args.account, "account"), _reason(args)
    credit_id = await desk.db.transaction(
        lambda session: accounts.rotate(session, desk.keyring, desk.pepper, desk.admin, account_id, reason)
    )
    text = f"{credit_id}\nKeep it: it cannot be shown again. The old one is refused."
    return Answer(text, {"account_id": str(account_id), "credit_id": credit_id})


async def _adjust(desk: Desk, args: argparse.Namespace) -> Answer:
    amount_nusd = parse_usd(args.amount_usd.encode(), "amount_usd")
    signed = amount_nusd if args.verb == "credit" else -amount_nusd
    account_id, reason = _uuid(args.account, "account"), clean_reason(args.reason)
    done = await desk.db.transaction(
        lambda session: accounts.adjust(
            session, desk.pepper, desk.admin, account_id, signed, reason, dry_run=args.dry_run,
            below_floor=getattr(args, "below_floor", False),
        )
    )  # fmt: skip
    data = {
        "account_id": str(account_id), "amount_usd": usd_text(signed), "balance_before_usd": usd_text(done.before_nusd),
        "balance_usd": usd_text(done.after_nusd), "available_usd": usd_text(done.available_nusd), "dry_run": args.dry_run,
        "reference": done.reference,
    }  # fmt: skip
    would = "would go" if args.dry_run else "went"
    return Answer(f"The balance {would} from {data['balance_before_usd']} to {data['balance_usd']} USD.", data)


# --- keys -------------------------------------------------------------------------------------------

_KEY: Final = ("id", "name", "preview", "state", "limit_usd", "period", "spent_usd", "expire_at", "scopes", "models")


def _key(key: Row) -> dict[str, Any]:
    state = "revoked" if key["deleted_at"] else "disabled" if key["disabled_at"] else "live"
    return {
        "id": str(key["id"]), "name": key["name"], "preview": key["preview"], "state": state,
        "limit_usd": None if key["limit_nusd"] is None else usd_text(key["limit_nusd"]), "period": key["reset_period"],
        "spent_usd": usd_text(key["total_nusd"]), "requests_per_minute": key["requests_per_minute"],
        "max_usd_per_call": None if key["call_limit_nusd"] is None else usd_text(key["call_limit_nusd"]), "expire_at": _time(key["expire_at"]), "scopes": key["scopes"],
        "models": key["allowed_models"], "limits": said_windows(key), "parent_id": None if key["parent_id"] is None else str(key["parent_id"]),
    }  # fmt: skip


async def _list_keys(desk: Desk, args: argparse.Namespace) -> Answer:
    account_id, size, after = _uuid(args.account, "account"), page_size(args.limit_rows), _after(args)

    async def work(session: AsyncSession) -> list[Row]:
        await balance(session, account_id)  # which knows whether there is such an account
        return await list_keys(session, account_id, size, after, include_disabled=True)

    data = [_key(key) for key in await desk.db.transaction(work)]
    return Answer(_table(data, _KEY), {"keys": data})


async def _create_key(desk: Desk, args: argparse.Namespace) -> Answer:
    account_id, new = _uuid(args.account, "account"), NewKey(clean_name(args.name), **_wanted(args))
    if new.reset_period is not None and new.limit_nusd is None:
        raise InvalidField("--period needs --limit", param="period")
    key, secret = await desk.db.transaction(
        lambda session: keys.create(session, desk.keyring, desk.pepper, desk.admin, account_id, new)
    )
    return Answer(f"{secret}\nKeep it: it may not be shown again.", _key(key) | {"api_key": secret})


async def _change_key(desk: Desk, args: argparse.Namespace) -> Answer:
    wanted = _wanted(args)
    wanted |= {"name": clean_name(args.new_name)} if args.new_name is not None else {}
    wanted |= {"is_disabled": False} if args.enable else {}
    if not wanted:
        raise InvalidField("say what is to change; see `key set --help`")
    where = _uuid(args.account, "account"), _uuid(args.key, "key")
    key = await desk.db.transaction(
        lambda session: keys.change(session, desk.keyring, desk.pepper, desk.admin, *where, wanted)
    )
    return Answer(_table([_key(key)], _KEY), _key(key))


async def _disable_key(desk: Desk, args: argparse.Namespace) -> Answer:
    where, reason = (_uuid(args.account, "account"), _uuid(args.key, "key")), _reason(args)
    key = await desk.db.transaction(
        lambda session: keys.switch(
            session, desk.keyring, desk.pepper, desk.admin, *where, is_disabled=True, reason=reason
        )
    )
    return Answer(f"The key {key['name']} is switched off.", _key(key))


async def _revoke_key(desk: Desk, args: argparse.Namespace) -> Answer:
    where, reason = (_uuid(args.account, "account"), _uuid(args.key, "key")), _reason(args)
    await desk.db.transaction(
        lambda session: keys.revoke(session, desk.keyring, desk.pepper, desk.admin, *where, reason)
    )
    return Answer("The key is revoked.", {"revoked": str(where[1])})


def _wanted(args: argparse.Namespace) -> dict[str, Any]:
    """The fields that were named, under the names the verbs know. Raises InvalidField."""
    wanted: dict[str, Any] = {}
    if args.limit is not None:
        wanted["limit_nusd"] = None if args.limit == "none" else _limit(args.limit)
    if args.period is not None:
        wanted["reset_period"] = None if args.period == "none" else _PERIODS[args.period].value
    if args.expires is not None:
        wanted["expire_at"] = None if args.expires == "none" else _future(args.expires)
    if args.per_call is not None:
        wanted["call_limit_nusd"] = None if args.per_call == "none" else _of_a_call(args.per_call)
    if args.per_minute is not None:
        wanted["requests_per_minute"] = None if args.per_minute == "none" else _times(args.per_minute)
    if args.scopes is not None:
        wanted["scopes"] = None if args.scopes == "all" else _some_of((*KEY_SCOPES, MANAGES_KEYS), args.scopes)
    if args.models is not None:
        wanted["allowed_models"] = None if args.models == "all" else args.models.split(",")
    return wanted


def _limit(text: str) -> int:
    limit_nusd = parse_usd(text.encode(), "limit")
    if limit_nusd < LEAST_LIMIT_NUSD:
        raise InvalidField("--limit must be at least 0.01, or none", param="limit")
    return limit_nusd


def _of_a_call(text: str) -> int:
    limit_nusd = parse_usd(text.encode(), "per_call")
    if limit_nusd == 0:
        raise InvalidField("--per-call must be more than 0, or none", param="per_call")
    return limit_nusd


def _times(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 1_000_000:
        raise InvalidField("--per-minute is a number from 1 to 1000000, or none", param="per_minute")
    return int(text)


def _future(text: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidField(f"--expires is a time such as 2027-01-01T00:00:00Z, got {text[:50]!r}") from None
    moment = moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment
    if moment <= datetime.now(UTC):
        raise InvalidField("--expires must be in the future", param="expires")
    return moment


def _some_of(known: Iterable[str], text: str) -> list[str]:
    found = text.split(",")
    if odd := [each for each in found if each not in set(known)]:
        raise InvalidField(f"there is no scope {odd[0][:50]!r}; there are {', '.join(known)}", param="scopes")
    return found


# --- tokens -----------------------------------------------------------------------------------------


async def _create_token(desk: Desk, args: argparse.Namespace) -> Answer:
    kind: TokenKind = "service" if args.service is not None else "admin"
    name = args.service if kind == "service" else args.admin
    scopes = None if args.scopes is None else _some_of(SCOPES, args.scopes)
    new = NewToken(kind, name, args.on_expiry, scopes, _until(kind, args.expires_in))
    _, secret = await desk.db.transaction(lambda session: make_token(session, desk.pepper, desk.admin, new))
    until = f" It expires on {new.expires_at:%Y-%m-%d}." if new.expires_at else ""
    data = {"kind": kind, "name": name, "token": secret, "expires_at": _time(new.expires_at)}
    return Answer(f"{secret}\nKeep it: it cannot be shown again.{until}", data)


def _until(kind: TokenKind, text: str | None) -> datetime | None:
    now = datetime.now(UTC)
    if text is None:
        return default_expiry(kind, now)
    if text == "never":
        return None
    if not text.isascii() or not text.isdigit() or not 1 <= int(text[:9]) <= 3650:
        raise InvalidField(
            f"--expires-in is a number of days up to 3650, or never; got {text[:20]!r}", param="expires_in"
        )
    return now + timedelta(days=int(text))


async def _list_tokens(desk: Desk, args: argparse.Namespace) -> Answer:
    size, after = page_size(args.limit_rows), _after(args)
    found = await desk.db.transaction(lambda session: list_tokens(session, size, after, args.kind, args.state))
    times = ("created_at", "expires_at", "last_used_at", "revoked_at")
    same = ("kind", "name", "state", "scopes", "on_expiry")
    data = [
        {"id": str(each["id"]), **{name: each[name] for name in same}, **{name: _time(each[name]) for name in times}}
        for each in found
    ]
    return Answer(
        _table(data, ("id", "kind", "name", "state", "scopes", "expires_at", "last_used_at")), {"tokens": data}
    )


async def _revoke_token(desk: Desk, args: argparse.Namespace) -> Answer:
    token_id, reason = _uuid(args.token, "token"), _reason(args)
    gone = await desk.db.transaction(lambda session: revoke_token(session, desk.pepper, desk.admin, token_id, reason))
    return Answer(f"The {gone['kind']} token {gone['name']} is revoked.", {"revoked": str(token_id)})


# --- top-ups ----------------------------------------------------------------------------------------

_TOPUP: Final = ("id", "account_id", "method", "status", "additional_status", "credited_usd", "review", "created_at")


def _topup(topup: Row) -> dict[str, Any]:
    same = {name: topup[name] for name in ("method", "backend", "invoice_id", "status", "additional_status", "review")}
    finding = topup["finding_id"]
    return same | {
        "id": str(topup["id"]), "account_id": str(topup["account_id"]), "credited_usd": usd_text(topup["credited_nusd"]),
        "bonus_usd": usd_text(topup["bonus_nusd"]), "finding_id": None if finding is None else str(finding),
        "created_at": _time(topup["created_at"]),
    }  # fmt: skip


async def _list_topups(desk: Desk, args: argparse.Namespace) -> Answer:
    state: topups.State = "unapplied" if args.verb == "unapplied" else args.state
    account = getattr(args, "account", None)
    account_id = None if account is None else _uuid(account, "account")
    size, after = page_size(args.limit_rows), _after(args)

    async def work(session: AsyncSession) -> Sequence[Row]:
        last = None if after is None else await topups.position_of(session, after)
        return await topups.list_by_state(session, state, size, last, account_id)

    data = [_topup(topup) for topup in await desk.db.transaction(work)]
    return Answer(_table(data, _TOPUP), {"topups": data})


async def _reconcile(desk: Desk, args: argparse.Namespace) -> Answer:
    topup_id = _uuid(args.topup, "topup")
    ref = await desk.db.transaction(lambda session: ref_of(session, topup_id))
    before = await topups.ask_backend(desk.db, desk.gateways, ref)
    after = await desk.db.transaction(
        lambda session: topups.note_reconciled(session, desk.pepper, desk.admin, ref, before)
    )
    moved = after["credited_nusd"] - before["credited_nusd"]
    return Answer(f"The top-up is {after['status']}; {usd_text(moved)} USD were credited now.", _topup(after))


async def _resolve(desk: Desk, args: argparse.Namespace) -> Answer:
    topup_id, reason = _uuid(args.topup, "topup"), clean_reason(args.reason)
    amount_nusd = None if args.amount is None else parse_usd(args.amount.encode(), "amount_usd")
    finding_id = None if args.finding is None else _uuid(args.finding, "finding")

    async def work(session: AsyncSession) -> Row:
        ref = await ref_of(session, topup_id)
        told = args.action, amount_nusd, reason, finding_id
        return await topups.decide(session, desk.pepper, desk.admin, ref, *told)

    return Answer("It does not wait any more.", _topup(await desk.db.transaction(work)))


# --- the house --------------------------------------------------------------------------------------


async def _stats(desk: Desk, args: argparse.Namespace) -> Answer:
    asked = days_asked(_day(args.since, "--from"), _day(args.until, "--to"), datetime.now(UTC))
    found = await desk.db.transaction(lambda session: stats(session, *asked))
    days = [_in_usd(each) for each in found.days]
    data = _in_usd(found.totals) | {"days": days}
    totals = "\n".join(f"{name:<16} {value}" for name, value in data.items() if name != "days")
    told = [day for day in days if any(day[name] not in ("0", 0) for name in day if name != "day")]
    return Answer(f"{totals}\n\n{_table(told, None)}", data)


def _in_usd(figures: Row) -> dict[str, Any]:
    """Nano-USD as decimals in USD; the rest as it is."""
    return {
        name.replace("_nusd", "_usd"): usd_text(int(value)) if name.endswith("_nusd") else value if isinstance(value, int) else str(value)
        for name, value in figures.items()
    }  # fmt: skip


async def _log(desk: Desk, args: argparse.Namespace) -> Answer:
    size, after = page_size(args.limit_rows), _after(args)
    found = await desk.db.transaction(
        lambda session: acts(session, size, after, admin=args.actor, act=args.act, subject=args.target)
    )
    data = [_act(each) for each in found]
    return Answer(
        _table(data, ("created_at", "actor", "act", "target", "amount_usd", "reason", "after")), {"acts": data}
    )


def _act(act: Row) -> dict[str, Any]:
    before, after = changed_by(act)
    amount = act["amount_nusd"]
    return {
        "id": str(act["id"]), "created_at": _time(act["created_at"]), "actor": act["admin"], "act": act["act"], "target": act["subject"],
        "reason": act["reason"], "amount_usd": None if amount is None else usd_text(amount), "before": before, "after": after,
        "request_id": act["request_id"],
    }  # fmt: skip


VERBS: Final[Mapping[tuple[str, str], Run]] = {
    ("account", "list"): _list_accounts, ("account", "search"): _search, ("account", "show"): _show, ("account", "create"): _open,
    ("account", "freeze"): _set_status, ("account", "unfreeze"): _set_status, ("account", "close"): _close,
    ("account", "rotate"): _rotate, ("account", "credit"): _adjust, ("account", "debit"): _adjust,
    ("key", "list"): _list_keys, ("key", "create"): _create_key, ("key", "set"): _change_key, ("key", "disable"): _disable_key,
    ("key", "revoke"): _revoke_key, ("token", "create"): _create_token, ("token", "list"): _list_tokens,
    ("token", "revoke"): _revoke_token, ("topup", "list"): _list_topups, ("topup", "unapplied"): _list_topups,
    ("topup", "reconcile"): _reconcile, ("topup", "resolve"): _resolve, ("stats", ""): _stats, ("log", ""): _log,
}  # fmt: skip


# --- words ------------------------------------------------------------------------------------------


def _table(data: Sequence[Mapping[str, Any]], columns: Sequence[str] | None) -> str:
    """Rows under their names, as wide as they need: on a terminal it is the terminal that breaks lines."""
    if not data:
        return "There is none."
    names = list(data[0]) if columns is None else columns
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name.replace("_", " "), no_wrap=True, justify="right" if name.endswith("_usd") else "left")
    for each in data:
        table.add_row(*(_cell(each[name]) for name in names))
    shown = io.StringIO()
    Console(file=shown, width=10_000, markup=False, highlight=False, no_color=True).print(table)
    return "\n".join(line.rstrip() for line in shown.getvalue().splitlines())


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return msgspec.json.encode(value).decode()
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _time(moment: datetime | None) -> str | None:
    return None if moment is None else f"{moment.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}"


def _day(text: str | None, param: str) -> Any:
    try:
        return None if text is None else datetime.strptime(text, "%Y-%m-%d").replace(tzinfo=UTC).date()
    except ValueError:
        raise InvalidField(f"{param} is a UTC day such as 2026-01-31, got {text[:20]!r}") from None  # type: ignore[index]


def _reason(args: argparse.Namespace) -> str | None:
    return None if args.reason is None else clean_reason(args.reason)


def _after(args: argparse.Namespace) -> uuid.UUID | None:
    return None if args.after is None else _uuid(args.after, "after")


def _uuid(text: str, param: str) -> uuid.UUID:
    found = uuid_in(text)
    if found is None:
        raise InvalidField(
            f"{param} is an id such as 0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10, got {text[:50]!r}", param=param
        )
    return found
