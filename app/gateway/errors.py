"""Every refusal that the gateway gives by itself, and how one is written for OpenAI's and for Anthropic's clients.

Refusal
├─ MalformedJson, MalformedHeader, UpstreamRefused                400 (or the upstream's own)
├─ NoApiKey                                                       401
├─ UnknownPath, UnknownModel, NothingThere                        404
├─ MethodNotAllowed 405, BodyTooLarge 413
├─ InvalidField, PluginUnavailable                                422
├─ UpstreamBusy                                                   429
├─ UpstreamFailed                                                 502
└─ Told                                                           as Satmeter says: 401, 402, 403, 422, 429, 503
"""

from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

from app.client import Denied


class Refusal(Exception):
    """A refusal with an HTTP status, a stable code, and a sentence for the person who reads it."""

    status: int = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.message = message or (type(self).__doc__ or "").strip().split("\n")[0]
        self.param, self.metadata = param, dict(metadata or {})
        self.headers: dict[str, str] = dict(headers or {})
        super().__init__(self.message)

    def wire(self) -> dict[str, Any]:
        """The `error` object as OpenAI's SDKs read it."""
        inner: dict[str, Any] = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        return inner | ({"metadata": self.metadata} if self.metadata else {})


class MalformedJson(Refusal):
    """The request body is not valid JSON."""

    status, code, type = 400, "malformed_json", "invalid_request_error"


class MalformedHeader(Refusal):
    """A request header is malformed."""

    status, code, type = 400, "malformed_header", "invalid_request_error"


class NoApiKey(Refusal):
    """No API key was sent: give one as Authorization: Bearer, x-api-key or api-key."""

    status, code, type = 401, "invalid_api_key", "authentication_error"

    def __init__(self, message: str = "") -> None:
        super().__init__(message, headers={"www-authenticate": "Bearer"})


class UnknownPath(Refusal):
    """There is no such path; see /v1/models for what is served here."""

    status, code, type = 404, "not_found", "invalid_request_error"


class NothingThere(Refusal):
    """There is nothing by that id, or it is somebody else's."""

    status, code, type = 404, "not_found", "invalid_request_error"


class UnknownModel(Refusal):
    """There is no such model here."""

    status, code, type = 404, "model_not_found", "invalid_request_error"


class MethodNotAllowed(Refusal):
    """This path is asked in another way."""

    status, code, type = 405, "method_not_allowed", "invalid_request_error"


class BodyTooLarge(Refusal):
    """The body is larger than 25 MB."""

    status, code, type = 413, "body_too_large", "invalid_request_error"


class InvalidField(Refusal):
    """A field is missing, or holds what it cannot."""

    status, code, type = 422, "invalid_field", "invalid_request_error"


class PluginUnavailable(Refusal):
    """This plugin cannot be had here; nothing was charged."""

    status, code, type = 422, "plugin_unavailable", "invalid_request_error"


class UpstreamRefused(Refusal):
    """The model's provider refused the request."""

    status, code, type = 400, "upstream_refused", "invalid_request_error"


class UpstreamBusy(Refusal):
    """The model's provider is busy; ask again shortly."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class UpstreamFailed(Refusal):
    """The model's provider failed."""

    status, code, type = 502, "upstream_error", "server_error"


class Unpriced(Refusal):
    """What this cost is not known yet; ask again shortly."""

    status, code, type = 503, "billing_unavailable", "server_error"


class Told(Refusal):
    """What Satmeter says the caller should be told, with its own figures and headers."""

    def __init__(self, denied: Denied, low_balance_status: int) -> None:
        details = denied.details
        super().__init__(denied.message, headers={name.lower(): value for name, value in denied.headers.items()})
        self.error, self.kind = denied.error, str(details.get("type", ""))
        self.status = denied.status
        if denied.status == 402 and denied.code == "insufficient_balance":
            self.status = low_balance_status
        if self.status == 429:
            self.headers.setdefault("retry-after", "60")

    def wire(self) -> Any:
        return self.error


def openai_body(refusal: Refusal) -> bytes:
    """`error` for OpenAI's SDKs; `message` and `statusCode` beside it for older clients, `detail` for those of pureai."""
    whole = {"error": refusal.wire(), "message": refusal.message, "statusCode": refusal.status}
    if isinstance(refusal, UpstreamFailed):
        whole["detail"] = refusal.message
    return msgspec.json.encode(whole)


def anthropic_body(refusal: Refusal) -> bytes:
    kind = _ANTHROPIC_TYPES.get(refusal.status, "api_error" if refusal.status >= 500 else "invalid_request_error")
    return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": refusal.message}})


_ANTHROPIC_TYPES: Final = {
    401: "authentication_error", 402: "billing_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
"""Source: docs.anthropic.com, "Errors"."""
