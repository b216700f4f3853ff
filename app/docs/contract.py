"""The OpenAPI document: what Litestar finds of each route, completed from its handler.

Who may call, and which errors can come, is read from the names of the handler's dependencies.
"""

import re
from collections.abc import Iterator
from functools import cached_property
from types import NoneType
from typing import Any

import msgspec
from litestar import Response
from litestar.handlers import HTTPRouteHandler
from litestar.openapi.spec import OpenAPI, Schema
from litestar.plugins import OpenAPISchemaPlugin, ReceiveRoutePlugin
from litestar.routes import BaseRoute, HTTPRoute
from litestar.types import Method
from litestar.typing import FieldDefinition

from app.docs.samples import samples
from app.docs.schema import Schemas, body_of, described, example, meaning, pointed, prose_of
from app.docs.words import (
    BODIES,
    CALLERS,
    CREDENTIALS,
    HEADERS,
    LIFE,
    LIMITS,
    NAMES,
    NOUNS,
    ONCE,
    ONCE_OF_STRANGERS,
    OPENROUTER_TAG,
    REFUSALS,
    TAGS,
    TOGETHER,
    VERDICTS,
    Json,
)
from app.kernel import errors as e
from app.kernel.errors import AppError

_JSON = "application/json"
_NULL = {"type": "null"}


class Routes(OpenAPISchemaPlugin, ReceiveRoutePlugin):
    """Hears of every route and names its operations; keeps Litestar's hands off the structs, which `Schemas` reads."""

    def __init__(self) -> None:
        self.handlers: dict[tuple[str, str], HTTPRouteHandler] = {}

    def receive_route(self, route: BaseRoute) -> None:
        if isinstance(route, HTTPRoute):
            shown = [handler for handler in route.route_handlers if handler.resolve_include_in_schema()]
            self.handlers |= {(route.path_format, method): one for one in shown for method in one.http_methods}

    @staticmethod
    def is_plugin_supported_type(value: Any) -> bool:
        return isinstance(value, type) and issubclass(value, msgspec.Struct)

    def to_openapi_schema(self, field_definition: FieldDefinition, schema_creator: Any) -> Schema:
        return Schema()

    def name(self, handler: HTTPRouteHandler, method: Method, path: list[Any]) -> str:
        """The operation id, for Litestar."""
        parts = [part if isinstance(part, str) else f"{{{part.name}}}" for part in path]
        return self.names["/" + "/".join(parts), method.upper()]

    @cached_property
    def names(self) -> dict[tuple[str, str], str]:
        """Operation ids. Of two that would be the same, the longer path's gets what is other about it as well."""
        found: dict[str, tuple[str, str]] = {}
        for (path, method), handler in sorted(self.handlers.items(), key=lambda one: (len(one[0][0]), one[0])):
            plain = handler.handler_name.strip("_")
            several = len(handler.http_methods) > 1
            name = operation_id(f"{method.lower()}_{plain}" if several else plain, method, path)
            others = iter(path.split("/"))
            while name in found:
                other = re.sub("[^a-z]", "", next(others, "again"))
                name += other.title() if other not in name.lower() else ""
            found[name] = path, method
        return {address: name for name, address in found.items()}


def operation_id(name: str, method: str, path: str) -> str:
    """`create_account` is `createAccount`; `create` under `/keys` is `createKey`, and `list` is `listKeys`.

    A GET without a verb reads, and an operator's operation begins with `admin`.
    """
    if known := NAMES.get(f"{method} {path}"):
        return known
    words = name.split("_")
    if method == "GET" and words[0] not in LIFE:
        words = ["read", *words]
    if len(words) == 1:
        nouns = [part for part in path.strip("/").split("/") if not part.startswith("{") and part != name]
        noun = NOUNS.get(nouns[-1], nouns[-1]) if nouns else ""
        words += re.split(r"[-_.]", noun if name == "list" else noun.removesuffix("s"))
    words = ["admin", *words] if path.startswith("/admin/") else words
    return words[0] + "".join(word.title() for word in words[1:])


class Document(OpenAPI):
    """The document, completed when it is first asked for."""

    routes: Routes
    _completed: Json | None = None

    def to_schema(self) -> Json:
        if self._completed is None:
            self._completed = _completed(super().to_schema(), self.routes)
        return self._completed


def _completed(found: Json, routes: Routes) -> Json:
    schemas = Schemas()
    whole = [(operation, routes.handlers[path, method]) for path, method, operation in operations(found)]
    for operation, handler in whole:
        _complete_request(operation, handler, schemas)
    for operation, handler in whole:
        _complete_answers(operation, handler, schemas)
    for path, method, operation in operations(found):
        operation["x-codeSamples"] = samples(found, path, method, operation)
    used = {tag_of(operation) for operation, _ in whole}
    found["tags"] = [{"name": tag, "description": text} for tag, text in TAGS.items() if tag in used]
    found["components"] = {
        "schemas": dict(sorted(schemas.found.items())),
        "securitySchemes": {name: scheme | {"description": doc} for name, (_, doc, scheme) in CREDENTIALS.items()},
        "headers": HEADERS,
    }
    return found


