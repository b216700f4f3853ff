"""How a query is read: what is not asked for, stands twice or is no value is refused, because silence makes sums wrong."""

import re
from collections.abc import Mapping
from typing import Any, Final, get_args
from uuid import UUID

from litestar.connection import ASGIConnection
from litestar.handlers import BaseRouteHandler
from litestar.params import QueryParameter
from litestar.typing import FieldDefinition

from app.kernel.errors import InvalidField
from app.kernel.reading import uuid_in

LENIENT: Final = re.compile("/$|/(console|operator|webhooks|receipts|docs|openapi.json|llms.txt|metrics|health)(/|$)")
"""Pages, to which programs add what they follow people by; what monitors ask; and webhooks, which a backend must not lose.

Everywhere else a parameter that is misspelt or not known is refused: the answer would be about something else.
"""

EXTRAS: Final[Mapping[str, frozenset[str]]] = {
    **dict.fromkeys(("/v1/models", "/models", "/router/models"), frozenset({"client_version"})),
    "/api/v1/models": frozenset({"client_version", "category", "supported_parameters", "sort"}),
    "/api/v1/keys": frozenset({"workspace_id"}),
}
"""What clients that exist send besides, where leaving it out of account tells them nothing wrong: Codex its version,
OpenRouter's how to sort and sift a list of models that they sift again, and the one workspace that there is."""

_WHOLE_NUMBER: Final = re.compile(r"-?\d{1,18}", re.ASCII)


async def refuse_odd_query(connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
    """A guard, but for gateways' subrequests, whose query may be their client's, and for OPTIONS, which looks at none.

    Raises InvalidField.
    """
    is_asked = connection.scope.get("query_string") and connection.scope.get("method") != "OPTIONS"
    if not is_asked or "gateway" in handler.parsed_fn_signature.parameters:
        return
    known = {
        field.kwarg_definition.name or name: field
        for name, field in handler.parsed_fn_signature.parameters.items()
        if isinstance(field.kwarg_definition, QueryParameter)
    }
    route = connection.scope.get("path_template", "")
    is_lenient, extras = LENIENT.match(route) is not None, EXTRAS.get(route, frozenset())
    given: dict[str, str] = {}
    for name, value in connection.query_params.multi_items():
        if name in known:
            if given.setdefault(name, value) != value:
                raise InvalidField(f"{name} stands twice, and not the same", param=name)
            _check(name, value, known[name])
        elif not is_lenient and name not in extras:
            raise InvalidField(
                f"{name[:100]!r} is no parameter of this; it takes {', '.join(known) or 'none'}", param=name[:100]
            )


def _check(name: str, value: str, field: FieldDefinition) -> None:
    """What would be taken for another value: the library reads `null` as absent, `1e1` as 10 and `{…}` as a UUID."""
    kinds = {field.annotation, *get_args(field.annotation)}
    if value.lower() == "null" or (not value and str in kinds):
        raise InvalidField(f"{name}: {value!r} is no value; leave the parameter out", param=name)
    if int in kinds and not _WHOLE_NUMBER.fullmatch(value):
        raise InvalidField(f"{name} must be a whole number", param=name)
    if UUID in kinds and uuid_in(value) is None:
        raise InvalidField(f"{name} must be a UUID, such as 0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11", param=name)
