"""What only a person can say about the service: the texts, and the tables that no handler can tell.

Nothing here is needed for a new route or field to be documented; a row makes it better.
"""

from typing import Any, Final

from app.kernel import errors as e
from app.kernel.errors import AppError
from app.kernel.pages import MAX_SKIPPED
from app.pricing.catalogue import PriceDropTooLarge, PriceLeapTooLarge
from app.topups.methods import METHODS

Json = dict[str, Any]

WHAT: Final = "Prepaid billing and crypto top-ups for people who sell AI inference."
ABOUT: Final = f"""{WHAT} Open an account with one POST and no e-mail, pay it with Lightning or coins, make API keys with \
spending limits, and call models; the inference proxy asks here before each call and tells afterwards what it cost.

Money is a JSON number in USD unless the field says otherwise: an exact plain decimal, to be read without a binary float. \
It may be sent as a string too. Costs that a proxy reports on `/v1/meter` may have an exponent and any decimals, in at most 40 \
characters: they are rounded to the nearest nano-dollar, and to one where they are less. Times are ISO 8601 UTC, but `created_at` and `expires_at` of top-ups are Unix seconds.

Every answer carries `X-Request-Id`. A POST that takes `Idempotency-Key` has its effect once: the same key and body \
get the first answer again, with `Idempotent-Replayed: true`. A list goes on where it ended with `cursor=` its `next_cursor`. A query parameter that is not known is refused. HEAD is answered \
as GET, and web pages may ask whatever customers ask, unless the operator says whose."""

TAGS: Final[dict[str, str]] = {
    "Accounts": "An account is two secrets and a balance. Start here.",
    "API keys": "Keys that spend from the account, each with its own limits.",
    "Top-ups": "Ask for an invoice, pay it, and see the credit arrive.",
    "Auto top-up": "Let your own Lightning wallet refill the balance when it runs low, over Nostr Wallet Connect.",
    "Notices": "Hear of a low balance, a top-up, a key at its limit: by a webhook signed as Standard Webhooks has it, and by a Nostr"
    " direct message (NIP-17).",
    "Activity": "What was called, what it cost, and why.",
    "Prices": "What is sold, and what a unit of it costs.",
    "OpenRouter": "The same in OpenRouter's words, for its clients: /api/v1 is their base URL, the credit id the management key"
    " (`Authorization: Bearer` or `x-credit-id`). Errors have the status as `code`, and ours in `metadata.error_code`.",
    "Metering": "For inference proxies: hold money before a call, charge it afterwards.",
    "Admin": "For operators. Each act is written to the audit log.",
    "Operations": "For monitoring, and for the payment backend.",
}
OPENROUTER_TAG: Final = "OpenRouter"
LIFE: Final = (
    "list", "create", "ask", "get", "read", "show", "change", "authorize", "settle", "extend", "release", "charge", "refund", "revoke",
)  # fmt: skip
"""Verbs, in the order in which a thing lives through them."""

# --- who calls ------------------------------------------------------------------------------------

CREDENTIALS: Final[dict[str, tuple[str, str, Json]]] = {
    "creditId": (
        "credit id", "Owns the account: may do everything on it. A UUID, shown once when the account is opened.",
        {"type": "apiKey", "in": "header", "name": "x-credit-id"},
    ),
    "apiKey": (
        "API key", "Spends from an account, as far as its limits and scopes go. `sk-…`; `Authorization: Token` works too. Where the operator takes"
        " JWTs of an issuer, one stands for its subject's key (RS256 or ES256, with `exp`).",
        {"type": "http", "scheme": "bearer", "bearerFormat": "sk-…"},
    ),
    "xApiKey": ("API key", "An API key, as some clients send it.", {"type": "apiKey", "in": "header", "name": "x-api-key"}),
    "plainApiKey": ("API key", "An API key, as some clients send it.", {"type": "apiKey", "in": "header", "name": "api-key"}),
    "serviceToken": (
        "service token", "One per inference proxy. `svc-…`, made by the operator.",
        {"type": "http", "scheme": "bearer", "bearerFormat": "svc-…"},
    ),
    "gatewayToken": (
        "service token", "The same, from a gateway that shows its client's key: `svc-…`, then `; id=…` and `; model=…` if it likes.",
        {"type": "apiKey", "in": "header", "name": "X-Service-Token"},
    ),
    "nostrEvent": (
        "Nostr key", "`Nostr <base64>`: an event of NIP-98 for this very request, signed by a key that was bound to the account.",
        {"type": "apiKey", "in": "header", "name": "Authorization"},
    ),
    "adminToken": (
        "admin token", "For operators, as far as its scopes go. `adm-…`, made on the command line, or by another operator.",
        {"type": "http", "scheme": "bearer", "bearerFormat": "adm-…"},
    ),
}  # fmt: skip
_ACCOUNT: Final[tuple[Json, ...]] = ({"apiKey": []}, {"xApiKey": []}, {"plainApiKey": []}, {"creditId": []})
_NO_ACCOUNT: Final = (e.InvalidApiKey, e.InvalidCreditId, e.MissingScope, e.IssuerUnavailable)
CALLERS: Final[dict[str, tuple[tuple[Json, ...], tuple[type[AppError], ...]]]] = {
    "service": (({"serviceToken": []},), (e.InvalidToken,)),
    "gateway": (
        tuple({"gatewayToken": [], key: []} for key in ("apiKey", "xApiKey", "plainApiKey")),
        (e.InvalidToken, e.InvalidApiKey, e.IssuerUnavailable),
    ),
    "admin": (({"adminToken": []},), (e.InvalidToken, e.MissingScope)),
    "owner": (({"creditId": []},), (e.InvalidCreditId, e.MissingScope)),
    "rotating": (({"creditId": []},), (e.InvalidCreditId, e.MissingScope)),
    "manager": (({"creditId": []}, *_ACCOUNT[:3]), _NO_ACCOUNT),
    "key": (
        ({"apiKey": []}, {"xApiKey": []}, {"plainApiKey": []}),
        (e.InvalidApiKey, e.MissingScope, e.IssuerUnavailable),
    ),
    "caller": (_ACCOUNT, _NO_ACCOUNT),
    "nostr": (({"nostrEvent": []}, {}), (e.InvalidToken,)),
    "verifier": ((*_ACCOUNT, {}), _NO_ACCOUNT),
}
"""Who may call, and how others are refused, by the first dependency of these that a handler has.

With `verifier` alone the handler looks for the credential itself, so it may also be in the body.
"""

# --- operations -----------------------------------------------------------------------------------

NAMES: Final[dict[str, str]] = {
    "GET /activity/{charge_id}/explain": "explainCharge",
    "GET /topups": "listTopups",
    "GET /topup/status/{invoice_id}": "readTopup",
    "GET /v1/meter/ext-authz": "authorizeSubrequest",
    "POST /credits/check-or-create": "checkAccount",
    "GET /api/v1/key": "readCurrentKey",
    "GET /api/v1/auth/key": "readAuthKey",
    "POST /nwc-auto-topup/connect": "connectWallet",
    "GET /nwc-auto-topup": "readWallet",
    "DELETE /nwc-auto-topup/connection": "disconnectWallet",
    "GET /nwc-auto-topup/attempts": "listAttempts",
    "POST /v1/meter/events": "reportEvents",
    "POST /webhooks/{backend}": "receiveWebhook",
    "GET /admin/accounts/{account_id}/keys": "adminListKeys",
    "GET /admin/topups": "adminListTopups",
    "GET /admin/topups/unapplied": "adminListUnapplied",
    "POST /admin/accounts/search": "adminSearchAccounts",
    "GET /admin/prices": "adminListVersions",
    "GET /admin/prices/rules": "adminListRules",
    "POST /admin/prices/import": "adminImportPrices",
    "POST /admin/prices/{version}/activate": "adminActivateVersion",
    "GET /admin/prices/{version}/diff": "adminShowDiff",
    "POST /admin/prices/overrides": "adminOverridePrice",
    "POST /admin/prices/markups": "adminMarkupPrices",
    "POST /admin/prices/fees": "adminAskFee",
    "GET /admin/audit": "adminStartAudit",
    "GET /admin/audit-log": "adminListActs",
}
"""Operation ids that the rule in `operation_id` would not find."""

NOUNS: Final = {"meter": "call"}
"""What an operation is about, where the path says it in another word."""

