"""What operators do with accounts: find, show, freeze, close, give another credit id, credit and debit. Each change is an act."""

import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.accounts import accounts
from app.accounts.accounts import OpenedAccount, open_account
from app.admin.acts import write_act
from app.kernel.db import Row, row, rows
from app.kernel.errors import InsufficientBalance, InvalidField, NotFound
from app.kernel.money import usd, usd_text
from app.kernel.reading import uuid_in
from app.kernel.security import Admin, Pepper, canonical_credit_id, is_wellformed, subject_hash
from app.keys.issue import Keyring, newest_keys
from app.ledger.post import post
from app.ledger.statement import statement
from app.ledger.tables import AccountStatus, EntryKind
from app.notices.marks import adjusted
from app.topups.create import list_topups

_MOST_FOUND: Final = 100
_SHOWN: Final = 20
_MAX_NUSD: Final = 2**63 - 1
_PREVIEW: Final = re.compile(r"(sk-\w{3}|jwt-[0-9a-f]{4})(?:…|\.{3})(\w{4})", re.ASCII)
_OF_CREDENTIAL: Final = "SELECT account_id FROM credential WHERE secret_hash = :hash AND kind = :kind AND (ends_at IS NULL OR ends_at > now())"
_SHA256: Final = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_Question = tuple[str, str, dict[str, Any]]
"""What is looked for, the statement that finds whose it is, and its parameters."""
_SUMMARY: Final = """
    SELECT a.id, a.status, a.posted_nusd, a.held_nusd, a.floor_nusd, a.created_at,
           (SELECT count(*) FROM api_key k WHERE k.account_id = a.id AND k.deleted_at IS NULL) AS keys
    FROM account a"""


# --- finding ----------------------------------------------------------------------------------------


async def list_accounts(
    session: AsyncSession, limit: int, before_id: uuid.UUID | None, status: AccountStatus | None = None
) -> list[Row]:
    """A page of the accounts, newest first. `before_id` is where the page before ended."""
    return await rows(
        session,
        f"""{_SUMMARY} WHERE (CAST(:before_id AS uuid) IS NULL OR a.id < :before_id)
              AND (CAST(:status AS text) IS NULL OR a.status = :status)
            ORDER BY a.id DESC LIMIT :limit""",
        before_id=before_id, status=None if status is None else status.value, limit=limit,
    )  # fmt: skip


async def search(session: AsyncSession, pepper: Pepper, asked: str, issuer: str = "") -> list[Row]:
    """Whose is this? Accounts, newest first, each with what it was found by (`matched`).

    By account id, credit id, API key, its masked form, its SHA-256 or its id, by a top-up's id, invoice or address, and by
    a payment's hash or transaction. By the subject of `issuer`'s JWTs, where there is one.
    """
    matched: dict[uuid.UUID, list[str]] = {}
    questions = _questions(pepper, asked.strip())
    if issuer:
        subject = pepper.lookup_subject(subject_hash(issuer, asked.strip()))
        questions.append(("jwt_subject", _OF_CREDENTIAL, {"hash": subject, "kind": "api_key"}))
    for what, statement_, params in questions:
        for found in await rows(session, f"{statement_} LIMIT {_MOST_FOUND}", **params):
            names = matched.setdefault(found["account_id"], [])
            names += [what] * (what not in names)
    if not matched:
        return []
    found_accounts = await rows(session, f"{_SUMMARY} WHERE a.id = ANY(:ids) ORDER BY a.id DESC", ids=list(matched))
    return [each | {"matched": matched[each["id"]]} for each in found_accounts]


