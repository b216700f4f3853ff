"""JSON Schemas from the structs that really read and write the bodies, and from the family of errors."""

import inspect
from collections.abc import Iterable
from types import UnionType
from typing import Any, Final, Union, get_args, get_origin

import msgspec
import msgspec.inspect as mi

from app.docs.words import FIELDS, NULL_IN_ANSWERS, TOGETHER, WITHIN, Json
from app.kernel.errors import AppError
from app.kernel.money import MAX_NUSD, MAX_REPORTED_LENGTH, NUSD_PER_USD

_UUID: Final = "^([0-9a-fA-F]{32}|[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12})$"
_KINDS: Final[dict[type[mi.Type], Json]] = {
    mi.StrType: {"type": "string"}, mi.IntType: {"type": "integer"}, mi.FloatType: {"type": "number"},
    mi.BoolType: {"type": "boolean"}, mi.NoneType: {"type": "null"}, mi.UUIDType: {"type": "string", "format": "uuid", "pattern": _UUID},
    mi.DateTimeType: {"type": "string", "format": "date-time"}, mi.DateType: {"type": "string", "format": "date"},
}  # fmt: skip
_LIMITS: Final = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "multiple_of": "multipleOf",
    "min_length": "minLength", "max_length": "maxLength", "pattern": "pattern",
}  # fmt: skip
_MONEY: Final[Json] = {"type": "number", "format": "decimal"}
_MONEY_READ: Final[Json] = _MONEY | {
    "type": ["number", "string"], "minimum": 0, "maximum": MAX_NUSD // NUSD_PER_USD,
    "pattern": r"^(?=[0-9]{1,12}(\.|$))(0*1000000000(\.0{1,9})?|0*[0-9]{1,9}(\.[0-9]{1,9})?)$",
}  # fmt: skip

_MOMENT_READ: Final = (
    r"^[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})$"
)


_REPORTED: Final[Json] = _MONEY | {
    "type": ["number", "string"], "minimum": 0, "maximum": MAX_NUSD // NUSD_PER_USD, "maxLength": MAX_REPORTED_LENGTH,
    "pattern": r"^(0*1000000000(\.0+)?|0*[0-9]{1,9}(\.[0-9]+)?|[0-9]+(\.[0-9]+)?[eE][+-]?[0-9]+)$",
}  # fmt: skip


class Schemas:
    """Makes schemas, and keeps those of the structs by name in `found`.

    A struct that is read takes money as text too and may leave defaults out; ask for what is read first.
    """

    def __init__(self) -> None:
        self.found: Json = {"Error": _error_schema(), "OpenRouterError": _openrouter_error_schema()}

    def of(self, kind: Any, *, is_read: bool) -> Json:
        # Asked for the whole union at once, msgspec would refuse one that it could not read, such as a verdict.
        kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        return _union([self._of(mi.type_info(one), is_read=is_read) for one in kinds])

    def _of(self, kind: mi.Type, *, is_read: bool) -> Json:
        match kind:
            case mi.Metadata(extra={"holds": held}):  # read as it is, and looked into later
                return self.of(held, is_read=is_read)
            case mi.Metadata(extra={"reported": True}) if is_read:
                return dict(_REPORTED)
            case mi.Metadata(type=inner):
                return self._of(inner, is_read=is_read)
            case mi.StructType(cls=cls):
                if cls.__name__ not in self.found:
                    self.found[cls.__name__] = {}  # a struct may hold itself
                    self.found[cls.__name__] |= self._struct(kind, is_read=is_read)
                return {"$ref": f"#/components/schemas/{cls.__name__}"}
            case mi.UnionType(types=types):
                return _union([self._of(one, is_read=is_read) for one in types])
            case mi.CollectionType(item_type=item, min_length=least, max_length=most):
                items = {"type": "array", "items": self._of(item, is_read=is_read)}
                limits = {"minItems": least, "maxItems": most}
                return items | {word: limit for word, limit in limits.items() if limit is not None}
            case mi.DictType(value_type=value):
                return {"type": "object", "additionalProperties": self._of(value, is_read=is_read) or True}
            case mi.LiteralType(values=values):
                return _one_of(values)
            case mi.EnumType(cls=enum):
                return _one_of([one.value for one in enum])
            case mi.DateTimeType(tz=True) if is_read:
                return _KINDS[mi.DateTimeType] | {"pattern": _MOMENT_READ}
            case mi.RawType():
                return dict(_MONEY_READ if is_read else _MONEY)
            case _:
                limits = {word: getattr(kind, name, None) for name, word in _LIMITS.items()}
                return _KINDS.get(type(kind), {}) | {
                    # `\Z` is Python's alone; JSON Schema reads JavaScript's patterns.
                    word: limit.replace(r"\Z", "$") if isinstance(limit, str) else limit
                    for word, limit in limits.items()
                    if limit is not None
                }

    def _struct(self, info: mi.StructType, *, is_read: bool) -> Json:
        struct, config = info.cls, info.cls.__struct_config__
        required, properties = [], {}
        for field in info.fields:
            name = field.encode_name
            schema = self._of(field.type, is_read=is_read)
            if schema.get("format") == "decimal" and _may_be_null(struct, field, is_read=is_read):
                schema["type"] = [*([schema["type"]] if isinstance(schema["type"], str) else schema["type"]), "null"]
            schema |= WITHIN.get(f"{struct.__name__}.{name}", {}) if is_read else {}
            schema["description"], shown = described(name, struct.__name__)
            if shown is not None and not {"enum", "$ref"} & set(schema):
                schema["examples"] = [shown]
            if is_read and isinstance(field.default, str | int):
                schema["default"] = field.default
            properties[name] = schema
            is_always_written = not is_read and field.default is not msgspec.NODEFAULT and not config.omit_defaults
            if field.required or is_always_written:
                required.append(name)
        about = {"description": prose_of(struct.__doc__)} if struct.__doc__ else {}
        closed = {"additionalProperties": False} if config.forbid_unknown_fields else {}
        together = TOGETHER.get(struct.__name__, {}) if is_read else {}
        return {"type": "object", "properties": properties, "required": required} | closed | about | together


