"""Every refusal the service can give: one family, each class knows its HTTP status and stable code.

    AppError
    ├─ MalformedJson, MalformedHeader                                   400
    ├─ InvalidApiKey, InvalidCreditId, InvalidToken, InvalidSignature   401
    ├─ InsufficientBalance, KeyLimitExceeded, InvalidChallenge          402
    ├─ MissingScope, ModelNotAllowed, AccountFrozen                     403
    ├─ NotFound, InvoiceNotFound, KeyNotFound, HoldNotFound             404
    ├─ IdempotencyKeyReuse, IdempotencyInProgress, RequestIdReuse,
    │  HoldClosed, HoldCaptured, AlreadyRefunded, NameTaken             409
    ├─ BodyTooLarge 413, UnsupportedMediaType                           415
    ├─ InvalidField, AmountOutOfRange, UnsupportedCurrency,
    │  UnknownMethod, ModelNotPriced, WalletSilent, WalletNotUsable     422
    ├─ RateLimitExceeded, FundsHeld                                     429
    └─ PaymentBackendUnavailable, PaymentPending, IssuerUnavailable,
       DatabaseUnavailable                                              503

Verbs raise them; only the HTTP doors render them. A message tells what was asked, what was found and
what would help; a secret never reaches it.
"""

from collections.abc import Mapping
from typing import Any, ClassVar


class AppError(Exception):
    """A refusal with an HTTP status, a stable code, and a sentence for the person who reads it."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "server_error"

    def __init__(
        self,
        message: str = "",
        *,
        param: str | None = None,
        retry_after_seconds: int | None = None,
        metadata: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`headers` are what the refusal bears besides: a challenge that can be paid."""
        self.message = message or (type(self).__doc__ or "").strip().split("\n")[0]
        self.param = param
        self.retry_after_seconds = retry_after_seconds
        self.metadata = dict(metadata) if metadata else None
        self.headers = dict(headers or {})
        super().__init__(self.message)

    def wire(self) -> dict[str, Any]:
        """The `error` object of the wire contract."""
        inner: dict[str, Any] = {"message": self.message, "type": self.type, "code": self.code, "param": self.param}
        metadata = dict(self.metadata or {})
        if self.retry_after_seconds is not None:
            metadata["retry_after"] = self.retry_after_seconds
        return inner | ({"metadata": metadata} if metadata else {})


class MalformedJson(AppError):
    """The request body is not valid JSON."""

    status, code, type = 400, "malformed_json", "invalid_request_error"


class MalformedHeader(AppError):
    """A request header is malformed."""

    status, code, type = 400, "malformed_header", "invalid_request_error"


class InvalidApiKey(AppError):
    """Invalid API key."""

    status, code, type = 401, "invalid_api_key", "authentication_error"


class InvalidCreditId(AppError):
    """Invalid credit id."""

    status, code, type = 401, "invalid_credit_id", "authentication_error"


class InvalidToken(AppError):
    """Invalid token."""

    status, code, type = 401, "invalid_token", "authentication_error"


class InvalidSignature(AppError):
    """The webhook signature does not match its body."""

    status, code, type = 401, "invalid_signature", "authentication_error"


class InsufficientBalance(AppError):
    """Insufficient balance."""

    status, code, type = 402, "insufficient_balance", "insufficient_quota"
    spendable_nusd: int | None = None
    """What a call might cost now, where that is known."""


class KeyLimitExceeded(AppError):
    """This API key has reached its spending limit."""

    status, code, type = 402, "key_limit_exceeded", "insufficient_quota"
    spendable_nusd: int | None = None
    """The same."""


class InvalidChallenge(AppError):
    """This payment's proof was used before; it is good for one request."""

    status, code, type = 402, "invalid_challenge", "insufficient_quota"


class MissingScope(AppError):
    """This credential may not do that."""

    status, code, type = 403, "missing_scope", "permission_error"


class ModelNotAllowed(AppError):
    """This API key may not call that model."""

    status, code, type = 403, "model_not_allowed", "permission_error"


class AccountFrozen(AppError):
    """This account is frozen; ask the operator."""

    status, code, type = 403, "account_frozen", "permission_error"


