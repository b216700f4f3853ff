"""Which methods an address takes, told alike by OPTIONS and by a refusal of another method."""

from collections.abc import Iterable

from litestar import Litestar
from litestar.routes import HTTPRoute


def tell_every_method(app: Litestar) -> None:
    """Litestar makes its answer to OPTIONS with the first handler of an address, and does not hear of the others."""
    for route in app.routes:
        if isinstance(route, HTTPRoute):
            route.methods = with_head(route.methods)  # type: ignore[assignment]
            handler, _ = route.route_handler_map["OPTIONS"]
            if handler.fn.__qualname__.startswith("HTTPRoute.create_options_handler"):
                handler._fn = route.create_options_handler(route.path).fn


def with_head(methods: Iterable[str]) -> set[str]:
    """What takes GET takes HEAD."""
    found = set(methods)
    return found | {"HEAD"} if "GET" in found else found