REFUSALS: Final[dict[str, tuple[type[AppError], ...]]] = {
    "amount": (e.AmountOutOfRange,),
    "backend": (e.NotFound,),
    "currency": (e.UnsupportedCurrency,),
    "hold_id": (e.HoldNotFound,),
    "invoice_id": (e.InvoiceNotFound,),
    "key_id": (e.KeyNotFound,),
    "method": (e.UnknownMethod,),
    "token": (e.InvoiceNotFound,),
    "topup_id": (e.InvoiceNotFound,),
    "createAccount": (
        e.InsufficientBalance,
        e.AmountOutOfRange,
        e.UnsupportedCurrency,
        e.PaymentBackendUnavailable,
        e.RateLimitExceeded,
        e.InvalidApiKey,
        e.InvalidCreditId,
        e.InvalidToken,
    ),
    "checkAccount": (e.NotFound,),
    "recoverAccount": (e.RateLimitExceeded,),
    "bindNostrKey": (e.InvalidField, e.NameTaken),
    "unbindNostrKey": (e.InvalidField, e.NotFound),
    "createRecoveryCode": (e.InvalidToken,),
    "removeRecoveryCode": (e.NotFound,),
    "closeAccount": (e.InvalidField,),
    "createKey": (e.NameTaken,),
    "createManagedKey": (e.NameTaken,),
    "changeManagedKey": (e.NameTaken,),
    "key_hash": (e.KeyNotFound,),
    "readGeneration": (e.NotFound,),
    "model_id": (e.NotFound,),
    "changeKey": (e.NameTaken,),
    "createTopup": (e.PaymentBackendUnavailable,),
    "connectWallet": (e.WalletSilent, e.WalletNotUsable, e.AmountOutOfRange, e.UnknownMethod, e.RateLimitExceeded),
    "disconnectWallet": (e.NotFound,),
    "setNotices": (e.RateLimitExceeded,),
    "removeNotices": (e.NotFound,),
    "replaceSecret": (e.NotFound,),
    "sendTest": (e.RateLimitExceeded, e.InvalidField),
    "notice_id": (e.NotFound, e.RateLimitExceeded),
    "claimPayment": (e.InvoiceNotFound, e.RateLimitExceeded, e.PaymentBackendUnavailable),
    "receiveWebhook": (e.InvalidSignature, e.BodyTooLarge),
    "authorizeCall": (e.RequestIdReuse, e.HoldClosed, e.IssuerUnavailable),
    "chargeCall": (e.RequestIdReuse, e.IssuerUnavailable),
    "verifyCall": (e.IssuerUnavailable,),
    "settleCall": (e.InvalidApiKey, e.IssuerUnavailable),
    "releaseCall": (e.HoldClosed, e.HoldCaptured, e.InvalidApiKey, e.IssuerUnavailable),
    "extendCall": (e.HoldClosed,),
    "refundCall": (e.AlreadyRefunded, e.NotFound),
    "reportEvents": (e.HoldNotFound, e.InvalidApiKey, e.ModelNotPriced, e.RequestIdReuse),
    "explainCharge": (e.NotFound,),
    "authorizeSubrequest": (
        e.MalformedHeader,
        e.InsufficientBalance,
        e.InvalidChallenge,
        e.PaymentBackendUnavailable,
        e.KeyLimitExceeded,
        e.MissingScope,
        e.ModelNotAllowed,
        e.AccountFrozen,
        e.RequestIdReuse,
        e.FundsHeld,
    ),
    "account_id": (e.NotFound,),
    "audit_id": (e.NotFound,),
    "rule_id": (e.NotFound,),
    "token_id": (e.NotFound,),
    "version": (e.NotFound,),
    "adminActivateVersion": (PriceDropTooLarge, PriceLeapTooLarge),
    "adminChangeKey": (e.NameTaken,),
    "adminCreateKey": (e.NameTaken,),
    "adminCreateToken": (e.NameTaken,),
    "adminDebitAccount": (e.InsufficientBalance,),
    "adminReconcileTopup": (e.PaymentBackendUnavailable,),
}
"""What is refused because of a field or parameter, or by one operation, beyond what its dependencies refuse."""

_ANY_VERDICT: Final = (
    e.InvalidApiKey, e.InsufficientBalance, e.InvalidChallenge, e.PaymentBackendUnavailable, e.KeyLimitExceeded, e.MissingScope, e.ModelNotAllowed, e.AccountFrozen, e.FundsHeld,
)  # fmt: skip
VERDICTS: Final[dict[str, tuple[type[AppError], ...]]] = {
    "authorizeCall": (*_ANY_VERDICT, e.ModelNotPriced), "verifyCall": _ANY_VERDICT, "chargeCall": (*_ANY_VERDICT, e.ModelNotPriced)
}  # fmt: skip
"""What a proxy is told in a 200, because it is about the proxy's own caller."""

BODIES: Final[dict[str, Json]] = {
    "verifyCall": {"api_key": "sk-…", "model": "openai/gpt-4o"},
    "createTopup": {"amount": 1000, "currency": "SATS"},
    "connectWallet": {
        "nwc_url": "nostr+walletconnect://b889…?relay=wss://relay.example.com&secret=71a8…",
        "threshold_usd": 5,
        "topup_amount_usd": 10,
    },
    "createManagedKey": {"name": "my-app", "limit": 5, "limit_reset": "monthly"},
    "changeManagedKey": {"limit": 10},
    "checkAccount": {"credit_id": "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"},
    "createAccount": {"recovery": True},
    "rotateAccount": {"overlap_seconds": 3600},
    "recoverAccount": {"recovery_code": "3F8KQ-…-9Z2WM", "revoke_keys": True},
    "createRecoveryCode": {"recovery_code": "3F8KQ-…-9Z2WM"},
    "createKey": {"name": "my-app", "usage_limit_usd": 5, "reset_period": "monthly"},
    "changeKey": {"usage_limit_usd": 10},
    "askBalance": {"credit_id": "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"},
    "claimPayment": {"payment_hash": "9f2a…64 hex digits…c1"},
    "authorizeCall": {
        "request_id": "call-1",
        "api_key": "sk-…",
        "model": "openai/gpt-4o",
        "estimate": {"input_tokens": 1200, "max_output_tokens": 500},
        "features": ["web"],
    },
    "settleCall": {
        "hold_id": "…",
        "usage": {"input_tokens": 1200, "cache_read_tokens": 1000, "output_tokens": 300},
        "features_used": ["web"],
    },
    "settleBatch": {"settles": [{"hold_id": "…", "usage": {"input_tokens": 1200, "output_tokens": 300}}]},
    "reportEvents": {
        "specversion": "1.0",
        "id": "call-1",
        "source": "/gateway/eu-1",
        "type": "ai.usage",
        "data": {"hold_id": "…", "usage": {"input_tokens": 1200, "output_tokens": 300}},
    },
    "releaseCall": {"hold_id": "…", "reason": "upstream refused"},
    "extendCall": {"hold_id": "…", "ttl_seconds": 3600, "captured_usd": 0.02},
    "refundCall": {"charge_id": "…", "amount_usd": 0.01, "reason": "the video failed"},
    "chargeCall": {
        "request_id": "call-2",
        "api_key": "sk-…",
        "model": "openai/dall-e-3",
        "usage": {"images": 1},
        "attributes": {"quality": "hd"},
    },
    "adminChangeKey": {"usage_limit_usd": 10},
    "adminCreateKey": {"name": "my-app", "usage_limit_usd": 5, "reset_period": "monthly"},
    "adminCreateToken": {"kind": "admin", "name": "night-shift", "scopes": ["read", "support"]},
    "adminCreditAccount": {"amount_usd": 2.5, "reason": "goodwill for the outage of Monday"},
    "adminDebitAccount": {"amount_usd": 2.5, "reason": "paid back", "dry_run": True},
    "adminSearchAccounts": {"q": "sk-abc…wxyz"},
    "adminActivateVersion": {"allow_drops": True},
    "adminOverridePrice": {"model": "gpt-4o", "dimension": "output", "price_usd": 12, "per_units": 1000000},
    "adminMarkupPrices": {"scope": "provider", "subject": "openai", "factor": 1.2},
    "adminAskFee": {"feature": "web", "price_usd": 0.02},
    "adminImportPrices": {
        "format": "satmeter-prices-1",
        "models": [
            {"model": "m", "provider": "p", "mode": "chat", "usd_per_million": {"input": "0.15", "output": "0.60"}}
        ],
    },
    "adminResolveTopup": {"action": "credit", "reason": "paid late, agreed with the customer", "amount_usd": 4.2},
}
"""Bodies to paste, where the required fields alone would say too little."""

HEADERS: Final[dict[str, Json]] = {
    "X-Request-Id": {
        "description": "The request's id: the caller's own `X-Request-Id` or trace if it sent one.",
        "schema": {"type": "string", "maxLength": 64},
    },
    "X-Data-As-Of": {
        "description": "Where reading is done on a standby (DATABASE_READ_URL): everything until this moment is in the answer.",
        "schema": {"type": "string", "format": "date-time"},
    },
    "Idempotent-Replayed": {
        "description": "There, and `true`, when this is the answer that an earlier request with this key got.",
        "schema": {"const": "true"},
    },
    "Retry-After": {"description": "Seconds to wait before asking again.", "schema": {"type": "integer", "minimum": 0}},
}
ONCE: Final[Json] = {
    "name": "Idempotency-Key", "in": "header", "required": False, "example": "5f0c8a52-6d0e-4b7e-9c55-0f6f3f3f1c11",
    "description": "Makes a repeat harmless: 1-255 visible ASCII characters, new for every new request. Kept at least 24 h.",
    "schema": {"type": "string", "pattern": "^([!#-~]{1,255}|\"[!#-~]{1,255}\")$"},
}  # fmt: skip
ONCE_OF_STRANGERS: Final[Json] = ONCE | {
    "description": ONCE["description"].replace("1-255", "16-255"),
    "schema": {"type": "string", "pattern": '^([!#-~]{16,255}|"[!#-~]{16,255}")$'},
}
"""Where nobody is logged in: somebody else could guess a shorter one."""

# --- fields ---------------------------------------------------------------------------------------

_UUID: Final[Json] = {"format": "uuid", "pattern": "^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$"}


def _in_any_case(word: str) -> str:
    """As a pattern: JSON Schema's have no flags."""
    return "".join(f"[{letter}{letter.upper()}]" for letter in word)