class NotFound(AppError):
    """There is nothing here."""

    status, code, type = 404, "not_found", "invalid_request_error"


class InvoiceNotFound(AppError):
    """No such top-up."""

    status, code, type = 404, "invoice_not_found", "invalid_request_error"


class KeyNotFound(AppError):
    """No such API key."""

    status, code, type = 404, "key_not_found", "invalid_request_error"


class HoldNotFound(AppError):
    """No such hold."""

    status, code, type = 404, "hold_not_found", "invalid_request_error"


class IdempotencyKeyReuse(AppError):
    """This Idempotency-Key was used with another request; use a new key for a new request."""

    status, code, type = 409, "idempotency_key_reuse", "invalid_request_error"


class IdempotencyInProgress(AppError):
    """A request with this Idempotency-Key is still running; ask again shortly."""

    status, code, type = 409, "idempotency_in_progress", "invalid_request_error"


class RequestIdReuse(AppError):
    """This request_id was used with another request; a request_id is unique for ever."""

    status, code, type = 409, "request_id_reuse", "invalid_request_error"


class HoldClosed(AppError):
    """This hold is closed."""

    status, code, type = 409, "hold_closed", "invalid_request_error"


class HoldCaptured(AppError):
    """This hold has captured what the call cost so far: settle it, or let it expire, and that is charged."""

    status, code, type = 409, "hold_captured", "invalid_request_error"


class AlreadyRefunded(AppError):
    """This charge was refunded before, with another amount; a charge is refunded once."""

    status, code, type = 409, "already_refunded", "invalid_request_error"


class NameTaken(AppError):
    """Another live key of this account has that name."""

    status, code, type = 409, "name_taken", "invalid_request_error"


class BodyTooLarge(AppError):
    """The request body is larger than this route takes: 64 KiB, 1 MiB for reports of many calls, 8 MiB for price files."""

    status, code, type = 413, "body_too_large", "invalid_request_error"


class UnsupportedMediaType(AppError):
    """The request body must be sent as application/json."""

    status, code, type = 415, "unsupported_media_type", "invalid_request_error"


class InvalidField(AppError):
    """A field of the request is not valid."""

    status, code, type = 422, "invalid_field", "invalid_request_error"


class AmountOutOfRange(AppError):
    """The amount is outside the limits of this payment method."""

    status, code, type = 422, "amount_out_of_range", "invalid_request_error"


class UnsupportedCurrency(AppError):
    """This payment method does not take that currency."""

    status, code, type = 422, "unsupported_currency", "invalid_request_error"


class UnknownMethod(AppError):
    """No such payment method."""

    status, code, type = 422, "unknown_method", "invalid_request_error"


class ModelNotPriced(AppError):
    """This model has no price, so it is not sold."""

    status, code, type = 422, "model_not_priced", "invalid_request_error"


class WalletSilent(AppError):
    """The wallet could not be reached over this connection, or did not answer; is it running, and is the URL whole?"""

    status, code, type = 422, "wallet_unreachable", "invalid_request_error"


class WalletNotUsable(AppError):
    """The wallet cannot be used over this connection."""

    status, code, type = 422, "wallet_unsuitable", "invalid_request_error"


class RateLimitExceeded(AppError):
    """Too many requests."""

    status, code, type = 429, "rate_limit_exceeded", "rate_limit_error"


class FundsHeld(AppError):
    """The money is there, but held by requests in flight; ask again shortly."""

    status, code, type = 429, "funds_held", "rate_limit_error"


class PaymentBackendUnavailable(AppError):
    """The payment backend cannot be reached; nothing was changed, ask again shortly."""

    status, code, type = 503, "payment_backend_unavailable", "server_error"


class PaymentPending(PaymentBackendUnavailable):
    """The payment was made and is not credited yet; send the same proof again shortly, and do not pay again."""


class IssuerUnavailable(AppError):
    """The issuer of JWTs cannot be asked for its keys, so nobody can tell whether this one is good; ask again shortly."""

    status, code, type = 503, "issuer_unavailable", "server_error"


class DatabaseUnavailable(AppError):
    """The database cannot be reached; ask again shortly."""

    status, code, type = 503, "database_unavailable", "server_error"
