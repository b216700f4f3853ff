"""Which path is which row: a path that clients of any seed use, with or without /v1 or /api/v1 before it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from app.client import Denied

Row = Callable[[Any, Any], Awaitable[None]]
"""Answers one exchange of one gateway. Raises Refusal."""
_PREFIXES: Final = ("/api/v1", "/v1", "")


@dataclass(frozen=True, slots=True)
class Route:
    """A row at a path, said without its prefix; `{…}` is one part of a path, `{…*}` all that is left of it."""

    method: str
    path: str
    row: Row
    needs_key: bool = True

    def fits(self, path: str) -> bool:
        mine, theirs = self.path.split("/"), path.split("/")
        if mine[-1].endswith("*}"):
            theirs = [*theirs[: len(mine) - 1], "/".join(theirs[len(mine) - 1 :])]
        return len(mine) == len(theirs) and all(
            part == other or (part.startswith("{") and other != "") for part, other in zip(mine, theirs, strict=True)
        )


class Routes:
    """All of them. Those without a parameter are found by a look-up."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._plain: dict[str, dict[str, Route]] = {}
        self._others = tuple(route for route in routes if "{" in route.path)
        for route in routes:
            if "{" not in route.path:
                for prefix in _PREFIXES:
                    self._plain.setdefault(prefix + route.path, {})[route.method] = route

    def at(self, path: str) -> dict[str, Route]:
        """The rows at a path by their methods; nothing for an unknown path."""
        found = self._plain.get(path)
        if found is not None:
            return found
        bare = next(path.removeprefix(prefix) for prefix in _PREFIXES if path.startswith(prefix + "/") or not prefix)
        return {route.method: route for route in self._others if route.fits(bare)}


EMPTY_BALANCE: Final = Denied.of(
    402,
    msgspec.Raw(
        b'{"message":"Insufficient balance: nothing is left to spend","type":"insufficient_quota",'
        b'"code":"insufficient_balance","param":null,"metadata":{"limit_source":"account_balance"}}'
    ),
    {},
)
"""For what is free, and still only for those who have money."""
