"""How a payment backend is set up, for whoever looks after it: facts as the backend tells them, without a judgement."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol, runtime_checkable


@dataclass(frozen=True, slots=True)
class Hook:
    """A webhook of the store. `events` is None for all; `last_code` the status that its last delivery was answered with,
    None where there was none or no answer came."""

    url: str
    is_enabled: bool
    is_repeated: bool
    events: frozenset[str] | None
    last_code: int | None = None
    last_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class BackendSetup:
    """`permissions` of our key, as the backend spells them; `methods` of ours that are enabled; `nodes` of ours that it
    tells about, and whether each is there; `hooks` is None where our key may not look."""

    version: str
    is_synchronized: bool
    store_id: str
    permissions: tuple[str, ...]
    methods: frozenset[str]
    nodes: Mapping[str, bool]
    hooks: tuple[Hook, ...] | None


@runtime_checkable
class Inspectable(Protocol):
    """A backend that can tell how it is set up."""

    async def setup(self) -> BackendSetup:
        """Raises GatewayUnavailable, or GatewayRefused with what our key may not ask."""
