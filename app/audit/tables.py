"""What the auditor remembers: seals over what was written, the runs that made them, and what it found last."""

import uuid
from datetime import datetime

from sqlalchemy import BigInteger, CheckConstraint, DateTime, LargeBinary
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import account_key_of_calls, money, when, words


class Seal(SQLModel, table=True):
    """`count` places of one chain, from `number` on. Append-only.

    A link is a MAC over what stands at its place and the link before it, 16 bytes; `links` are those of all places. In `form` 2, of
    entries, they are 16 bytes of each place's digest, and behind them one link over all that is here.
    `kept` is what is needed of each place when what stood there is gone: a call's own digest, or MAC, in the chain `entries`,
    else what the link says of the row. `account_id` is nil for what is the house's, such as prices.
    """

    __table_args__ = (CheckConstraint("number > 0 AND count > 0", name="seal_has_a_place"),)

    account_id: uuid.UUID = account_key_of_calls()
    chain: str = words(primary_key=True)
    number: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    count: int = money(default=None)
    links: bytes = Field(sa_type=LargeBinary)
    kept: bytes = Field(sa_type=LargeBinary)
    run_id: int = money(default=None)
    form: int = money(default=1)


class SealRun(SQLModel, table=True):
    """One transaction of seals: how many, a digest over them, and a MAC that chains it to the run before. Append-only.

    `until` is the promise: what was written before it and can still be seen was sealed by then. The last run is the head
    of all seals; whoever noted it elsewhere can tell that nothing before it was taken away.
    """

    __tablename__ = "seal_run"

    id: int = Field(sa_type=BigInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    made_at: datetime = when()
    until: datetime = Field(sa_type=DateTime(timezone=True))
    seals: int = money(default=None)
    digest: bytes = Field(sa_type=LargeBinary)
    mac: bytes = Field(sa_type=LargeBinary)


class AuditFinding(SQLModel, table=True):
    """What the continuous audit found of an account when it last looked; none for an account where nothing differs.

    `unexplained` entries have nothing behind them, `oldest_at` is the oldest of them.
    """

    __tablename__ = "audit_finding"

    account_id: uuid.UUID = account_key_of_calls()
    differences: int = money(default=None)
    unexplained: int = money(default=None)
    oldest_at: datetime | None = when(nullable=True)
    found_at: datetime = when()


class AuditWalk(SQLModel, table=True):
    """Where the continuous audit is: the account it looked at last in this round, and how much it has seen.

    `seen_until` is up to when nothing new was left out, in a row `new` when new entries were looked at last; `entries` were seen in this round, `entries_before` in the one before.
    """

    __tablename__ = "audit_walk"

    name: str = words(primary_key=True)
    after: uuid.UUID = Field(sa_type=UUID)
    seen_until: datetime | None = when(nullable=True)
    entries: int = money()
    entries_before: int = money()
    rounds: int = money()
    looked_at: datetime = when()