_NOT_NULL: Final = f"(?!{_in_any_case('null')}$)"
_NAME: Final[Json] = {"minLength": 1, "maxLength": 200, "pattern": rf"^{_NOT_NULL}[^\x00-\x1f\x7f]+$"}
_MOMENT: Final[Json] = {
    "pattern": r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,9})?)?(Z|[+-][0-9]{2}:[0-9]{2})?)?$"
}
_DAY: Final[Json] = {"format": "date", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}
LIMITS: Final[dict[str, Json]] = {
    "limit": {"minimum": 1, "maximum": 100}, "listHistory.limit": {"minimum": 1}, "page": {"minimum": 1}, "page_count": {"minimum": 1},
    "offset": {"minimum": 0}, "listHistory.offset": {"minimum": 0, "maximum": MAX_SKIPPED}, "start_date": _MOMENT, "end_date": _MOMENT,
    "date": _DAY, "date_from": _DAY, "date_to": _DAY, "api_key_hash": {"pattern": "^[0-9a-fA-F]{64}$"}, "cursor": {"pattern": f"^{_NOT_NULL}[A-Za-z0-9_-]{{1,1200}}$"}, "from": _MOMENT, "to": _MOMENT,
    "method": {"enum": list(METHODS)}, "key_id": _UUID, "topup_id": _UUID, "account_id": _UUID, "rule_id": _UUID, "token_id": _UUID,
    "adminReadStats.from": _DAY, "adminReadStats.to": _DAY, "api_key_id": _UUID, "mode": {"enum": ["nginx"]},
    "endpoint": _NAME, "listHistory.model": _NAME, "listActivity.model": _NAME,
    "model": {"pattern": rf"^{_NOT_NULL}[\s\S]+$"},
}  # fmt: skip
"""What a parameter may be, where its handler takes any text and looks into it later."""


def _exactly_one(*names: str) -> Json:
    return {"oneOf": [{"required": [name], "properties": {name: _GIVEN}} for name in names]}


_GIVEN: Final[Json] = {"not": {"type": "null"}}


def _named_and_limited(period: str, limit: str) -> Json:
    """A new key has a name, and a limit that starts anew is there."""
    return {
        "required": ["name"],
        "if": {"required": [period], "properties": {period: _GIVEN}},
        "then": {"required": [limit], "properties": {limit: _GIVEN}},
    }


_KEY: Final = _exactly_one("api_key", "api_key_hash")
_TOLD: Final[Json] = {"anyOf": _exactly_one("usage", "cost_usd")["oneOf"]}
_PAID: Final[Json] = {"minimum": 0.1, "maximum": 1000}
_MOVES: Final[Json] = {
    "required": ["amount_usd"],
    "properties": {"action": {"enum": ["credit", "debit"]}, "amount_usd": _GIVEN},
}
_OF_ALL: Final[Json] = {"required": ["scope"], "properties": {"scope": {"const": "default"}}}
_BY_TICKET: Final[Json] = {
    "required": ["hold_id"],
    "properties": {"hold_id": _GIVEN} | {name: {"type": "null"} for name in ("request_id", "api_key", "api_key_hash")},
}
_BY_REQUEST: Final[Json] = {
    "required": ["request_id"],
    "properties": {"request_id": _GIVEN, "hold_id": {"type": "null"}},
} | _KEY
_HELD: Final[Json] = {"oneOf": [_BY_TICKET, _BY_REQUEST]}
TOGETHER: Final[dict[str, Json]] = {
    "AuthorizeRequest": {"allOf": [_KEY, _exactly_one("estimate", "max_cost_usd")]},
    "ChargeRequest": {"allOf": [_KEY, _TOLD]},
    "ClaimRequest": _exactly_one("payment_hash", "lightning_invoice", "txid"),
    "CloudEvent": {
        "anyOf": [
            *({"properties": {"data": {"required": [name], "properties": {name: _GIVEN}}}} for name in ("hold_id", "api_key_hash")),
            {"required": ["subject"], "properties": {"subject": {"type": "string", "pattern": "^[0-9a-fA-F]{64}$"}}},
        ]
    },
    "SettleRequest": {"allOf": [_HELD, _TOLD]},
    "ReleaseRequest": _HELD,
    "VerifyRequest": _KEY,
    "UsageData": _TOLD,
    "Resolution": {"oneOf": [_MOVES, {"properties": {"action": {"const": "dismiss"}, "amount_usd": {"type": "null"}}}]},
    "MarkupRequest": {
        "if": _OF_ALL,
        "then": {"properties": {"subject": {"maxLength": 0}}},
        "else": {"required": ["subject"], "properties": {"subject": {"minLength": 1}}},
    },
    "createKey": _named_and_limited("reset_period", "usage_limit_usd"),
    "adminCreateKey": _named_and_limited("reset_period", "usage_limit_usd"),
    "createManagedKey": _named_and_limited("limit_reset", "limit"),
}  # fmt: skip
"""What fields of a body must be together, by its struct, or by the operation where others read the same struct."""

_PAIR: Final = "[^=;]+=[^;]+"
_KEY_NAME: Final[Json] = {"pattern": r"^ *[^\x00-\x20\x7f]([^\x00-\x1f\x7f]{0,23}[^\x00-\x20\x7f])? *$"}
WITHIN: Final[dict[str, Json]] = {
    "KeyRequest.max_usd_per_call": {"exclusiveMinimum": 0},
    "OperatorKeyRequest.max_usd_per_call": {"exclusiveMinimum": 0},
    "KeyRequest.usage_limit_usd": {"minimum": 0.01},
    "LimitRequest.usd": {"minimum": 0.01},
    "KeyRequest.name": _KEY_NAME,
    "OperatorKeyRequest.usage_limit_usd": {"minimum": 0.01},
    "OperatorKeyRequest.name": _KEY_NAME,
    "OverrideRequest.attributes": {"pattern": f"^({_PAIR}(;{_PAIR})*)?$"},
    "TokenRequest.name": {"pattern": "^[a-z0-9][a-z0-9._-]{0,63}$"},
    "ManagedKeyRequest.limit": {"minimum": 0.01},
    "ManagedKeyRequest.name": _KEY_NAME,
    "ConnectRequest.threshold_usd": {"minimum": 5},
    "ConnectRequest.topup_amount_usd": _PAID,
    "ConnectRequest.nwc_url": {"pattern": rf"^\s*{_in_any_case('nostr')}\+?{_in_any_case('walletconnect')}:"},
    "Resolution.amount_usd": {"exclusiveMinimum": 0},
}
"""What a field may be, where its handler takes any text or amount and looks into it later."""

NULL_IN_ANSWERS: Final = {
    "ActView.amount_usd",
    "ChangeView.new_usd",
    "ChangeView.old_usd",
    "BalanceView.burn_usd_per_day",
    "BalanceView.runway_days",
    "CurrentKeyView.limit",
    "CurrentKeyView.limit_remaining",
    "ManagedKeyView.limit",
    "ManagedKeyView.limit_remaining",
    "ConnectionView.max_per_day_usd",
    "KeyView.max_usd_per_call",
    "KeyView.usage_limit_usd",
    "TopupView.rate_usd",
}
"""Money that may be null. Its type cannot say so: it is raw JSON, to stay exact."""