def _questions(pepper: Pepper, asked: str) -> list[_Question]:
    """What to look for, by what it looks like: each with the statement that finds it in an index."""
    if (as_id := uuid_in(asked)) is not None:
        by_id: dict[str, Any] = {"id": as_id}
        hashed: dict[str, Any] = {"hash": pepper.lookup(canonical_credit_id(asked) or ""), "kind": "credit_id"}
        return [
            ("account_id", "SELECT id AS account_id FROM account WHERE id = :id", by_id),
            ("credit_id", _OF_CREDENTIAL, hashed),
            ("key_id", "SELECT account_id FROM api_key WHERE id = :id", by_id),
            ("topup_id", "SELECT account_id FROM topup WHERE id = :id", by_id),
        ]
    if preview := _PREVIEW.fullmatch(asked):
        shown = f"{preview[1]}…{preview[2]}"
        return [("key_preview", "SELECT account_id FROM api_key WHERE preview = :preview", {"preview": shown})]
    if is_wellformed(asked, "sk"):
        return [("api_key", _OF_CREDENTIAL, {"hash": pepper.lookup(asked), "kind": "api_key"})]
    questions: list[_Question] = []
    if _SHA256.fullmatch(asked):
        hashed = {"hash": pepper.lookup_hashed(bytes.fromhex(asked)), "kind": "api_key"}
        questions.append(("api_key_hash", _OF_CREDENTIAL, hashed))
    return [*questions, *_of_payments(asked)]


def _of_payments(asked: str) -> list[_Question]:
    """By what a payer has in hand. BTCPay's payment ids: a Lightning payment hash; `txid-vout`; of Monero `txid#…`."""
    escaped = re.sub(r"([\\%_])", r"\\\1", asked)
    payments = """SELECT account_id FROM payment
                  WHERE payment_id = :asked OR payment_id LIKE :with_output OR payment_id LIKE :with_account"""
    return [
        (
            "invoice_id",
            """SELECT i.account_id FROM (SELECT DISTINCT backend FROM topup_invoice) b
               JOIN topup_invoice i ON i.backend = b.backend AND i.invoice_id = :asked""",
            {"asked": asked},
        ),
        ("payment", payments, {"asked": asked, "with_output": f"{escaped}-%", "with_account": f"{escaped}#%"}),
        ("address", "SELECT account_id FROM topup_address WHERE destination = :asked", {"asked": asked}),
        ("payment", "SELECT account_id FROM nwc_attempt WHERE payment_hash = :asked", {"asked": asked}),
    ]


@dataclass(frozen=True, slots=True)
class Shown:
    """One account with its newest keys, top-ups, entries and the holds that are open."""

    account: Row
    keys: Sequence[Row]
    topups: Sequence[Row]
    holds: Sequence[Row]
    entries: Sequence[Row]


async def show(session: AsyncSession, account_id: uuid.UUID) -> Shown:
    """Raises NotFound."""
    account = await row(session, f"{_SUMMARY} WHERE a.id = :id", id=account_id)
    if account is None:
        raise NotFound("No such account")
    holds = await rows(
        session,
        """SELECT id, key_id, service, request_id, model, amount_nusd, captured_nusd, created_at, expires_at FROM hold
           WHERE account_id = :account_id AND state = 'open' ORDER BY expires_at DESC LIMIT :shown""",
        account_id=account_id, shown=_SHOWN,
    )  # fmt: skip
    return Shown(
        account,
        await newest_keys(session, account_id, _SHOWN, 0, include_disabled=True),
        await list_topups(session, account_id, _SHOWN, None),
        holds,
        await statement(session, account_id, limit=_SHOWN),
    )


# --- changing ---------------------------------------------------------------------------------------


async def open_by(session: AsyncSession, keyring: Keyring, pepper: Pepper, admin: Admin) -> OpenedAccount:
    """Open an account for a customer; its secrets are shown now alone."""
    opened = await open_account(session, keyring)
    await write_act(session, pepper, admin, "account.create", str(opened.account_id), after={"status": "active"})
    return opened


async def freeze(session: AsyncSession, pepper: Pepper, admin: Admin, account_id: uuid.UUID, reason: str | None) -> Row:
    """No call of it is allowed any more; what is in flight settles. Raises NotFound, InvalidField for a closed one."""
    return await _set_status(session, pepper, admin, account_id, AccountStatus.FROZEN, "account.freeze", reason)


async def unfreeze(
    session: AsyncSession, pepper: Pepper, admin: Admin, account_id: uuid.UUID, reason: str | None
) -> Row:
    """Its calls are allowed again. Raises NotFound, InvalidField for a closed one."""
    return await _set_status(session, pepper, admin, account_id, AccountStatus.ACTIVE, "account.unfreeze", reason)


