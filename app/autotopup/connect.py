"""A wallet's connection: made after a probe, read, paused, resumed, removed; its secret kept sealed."""

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final, LiteralString

from sqlalchemy.ext.asyncio import AsyncSession

from app.autotopup.rules import (
    LIFTED_BY_A_TOPUP,
    PAUSES,
    REFUSALS_TO_PAUSE,
    SILENCE_TO_PAUSE,
    after_silence,
    back_off,
)
from app.autotopup.wallet import (
    Connection,
    Encryption,
    Probe,
    Wallets,
    WalletUnreachable,
    WalletUnsuitable,
    WalletUri,
)
from app.kernel.db import Database, Row, new_id, row, rows
from app.kernel.errors import NotFound, RateLimitExceeded, WalletNotUsable, WalletSilent
from app.kernel.logs import log
from app.kernel.progress import Told, nobody
from app.kernel.security import Resealed, Sealer, UnsealError
from app.kernel.shards import everywhere
from app.notices.tell import tell

_RESEAL_AT_ONCE: Final = 500
_CONNECTING: Final[set[uuid.UUID]] = set()


@dataclass(frozen=True, slots=True)
class Wish:
    """When to top up, by how much, and the most in any 24 hours (None: the number of attempts alone limits it)."""

    threshold_nusd: int
    topup_amount_nusd: int
    max_per_day_nusd: int | None


async def probe(wallets: Wallets, uri: WalletUri) -> Probe:
    """Ask the wallet what it is. Raises WalletSilent, WalletNotUsable."""
    try:
        found = await wallets.probe(uri)
    except WalletUnreachable:
        raise WalletSilent(param="nwc_url") from None
    except WalletUnsuitable as error:
        raise WalletNotUsable(str(error), param="nwc_url") from None
    if "pay_invoice" not in found.methods:
        raise WalletNotUsable("The wallet does not offer pay_invoice over this connection", param="nwc_url")
    return found


@contextmanager
def alone(account_id: uuid.UUID) -> Iterator[None]:
    """One wallet is connected at a time: a probe takes as long as a stranger's relay likes, and threads of ours.

    Raises RateLimitExceeded. Each process counts its own.
    """
    if account_id in _CONNECTING:
        raise RateLimitExceeded("A wallet is being connected already; wait until that is done", retry_after_seconds=5)
    _CONNECTING.add(account_id)
    try:
        yield
    finally:
        _CONNECTING.discard(account_id)


async def connect(
    session: AsyncSession,
    sealer: Sealer,
    account_id: uuid.UUID,
    uri: WalletUri,
    found: Probe,
    wish: Wish,
    now: datetime,
) -> Row:
    """Store a probed wallet, in place of another if there is one, and have charges tell when the balance is low.

    An attempt that the other wallet was asked to pay stays open, and is waited for; one that it was not asked to pay
    is given up by its driver, who sees another connection.
    """
    made = await row(
        session,
        """INSERT INTO nwc_connection (account_id, id, wallet_pubkey, relays, lud16, encryption, can_look_up, sealed_secret,
                                       threshold_nusd, topup_amount_nusd, max_per_day_nusd, created_at)
           VALUES (:account_id, :id, :pubkey, :relays, :lud16, :encryption, :can_look_up, :sealed,
                   :threshold_nusd, :topup_amount_nusd, :max_per_day_nusd, :now)
           ON CONFLICT (account_id) DO UPDATE SET id = EXCLUDED.id, wallet_pubkey = EXCLUDED.wallet_pubkey,
               relays = EXCLUDED.relays, lud16 = EXCLUDED.lud16, encryption = EXCLUDED.encryption,
               can_look_up = EXCLUDED.can_look_up, sealed_secret = EXCLUDED.sealed_secret,
               threshold_nusd = EXCLUDED.threshold_nusd, topup_amount_nusd = EXCLUDED.topup_amount_nusd,
               max_per_day_nusd = EXCLUDED.max_per_day_nusd, created_at = EXCLUDED.created_at, pause = NULL, refusals = 0,
               refused_at = NULL, silent_since = NULL, not_before = NULL
           RETURNING *""",
        account_id=account_id, id=new_id(), pubkey=uri.pubkey, relays=list(uri.relays), lud16=uri.lud16,
        encryption=found.encryption.value, can_look_up="lookup_invoice" in found.methods,
        sealed=sealer.seal(uri.secret.encode(), sealed_as(account_id)), threshold_nusd=wish.threshold_nusd,
        topup_amount_nusd=wish.topup_amount_nusd, max_per_day_nusd=wish.max_per_day_nusd, now=now,
    )  # fmt: skip
    assert made is not None
    await _tell_when_low(session, account_id, wish.threshold_nusd)
    return made