def _complete_request(operation: Json, handler: HTTPRouteHandler, schemas: Schemas) -> None:
    operation["description"] = prose_of(operation.get("description"))
    needs = set(handler.parsed_fn_signature.parameters)
    who = next((one for one in CALLERS if one in needs), None)
    operation["security"] = list(CALLERS[who][0]) if who else []
    for parameter in operation.setdefault("parameters", []):
        _complete_parameter(parameter, operation["operationId"])
    if "once" in needs:
        operation["parameters"].append(ONCE if who else ONCE_OF_STRANGERS)
    data = handler.parsed_fn_signature.parameters.get("data")
    if data is not None:
        # Litestar takes off what is annotated to a type: what a raw body holds.
        schema = schemas.of(data.raw if data.annotation is msgspec.Raw else data.annotation, is_read=True)
        kinds = [one for one in schema.get("oneOf", [schema]) if one != _NULL]
        shown = BODIES.get(operation["operationId"]) or example(kinds[0], schemas.found)
        kinds = [one | TOGETHER.get(operation["operationId"], {}) for one in kinds]
        media = {"schema": kinds[0] if len(kinds) == 1 else {"oneOf": kinds}, "example": shown}
        operation["requestBody"] = {"required": _NULL not in schema.get("oneOf", ()), "content": {_JSON: media}}


def _complete_parameter(parameter: Json, operation_id: str) -> None:
    kinds = [one for one in parameter["schema"].get("oneOf", [parameter["schema"]]) if one != _NULL]
    name, schema = parameter["name"], kinds[0]
    if "enum" in schema:  # left out, it is absent; `null` is no word of it
        schema = {"type": "string", "enum": [one for one in schema["enum"] if one is not None]}
    parameter["schema"] = schema | (LIMITS.get(f"{operation_id}.{name}") or LIMITS.get(name, {}))
    parameter["description"], shown = described(parameter["name"], operation_id)
    parameter |= {"example": shown} if shown is not None else {}
    for noise in ("deprecated", "allowEmptyValue"):
        parameter.pop(noise, None)


def _complete_answers(operation: Json, handler: HTTPRouteHandler, schemas: Schemas) -> None:
    name, needs = operation["operationId"], set(handler.parsed_fn_signature.parameters)
    always = _headers("X-Request-Id")
    status, answer = next(one for one in operation["responses"].items() if one[0].startswith("2"))
    good = {
        "description": "Created" if status == "201" else "OK",
        "headers": always
        | dict(sorted(answer.get("headers", {}).items()))
        | (_headers("X-Data-As-Of") if "reads" in needs else {})
        | (_headers("Idempotent-Replayed") if "once" in needs else {}),
    }
    if media_type := next(iter(answer.get("content", ())), None):
        told = handler.parsed_fn_signature.return_type
        told = told.inner_types[0] if told.is_subclass_of(Response) and told.inner_types else told
        if told.annotation is not NoneType:
            good["content"] = {media_type: {"schema": schemas.of(told.annotation, is_read=False)}}
    operation["responses"] = {status: good}
    errors = list(dict.fromkeys(refusals(operation, needs, schemas)))
    for bad in sorted({error.status for error in errors}):
        found = [error for error in errors if error.status == bad]
        may_wait = bad in (429, 503) or e.IdempotencyInProgress in found
        operation["responses"][str(bad)] = {
            "description": " ".join(f"`{error.code}`: {meaning(error)}" for error in found),
            "headers": always | (_headers("Retry-After") if may_wait else {}),
            "content": {_JSON: {"schema": {"$ref": f"#/components/schemas/{_error_of(operation)}"}}},
            "x-codes": [error.code for error in found],
        }
    if name == "readReady":
        operation["responses"]["503"] = good | {"description": "Down: it cannot serve."}
    if name in VERDICTS:
        operation["x-verdicts"] = [error.code for error in VERDICTS[name]]


def _error_of(operation: Json) -> str:
    return "OpenRouterError" if tag_of(operation) == OPENROUTER_TAG else "Error"


def refusals(operation: Json, needs: set[str], schemas: Schemas) -> Iterator[type[AppError]]:
    """Every error this operation can answer."""
    sent = [parameter["name"] for parameter in operation["parameters"]]
    if "requestBody" in operation:
        yield from (e.MalformedJson, e.BodyTooLarge, e.UnsupportedMediaType, e.InvalidField)
        sent += pointed(body_of(operation)["schema"], schemas.found).get("properties", ())
    if "once" in needs:
        yield from (e.IdempotencyKeyReuse, e.IdempotencyInProgress, e.RateLimitExceeded)
    if any(parameter["in"] == "query" for parameter in operation["parameters"]):
        yield e.InvalidField
    if needs & {"once", *CALLERS}:  # of two credentials that differ
        yield e.MalformedHeader
    yield from next((errors for who, (_, errors) in CALLERS.items() if who in needs), ())
    for one in (*sent, operation["operationId"]):
        yield from REFUSALS.get(one, ())
    if needs & {"db", *CALLERS}:
        yield e.DatabaseUnavailable
    yield AppError


def _headers(name: str) -> Json:
    return {name: {"$ref": f"#/components/headers/{name}"}}


# --- reading the document -----------------------------------------------------------------------------


def operations(document: Json) -> Iterator[tuple[str, str, Json]]:
    """Path, method and operation: by tag, and in the order in which they are lived through."""
    found = [(path, verb.upper(), item[verb]) for path, item in document["paths"].items() for verb in item]
    tags = list(TAGS)

    def rank(one: tuple[str, str, Json]) -> tuple[int, int]:
        tag, verb = tag_of(one[2]), re.split("[A-Z]", one[2]["operationId"])[0]
        return tags.index(tag) if tag in tags else len(tags), LIFE.index(verb) if verb in LIFE else len(LIFE)

    yield from sorted(found, key=rank)


def tag_of(operation: Json) -> str:
    return str((operation.get("tags") or ["Other"])[0])


def callers(operation: Json) -> list[str]:
    """Who may call it, in words."""
    schemes = [scheme for one in operation["security"] for scheme in one]
    return list(dict.fromkeys(CREDENTIALS[scheme][0] for scheme in schemes)) or ["no credential"]