async def _set_status(
    session: AsyncSession,
    pepper: Pepper,
    admin: Admin,
    account_id: uuid.UUID,
    status: AccountStatus,
    act: str,
    reason: str | None,
) -> Row:
    before = await accounts.set_status(session, account_id, status)
    await write_act(
        session, pepper, admin, act, str(account_id), reason,
        before={"status": before}, after={"status": status.value},
    )  # fmt: skip
    return await _summary(session, account_id)


async def close(
    session: AsyncSession, keyring: Keyring, pepper: Pepper, admin: Admin, account_id: uuid.UUID, reason: str | None
) -> Row:
    """Raises NotFound, and InvalidField while something is on it."""
    before = await accounts.close(session, keyring, account_id)
    await write_act(
        session, pepper, admin, "account.close", str(account_id), reason,
        before={"status": before}, after={"status": AccountStatus.CLOSED.value},
    )  # fmt: skip
    return await _summary(session, account_id)


async def rotate(
    session: AsyncSession, keyring: Keyring, pepper: Pepper, admin: Admin, account_id: uuid.UUID, reason: str | None
) -> str:
    """The new credit id, which is shown now alone. Raises NotFound, InvalidField for a closed account."""
    rotated = await accounts.rotate_credit_id(session, keyring, account_id, "operator")
    await write_act(session, pepper, admin, "account.rotate", str(account_id), reason)
    return rotated.credit_id


@dataclass(frozen=True, slots=True)
class Adjusted:
    """What an adjustment did, or would do: nano-USD. `reference` is its entry's; None where nothing was done."""

    account_id: uuid.UUID
    amount_nusd: int
    before_nusd: int
    after_nusd: int
    available_nusd: int
    reference: str | None


async def adjust(
    session: AsyncSession,
    pepper: Pepper,
    admin: Admin,
    account_id: uuid.UUID,
    amount_nusd: int,
    reason: str,
    *,
    below_floor: bool = False,
    dry_run: bool = False,
) -> Adjusted:
    """Credit an account, or debit it (negative), as an ordinary entry whose reference names the act.

    A debit leaves what is held and the floor alone unless `below_floor`. `dry_run` refuses what would be refused, and does
    nothing. Raises NotFound, InvalidField for nothing and for more than the books can hold, InsufficientBalance.
    """
    if amount_nusd == 0:
        raise InvalidField("amount_usd must be more than 0", param="amount_usd")
    account = await accounts.lock(session, account_id)
    if account["status"] == AccountStatus.CLOSED and amount_nusd > 0:
        raise InvalidField("this account is closed, and nobody can spend from it", param="account_id")
    before_nusd: int = account["posted_nusd"]
    after_nusd = before_nusd + amount_nusd
    if abs(after_nusd) > _MAX_NUSD:
        raise InvalidField("The amount would take the account past what the books can hold", param="amount_usd")
    left_nusd = after_nusd - account["held_nusd"] - account["floor_nusd"]
    if amount_nusd < 0 and left_nusd < 0 and not below_floor:
        _refuse_debit(-amount_nusd, max(0, left_nusd - amount_nusd))
    reference = None
    if not dry_run:
        act = await write_act(
            session, pepper, admin, "account.credit" if amount_nusd > 0 else "account.debit", str(account_id), reason,
            amount_nusd, before={"balance_usd": usd_text(before_nusd)}, after={"balance_usd": usd_text(after_nusd)},
        )  # fmt: skip
        reference = f"act/{act}"
        await post(session, account_id, EntryKind.ADJUSTMENT, reference, "adjustment", amount_nusd)
        await adjusted(session, account_id, amount_nusd)
    return Adjusted(account_id, amount_nusd, before_nusd, after_nusd, max(0, left_nusd), reference)


def _refuse_debit(amount_nusd: int, available_nusd: int) -> None:
    raise InsufficientBalance(
        f"A debit of ${usd_text(amount_nusd)} is more than the ${usd_text(available_nusd)} that may be spent of this account;"
        " below_floor takes it all the same",
        metadata={
            "limit_source": "account_balance", "required_usd": usd(amount_nusd), "available_usd": usd(available_nusd),
            "shortfall_usd": usd(amount_nusd - available_nusd),
        },
    )  # fmt: skip


async def _summary(session: AsyncSession, account_id: uuid.UUID) -> Row:
    found = await row(session, f"{_SUMMARY} WHERE a.id = :id", id=account_id)
    assert found is not None
    return found