async def disconnect(session: AsyncSession, account_id: uuid.UUID) -> None:
    """Forget the wallet and its secret at once; what it was asked to pay is waited for at the payment backend alone.

    Raises NotFound without a connection.
    """
    gone = await row(
        session, "DELETE FROM nwc_connection WHERE account_id = :account_id RETURNING 1 AS gone", account_id=account_id
    )
    if gone is None:
        raise NotFound("No wallet is connected")
    await _tell_when_low(session, account_id, None)


async def find(session: AsyncSession, account_id: uuid.UUID) -> Row | None:
    return await row(session, "SELECT * FROM nwc_connection WHERE account_id = :account_id", account_id=account_id)


async def lock(session: AsyncSession, account_id: uuid.UUID) -> Row | None:
    """The connection, ours until the transaction ends. It is locked before attempts and the account, by everybody."""
    return await row(
        session, "SELECT * FROM nwc_connection WHERE account_id = :account_id FOR UPDATE", account_id=account_id
    )


async def low_accounts(db: Database, now: datetime, limit: int = 500) -> list[uuid.UUID]:
    """Accounts below their threshold that may be topped up: the safety net under what charges tell."""
    found = await everywhere(db, {"account_id": "uuid"}, _LOW, {"now": now, "limit": limit})
    return [each["account_id"] for each in found]


_LOW: Final[LiteralString] = """
SELECT c.account_id FROM nwc_connection c JOIN account a ON a.id = c.account_id
WHERE c.pause IS NULL AND a.posted_nusd < c.threshold_nusd AND a.status = 'active' AND (c.not_before IS NULL OR c.not_before <= %(now)s)
  AND NOT EXISTS (SELECT 1 FROM nwc_attempt n WHERE n.account_id = c.account_id AND n.closed_at IS NULL)
LIMIT %(limit)s
"""


# --- what attempts tell about a wallet --------------------------------------------------------------
# Each takes the connection as `lock` gave it, and is called for the connection that the attempt was made with.


async def note_refusal(session: AsyncSession, connection: Row, pause: str | None, now: datetime) -> None:
    """One more refusal in a row: leave the wallet alone for a while, or altogether."""
    refusals = connection["refusals"] + 1
    if pause is None and refusals >= REFUSALS_TO_PAUSE:
        pause = "refusals"
    await row(
        session,
        """UPDATE nwc_connection SET refusals = :refusals, refused_at = :now, not_before = :not_before, silent_since = NULL
           WHERE account_id = :account_id""",
        refusals=refusals, now=now, not_before=now + back_off(refusals), account_id=connection["account_id"],
    )  # fmt: skip
    told = {
        "refusals": refusals,
        "next_attempt_at": now + back_off(refusals),
        "wallet_pubkey": connection["wallet_pubkey"],
    }
    await tell(session, connection["account_id"], "autotopup.refused", told)
    log.warning("autotopup.refused", account_id=str(connection["account_id"]), attempts=refusals)
    if pause is not None:
        await stop(session, connection, pause, now)


async def note_silence(session: AsyncSession, connection: Row, since: datetime, now: datetime) -> None:
    """An attempt without any answer: no refusal, but a day of it is enough."""
    since = min(connection["silent_since"] or since, since)
    await row(
        session,
        """UPDATE nwc_connection SET silent_since = :since, not_before = :not_before WHERE account_id = :account_id""",
        since=since, not_before=now + after_silence(now - since), account_id=connection["account_id"],
    )  # fmt: skip
    if now - since >= SILENCE_TO_PAUSE:
        await stop(session, connection, "silence", now)


async def note_answer(session: AsyncSession, connection: Row) -> None:
    await row(
        session,
        "UPDATE nwc_connection SET silent_since = NULL WHERE account_id = :account_id AND silent_since IS NOT NULL",
        account_id=connection["account_id"],
    )


async def wait(session: AsyncSession, connection: Row, until: datetime) -> None:
    """Begin no attempt before then."""
    await row(
        session,
        "UPDATE nwc_connection SET not_before = :until WHERE account_id = :account_id",
        until=until, account_id=connection["account_id"],
    )  # fmt: skip


async def learn_encryption(session: AsyncSession, connection: Row, encryption: Encryption) -> None:
    await row(
        session,
        "UPDATE nwc_connection SET encryption = :encryption WHERE account_id = :account_id AND id = :id",
        encryption=encryption.value, account_id=connection["account_id"], id=connection["id"],
    )  # fmt: skip


