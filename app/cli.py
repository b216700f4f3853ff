"""The operator's door: satmeter run | migrate | audit | demo | account … | key … | token … | topup … | stats | log |
keys rotate | prices … | usage …

What a command needs is loaded where it begins: all of it together takes two seconds, and who asks for help needs none.
"""

from __future__ import annotations

import argparse
import asyncio
import getpass
import json
import os
import shlex
import signal
import sys
import uuid
from collections.abc import Awaitable, Callable, Sequence
from decimal import ROUND_DOWN, Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias, cast, get_args

import msgspec

from app import __version__

if TYPE_CHECKING:
    from app.activity.commands import Answer
    from app.admin.commands import Add
    from app.audit import Report
    from app.gateway.settings import GatewaySettings
    from app.kernel.db import Database
    from app.kernel.progress import Told
    from app.kernel.security import Admin
    from app.kernel.settings import Settings
    from app.sandbox.demo import Demo
    from app.wiring import House

NAME: Final = "satmeter"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it did what was asked, 1 when the books differ, 2 when it could not be done, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    args = (_child_parser() if words[:1] == ["serve"] else _parser(words[0] if words else "")).parse_args(words)
    if hasattr(args, "at_once"):  # needs no settings
        return int(args.at_once(args))
    return _done(args)


def _done(args: argparse.Namespace) -> int:
    from app.gateway.settings import GatewaySettingsError
    from app.kernel import logs
    from app.kernel.embedded import EmbeddedError
    from app.kernel.errors import AppError
    from app.kernel.settings import SettingsError
    from app.migrations import MigrationError
    from app.sandbox.demo import DemoError

    logs.configure("INFO")
    logs.catch_all()
    os.umask(0o077)  # whatever we make is for us alone
    try:
        settings = args.reads()
        logs.configure(settings.log_level)
        return int(args.command(settings, args))
    except (SettingsError, GatewaySettingsError, EmbeddedError, MigrationError, DemoError) as error:
        print(f"satmeter: {error}", file=sys.stderr)
    except AppError as error:
        print(f"satmeter: {error.message}", file=sys.stderr)
    except BrokenPipeError:  # `satmeter prices list | head`: who read has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("satmeter: interrupted", file=sys.stderr)
        return 130
    except Exception as error:  # noqa: BLE001 - a door
        print(f"satmeter: a defect of ours: {type(error).__name__} at {logs.where_it_broke(error)}", file=sys.stderr)
    return 2


