"""The same stream over trees of keys with several windows: what calls are answered, and what every key and window then has."""

import os
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Final

import psycopg
import pytest

from app.kernel.db import Database
from app.kernel.errors import InvalidField
from app.keys.issue import change
from app.keys.tree import Window as Limit
from app.keys.verify import KeyOwner
from tests.model import Account, Charge, Hold, Key, Window
from tests.test_batches import LONG_AGO
from tests.test_model import KEYRING, Stream

STEPS: Final = int(os.environ.get("KEY_MODEL_STEPS", "20000"))
STEPS_A_SEED: Final = 1_000
LONGEST: Final = timedelta(days=40)
PERIODS: Final = ("day", "week", "month", None)
KEYS: Final[list[dict[str, Any]]] = [
    {}, {"limit_nusd": 9_000}, {"parent": 1, "limit_nusd": 900, "reset_period": "day"}, {"parent": 1},
    {"parent": 2, "limit_nusd": 500, "reset_period": "day", "more": [(None, 2_000)]},
    {"limit_nusd": 700, "reset_period": "day", "more": [("month", 1_500)]},
    {"parent": 5, "scopes": ["spend"], "allowed_models": ["m", "n"]}, {"parent": 6, "limit_nusd": 300, "reset_period": "week"},
    {"parent": 7, "call_limit": 100}, {"parent": 8}, {"parent": 9}, {"parent": 0, "more": [("week", 4_000)], "limit_nusd": 3_000, "reset_period": "day"},
]  # fmt: skip
"""`parent` is another key's place in the list."""


class Trees(Stream):
    keys: ClassVar = [{name: key[name] for name in key if name not in ("parent", "more", "call_limit")} for key in KEYS]

    def __init__(self, seed: int, db: Database, conn: psycopg.Connection[Any]) -> None:
        super().__init__(seed, db, conn)
        for number, account in enumerate(self.accounts):
            for place, wanted in enumerate(KEYS):
                self.plant_in_tree(account, number * len(KEYS), place, wanted)

    def plant_in_tree(self, account: Account, first: int, place: int, wanted: dict[str, Any]) -> None:
        key, more = account.keys[place], wanted.get("more", [])
        key.more = [Window(LONG_AGO, limit, period) for period, limit in more]
        key.call_limit = wanted.get("call_limit")
        if "parent" in wanted:
            key.parent = account.keys[wanted["parent"]]
        above = [self.owners[first + account.keys.index(each)].key_id for each in reversed(key.line()[1:])]
        self.conn.execute(
            """UPDATE api_key SET parent_id = %s, ancestor_ids = %s, call_limit_nusd = %s, more_periods = %s, more_limits_nusd = %s,
                      more_starts = %s, more_usage_nusd = %s WHERE id = %s""",
            [above[-1] if above else None, above or None, key.call_limit, [each.period for each in key.more] or None,
             [each.limit for each in key.more] or None, [each.start for each in key.more] or None, [0] * len(key.more) or None,
             self.owners[first + place].key_id],
        )  # fmt: skip

    async def act_patch(self, owner: KeyOwner, account: Account, key: Key) -> None:
        """Any windows, or only another limit for the first."""
        if not key.is_live:
            return
        periods = [period for period in PERIODS if self.choice.random() < 0.4]
        limits = [self.choice.choice((0, 300, 900, 5_000)) for _ in periods]
        windows = [Limit(period, limit) for period, limit in zip(periods, limits, strict=True)]
        try:
            await self.db.transaction(
                lambda session: change(session, KEYRING, owner.account_id, owner.key_id, {"windows": windows})
            )
        except InvalidField as error:  # and nothing is changed, as every figure says in the end
            if "is more than a key above may spend" not in error.message:
                raise
            return
        starts = self.conn.execute(
            "SELECT max(start) FROM api_key, unnest(array_append(more_starts, window_start)) start WHERE id = %s",
            [owner.key_id],
        ).fetchall()
        limit, period = (limits[0], periods[0]) if windows else (None, None)
        # Where a window is new, the latest start is this moment's.
        account.patch(key, limit, period, starts[0][0], list(zip(periods[1:], limits[1:], strict=True)))

    async def act_yesterday(self, owner: KeyOwner, account: Account, _: Key) -> None:
        """Longer ago than any period lasts: a day alone would end a week's window, and leave its calls in this week."""
        for table in ("api_key", "hold", "usage"):
            self.conn.execute(
                f"UPDATE {table} SET window_start = window_start - %s WHERE account_id = %s".encode(),
                [LONGEST, owner.account_id],
            )
        self.conn.execute(
            """UPDATE api_key SET more_starts = ARRAY (SELECT start - %s FROM unnest(more_starts) start)
               WHERE account_id = %s AND more_starts IS NOT NULL""",
            [LONGEST, owner.account_id],
        )
        dated: list[Key | Hold | Charge] = [*account.keys, *account.holds.values(), *account.charges.values()]
        for each in dated:
            each.window -= LONGEST
        for window in (window for key in account.keys for window in key.more):
            window.start -= LONGEST

    def same_rows(self) -> None:
        """Every figure of every window, and when each call began; then all else, which is compared to the second there."""
        now = datetime.now(UTC)
        for number, account in enumerate(self.accounts):
            for place, key in enumerate(account.keys):
                owner = self.owners[number * len(self.keys) + place]
                [found] = self.conn.execute(
                    """SELECT more_periods, more_limits_nusd, meter_more_starts(k, now()), meter_more_spent(k, now())
                       FROM api_key k WHERE id = %s""",
                    [owner.key_id],
                ).fetchall()
                starts = [window.start_at(now) for window in key.more]
                spent = [account.spent_since(key, start) for start in starts]
                told = [window.period for window in key.more], [window.limit for window in key.more], starts, spent
                assert [each or [] for each in found] == list(told), (place, key)
            self.as_the_database_has_them(account, number)
        super().same_rows()

    def as_the_database_has_them(self, account: Account, number: int) -> None:
        """A call below other keys began when the database says so, within the time that its answer took."""
        of = {"id": self.ids(account)}
        begun: dict[str, list[Hold | Charge]] = {}
        for calls in (account.holds, account.charges):
            for request_id, call in calls.items():
                begun.setdefault(request_id, []).append(call)
        for table in ("hold", "usage"):
            for request_id, window_start in self.conn.execute(
                f"SELECT request_id, window_start FROM {table} WHERE account_id = %(id)s".encode(), of
            ).fetchall():
                for call in begun[request_id]:
                    assert abs(call.window - window_start) < timedelta(seconds=20), (request_id, call)
                    call.window = window_start


async def show(seed: int, calls: int, db: Database, conn: psycopg.Connection[Any]) -> Counter[str]:
    stream = Trees(seed, db, conn)
    await stream.run(calls)
    stream.same_rows()
    return stream.verdicts


@pytest.mark.parametrize("seed", range(2))
async def test_what_calls_of_a_tree_are_answered_and_leave_is_what_the_model_predicts(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    verdicts = await show(seed, 300, db, owner_conn)
    assert len(verdicts) > 6, verdicts


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 100 + max(1, STEPS // STEPS_A_SEED)))
async def test_what_a_thousand_calls_of_a_tree_are_answered_and_leave_is_what_the_model_predicts(
    db: Database, owner_conn: psycopg.Connection[Any], seed: int
) -> None:
    verdicts = await show(seed, STEPS_A_SEED, db, owner_conn)
    print(f"\n{verdicts.total()} calls: {dict(verdicts)}", end="")