async def stop(session: AsyncSession, connection: Row, pause: str, now: datetime) -> None:
    """Make no more attempts, for a reason of PAUSES that the owner can read."""
    assert pause in PAUSES
    await row(
        session,
        "UPDATE nwc_connection SET pause = :pause, refused_at = :now WHERE account_id = :account_id",
        pause=pause, now=now, account_id=connection["account_id"],
    )  # fmt: skip
    await _tell_when_low(session, connection["account_id"], None)
    told = {"code": pause, "reason": PAUSES[pause], "wallet_pubkey": connection["wallet_pubkey"]}
    await tell(session, connection["account_id"], "autotopup.paused", told)
    log.warning("autotopup.paused", account_id=str(connection["account_id"]), code=pause)


async def resume(session: AsyncSession, connection: Row) -> None:
    """A top-up settled: whatever was counted against the wallet is forgotten."""
    await row(
        session,
        """UPDATE nwc_connection SET pause = NULL, refusals = 0, refused_at = NULL, silent_since = NULL, not_before = NULL
           WHERE account_id = :account_id""",
        account_id=connection["account_id"],
    )
    await _tell_when_low(session, connection["account_id"], connection["threshold_nusd"])


async def resumable(session: AsyncSession) -> list[uuid.UUID]:
    """Accounts that were topped up, by whatever means, since their wallet refused or fell silent."""
    found = await rows(session, f"SELECT account_id FROM nwc_connection c WHERE {_IS_RESUMABLE}")
    return [each["account_id"] for each in found]


async def is_resumable(session: AsyncSession, connection: Row) -> bool:
    """The same for one connection, as `lock` gave it."""
    found = await row(
        session,
        f"SELECT 1 AS is_so FROM nwc_connection c WHERE account_id = :account_id AND {_IS_RESUMABLE}",
        account_id=connection["account_id"],
    )
    return found is not None


# Since when something counts against a wallet: its last refusal or pause, else the silence that began then.
_SINCE: Final = "coalesce(c.refused_at, c.silent_since)"
# The newest one alone is read, from an index: topups are many, and were this a join, all of them might be read.
_IS_RESUMABLE: Final = f"""(c.pause IS NULL OR c.pause IN ({", ".join(f"'{name}'" for name in sorted(LIFTED_BY_A_TOPUP))}))
    AND {_SINCE} IS NOT NULL
    AND (SELECT max(t.settled_at) FROM topup t WHERE t.account_id = c.account_id AND t.credited_nusd > 0) > {_SINCE}"""


async def _tell_when_low(session: AsyncSession, account_id: uuid.UUID, threshold_nusd: int | None) -> None:
    """Have every charge compare the balance after it with this; the hot path reads nothing but its own row."""
    await row(
        session, "UPDATE account SET low_nusd = :low WHERE id = :id", low=threshold_nusd, id=account_id
    )  # fmt: skip


# --- the secret -------------------------------------------------------------------------------------


def opened(sealer: Sealer, connection: Row) -> Connection:
    """The connection ready for use. Raises UnsealError."""
    secret = sealer.open(connection["sealed_secret"], sealed_as(connection["account_id"])).decode()
    uri = WalletUri(connection["wallet_pubkey"], tuple(connection["relays"]), secret, connection["lud16"])
    return Connection(uri, Encryption(connection["encryption"]))


async def reseal_all(db: Database, sealer: Sealer, told: Told = nobody) -> Resealed:
    """Seal every wallet's secret under the newest key; one that does not open stays as it is."""
    total = Resealed()
    last: uuid.UUID | None = uuid.UUID(int=0)
    while last is not None:
        some, last = await db.transaction(partial(_reseal_some, sealer=sealer, after=last))
        total += some
        told(total.done, None)
    return total


async def _reseal_some(session: AsyncSession, sealer: Sealer, after: uuid.UUID) -> tuple[Resealed, uuid.UUID | None]:
    """Some accounts behind `after`, and the last of them: None when there are no more."""
    stale = await rows(
        session,
        f"""SELECT account_id, sealed_secret FROM nwc_connection
            WHERE account_id > :after AND NOT starts_with(sealed_secret, :current)
            ORDER BY account_id LIMIT {_RESEAL_AT_ONCE}""",
        current=f"{sealer.current_id}.", after=after,
    )  # fmt: skip
    done = 0
    for each in stale:
        name = sealed_as(each["account_id"])
        try:
            secret = sealer.open(each["sealed_secret"], name)
        except UnsealError:
            log.error("autotopup.secret_unreadable", account_id=str(each["account_id"]))
            continue
        await row(
            session,
            """UPDATE nwc_connection SET sealed_secret = :sealed
               WHERE account_id = :account_id AND sealed_secret = :before""",
            sealed=sealer.seal(secret, name), account_id=each["account_id"], before=each["sealed_secret"],
        )  # fmt: skip
        done += 1
    return Resealed(done, len(stale) - done), stale[-1]["account_id"] if stale else None


def sealed_as(account_id: uuid.UUID) -> str:
    """The name that a wallet's secret is bound to."""
    return f"nwc/{account_id}"
