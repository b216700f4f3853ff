"""`doctor`: asks the real world whether it is as the settings say, and says in words what is not."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from app.doctor import backends, database, issuer, machine, relays, traffic
from app.doctor.lines import Line, exit_code, fault
from app.kernel.logs import log, where_it_broke
from app.wiring import House

__all__ = ["Line", "examine", "exit_code"]

Look = Callable[[House, str], Awaitable[Sequence[Line]]]
_SECONDS: Final = 45
"""How long one subject may take; whatever it asks has shorter limits of its own."""
_SUBJECTS: Final[dict[str, Look]] = {
    "backend": backends.look,
    "relays": relays.look,
    "jwt": issuer.look,
    "public_url": machine.look_from_outside,
    "machine": machine.look,
    "traffic": traffic.look,
}


async def examine(house: House, url: str) -> tuple[Line, ...]:
    """Everything there is to say, always in the same order; changes nothing but for a small invoice of each method, which
    nobody pays."""
    first = await _looked("database", database.look, house, url)  # alone, because it is timed
    others = await asyncio.gather(*(_looked(name, look, house, url) for name, look in _SUBJECTS.items()))
    return tuple(line for lines in (first, *others) for line in lines)


async def _looked(name: str, look: Look, house: House, url: str) -> Sequence[Line]:
    """One subject that cannot be looked at keeps nobody from the others."""
    try:
        async with asyncio.timeout(_SECONDS):
            return await look(house, url)
    except TimeoutError:
        return [fault(name, f"could not be looked at within {_SECONDS} seconds")]
    except Exception as error:  # noqa: BLE001 - a door
        log.error("doctor.failed", job=name, exc_type=type(error).__name__, where=where_it_broke(error))
        return [fault(name, f"could not be looked at: {type(error).__name__}")]
