"""What a route is handed: the request, the parts of the sandbox, and ids from its path."""

from typing import Any, TypeAlias

from litestar import Request
from litestar.di import NamedDependency, Provide
from litestar.params import FromPath

from .backend import Backend
from .outage import Outage
from .wallet import Wallet

Call: TypeAlias = Request[Any, Any, Any]
TheBackend: TypeAlias = NamedDependency[Backend]
TheOutage: TypeAlias = NamedDependency[Outage]
TheWallet: TypeAlias = NamedDependency[Wallet]
Id: TypeAlias = FromPath[str]


def constant(value: object) -> Provide:
    """A dependency that is the same object for every request."""

    def give() -> object:
        return value

    return Provide(give, sync_to_thread=False)
