"""The way out to Nostr relays, over which customers' wallets are asked to pay."""

import asyncio
from typing import Final, Protocol, runtime_checkable

from app.autotopup.wallet import hosts
from app.doctor.lines import Line, fault, ok, warning
from app.kernel.db import rows
from app.kernel.errors import DatabaseUnavailable
from app.wiring import House

_PUBLIC: Final = ("wss://relay.getalby.com/v1", "wss://relay.damus.io")
"""Asked where no wallet is connected yet."""
_MOST_USED: Final = """
    SELECT relay FROM nwc_connection, unnest(relays) AS relay WHERE pause IS NULL
    GROUP BY relay ORDER BY count(*) DESC, relay LIMIT 5"""


@runtime_checkable
class Reaching(Protocol):
    """Wallets that can say whether a relay is there."""

    async def reaches(self, relay: str) -> bool:
        """Never raises."""


async def look(house: House, _: str) -> list[Line]:
    if not house.settings.nwc_auto_topup:
        return [ok("relays", "NWC_AUTO_TOPUP is off: no wallet is asked to pay")]
    wallets = house.wallets
    if not isinstance(wallets, Reaching):
        return [ok("relays", "these wallets need none")]
    try:
        used = [found["relay"] for found in await house.db.transaction(lambda session: rows(session, _MOST_USED))]
    except DatabaseUnavailable:
        used = []
    asked = used or ([f"ws{house.settings.sandbox_url[4:]}/relay"] if house.settings.uses_sandbox else list(_PUBLIC))
    reached = await asyncio.gather(*(wallets.reaches(relay) for relay in asked))
    silent = hosts([relay for relay, is_there in zip(asked, reached, strict=True) if not is_there])
    whose = "that wallets use" if used else "that were tried"
    if len(silent) == len(asked):
        return [fault("relays", f"none of {len(asked)} relays {whose} can be reached: {', '.join(silent)}", "let wss (port 443) out")]  # fmt: skip
    if silent:
        return [warning("relays", f"{len(silent)} of {len(asked)} relays {whose} cannot be reached: {', '.join(silent)}", "their customers' refills wait")]  # fmt: skip
    return [ok("relays", f"{len(asked)} relays {whose} can be reached")]