def described(name: str, struct: str = "") -> tuple[str, Any]:
    """What a field or parameter means, and an example or None. Without a word of ours, its name is spelled out."""
    *words, last = name.strip("_").split("_")
    units = {"usd": ", USD", "ms": ", milliseconds"}
    derived = " ".join(words) + units[last] if words and last in units else " ".join((*words, last))
    return FIELDS.get(f"{struct}.{name}") or FIELDS.get(name) or (f"{derived[:1].upper()}{derived[1:]}.", None)


def prose_of(text: str | None) -> str:
    """A docstring as paragraphs without line breaks."""
    return "\n\n".join(part.replace("\n", " ") for part in inspect.cleandoc(text or "").split("\n\n"))


def _may_be_null(struct: type[msgspec.Struct], field: mi.Field, *, is_read: bool) -> bool:
    if is_read:
        return not field.required
    is_null = isinstance(field.default, msgspec.Raw) and bytes(field.default) == b"null"
    return is_null or f"{struct.__name__}.{field.encode_name}" in NULL_IN_ANSWERS


def _union(schemas: list[Json]) -> Json:
    """One schema where it can be said in one: a nullable type is a list of types."""
    others = [schema for schema in schemas if schema != {"type": "null"}]
    if len(others) == len(schemas) == 1 or others == [{}]:
        return others[0]
    if len(others) == 1 and isinstance(others[0].get("type"), str):
        enum = {"enum": [*others[0]["enum"], None]} if "enum" in others[0] else {}
        return others[0] | {"type": [others[0]["type"], "null"]} | enum
    return {"oneOf": schemas}


def _one_of(values: Iterable[Any]) -> Json:
    values = list(values)
    return {"enum": values} | ({"type": "string"} if all(isinstance(value, str) for value in values) else {})


def pointed(schema: Json, schemas: Json) -> Json:
    """The schema itself, or the one that its `$ref` points to."""
    found: Json = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found


def example(schema: Json, schemas: Json) -> Any:
    """A plausible value of this schema."""
    schema = pointed(schema, schemas)
    if "oneOf" in schema:
        return example(schema["oneOf"][0], schemas)
    for name in ("examples", "enum"):
        if name in schema:
            return schema[name][0]
    match schema.get("type"):
        case "object":
            return {name: example(schema["properties"][name], schemas) for name in schema.get("required", ())}
        case "array":
            return [example(schema["items"], schemas)]
        case "string" | "boolean" | "integer" | "number" as kind:
            return {"string": "…", "boolean": True}.get(kind, 1)
    return None


# --- errors -----------------------------------------------------------------------------------------


def every_error() -> dict[str, type[AppError]]:
    """Each code that there is, with its class, by status."""
    found, waiting = {AppError.code: AppError}, [AppError]
    while waiting:
        kinds = waiting.pop().__subclasses__()
        found = {kind.code: kind for kind in kinds} | found  # a kind of an error that bears its code is told as that
        waiting += kinds
    return dict(sorted(found.items(), key=lambda one: (one[1].status, one[0])))


def meaning(error: type[AppError]) -> str:
    return "Something of ours broke." if error is AppError else prose_of(error.__doc__)


def _error_schema() -> Json:
    errors = every_error()
    text = {"type": "string"}
    inner = {
        "message": text | {"description": "What was asked, what was found, and what would help."},
        "type": text | {"enum": sorted({error.type for error in errors.values()}), "description": "The kind of error, as OpenAI names it."},
        "code": text | {"enum": list(errors), "description": "Stable: decide by this."},
        "param": {"type": ["string", "null"], "description": "The field or header at fault."},
        "metadata": {
            "type": "object", "additionalProperties": True,
            "description": "More by code, such as `retry_after` in seconds, or `shortfall_usd`.",
        },
    }  # fmt: skip
    outer = {
        "error": {
            "type": "object", "description": "What OpenAI's clients read.", "properties": inner,
            "required": ["message", "type", "code", "param"],
        },
        "message": text | {"description": "The same message, for older clients."},
        "statusCode": {"type": "integer", "description": "The HTTP status again."},
    }  # fmt: skip
    about = "The one body of every refusal."
    return {"type": "object", "description": about, "properties": outer, "required": list(outer)}


def _openrouter_error_schema() -> Json:
    """The same, as clients of OpenRouter read it."""
    whole = _error_schema()
    inner = whole["properties"]["error"]
    said = inner["properties"]["code"] | {"description": "Stable: decide by this."}
    inner["properties"]["code"] = {"type": "integer", "description": "The HTTP status, as OpenRouter tells it."}
    inner["properties"]["metadata"] |= {"properties": {"error_code": said}, "required": ["error_code"]}
    inner["required"] = [*inner["required"], "metadata"]
    return whole | {"description": "The body of every refusal below /api/v1."}


def body_of(operation: Json) -> Json:
    """Schema and example of the body it takes; for those that take one."""
    media: Json = operation["requestBody"]["content"]["application/json"]
    return media
