"""How the store is set up, and how it can be set up wrongly: what a real operator's BTCPay may have, for whoever plants it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from .errors import Invalid
from .methods import METHODS

MINUTES_MOST = 30 * 24 * 60


class Setup:
    """`permissions` of the API key, each for the one store unless it says otherwise (`unrestricted`, `…:another-store`).

    `disabled` methods are not offered, `offline` ones have no node just now. `bolt11_minutes` is how long a BOLT11 lasts
    whatever its invoice says, as custodial nodes have it.
    """

    def __init__(self, permissions: tuple[str, ...]) -> None:
        self.permissions = permissions
        self.synchronized = True
        self.version = "2.4.1"
        self.disabled: frozenset[str] = frozenset()
        self.offline: frozenset[str] = frozenset()
        self.bolt11_minutes: int | None = None

    def allows(self, permission: str, store_id: str) -> bool:
        """Whether the key may do this in that store."""
        wider = ("unrestricted", "btcpay.store.canmodifystoresettings")
        return any(
            held in (named, f"{named}:{store_id}") for held in self.permissions for named in (permission, *wider)
        )

    def told(self, store_id: str) -> list[str]:
        """As Greenfield lists them."""
        return [held if ":" in held or held == "unrestricted" else f"{held}:{store_id}" for held in self.permissions]

    def change(self, raw: bytes) -> None:
        """What is left out stays. Raises Invalid."""
        try:
            orders = msgspec.json.decode(raw or b"{}", type=_Orders)
        except msgspec.DecodeError as error:
            raise Invalid(("setup", str(error))) from error
        for name, value in msgspec.structs.asdict(orders).items():
            if value is not msgspec.UNSET:
                setattr(self, name, value)

    def view(self) -> Mapping[str, Any]:
        return {
            "permissions": list(self.permissions),
            "synchronized": self.synchronized,
            "version": self.version,
            "disabled": sorted(self.disabled),
            "offline": sorted(self.offline),
            "bolt11_minutes": self.bolt11_minutes,
        }


class _Orders(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be planted."""

    permissions: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    synchronized: bool | msgspec.UnsetType = msgspec.UNSET
    version: str | msgspec.UnsetType = msgspec.UNSET
    disabled: frozenset[str] | msgspec.UnsetType = msgspec.UNSET
    offline: frozenset[str] | msgspec.UnsetType = msgspec.UNSET
    bolt11_minutes: int | None | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        for named in (self.disabled, self.offline):
            if named is not msgspec.UNSET and not named <= set(METHODS):
                raise ValueError(f"there are {', '.join(METHODS)}")
        minutes = self.bolt11_minutes
        if isinstance(minutes, int) and not 1 <= minutes <= MINUTES_MOST:
            raise ValueError(f"bolt11_minutes has 1 to {MINUTES_MOST}, or null")
