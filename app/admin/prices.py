"""How changes of prices stand in the operators' log: the verbs themselves are `app/pricing/commands.py`'s, for both doors."""

from collections.abc import Mapping
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncSession

from app.admin.acts import write_act
from app.kernel.security import Admin, Pepper
from app.pricing.commands import Noted

_OF_IMPORT: Final = ("version", "format", "source_hash", "prices", "models")
_COUNTED: Final = ("added", "removed", "changed")


def noting(pepper: Pepper, admin: Admin) -> Noted:
    """Writes each change down as this operator's."""

    async def note(session: AsyncSession, verb: str, data: Mapping[str, Any]) -> None:
        target, before, after = _told(verb, data)
        await write_act(session, pepper, admin, f"prices.{verb}", target, before=before, after=after)

    return note


def _told(verb: str, data: Mapping[str, Any]) -> tuple[str, dict[str, Any] | None, dict[str, Any]]:
    """What it was done to, what was before, and what is now; of thousands of prices how many."""
    match verb:
        case "import":
            return f"prices/{data['version']}", None, {name: data[name] for name in _OF_IMPORT}
        case "activate":
            counts = {name: len(data[name]) for name in _COUNTED}
            after = {"active": data["active"], "since": data["since"], **counts}
            return f"prices/{data['active']}", {"active": data["before"]}, after
        case "end":
            return f"rule/{data['ended']}", None, {"state": "ended"}
        case _:
            return f"rule/{data['id']}", None, dict(data)