def _parser(word: str | None = None) -> argparse.ArgumentParser:
    """All commands; with what may be said behind each, or behind `word` alone."""
    name = NAME if Path(sys.argv[0]).name == NAME else "python -m app"
    parser = argparse.ArgumentParser(prog=name, description="Satmeter: prepaid billing for AI inference.")
    parser.add_argument("--version", action="version", version=f"satmeter {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for each, (says, fill) in _COMMANDS.items():
        command = commands.add_parser(each, help=says, description=says)
        if word in (None, each):
            fill(command)
    return parser


# --- what may be said behind each command -----------------------------------------------------------


def _does(parser: Any, does: Callable[[Settings, argparse.Namespace], int]) -> Any:
    from app.kernel.settings import load

    parser.set_defaults(command=does, reads=load)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _verbs(parser: Any, does: Callable[[Settings, argparse.Namespace], int], group: str | None = None) -> Add:
    """Makes a parser for a verb of this command."""
    verbs = parser.add_subparsers(required=True, metavar="VERB", dest="verb")

    def add(verb: str, says: str) -> argparse.ArgumentParser:
        made = _does(verbs.add_parser(verb, help=says, description=says), does)
        if group is not None:
            made.set_defaults(group=group)
        return cast("argparse.ArgumentParser", made)

    return add


def _add_run(parser: Any) -> None:
    from app.run import Only

    running = _does(parser, _run)
    running.add_argument("--demo", action="store_true", help="make a funded demo account and print commands to try")
    running.add_argument("--only", choices=get_args(Only), help="one part, where the other runs elsewhere")


def _add_migrate(parser: Any) -> None:
    says = "and have Citus shard it by account; a database that is sharded stays so"
    _does(parser, _migrate).add_argument("--citus", action="store_true", help=says)


def _add_audit(parser: Any) -> None:
    says = "a head of the seals that an earlier audit printed: it must still stand"
    _does(parser, _audit).add_argument("--head", metavar="N:MAC", help=says)


def _add_operators(parser: Any, group: str) -> None:
    from app.admin import commands as operators

    adds: dict[str, Callable[[Any], None]] = {
        "account": operators.add_account, "key": operators.add_key, "token": operators.add_token, "topup": operators.add_topup,
        "stats": operators.add_stats, "log": operators.add_log,
    }  # fmt: skip
    if group in ("stats", "log"):  # these have no verbs
        parser.set_defaults(group=group)
        adds[group](_does(parser, _operate))
    else:
        adds[group](_verbs(parser, _operate, group))


def _add_keys(parser: Any) -> None:
    _verbs(parser, _keys_rotate)("rotate", "seal every kept secret under the newest of SEALING_KEYS")


def _add_prices(parser: Any) -> None:
    from app.pricing import commands as prices

    prices.add_arguments(_verbs(parser, _prices))


def _add_usage(parser: Any) -> None:
    from app.activity import commands as usage

    usage.add_arguments(_verbs(parser, _usage))


def _add_entries(parser: Any) -> None:
    from app.audit import commands as entries

    entries.add_arguments(_verbs(parser, _entries))


def _add_gateway(parser: Any) -> None:
    from app.gateway.settings import load

    parser.set_defaults(command=_gateway, reads=load)


def _add_mcp(parser: Any) -> None:
    from app.agents import command as agents

    agents.add_arguments(parser)


def _add_completion(parser: Any) -> None:
    import shtab

    parser.description = "Print the script by which a shell completes satmeter's commands and options."
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    parser.set_defaults(at_once=_completion)


def _child_parser() -> argparse.ArgumentParser:
    """How `run` starts its children; no command of an operator's."""
    from app.kernel.settings import load

    serving = argparse.ArgumentParser(prog="python -m app serve")
    serving.add_argument("verb", choices=("serve",))
    serving.add_argument("role", choices=("http", "sandbox"))
    serving.set_defaults(command=_serve, reads=load)
    return serving


def _completion(args: argparse.Namespace) -> int:
    import shtab

    parser = _parser()
    parser.prog = NAME
    _say(shtab.complete(parser, args.shell))
    return 0


def _say(text: str) -> None:
    print(text, flush=True)


_Fill: TypeAlias = Callable[[Any], object]
_COMMANDS: Final[dict[str, tuple[str, _Fill]]] = {
    "run": ("HTTP, jobs and, where they are not given, database and sandbox", _add_run),
    "migrate": ("bring the database to this version's schema", _add_migrate),
    "audit": ("recompute every figure in the books; exit code 1 if one differs", _add_audit),
    "doctor": (
        "ask the real world whether it is as the settings say; exit code 1 with warnings, 2 with a fault",
        lambda parser: _does(parser, _doctor),
    ),
    "demo": ("make a funded account on the running development server", lambda parser: _does(parser, _demo)),
    "account": (
        "accounts: find, open, freeze, close, credit, debit",
        lambda parser: _add_operators(parser, "account"),
    ),
    "key": ("API keys of any account", lambda parser: _add_operators(parser, "key")),
    "token": ("tokens of proxies and operators", lambda parser: _add_operators(parser, "token")),
    "topup": ("top-ups: by state, reconcile, resolve", lambda parser: _add_operators(parser, "topup")),
    "stats": (
        "what is owed, held, received and earned; and by day",
        lambda parser: _add_operators(parser, "stats"),
    ),
    "log": ("what operators did, newest first", lambda parser: _add_operators(parser, "log")),
    "keys": ("sealing keys", _add_keys),
    "prices": ("the price catalogue", _add_prices),
    "usage": ("months of calls: export, drop, sum again", _add_usage),
    "entries": ("ledger entries of long ago: export, drop", _add_entries),
    "gateway": (
        "models behind the meter: a door of its own, which knows Satmeter by its wire (GATEWAY_SERVICE_TOKEN)",
        _add_gateway,
    ),
    "mcp": (
        "an account in an agent's hands: an MCP server (SATMETER_URL, SATMETER_API_KEY or SATMETER_CREDIT_ID)",
        _add_mcp,
    ),
    "completion": ('a script that completes commands: eval "$(satmeter completion bash)"', _add_completion),
}


# --- what each does ---------------------------------------------------------------------------------


def _run(settings: Settings, args: argparse.Namespace) -> int:
    from app.gateway.settings import public_url as gateway_url
    from app.run import has_gateway, run

    wants_demo = args.demo and settings.uses_sandbox
    log_path = settings.data_dir / "satmeter.log" if wants_demo else None

    def when_ready(url: str, is_stopping: Callable[[], bool]) -> None:
        if args.only == "jobs":
            _say("\nSatmeter's jobs are running.")
            return
        _say(f"\nSatmeter is running at {settings.public_url}   (API: {settings.public_url}/docs)")
        _say(
            f"Pages:  {_console_url(settings)} (customers)   {settings.public_url}/operator (you, with an admin token)"
        )
        if settings.uses_sandbox:
            _say(f"Sandbox BTCPay, no real money:  {settings.sandbox_url}")
        if has_gateway(settings):
            _say(f"Gateway to models:              {gateway_url()}/v1")
        if log_path is not None:
            _say(f"Logs: {log_path}")
        if wants_demo:
            _introduce(settings, url, is_stopping)
        if not is_stopping():
            _say("\nCtrl-C stops everything and keeps the data.")

    run(settings, _say, only=args.only, when_ready=when_ready, log_path=log_path)
    return 0


def _introduce(settings: Settings, url: str, is_stopping: Callable[[], bool]) -> None:
    """Print the demo account of this machine: the one made before if it still has money, else a new one."""
    from app.gateway.settings import public_url as gateway_url
    from app.kernel.settings import private_write
    from app.sandbox.demo import Demo, balance, wallet_url

    path = settings.data_dir / "demo.json"
    try:
        demo = msgspec.json.decode(path.read_bytes(), type=Demo) if path.exists() else None
        left = asyncio.run(balance(settings.public_url, demo)) if demo is not None else None
        if demo is None or left is None or left < 1:
            demo, left = asyncio.run(_with_house(settings, url, lambda house: _make_demo(settings, house))), None
        # One from before there was a wallet has no URL of it; and its relay moves with SANDBOX_PORT.
        nwc_url = asyncio.run(wallet_url(settings.sandbox_url))
        demo = msgspec.structs.replace(
            demo, nwc_url=nwc_url, gateway_url=gateway_url(), console_url=_console_url(settings)
        )
        private_write(path, msgspec.json.encode(demo).decode())
    except Exception as error:  # noqa: BLE001 - a door: the service runs on without its demo
        if is_stopping():
            return
        _say(f"\nThe demo account could not be made: {error or type(error).__name__}")
        return
    _say(_introduction(demo, left))


def _introduction(demo: Demo, left: Decimal | None = None) -> str:
    """What to try with it; `left` is what an account of an earlier run still has, in USD."""
    funds = "topped up with $5 over sandbox Lightning (and the 5 % bonus)"
    if left is not None:
        funds = f"of an earlier run, with ${left.quantize(Decimal('0.01'), ROUND_DOWN)} left"
    spend = max(1, int(left or 0) - 4)
    charge = {
        "request_id": f"try-{uuid.uuid4().hex[:8]}",
        "api_key": demo.api_key,
        "model": "gpt-4o-mini",
        "usage": {"input_tokens": 100, "output_tokens": 50},
    }
    connect = {"nwc_url": demo.nwc_url, "threshold_usd": 5, "topup_amount_usd": 10}
    post_json = "-H 'Content-Type: application/json' -d"
    return f"""
A demo account, {funds}:
  credit id      {demo.credit_id}
  API key        {demo.api_key}
  service token  {demo.service_token}
  admin token    {demo.admin_token}

Look: {demo.console_url} signs in with the credit id, {demo.base_url}/operator with the admin token.

Paste these:

  curl -s {demo.base_url}/credits/balance -H 'Authorization: Bearer {demo.api_key}'

  curl -s {demo.base_url}/v1/meter/charge -H 'Authorization: Bearer {demo.service_token}' {post_json} {shlex.quote(json.dumps(charge))}

  curl -s {demo.base_url}/topup/create/btc-lightning -H 'Authorization: Bearer {demo.api_key}' {post_json} '{{"amount": 1000, "currency": "SATS"}}'

Open the last one's checkout_url in a browser and press Pay. Or connect the sandbox's own Lightning wallet:

  curl -s {demo.base_url}/nwc-auto-topup/connect -H 'x-credit-id: {demo.credit_id}' {post_json} {shlex.quote(json.dumps(connect))}

then charge ${spend} (the second command, with another request_id, and "cost_usd": {spend} instead of the usage), wait some
seconds and look at the balance: it fell below $5, and the wallet refilled it.

Call a model through the gateway, with OpenAI's own SDK (pip install openai); the call is charged to the key:

python3 - <<'END'
from openai import OpenAI
client = OpenAI(base_url="{demo.gateway_url}/v1", api_key="{demo.api_key}")
answer = client.chat.completions.create(model="gpt-4o-mini", messages=[{{"role": "user", "content": "Hello!"}}])
print(answer.choices[0].message.content, answer.usage.total_cost_usd, "USD")
END"""


async def _make_demo(settings: Settings, house: House) -> Demo:
    from app.admin.tokens import create_token
    from app.gateway.settings import public_url as gateway_url
    from app.sandbox.demo import Demo, fund_new_account, wallet_url

    credit_id, api_key = await fund_new_account(settings.public_url, settings.sandbox_url)
    name = f"demo-{uuid.uuid4().hex[:8]}"
    return Demo(
        base_url=settings.public_url,
        sandbox_url=settings.sandbox_url,
        credit_id=credit_id,
        api_key=api_key,
        service_token=await create_token(house.db, settings.pepper, "service", name),
        admin_token=await create_token(house.db, settings.pepper, "admin", name),
        nwc_url=await wallet_url(settings.sandbox_url),
        gateway_url=gateway_url(),
        console_url=_console_url(settings),
    )


def _console_url(settings: Settings) -> str:
    return f"{settings.public_url}/console"


def _demo(settings: Settings, args: argparse.Namespace) -> int:
    from app.sandbox.demo import DemoError

    if settings.is_production or not settings.uses_sandbox:
        raise DemoError("the demo needs the sandbox: ENVIRONMENT=development and no BTCPAY_URL")
    demo = _in_house(settings, lambda house: _make_demo(settings, house))
    _say(msgspec.json.encode(demo).decode() if args.json else _introduction(demo))
    return 0


def _migrate(settings: Settings, args: argparse.Namespace) -> int:
    from app.migrations import head, migrate
    from app.run import database

    with database(settings) as (url, _):
        changed = migrate(url, settings.database_pooler, sharded=args.citus)
    _say(
        json.dumps({"revision": head(), "changed": changed}) if args.json else f"The database is at migration {head()}."
    )
    return 0


async def _audited(settings: Settings, house: House, told: Told, noted_head: str | None) -> Report:
    """The verdict, which monitoring is told too."""
    from app.audit import Secrets, audit
    from app.audit.background import note_verdict
    from app.kernel.db import new_id

    # A head that was noted a moment ago may not have come to a standby yet.
    reads = house.reads if noted_head is None else house.db
    report = await audit(reads, Secrets.of(settings), told, noted_head)
    await house.db.transaction(lambda session: note_verdict(session, len(report.findings), str(new_id())))
    return report


def _audit(settings: Settings, args: argparse.Namespace) -> int:
    from app.kernel import progress
    from app.kernel.money import usd_text

    with progress.shown("Auditing", "checks") as told:
        report = _in_house(settings, lambda house: _audited(settings, house, told, args.head))
    if args.json:
        _say(msgspec.json.encode(report).decode())
        return 0 if report.is_clean else 1
    for finding in report.findings:
        _say(f"{finding.check}: {finding.subject}: recorded {finding.recorded}, recomputed {finding.recomputed}")
    for each in report.told:
        _say(
            f"{each.model}: {each.calls} calls of the last day cost ${usd_text(each.told_nusd)} as their proxies said,"
            f" ${usd_text(each.catalogue_nusd)} by the catalogue"
        )
    _say(_seals_told(report))
    found = "nothing differs" if report.is_clean else f"{len(report.findings)} figures differ"
    _say(f"{report.checks} checks over {report.accounts} accounts and {report.entries} entries: {found}.")
    return 0 if report.is_clean else 1


def _doctor(settings: Settings, args: argparse.Namespace) -> int:
    from app.doctor import examine, exit_code
    from app.run import database

    with database(settings) as (url, _):
        lines = asyncio.run(_with_house(settings, url, lambda house: examine(house, url)))
    _say(msgspec.json.encode({"lines": lines}).decode() if args.json else "\n".join(map(str, lines)))
    return exit_code(lines)


def _operate(settings: Settings, args: argparse.Namespace) -> int:
    """An operator's verb: what cannot be undone is asked about, on a terminal; elsewhere it needs --yes."""
    from app.admin import commands as operators

    if (asked := operators.question(args.group, args)) is not None:
        _refuse_unless_sure(asked)
    if getattr(args, "what", None) == "-":
        args.what = sys.stdin.readline().strip()

    def work(house: House) -> Awaitable[operators.Answer]:
        desk = operators.Desk(house.db, settings.pepper, house.keyring, house.gateways, _who(), settings.jwt_issuer)
        return operators.run(desk, args.group, args)

    answer: operators.Answer = _in_house(settings, work)
    _say(json.dumps(answer.data) if args.json else answer.text)
    return 0


def _seals_told(report: Report) -> str:
    seals = report.seals
    if seals is None:
        return "Nothing is sealed yet: the jobs of `satmeter run` do that within a minute."
    waiting = (
        ""
        if seals.unsealed_since is None
        else (f", {seals.unsealed} rows since {seals.unsealed_since:%H:%M:%S} UTC wait for theirs")
    )
    return (
        f"Sealed up to {seals.until:%Y-%m-%d %H:%M:%S} UTC at least{waiting}. Head: {seals.head}"
        " (note it elsewhere: `audit --head` tells later whether it still stands)"
    )


def _refuse_unless_sure(asked: str) -> None:
    """Raises InvalidField."""
    from app.kernel.errors import InvalidField

    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidField(f"{asked} Say --yes to do it without being asked")
    print(f"{asked} Go on? [y/N] ", end="", file=sys.stderr, flush=True)
    if sys.stdin.readline().strip().lower() not in ("y", "yes"):
        raise InvalidField("nothing was done")


def _who() -> Admin:
    """Whoever runs the command, as the log names them."""
    from app.kernel.security import Admin

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's number without a name
        name = str(os.getuid())
    return Admin(uuid.UUID(int=0), f"cli:{name}")


def _keys_rotate(settings: Settings, args: argparse.Namespace) -> int:
    from app.autotopup import connect as wallets
    from app.kernel import progress
    from app.kernel.security import Resealed
    from app.keys import issue as keys
    from app.notices import reseal as notices

    async def rotate(house: House) -> tuple[Resealed, Resealed, Resealed]:
        with progress.shown("Sealing anew", "keys") as told:
            of_keys = await keys.reseal_all(house.db, house.keyring, told)
        with progress.shown("Sealing anew", "wallets") as told:
            of_wallets = await wallets.reseal_all(house.db, settings.sealer, told)
        with progress.shown("Sealing anew", "notices") as told:
            return of_keys, of_wallets, await notices.reseal_all(house.db, settings.sealer, told)

    of_keys, of_wallets, of_notices = _in_house(settings, rotate)
    done = "sealed anew" if settings.key_reveal else "forgotten, because KEY_REVEAL is off"
    all_three = of_keys + of_wallets + of_notices
    text = f"{of_keys.done} secrets {done}."
    if of_wallets.done:
        text += f" {of_wallets.done} wallets' secrets sealed anew."
    if of_notices.done:
        text += f" {of_notices.done} of notices' addresses and secrets sealed anew."
    if all_three.unreadable:
        text += f" {all_three.unreadable} do not open with the SEALING_KEYS given and stay as they are; the log tells which."
    _say(json.dumps({"changed": all_three.done, "unreadable": all_three.unreadable}) if args.json else text)
    return 0


def _prices(settings: Settings, args: argparse.Namespace) -> int:
    from app.admin.prices import noting
    from app.kernel import progress
    from app.pricing import commands as prices

    with progress.shown("Storing", "prices") as told:
        answer: prices.Answer = _in_house(
            settings, lambda house: prices.run(house.db, args.verb, args, told, noting(settings.pepper, _who()))
        )
    _say(json.dumps(answer.data) if args.json else answer.text)
    return 0


_COUNTED: Final = {"export": ("Exporting", "calls"), "rebuild": ("Summing again", "accounts")}


def _usage(settings: Settings, args: argparse.Namespace) -> int:
    """With the owner's connection: the service's own role may not drop what was written."""
    from app.activity import commands as usage

    return _as_owner(settings, args, lambda db, told, reads: usage.run(db, args.verb, args, told, reads))


def _entries(settings: Settings, args: argparse.Namespace) -> int:
    from app.audit import commands as entries

    return _as_owner(
        settings, args, lambda db, told, reads: entries.run(db, settings.pepper, args.verb, args, told, reads)
    )


def _as_owner(
    settings: Settings, args: argparse.Namespace,
    does: Callable[[Database, Told, Database | None], Awaitable[Answer]],
) -> int:  # fmt: skip
    from app.kernel import progress
    from app.kernel.db import Database
    from app.run import bring_to_head, database
    from app.wiring import standby

    async def work(url: str) -> Answer:
        db = Database(url, pool_size=2, role=None, pooler=settings.database_pooler)
        reads = standby(settings, db, role=None)
        await db.open()
        try:
            with progress.shown(*_COUNTED.get(args.verb, ("Working", "steps"))) as told:
                return await does(db, told, reads)
        finally:
            if reads is not None:
                await reads.close()
            await db.close()

    with database(settings) as (url, _):
        bring_to_head(settings, url, lambda _: None)
        answer = asyncio.run(work(url))
    _say(json.dumps(answer.data) if args.json else answer.text)
    return 0


def _serve(settings: Settings, args: argparse.Namespace) -> int:
    from app.run import serve

    serve(args.role, settings)
    return 0


def _gateway(settings: GatewaySettings, args: argparse.Namespace) -> int:
    from app.run import serve_gateway

    serve_gateway(settings)
    return 0


def _in_house(settings: Settings, work: Callable[[House], Awaitable[Any]]) -> Any:
    """Do something with the database, whether or not a server is running on it."""
    from app.run import bring_to_head, database

    with database(settings) as (url, _):
        bring_to_head(settings, url, lambda _: None)
        return asyncio.run(_with_house(settings, url, work))


async def _with_house(settings: Settings, url: str, work: Callable[[House], Awaitable[Any]]) -> Any:
    from app.wiring import build

    house = build(settings, url)
    await house.db.open()
    try:
        return await work(house)
    finally:
        await house.close()
