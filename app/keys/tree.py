"""What keys have above them: windows side by side, and bounds that a key below another one may not leave."""

import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, rows
from app.kernel.errors import InvalidApiKey, InvalidField
from app.kernel.money import usd_text
from app.keys.verify import SCOPES, narrowed

MOST_ABOVE: Final = 5
"""So many keys may stand above one."""
_ORDER: Final = {"day": 0, "week": 1, "month": 2, None: 3}
PERIOD_WORDS: Final[dict[str | None, str]] = {"day": "daily", "week": "weekly", "month": "monthly", None: "total"}


@dataclass(frozen=True, slots=True)
class Window:
    """A limit and how often it starts anew, None for never; the shorter ones come first."""

    period: str | None
    limit_nusd: int

    def __lt__(self, other: "Window") -> bool:
        return _ORDER[self.period] < _ORDER[other.period]

    def lies_in(self, other: "Window") -> bool:
        """Whether what is spent in one of these is spent in one of those, give or take where they meet."""
        return _ORDER[self.period] <= _ORDER[other.period]


@dataclass(frozen=True, slots=True)
class Above:
    """The keys from the root down to a parent: none of them is exceeded by a key below."""

    keys: Sequence[Row]

    @property
    def chain(self) -> list[uuid.UUID]:
        return [key["id"] for key in self.keys]

    def must_work(self) -> None:
        """Raises InvalidApiKey for one that was revoked, switched off or is over, and InvalidField below too many."""
        if not all(key["works"] for key in self.keys):
            raise InvalidApiKey
        if len(self.keys) > MOST_ABOVE:
            raise InvalidField(f"this key stands below {MOST_ABOVE} others, and none may stand below more")

    def scopes(self) -> list[str] | None:
        return narrowed([key["scopes"] for key in self.keys], SCOPES)

    def unsaid_scopes(self) -> list[str] | None:
        """What a key below is given that asks for no scopes: what its parent may do but make keys."""
        scopes = self.scopes()
        return None if scopes is None else [scope for scope in scopes if scope in SCOPES]

    def refuse_beyond(
        self,
        *,
        windows: Iterable[Window],
        limits_param: str,
        expire_at: datetime | None,
        scopes: Iterable[str] | None,
        allowed_models: Iterable[str] | None,
        call_limit_nusd: int | None,
        requests_per_minute: int | None,
    ) -> None:
        """Raises InvalidField for what is more than a key above has; None asks for nothing of its own."""
        for window in windows:
            self._refuse_wider(window, limits_param)
        self._refuse_more("expire_at", "expire_at", expire_at, str)
        self._refuse_more("call_limit_nusd", "max_usd_per_call", call_limit_nusd, lambda nusd: f"${usd_text(nusd)}")
        self._refuse_more("requests_per_minute", "requests_per_minute", requests_per_minute, str)
        may = self.scopes()
        _refuse_others("scopes", scopes, SCOPES if may is None else may)
        _refuse_others("allowed_models", allowed_models, narrowed([key["allowed_models"] for key in self.keys]))

    def _refuse_wider(self, window: Window, param: str) -> None:
        for key in self.keys:
            for its in windows_of(key):
                if window.lies_in(its) and window.limit_nusd > its.limit_nusd:
                    raise InvalidField(
                        f"${usd_text(window.limit_nusd)} {PERIOD_WORDS[window.period]} is more than a key above may spend:"
                        f" ${usd_text(its.limit_nusd)} {PERIOD_WORDS[its.period]}",
                        param=param,
                    )

    def _refuse_more(self, name: str, param: str, wanted: Any, shown: Any) -> None:
        least = min((key[name] for key in self.keys if key[name] is not None), default=None)
        if wanted is not None and least is not None and wanted > least:
            raise InvalidField(f"{param} may be at most {shown(least)}, as for the keys above", param=param)


def windows_of(key: Row) -> list[Window]:
    """All windows of a key's row."""
    if key["limit_nusd"] is None:
        return []
    more = zip(key["more_periods"] or (), key["more_limits_nusd"] or (), strict=True)
    return [Window(key["reset_period"], key["limit_nusd"]), *(Window(period, limit) for period, limit in more)]


def said_windows(key: Row) -> list[str]:
    """All windows of a key in words, such as "10.5 daily"."""
    return [f"{usd_text(each.limit_nusd)} {PERIOD_WORDS[each.period]}" for each in windows_of(key)]


async def read_above(session: AsyncSession, account_id: uuid.UUID, parent_id: uuid.UUID | None) -> Above | None:
    """None for a root. Raises InvalidApiKey for a parent that is none of the account's."""
    if parent_id is None:
        return None
    found = await rows(
        session,
        """SELECT k.id, k.scopes, k.allowed_models, k.expire_at, k.limit_nusd, k.reset_period, k.more_periods, k.more_limits_nusd,
                  k.call_limit_nusd, k.requests_per_minute,
                  k.deleted_at IS NULL AND k.disabled_at IS NULL AND (k.expire_at IS NULL OR k.expire_at > now()) AS works
           FROM api_key parent, unnest(array_append(parent.ancestor_ids, parent.id)) WITH ORDINALITY up (id, level)
           JOIN api_key k ON k.account_id = :account_id AND k.id = up.id
           WHERE parent.account_id = :account_id AND parent.id = :parent_id ORDER BY up.level""",
        account_id=account_id, parent_id=parent_id,
    )  # fmt: skip
    if not found:
        raise InvalidApiKey
    return Above(found)


def _refuse_others(param: str, wanted: Iterable[str] | None, may: Sequence[str] | None) -> None:
    others = [] if wanted is None or may is None else [word for word in wanted if word not in may]
    if others:
        raise InvalidField(f"{param} may only have what the keys above have: not {', '.join(others)}", param=param)