FIELDS: Final[dict[str, tuple[str, Any]]] = {
    "AccountView.floor_usd": ("How far below zero its calls may take it, USD; 0 or less.", 0),
    "AccountView.keys": ("How many live API keys it has.", 3),
    "AccountView.status": ("active, frozen or closed.", "active"),
    "AccountView.balance_usd": ("What is on it, USD.", 12.34),
    "AccountView.available_usd": ("What may be spent of it now, USD.", 12.29),
    "adminListAccounts.q": (
        "What to look for: an id, an API key masked or whole, an invoice, an address, a payment hash, a transaction.",
        None,
    ),
    "adminListAccounts.status": ("Only accounts of this status.", None),
    "adminListTopups.state": ("Which: `review` waits for a person, `unapplied` was paid and is not credited.", None),
    "adminListTokens.state": ("Only tokens that are live, expired or revoked.", None),
    "adminListTokens.kind": ("Only service or admin tokens.", None),
    "adminListActs.actor": ("Only what this operator did.", None),
    "adminListActs.act": ("Only acts of this kind.", None),
    "adminListActs.target": ("Only what was done to this, and to what belongs to it.", None),
    "adminReadStats.from": ("The first UTC day, 30 days ago if absent.", "2026-01-01"),
    "adminReadStats.to": ("The last UTC day, today if absent.", "2026-01-31"),
    "adminImportPrices.name": ("What the version is noted as.", "litellm-2026-01-31.json"),
    "adminImportPrices.dry_run": ("True: say what would come of it, and store nothing.", None),
    "adminShowDiff.against": ("Another version than the active one to compare with.", None),
    "against": ("The version it is compared with; null where none is active.", 1),
    "matched": ("What a search found it by; null without one.", ["key_preview"]),
    "q": ("What to look for.", "sk-abc…wxyz"),
    "actor": ("Who did it: an admin token's name, or `cli:` and the user of a command.", "ops"),
    "act": ("What was done.", "account.credit"),
    "target": (
        "What it was done to; an account's id first, where it is an account's.",
        "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10",
    ),
    "ActView.reason": ("Why, if it was said.", "goodwill for the outage of Monday"),
    "ActView.amount_usd": ("What it moved, USD; null if nothing.", 2.5),
    "ActView.before": ("What was there before, of what it changed.", None),
    "ActView.after": ("What is there since.", None),
    "ActView.request_id": ("The request's `X-Request-Id`; null for a command.", None),
    "Because.reason": ("Why: it stands in the log.", "the customer asked for it"),
    "Adjustment.amount_usd": ("How much, USD.", 2.5),
    "Debit.amount_usd": ("How much, USD.", 2.5),
    "Adjustment.reason": ("Why: it stands in the log.", "goodwill for the outage of Monday"),
    "Debit.reason": ("Why: it stands in the log.", "paid back"),
    "dry_run": ("True: say what would happen, and do nothing.", False),
    "below_floor": ("True: take what is held or is not there too.", False),
    "AdjustedView.amount_usd": ("What was moved, USD; less than 0 for a debit.", 2.5),
    "balance_before_usd": ("What was on the account before, USD.", 10),
    "AdjustedView.available_usd": ("What may be spent of it since, USD.", 12.5),
    "reference": (
        "What it refers to; of an operator's adjustment `act/` and the act's id.",
        "act/0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f15",
    ),
    "contra": ("The house account on its other side.", "revenue:usage"),
    "EntryView.id": ("Entries of an account are numbered 1, 2, 3, …", 7),
    "EntryView.kind": ("topup, bonus, usage, refund or adjustment.", "topup"),
    "EntryView.amount_usd": ("What was added, USD; less than 0 for what was taken.", 20),
    "balance_after_usd": ("What was on the account after it, USD.", 20),
    "HoldView.service": ("The service that asked for it.", "my-proxy"),
    "WholeAccount.account": ("The account.", None),
    "WholeAccount.keys": ("Its newest keys, without their secrets.", None),
    "WholeAccount.topups": ("Its newest top-ups.", None),
    "WholeAccount.holds": ("Its open holds.", None),
    "entries": ("How many entries were looked at.", 1200),
    "WholeAccount.entries": ("Its newest entries.", None),
    "recovery": ("True: a recovery code comes too.", True),
    "recovery_code": (
        "A code for paper that gives another credit id: six groups of five. A secret. Case, spaces and hyphens do not matter.",
        "3F8KQ-…-9Z2WM",
    ),
    "overlap_seconds": ("How long the old credit id goes on to read and top up; 0 if absent, a day at most.", 3600),
    "old_ends_at": ("When the old credit id ends.", "2026-01-31T13:00:00Z"),
    "RotatedAccount.credit_id": ("The new credit id. A secret.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "RecoveredAccount.credit_id": ("The new credit id. A secret.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "RecoveredAccount.api_key": ("A first new key named `Default`, where all were revoked. A secret.", "sk-…"),
    "revoke_keys": ("True: every API key is revoked, and a new one comes.", True),
    "keys_revoked": ("How many keys were revoked.", 3),
    "WayBackView.kind": ("recovery_code or nostr.", "nostr"),
    "WayBackView.npub": ("The Nostr key's public half; null for a recovery code.", "npub1…"),
    "BoundKey.npub": ("The Nostr key that recovers from now on.", "npub1…"),
    "ends_at": ("Until when it recovers; null for good.", None),
    "EventView.act": ("What was done.", "rotated"),
    "shown_by": ("What was shown for it: credit_id, recovery_code, nostr; or operator.", "credit_id"),
    "EventView.subject": ("The key or npub it was done to; null where it was the account.", None),
    "Rotated.credit_id": ("The new credit id. A secret.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "AuditView.state": ("running, done or failed.", "done"),
    "StartedAudit.state": ("running.", "running"),
    "started_by": ("The operator who asked for it.", "ops"),
    "started_at": ("When it was begun.", "2026-01-31T12:00:00Z"),
    "finished_at": ("When it came to its end; null while it runs.", "2026-01-31T12:00:09Z"),
    "is_clean": ("Whether nothing differs.", True),
    "checks": ("How many promises of the books were checked.", 80),
    "AuditView.accounts": ("How many accounts were looked at.", 100),
    "findings": ("What differs; the first of each check.", []),
    "check": ("The promise that is broken.", "balance_is_sum_of_entries"),
    "FindingView.subject": ("What it is broken about.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10"),
    "recorded": ("What the books say of it.", "20"),
    "recomputed": ("What follows from the rest of them.", "19.5"),
    "last": ("The last audit that came to its end; null where there was none.", None),
    "audit_id": ("The audit's id, or `last`.", "last"),
    "liabilities_usd": ("What is on all accounts that are not below zero: it is their owners', USD.", 1200),
    "owed_usd": ("What accounts below zero owe, USD.", 0.5),
    "StatsView.held_usd": ("What calls in flight hold, USD.", 3.2),
    "holds_open": ("How many holds are open.", 12),
    "holds_expired": ("How many of them have expired and wait to be closed.", 0),
    "StatsView.received_usd": ("What was ever paid in, USD.", 5000),
    "StatsView.bonus_usd": ("What was ever given on top of it, USD.", 100),
    "StatsView.adjusted_usd": ("What operators ever credited, less what they debited, USD.", 12.5),
    "StatsView.revenue_usd": ("What calls ever cost, less refunds, USD.", 3900),
    "StatsView.accounts": (
        "How many accounts are active, frozen and closed.",
        {"active": 100, "frozen": 1, "closed": 2},
    ),
    "days": ("Each day that was asked for.", None),
    "DayStats.received_usd": ("What was paid in, USD.", 50),
    "DayStats.bonus_usd": ("What was given on top of it, USD.", 1),
    "DayStats.adjusted_usd": ("What operators credited, less what they debited, USD.", 0),
    "DayStats.revenue_usd": ("What the day's calls cost, less refunds, USD.", 40),
    "DayStats.refunded_usd": ("What was refunded of them, USD.", 0),
    "DayStats.requests": ("How many calls were charged.", 4000),
    "TokenRequest.kind": ("`service` for a proxy, `admin` for an operator.", "admin"),
    "TokenRequest.name": ("Whose it is: lower-case letters, digits, dots, dashes, underscores.", "night-shift"),
    "TokenRequest.scopes": ("What an operator's token may do; null for everything.", ["read", "support"]),
    "TokenRequest.expires_at": (
        "When it stops working; null for never, absent: after 90 days for an admin's.",
        "2027-01-01T00:00:00Z",
    ),
    "TokenRequest.on_expiry": (
        "Of a service's holds that it does not settle: what is charged. `captured` if absent.",
        "captured",
    ),
    "TokenView.kind": ("service or admin.", "admin"),
    "TokenView.name": ("Whose it is.", "night-shift"),
    "TokenView.state": ("live, expired or revoked.", "live"),
    "TokenView.scopes": ("What an operator's token may do; null for everything.", ["read", "support"]),
    "TokenView.expires_at": ("When it stops working; null for never.", "2027-01-01T00:00:00Z"),
    "TokenView.on_expiry": ("Of a service's holds that it does not settle: what is charged.", None),
    "last_used_at": ("When it was last used, to the minute; null for never.", "2026-01-31T12:00:00Z"),
    "revoked_at": ("When it was revoked; null if it was not.", None),
    "NewTokenView.token": ("The token. A secret.", "adm-…"),
    "NewTokenView.about": ("What is known of it.", None),
    "token_id": ("The token's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f16"),
    "rule_id": ("The rule's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f17"),
    "version": ("The price version's number.", 2),
    "ImportedView.version": ("The draft's number; null with `dry_run`.", 2),
    "format": ("What the file was read as.", "litellm"),
    "source_hash": ("The file's SHA-256.", "5f3a…64 hex digits…c1"),
    "ImportedView.prices": ("How many prices it has.", 4000),
    "ImportedView.models": ("How many models it has.", 900),
    "VersionView.prices": ("How many prices it has.", 4000),
    "VersionView.models": ("How many models it has.", 900),
    "VersionView.id": ("Its number.", 2),
    "VersionView.source": ("What it was read as.", "litellm"),
    "VersionView.note": ("What it was noted as.", "litellm-2026-01-31.json"),
    "VersionView.state": ("draft, active or retired.", "active"),
    "activated_at": ("Since when it is sold by; null if it never was.", None),
    "rounded_up": ("Prices finer than can be kept.", []),
    "doubled": ("Prices that were given twice; the dearer was taken.", []),
    "left_out": ("Models that are not sold, with the reason.", {}),
    "diff": ("What is sold otherwise.", None),
    "added": ("Prices that are new.", []),
    "removed": ("Prices that are gone.", []),
    "changed": ("Prices that are other than before.", []),
    "ChangeView.attributes": ("What the call must be asked with for this price.", "quality=hd"),
    "old_usd": ("The price before, USD for a unit; null if there was none.", 0.0000025),
    "new_usd": ("The price now, USD for a unit; null if there is none.", 0.000002),
    "percent": ("By how much it changed, per cent.", "-20"),
    "max_drop_percent": ("How much a price may fall.", 50),
    "allow_drops": ("True: whatever falls or is gone.", False),
    "max_leap_percent": ("How much a price may rise.", 400),
    "allow_leaps": ("True: whatever rises or appears.", False),
    "ActivatedView.active": ("The version that is sold by.", 2),
    "ActivatedView.before": ("The one before; null if there was none.", 1),
    "since": ("From when on.", "2026-01-31T12:00:05Z"),
    "effective_from": ("From when on it holds; in a few seconds if absent.", None),
    "effective_to": ("Until when it holds; null for ever.", None),
    "OverrideRequest.price_usd": ("What `per_units` units cost, USD.", 12),
    "OverrideRequest.per_units": ("How many units the price is for.", 1000000),
    "OverrideRequest.provider": ("Whose model it is; empty: whoever serves it.", "openai"),
    "OverrideRequest.min_input_tokens": ("For calls of so much input at least.", 0),
    "OverrideRequest.attributes": ("For calls asked like this, such as `quality=hd;size=1024x1024`.", "quality=hd"),
    "MarkupRequest.scope": ("Whose calls it is on.", "provider"),
    "MarkupRequest.subject": ("The provider, model or account; empty for `default`.", "openai"),
    "factor": ("What prices are multiplied by; 1.2 is 20 % on top.", 1.2),
    "per_request_usd": ("What is added to each call, USD.", 0),
    "feature": ("What the call uses, such as `web`.", "web"),
    "FeeRequest.price_usd": ("What a call that uses it is asked, USD.", 0.02),
    "RuleView.kind": ("override, markup or fee.", "markup"),
    "RuleView.price_usd": ("What a unit, or a call that uses the feature, costs, USD.", None),
    "RuleView.scope": ("Whose calls a markup is on.", "provider"),
    "RuleView.subject": ("The provider, model or account.", "openai"),
    "RuleView.attributes": ("What the call must be asked with for this price.", None),
    "ended": ("The rule's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f17"),
    "page": ("Which page, from 1 on, for readers that know no cursor.", None),
    "page_count": ("Rows a page, for the same; more than 200 are taken for 200.", None),
    "listHistory.limit": ("Rows a page; more than 200 are taken for 200.", None),
    "offset": ("How many rows come before the page, for readers that know no cursor.", None),
    "start_date": ("The same as `from`.", None),
    "end_date": ("The same as `to`.", None),
    "query_source": ("Always api.", "api"),
    "type": ("chat, image, video, audio or embedding, several with commas, or all.", None),
    "ModelView.type": ("chat, image, video, audio, embedding or other.", "chat"),
    "ModelView.mode": ("What it is for, in the word of the price file.", "chat"),
    "ModelView.name": ("For people.", "gpt-4o"),
    "ModelView.created_at": ("When its prices were imported, Unix milliseconds.", 1769860800000),
    "OpenRouterModel.name": ("For people.", "gpt-4o"),
    "model_id": ("A model's name, slashes and all.", "gpt-4o"),
    "date": ("A UTC day.", "2026-01-31"),
    "date_from": ("From this UTC day on.", None),
    "date_to": ("Up to this UTC day, which is included.", None),
    "key_hash": ("The SHA-256 of the API key, hex: its `hash` in a list of keys.", "5f3a…64 hex digits…c1"),
    "hash": ("The SHA-256 of the API key, hex, by which it is named here.", "5f3a…64 hex digits…c1"),
    "key": ("The API key itself. Keep it: it is told here alone.", "sk-…"),
    "deleted": ("Always true.", True),
    "workspace_id": ("The account's id; no secret.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10"),
    "output_modalities": (
        "What they put out: text, image, video, audio or embeddings, several with commas, or all.",
        None,
    ),
    "notice_id": ("The notice's id: the `webhook-id` it was sent with.", "msg_0198f2a45c1e7d3b9a6f2b7c8d9e0f10"),
    "NoticesRequest.webhook_url": (
        "Where notices are posted: https, on the public internet; null for nowhere. Kept sealed, and told of any change.",
        "https://hooks.example.com/satmeter?token=of-yours",
    ),
    "NoticesView.webhook_url": (
        "Where notices are posted; what follows the host is not shown.",
        "https://hooks.example.com/…",
    ),
    "webhook_state": ("`gone`: it answered 410, and is left alone until it is set again.", "active"),
    "npub": (
        "The Nostr key that gets notices as direct messages; null for none.",
        "npub1dergggklka99wwrs92yz8wdjs952h2ux2ha2ed598ngwu9w7a6fsh9xzpc",
    ),
    "sender_npub": (
        "The key that direct messages come from, always the same.",
        "npub1dergggklka99wwrs92yz8wdjs952h2ux2ha2ed598ngwu9w7a6fsh9xzpc",
    ),
    "low_balance_usd": ("Below which balance you call it low; null for no such mark. It needs no wallet.", 5),
    "events": ("Types to hear of; left out: all.", ["balance.low", "balance.empty"]),
    "signing_secret": ("Signs every webhook (Standard Webhooks). Shown when it is made, and never again.", "whsec_…"),
    "SecretRequest.overlap_seconds": ("For how long the secret of before signs too.", 86400),
    "old_secret_until": ("Until when the secret of before signs too.", "2026-11-29T12:00:00Z"),
    "channels": ("The ways it goes.", ["webhook"]),
    "channel": ("The way it goes.", "webhook"),
    "DeliveryView.id": (
        "The `webhook-id`: the same on each way and at each attempt.",
        "msg_0198f2a45c1e7d3b9a6f2b7c8d9e0f10",
    ),
    "TestNotice.id": ("The `webhook-id` it is sent with.", "msg_0198f2a45c1e7d3b9a6f2b7c8d9e0f10"),
    "Replayed.id": ("The `webhook-id` it is sent with, once more.", "msg_0198f2a45c1e7d3b9a6f2b7c8d9e0f10"),
    "DeliveryView.type": ("What happened.", "balance.low"),
    "DeliveryView.data": ("What was told, as the receiver reads it.", {"balance_usd": 4.2, "percent": 50}),
    "DeliveryView.state": ("`dead`: given up, and sent again only by a replay.", "delivered"),
    "DeliveryView.attempts": ("How often it was tried.", 1),
    "last_status": ("What the receiver answered last; null where it did not, or is no webhook.", 200),
    "last_error": ("Why the last attempt failed.", "timeout"),
    "deliveries": ("On how many ways it is sent again.", 1),
    "model_permaslug": ("The model that answered.", "gpt-4o-2024-11-20"),
    "endpoint_id": ("The same for a model at a provider, every day.", "0198f2a4-5c1e-5d3b-9a6f-2b7c8d9e0f14"),
    "provider_name": ("Who served it.", "openai"),
    "prompt_tokens": ("Tokens read, the cached ones included.", 1200),
    "completion_tokens": ("Tokens written.", 300),
    "DailyView.usage": ("What they cost, USD, less what was refunded.", 0.0105),
    "GenerationView.usage": ("What it cost, USD, less what was refunded.", 0.0105),
    "total_cost": ("What it cost, USD, less what was refunded.", 0.0105),
    "GenerationView.id": ("The id that was asked for.", "chatcmpl-…"),
    "latency": ("How long the call took, milliseconds.", 523),
    "generation_time": ("How long it took from the first token on, milliseconds.", 308),
    "cancelled": ("Whether the caller hung up.", False),
    "CheckedAccount.created": ("Always false: none is made.", False),
    "CheckRequest.credit_id": ("The credit id to look for.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "ManagedKeyRequest.limit": ("The most the key may spend in a window, at least 0.01 USD; null for no limit.", 5),
    "ManagedKeyRequest.limit_reset": (
        "How often the limit starts anew (UTC days, ISO weeks, months); null for never.",
        "monthly",
    ),
    "ManagedKeyRequest.expires_at": ("When the key stops working; null for never.", "2027-01-01T00:00:00Z"),
    "ManagedKeyView.limit": ("The most the key may spend in a window, USD; null for no limit.", 5),
    "ManagedKeyView.usage": ("What the key and those below it ever spent, USD.", 1.87),
    "KeyRequest.limits": (
        "Several windows at once, each period once; null or empty for no limit.",
        [{"usd": 1, "period": "daily"}, {"usd": 50, "period": "total"}],
    ),
    "OperatorKeyRequest.limits": (
        "Several windows at once, each period once; null or empty for no limit.",
        [{"usd": 1, "period": "daily"}, {"usd": 50, "period": "total"}],
    ),
    "KeyView.limits": ("Every window of the key, the shortest first; none without a limit.", None),
    "LimitRequest.usd": ("The most that may be spent in the window, at least 0.01 USD.", 1),
    "LimitRequest.period": ("How often it starts anew (UTC days, ISO weeks, months); total never does.", "daily"),
    "LimitView.usd": ("The most that may be spent in the window, USD.", 1),
    "LimitView.period": ("How often it starts anew (UTC days, ISO weeks, months); total never does.", "daily"),
    "LimitView.spent_usd": ("What the key and those below it spent in it, USD.", 0.4),
    "LimitView.remaining_usd": ("What is left of it, USD.", 0.6),
    "parent_id": ("The key that this one stands below; null for none.", None),
    "depth": ("How many keys stand above it.", 0),
    "ManagedKeyView.expires_at": ("When the key stops working; null for never.", "2027-01-01T00:00:00Z"),
    "account_id": ("The account's id; no secret.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10"),
    "action": ("What to do with the finding.", "credit"),
    "AttemptView.amount_usd": ("What the wallet was to pay, USD.", 10),
    "AttemptView.code": ("The wallet's last error code, if it gave one.", None),
    "AttemptView.credited_usd": ("What was added to the balance for it, the bonus included, USD.", 10.5),
    "AttemptView.invoice_id": ("Its top-up's invoice; null before there is one.", "9XyZbTq4"),
    "AttemptView.reason": ("Why it was not paid, for people.", None),
    "AttemptView.state": (
        "Settled once it is credited; unknown while the wallet's answer is missing or unclear.",
        "settled",
    ),
    "closed_at": ("When it came to its end; null while it is open.", "2026-01-31T12:00:09Z"),
    "additional_status": ("None, PaidPartial, PaidLate, PaidOver or Marked.", "None"),
    "address": ("Where to pay, for methods on a chain.", "bc1q…"),
    "allowed_models": ("The only models this key may call; null for all.", ["openai/gpt-4o"]),
    "amount": ("How much, in `currency`, within the method's limits.", 12000),
    "amount_due": ("What is still to be paid, in the coin.", 0.00012),
    "amount_paid": ("What was paid so far, in the coin.", 0),
    "Resolution.amount_usd": ("How much to credit or debit, USD.", 4.2),
    "all_keys": ("True shows the calls of all the account's keys; to a credit id they always are.", None),
    "amount_usd": ("What the line comes to, USD, exact.", 0.00018),
    "api_key_id": ("The key that paid, `_id` in a list of keys.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11"),
    "api_key": ("An API key. A secret.", "sk-…"),
    "listDailyActivity.api_key_hash": ("The SHA-256 of an API key in hex: whose calls.", None),
    "api_key_hash": ("SHA-256 of the key in hex, instead of `api_key`.", "9f86d081884c7d65…"),
    "api_key_reason": ("Why `api_key` is null: what was kept of it cannot be opened any more.", "unreadable"),
    "api_key_preview": ("The key, masked.", "sk-abc…wxyz"),
    "ChargeRequest.attributes": ("How the call was served, where its price depends on it.", {"quality": "hd"}),
    "SettleRequest.attributes": (
        "How the call was served: this counts, not what was asked for.",
        {"service_tier": "default"},
    ),
    "UsageUnits.audio_seconds": ("Seconds of sound, rounded up to whole ones.", 4.5),
    "UsageUnits.video_seconds": ("Seconds of video, rounded up to whole ones.", 4.5),
    "UsageData.attributes": ("How the call was served: this counts, not what was asked for.", None),
    "attributes": ("What the call must be asked with for this price.", {"quality": "hd"}),
    "audio_seconds": ("Seconds of sound.", None),
    "available": ("What may be spent now.", 12.29),
    "available_usd": ("What the account may still spend after this hold, USD.", 12.24),
    "backend": ("The payment backend's name.", "btcpay"),
    "NewAccount.balance": ("Nothing yet.", 0),
    "balance": ("What is on the account, USD.", 12.34),
    "balance_usd": ("What is on the account now, USD.", 12.33),
    "bonus_percent": ("Added on top of what is paid.", 5),
    "bonus_usd": ("The bonus that was added, USD.", 0),
    "burn_usd_per_day": (
        "What was spent a day, on average of the last 7 full days and today, USD; null if nothing was.",
        0.4,
    ),
    "byok_usage": ("Always 0.", 0),
    "byok_usage_daily": ("Always 0.", 0),
    "byok_usage_monthly": ("Always 0.", 0),
    "byok_usage_weekly": ("Always 0.", 0),
    "cache_input_cost_usd": ("For cached input, USD.", None),
    "cache_read_tokens": ("Input tokens that came from a cache.", None),
    "cache_write_tokens": (
        "Input tokens that were put into a cache for 5 minutes; those for an hour are told apart.",
        None,
    ),
    "characters": ("Characters, of speech.", None),
    "audio_input_tokens": ("Input tokens that were sound; part of `input_tokens`.", None),
    "audio_output_tokens": ("Output tokens that were sound; part of `output_tokens`.", None),
    "cache_write_1h_tokens": (
        "Input tokens that were put into a cache for an hour; not counted in `cache_write_tokens`.",
        None,
    ),
    "charge": ("The charge, if there is one.", None),
    "CloudEvent.data": ("The usage.", None),
    "CloudEvent.id": ("Unique within `source`.", "call-1"),
    "CloudEvent.source": ("Who reports it: with `id`, the call's name for ever.", "/gateway/eu-1"),
    "CloudEvent.type": ("Your own word for such events.", "ai.usage"),
    "image_input_tokens": ("Input tokens that were images; part of `input_tokens`.", None),
    "image_output_tokens": ("Output tokens that were images; part of `output_tokens`.", None),
    "images": ("How many images are made.", None),
    "max_output_tokens": ("How long each answer may be.", 500),
    "AuthorizeRequest.min_output_tokens": ("With `clamp`: the shortest answer that is of use, 1 if not said.", 100),
    "AuthorizeRequest.on_expiry": (
        "What becomes of the hold if nobody settles it in time: what was captured is charged (`captured`, or as the service token"
        " says), all that is held (`hold`), or nothing (`release`).",
        "captured",
    ),
    "VerifiedView.available_usd": (
        "What the key may still spend now: what is left of the account, and of its limit, USD.",
        4.58,
    ),
    "VerifyRequest.model": ("May it call this model?", "openai/gpt-4o"),
    "Allowed.repeat": ("Was this call authorized before? Then this is the hold it got.", False),
    "SettleRequest.request_id": ("In place of `hold_id`, with the key, where the authorize's answer was lost.", None),
    "SettleRequest.api_key": ("With `request_id`: the key that was authorized.", None),
    "SettleRequest.api_key_hash": ("With `request_id`, in place of `api_key`: its SHA-256 in hex.", None),
    "ReleaseRequest.request_id": ("In place of `hold_id`, with the key, where the authorize's answer was lost.", None),
    "ReleaseRequest.api_key": ("With `request_id`: the key that was authorized.", None),
    "ReleaseRequest.api_key_hash": ("With `request_id`, in place of `api_key`: its SHA-256 in hex.", None),
    "provider_cost_usd": ("What the provider asked for it, USD: kept, to compare, and never charged.", 0.00015),
    "upstream_model": (
        "What the provider calls the model that answered: kept, and never priced by.",
        "gpt-4o-2024-11-20",
    ),
    "AuthorizeRequest.max_hold_usd": (
        "Hold no more than this for the call, USD, so that several fit under one limit. What it costs is charged all the same.",
        0.02,
    ),
    "Allowed.clamped": ("Is less held than the call may cost? Then keep to `granted_output_tokens`.", False),
    "Allowed.estimated_cost_usd": ("What the whole of the estimate may cost, USD; null where there was none.", 0.0105),
    "Allowed.prices": ("What the call will be charged by, as far as its estimate foresees; null without one.", None),
    "PriceOfCall.kind": ("The figure of `cost` that it goes to: input, output, cache_input, media or fees.", "input"),
    "PriceOfCall.name": ("What is counted, or the feature of a fee.", "input"),
    "PriceOfCall.price_usd": ("What `per_units` of it cost this caller, markup included, USD.", 0.00000015),
    "PriceOfCall.per_units": ("How many units the price is for.", 1),
    "PriceOfCall.estimated_units": ("How many the estimate foresees.", 1000),
    "AuthorizeRequest.mode": (
        "`clamp` allows what the money is enough for; `strict` all of the estimate, or nothing.",
        "clamp",
    ),
    "pixels": ("Pixels of the images made, together.", None),
    "queries": ("Searches, or whatever the model's prices call a query.", None),
    "ChargeRequest.max_cost_usd": ("Refuse the charge if it costs more than this, USD.", 0.05),
    "Extended.available_usd": ("What the account may still spend, USD.", 12.24),
    "Extended.hold_usd": ("What the hold holds now, USD.", 0.05),
    "Extended.status": ("Always extended.", "extended"),
    "ExtendRequest.ttl_seconds": ("How long from now to hold at least.", 3600),
    "RefundView.status": ("Always refunded.", "refunded"),
    "UsageData.api_key_hash": ("SHA-256 of the API key in hex, where nothing was held.", "9f86d081884c7d65…"),
    "UsageData.hold_id": ("The hold that the call was made under.", "pW3k…"),
    "Verdict.error": ("Why not.", {"code": "hold_not_found", "message": "…"}),
    "Verdict.id": ("The event's id.", "call-1"),
    "Verdict.status": ("200, or the status of the refusal.", 200),
    "fees_usd": ("For features, searches and fixed fees, USD.", None),
    "RefundRequest.amount_usd": ("How much to give back, USD; all of it if absent.", 0.04),
    "captured_usd": ("What the call has cost so far, USD; the hold grows to it.", 0.02),
    "charge_id": ("The charge's id; opaque.", "AZjypFweffuabyt8jZ4PEAGY8qRcHn07mm8rfI2eDxI"),
    "charged": ("How many were charged, now or before.", 1),
    "estimate": (
        "What the call is known to need; instead of `max_cost_usd`. What is not said is held for as the dearest that it may be.",
        None,
    ),
    "finding_id": ("Which finding of this top-up waits for a person; null when none does.", None),
    "features": ("What the call may use that has a fee; see `/v1/prices`.", ["web"]),
    "features_used": ("What it did use of them. What is not named here is not charged.", ["web"]),
    "n": ("How many answers are asked for.", 1),
    "quality": ("As the model's prices name it.", "hd"),
    "refused": ("How many were not.", 0),
    "refunded_usd": ("What was given back, USD.", 0.04),
    "resolution": ("As the model's prices name it.", "1080p"),
    "results": ("One for each item, in their order.", None),
    "search_context_size": ("How much each search may read: low, medium or high; the dearest if not said.", "low"),
    "service_tier": ("As the model's prices name it.", "flex"),
    "settles": ("Settlements, each as `/v1/meter/settle` takes it.", None),
    "size": ("As the model's prices name it.", "1024x1024"),
    "specversion": ("Of CloudEvents.", "1.0"),
    "subject": ("SHA-256 of the API key in hex, where `data` names neither a hold nor a key.", None),
    "checkout_url": ("A page to pay on.", "https://pay.example.com/i/9XyZ"),
    "context_length": (
        "The most tokens a call may hold, read and written. Of a chat model whose price file does not say, what is known that it takes.",
        128000,
    ),
    "cost": ("What was charged, by line.", None),
    "cost_usd": ("What the call cost, USD.", 0.0105),
    "charged_usd": ("What was charged, USD.", 0.00018),
    "created": ("When, Unix seconds.", 1769860800),
    "TopupView.created_at": ("When it was made, Unix seconds.", 1769860800),
    "created_at": ("When it was made.", "2026-01-31T12:00:00Z"),
    "credit_id": ("The account's credit id. A secret, never shown again.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "credited_usd": ("What was added to the balance for it, USD.", 0),
    "crypto_amount_due": ("The whole amount to pay, in the coin.", 0.00012),
    "crypto_currency": ("The coin it is paid in.", "BTC"),
    "PriceList.currency": ("Always USD.", "USD"),
    "BalanceView.currency": ("Always USD.", "USD"),
    "creator_user_id": ("Always null.", None),
    "currency": ("The currency of `amount`.", "SATS"),
    "current_period_usage_usd": ("Spent in the current window, USD.", 0.42),
    "cursor": ("The `next_cursor` of the page before.", None),
    "data": ("The answer itself.", None),
    "database": ("ok, or unreachable.", "ok"),
    "day": ("The UTC day.", "2026-01-31"),
    "decision": ("The verdict.", None),
    "default_attributes": ("What a call is taken to ask for when it does not say.", None),
    "deleted_at": ("When it was revoked.", None),
    "dimension": ("What is counted.", "images"),
    "max_usd_per_call": ("The most that one call may cost, USD: a dearer one is refused; null for no limit.", 0.5),
    "requests_per_minute": ("How many calls there may be in a minute: one more is 429; null for no limit.", 60),
    "disabled": ("True switches the key off without revoking it.", False),
    "display_name": ("For people.", "Bitcoin Lightning"),
    "enabled": ("Whether it tops up when the balance runs low.", True),
    "encryption": ("How the wallet is talked to.", "nip44_v2"),
    "endpoint": ("Which of the proxy's endpoints was called.", "/v1/chat/completions"),
    "error": ("The `error` object to send the caller.", {"code": "insufficient_balance", "message": "…"}),
    "error_code": ("Always null: only what was charged is listed.", None),
    "exact_usd": ("The lines together, USD, before it is rounded up to a nano-dollar.", 0.00017995),
    "expiration_minutes": ("How long an invoice can be paid.", 15),
    "expire_at": ("When the key stops working; null for never.", "2027-01-01T00:00:00Z"),
    "TopupView.expires_at": ("Until when it can be paid, Unix seconds.", 1769861700),
    "CurrentKeyView.expires_at": ("When the key stops working; null for never.", "2027-01-01T00:00:00Z"),
    "expires_at": ("When the hold is freed by itself.", "2026-01-31T12:15:00Z"),
    "fee": ("The network fee that was part of it, in the coin; below 0 what rounding to whole sats spared.", 0),
    "fees": ("What a feature costs for one request, USD.", None),
    "flags": (
        "What is unusual about the charge: no_hold (none was made for an event's key), hold_missing, late, above_hold,"
        " usage_missing, usage_estimated; split_assumed (cached tokens and kinds overlap: the cheapest split), parts_beside"
        " (parts exceeded their whole and were added to it), beyond_model (a longer answer than the model's longest),"
        " provider_assumed (another provider's price), served_not_priced (as the asked model, and its hold at least),"
        " not_priced, and not_priced: with the name of what has no price and cost the rest of the hold. With not_priced, and"
        " with usage_missing where the call was completed, it cost what was held.",
        [],
    ),
    "from": ("From this UTC day or time on.", None),
    "granted_output_tokens": ("The most tokens the call may produce, if that was asked.", None),
    "held": ("What calls in flight hold of it, USD.", 0.05),
    "held_usd": ("What calls in flight hold now, USD.", 0.05),
    "hold_id": ("The hold, opaque. Settle or release it.", "pW3k…"),
    "hold_usd": ("What was held, USD.", 0.05),
    "_id": ("The key's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11"),
    "ModelView.id": ("The model's name in a call.", "openai/gpt-4o"),
    "id": ("Its id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f13"),
    "include_disabled": ("Show revoked keys too.", None),
    "include_byok_in_limit": ("Always false.", False),
    "input_count": ("Tokens read, the cached ones included.", 1200),
    "input_cost_usd": ("For input, USD.", None),
    "input_tokens": ("Tokens read, the cached ones included.", 1200),
    "invoice_id": ("The invoice's id at the payment backend.", "9XyZbTq4"),
    "interval": ("Of no meaning.", "10s"),
    "is_free_tier": ("True until the account is topped up for the first time.", False),
    "is_management_key": ("Always false.", False),
    "is_provisioning_key": ("Always false.", False),
    "key_id": ("The key's id, `_id` in a list of keys.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11"),
    "last_attempt": ("The newest attempt; null before the first.", None),
    "PriceLine.kind": ("input, output, cache_input, media or fees; call where it came already priced.", "input"),
    "label": ("The key, masked.", "sk-abc…wxyz"),
    "late": ("Did it come after the invoice expired?", False),
    "latency_ms": ("How long the call took, milliseconds; kept rounded.", 523.4),
    "lightning_invoice": ("A BOLT 11 invoice.", "lnbc…"),
    "limit": ("Rows a page, 1 to 100.", None),
    "lud16": ("The wallet's Lightning address, if it told one.", "me@example.com"),
    "CurrentKeyView.limit": ("The most the key may spend in a window, USD; null for no limit.", 5),
    "limit_remaining": ("What is left of it, USD.", 4.58),
    "limit_reset": ("How often it starts anew; null for never.", "monthly"),
    "lines": ("What the price was made of.", None),
    "limits": ("The least and the most, for each currency.", {"USD": {"min": 0.1, "max": 1000}}),
    "low": ("Is the balance below the mark at which a wallet refills it? Null without such a mark.", False),
    "markup": ("The factor on the list price.", 1.2),
    "max": ("The most.", 1000),
    "max_cost_usd": ("The most the call may cost, USD: this is held. Instead of `estimate`.", 0.05),
    "max_per_day_usd": ("The most to top up in any 24 hours, USD; null for no limit but 48 attempts.", 50),
    "media_cost_usd": ("For images, sound and video, USD.", None),
    "message": ("The same, for people.", "API key revoked successfully"),
    "method": (f"A payment method: {', '.join(METHODS)}.", "btc-lightning"),
    "migrations": ("Is the database's schema the one this code needs?", "at head"),
    "min": ("The least.", 0.1),
    "min_input_tokens": ("The size of the whole input from which this price applies.", 0),
    "mode": (
        "`nginx` for its auth_request, which knows 401 and 403 alone: refusals are then told in `X-Authz-Status` and `X-Authz-Body`.",
        None,
    ),
    "model": ("The model that was asked for.", "openai/gpt-4o"),
    "PriceLine.name": ("The unit that is counted, or the feature the fee is for.", "input"),
    "name": ("1 to 25 characters, unique among the account's keys. Needed when a key is made.", "my-app"),
    "net_usd": ("What is left of the charge after a refund, USD.", 0.00018),
    "network_fee": ("Part of what is due, in the coin; below 0 where a node rounded the price down to whole sats.", 0),
    "next_cursor": ("Where the next page begins; null after the last.", None),
    "nwc_url": (
        "The wallet's connection. Holds a secret; it is sealed, and never shown again.",
        "nostr+walletconnect://…",
    ),
    "note": ("For people.", None),
    "object": ("What kind of thing this is, in OpenAI's words.", None),
    "outcome": ("How the call ended.", "completed"),
    "output_count": ("Tokens written.", 300),
    "output_cost_usd": ("For output, USD.", None),
    "next_attempt_at": (
        "When the next attempt may begin, if the balance is below the threshold then. Null: as soon as it is.",
        "2026-01-31T12:01:00Z",
    ),
    "output_tokens": ("Tokens written.", 300),
    "owned_by": ("The provider that serves a call which names none.", "openai"),
    "pause_reason": ("Why it does not top up now, and what would help.", None),
    "payment_backend": ("ok, or unavailable: then no top-up can be made.", "ok"),
    "payment_hash": ("Of a Lightning payment, hex.", "9f2a…"),
    "payment_method": ("The method's name, for people.", "Bitcoin Lightning"),
    "payment_uri": ("The same for a wallet, as a link or QR code.", "bitcoin:bc1q…"),
    "payments": ("Every payment that came for it.", None),
    "price_in_usd": ("What it cost, USD, before a refund.", 0.0105),
    "price_usd": ("For one unit, USD.", 0.04),
    "price_version": ("The price list it was priced with, if any.", None),
    "priced_as": ("The model whose prices these are; null where it came already priced, or cost its hold.", "gpt-4o"),
    "pricing": ("USD per unit of an ordinary call, by dimension.", {"images": 0.04}),
    "pricing_variants": ("Every other price of the model.", None),
    "PriceView.provider": ("Who serves it.", "openai"),
    "provider": ("Who served it.", "openai"),
    "query_type": ("chat, embedding, image, audio, video or other, as far as can be seen from what was used.", "chat"),
    "rate_limit": ("Of no meaning.", None),
    "rate_source": ("Who quoted the rate.", "btcpay"),
    "rate_usd": ("USD per coin, fixed when it was made.", 65000),
    "reason": ("Why, for the log.", "upstream refused"),
    "per_units": ("For how many units the list price is: 60 of a price for a minute.", 1),
    "region": ("As the model's prices name it.", "eu"),
    "speed": ("As the model's prices name it.", "fast"),
    "cache_write_12h_tokens": ("Input tokens written to a cache for 12 hours; not counted in the other writes.", None),
    "cache_read_audio_tokens": ("Of the cached tokens read, those that are audio: counted among both.", None),
    "cache_read_image_tokens": ("Of the cached tokens read, those that are of images: counted among both.", None),
    "cache_read_video_tokens": ("Of the cached tokens read, those that are of video: counted among both.", None),
    "cache_write_audio_tokens": ("Of the tokens written to a cache for 5 minutes, those that are audio.", None),
    "cache_write_image_tokens": ("Of the tokens written to a cache for 5 minutes, those that are of images.", None),
    "cache_write_video_tokens": ("Of the tokens written to a cache for 5 minutes, those that are of video.", None),
    "video_input_tokens": ("Input tokens that are of video.", None),
    "video_output_tokens": ("Output tokens that are of video.", None),
    "reasoning_tokens": ("Output tokens that were thought, not shown.", None),
    "receipt_url": ("A page to print. The address is its key.", "https://satmeter.example.com/receipts/…"),
    "received_at": ("When it arrived.", "2026-01-31T12:01:07Z"),
    "CallView.request_id": ("The proxy's id for the call.", "call-1"),
    "requests": ("How many calls.", 12),
    "OldRateLimit.requests": ("Of no meaning.", -1),
    "rounding_usd": ("What rounding up added, less than a nano-dollar.", 0),
    "runway_days": ("For how many days the balance lasts at that rate; null if nothing was spent.", 30.8),
    "request_id": ("Your own id for the call, unique for ever.", "call-1"),
    "relays": ("The hosts over which the wallet is reached.", ["relay.example.com"]),
    "reset_at": ("When the window ends.", "2026-02-01T00:00:00Z"),
    "reset_period": ("How often the limit starts anew (UTC days, ISO weeks, months); null for never.", "monthly"),
    "review": ("Why it waits for a person.", "settled short"),
    "scopes": ("What the key may do; null for everything a key can.", ["spend", "balance"]),
    "served_model": ("The model that answered.", "gpt-4o-2024-11-20"),
    "show_key": ("Show secrets, if the operator allows it.", None),
    "headers": ("What to pass on to the caller: a challenge that can be paid, or how long to wait.", None),
    "payment_proof": (
        "The caller's Authorization header, where it holds `L402 …` or `Payment …`; beside a key, or instead.",
        "L402 …",
    ),
    "topup_offer": (
        "`none`: a refusal for want of money bears no offer. The header `X-Topup-Offer: none` says the same.",
        "none",
    ),
    "NewAccountRequest.amount": (
        "What the account is to have on it, paid over Lightning first. Without it, it is free and empty.",
        5000,
    ),
    "NewAccountRequest.currency": ("USD, SATS or BTC.", "SATS"),
    "Denied.status": ("The status to send the caller.", 402),
    "Health.status": ("ok, degraded (metered, but no top-ups) or down.", "ok"),
    "Released.status": ("Always released.", "released"),
    "ReviewedTopup.status": ("New, Processing, Settled, Expired or Invalid.", "Settled"),
    "TopupView.status": ("New, Processing, Settled, Expired or Invalid. Wait for Settled.", "New"),
    "ConnectionView.state": ("active, or paused: see `pause_reason`.", "active"),
    "CallView.status": ("How the call ended.", "completed"),
    "status": ("Did it work; of a call, how it ended.", "success"),
    "stored": ("False for a repeat, or what was not understood.", True),
    "success": ("Always true.", True),
    "supported_currencies": ("What `amount` may be in.", ["USD", "BTC", "SATS"]),
    "supported_methods": ("Every method that can be used here.", None),
    "threshold_usd": ("Top up when the balance falls below this, at least 5 USD.", 10),
    "timestamp": ("When it was charged.", "2026-01-31T12:00:00Z"),
    "to": ("Up to this time, or to the end of this UTC day.", None),
    "token": ("The last part of a `receipt_url`.", None),
    "topup": ("The top-up itself.", None),
    "topup_amount_usd": ("How much to top up each time, USD, within the limits of Lightning.", 10),
    "topup_id": ("A top-up's `id`.", None),
    "total_cost_usd": ("What was charged, USD.", 0.0105),
    "total_credits": ("What was ever credited, USD.", 20),
    "total_usage": ("What was ever used, less refunds, USD.", 7.66),
    "total_usage_all_time_usd": ("Spent since the key was made, USD.", 1.87),
    "ttft_ms": ("Time to the first token, milliseconds; kept rounded.", 215.2),
    "ttl_seconds": ("How long to hold, unless settled before.", 900),
    "txid": ("Of a payment on a chain.", None),
    "unit_price_usd": ("The list price of one unit, USD.", 0.00000015),
    "units": ("How many of them.", 1200),
    "unit": ("What one of it is.", "image"),
    "updated_at": ("When it was changed.", "2026-01-31T12:00:00Z"),
    "upstream_id": ("The provider's id for the call.", "chatcmpl-…"),
    "CurrentKeyView.usage": ("What the key and those below it ever spent, USD.", 1.87),
    "usage_daily": ("What it spent this UTC day, USD.", 0.1),
    "usage_monthly": ("What it spent this UTC month, USD.", 0.9),
    "usage_weekly": ("What it spent this week, from Monday on, UTC, USD.", 0.42),
    "usage": ("What was used. It is priced by the catalogue, unless there is a `cost_usd`.", None),
    "usage_estimated": ("True if `usage` was not told by the provider.", False),
    "usage_limit_usd": ("The most the key may spend in a window, at least 0.01 USD; null for no limit.", 5),
    "value": ("What was paid, in the coin.", 0.00012),
    "video_seconds": ("Seconds of video.", None),
    "wallet_pubkey": ("The wallet's Nostr public key.", "b889…"),
    "warnings": ("What works less well than it could, and what would help; empty if nothing.", []),
    "worth_usd": ("What it was worth when it settled, USD.", 7.8),
}
"""What a field or parameter means, with an example; `Struct.field` goes before `field`. Without a row, its name must do."""

# --- for agents -----------------------------------------------------------------------------------

GUIDE: Final = """# Satmeter

> {what} REST and JSON at {url}; the whole contract is {url}/openapi.json, for people {url}/docs.

## How to
1. Open an account: POST /accounts/create, no body, no credential. Keep `credit_id` (owns the account) and `api_key` (spends).
2. Pay: POST /topup/create/btc-lightning with `Authorization: Bearer <api_key>` and {{"amount": 1000, "currency": "SATS"}}.
   Pay its `lightning_invoice` (or `address`, for other methods), then ask GET /topup/status/<invoice_id> until
   `status` is "Settled". GET /topup/payment-methods has methods, limits and bonuses.
3. Make keys: POST /keys with `x-credit-id: <credit_id>` and {{"name": "my-app", "usage_limit_usd": 5, "reset_period": "monthly"}}.
4. A proxy (service token) asks POST /v1/meter/authorize with an `estimate` before a call, and tells POST /v1/meter/settle
   its `usage` afterwards.

## Pay by yourself
A 402 has a challenge for one Lightning invoice in `WWW-Authenticate`: L402, then Payment. A paying client does the rest.
1. No account: lnget -X POST -d '{{"amount":5000,"currency":"SATS"}}' {url}/accounts/create (or Alby's fetch402): the paid retry
   is 201, funded; the same proof opens the same account for a day.
2. A key without money: send it as `x-api-key` (payers write over Authorization). `metadata.offer` has the invoice to pay.
3. Proof: `Authorization: L402 <macaroon>:<preimage>` stands for the key again and again, `Payment <b64>` for one call.
4. 503 after paying: wait `Retry-After`, send the same proof; never pay twice. `X-Topup-Offer: none` asks for no offer.

## Rules
- Money is USD unless the field says otherwise, as an exact plain decimal: never read it into a binary float.
- Send `Idempotency-Key: <uuid>` where it is offered (marked *): a repeat then gets the first answer again.
- A refusal is {{"error": {{"message", "type", "code", "param", "metadata"?}}, "message", "statusCode"}}: decide by `error.code`.
  402: there is no money, top up. 429 and 503: wait `Retry-After` seconds. 422: `param` names the field. Do not retry others.
- Lists take `limit` (1-100) and `cursor`; go on with `next_cursor` until it is null.
- Error codes: {codes}.

## Operations
Each with who may call it, and the fields of its body (`!` required). Operators' routes under /admin are in openapi.json.
"""
