"""What only a person can say about the service: the texts, and the tables that no handler can tell.

Nothing here is needed for a new route or field to be documented; a row makes it better.
"""

from typing import Any, Final

from app.kernel import errors as e
from app.kernel.errors import AppError
from app.topups.methods import METHODS

Json = dict[str, Any]

WHAT: Final = "Prepaid billing and crypto top-ups for people who sell AI inference."
ABOUT: Final = f"""{WHAT} Open an account with one POST and no e-mail, pay it with Lightning or coins, make API keys with \
spending limits, and call models; the inference proxy asks here before each call and tells afterwards what it cost.

Money is a JSON number in USD unless the field says otherwise: an exact plain decimal, to be read without a binary float. \
It may be sent as a string too. Times are ISO 8601 UTC, but `created_at` and `expires_at` of top-ups are Unix seconds.

Every answer carries `X-Request-Id`. A POST that takes `Idempotency-Key` has its effect once: the same key and body \
get the first answer again, with `Idempotent-Replayed: true`. A list goes on where it ended with `cursor=` its `next_cursor`."""

TAGS: Final[dict[str, str]] = {
    "Accounts": "An account is two secrets and a balance. Start here.",
    "API keys": "Keys that spend from the account, each with its own limits.",
    "Top-ups": "Ask for an invoice, pay it, and see the credit arrive.",
    "Prices": "What is sold, and what a unit of it costs.",
    "Metering": "For inference proxies: hold money before a call, charge it afterwards.",
    "Admin": "For operators. Each act is written to the audit log.",
    "Operations": "For monitoring, and for the payment backend.",
}
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
        "API key", "Spends from an account, as far as its limits and scopes go. `sk-…`; `Authorization: Token` works too.",
        {"type": "http", "scheme": "bearer", "bearerFormat": "sk-…"},
    ),
    "xApiKey": ("API key", "An API key, as some clients send it.", {"type": "apiKey", "in": "header", "name": "x-api-key"}),
    "plainApiKey": ("API key", "An API key, as some clients send it.", {"type": "apiKey", "in": "header", "name": "api-key"}),
    "serviceToken": (
        "service token", "One per inference proxy. `svc-…`, made by the operator.",
        {"type": "http", "scheme": "bearer", "bearerFormat": "svc-…"},
    ),
    "adminToken": (
        "admin token", "For operators. `adm-…`, made on the command line.",
        {"type": "http", "scheme": "bearer", "bearerFormat": "adm-…"},
    ),
}  # fmt: skip
_ACCOUNT: Final[tuple[Json, ...]] = ({"apiKey": []}, {"xApiKey": []}, {"plainApiKey": []}, {"creditId": []})
_NO_ACCOUNT: Final = (e.InvalidApiKey, e.InvalidCreditId, e.MissingScope)
CALLERS: Final[dict[str, tuple[tuple[Json, ...], tuple[type[AppError], ...]]]] = {
    "service": (({"serviceToken": []},), (e.InvalidToken,)),
    "admin": (({"adminToken": []},), (e.InvalidToken,)),
    "owner": (({"creditId": []},), (e.InvalidCreditId,)),
    "caller": (_ACCOUNT, _NO_ACCOUNT),
    "verifier": ((*_ACCOUNT, {}), _NO_ACCOUNT),
}
"""Who may call, and how others are refused, by the first dependency of these that a handler has.

With `verifier` alone the handler looks for the credential itself, so it may also be in the body.
"""

# --- operations -----------------------------------------------------------------------------------

NAMES: Final[dict[str, str]] = {
    "GET /topups": "listTopups",
    "GET /topup/status/{invoice_id}": "readTopup",
    "POST /webhooks/{backend}": "receiveWebhook",
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
    "request_id": (e.RequestIdReuse,),
    "token": (e.InvoiceNotFound,),
    "topup_id": (e.InvoiceNotFound,),
    "createAccount": (e.RateLimitExceeded,),
    "createKey": (e.NameTaken,),
    "changeKey": (e.NameTaken,),
    "createTopup": (e.PaymentBackendUnavailable,),
    "claimPayment": (e.InvoiceNotFound, e.RateLimitExceeded, e.PaymentBackendUnavailable),
    "receiveWebhook": (e.InvalidSignature, e.BodyTooLarge),
    "releaseCall": (e.HoldClosed,),
    "adminReconcileTopup": (e.PaymentBackendUnavailable,),
}
"""What is refused because of a field or parameter, or by one operation, beyond what its dependencies refuse."""

_ANY_VERDICT: Final = (
    e.InvalidApiKey, e.InsufficientBalance, e.KeyLimitExceeded, e.MissingScope, e.ModelNotAllowed, e.AccountFrozen, e.FundsHeld,
)  # fmt: skip
VERDICTS: Final[dict[str, tuple[type[AppError], ...]]] = {
    "authorizeCall": (*_ANY_VERDICT, e.ModelNotPriced), "chargeCall": _ANY_VERDICT
}  # fmt: skip
"""What a proxy is told in a 200, because it is about the proxy's own caller."""

BODIES: Final[dict[str, Json]] = {
    "createTopup": {"amount": 1000, "currency": "SATS"},
    "createKey": {"name": "my-app", "usage_limit_usd": 5, "reset_period": "monthly"},
    "changeKey": {"usage_limit_usd": 10},
    "askBalance": {"credit_id": "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"},
    "claimPayment": {"payment_hash": "9f2a…64 hex digits…c1"},
    "authorizeCall": {"request_id": "call-1", "api_key": "sk-…", "model": "openai/gpt-4o", "max_cost_usd": 0.05},
    "settleCall": {"hold_id": "…", "cost_usd": 0.0105, "usage": {"input_tokens": 1200, "output_tokens": 300}},
    "releaseCall": {"hold_id": "…", "reason": "upstream refused"},
    "chargeCall": {"request_id": "call-2", "api_key": "sk-…", "model": "openai/dall-e-3", "cost_usd": 0.04},
    "adminResolveTopup": {"action": "credit", "reason": "paid late, agreed with the customer", "amount_usd": 4.2},
}
"""Bodies to paste, where the required fields alone would say too little."""

HEADERS: Final[dict[str, Json]] = {
    "X-Request-Id": {
        "description": "The request's id: the caller's own `X-Request-Id` or trace if it sent one.",
        "schema": {"type": "string", "maxLength": 64},
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
    "schema": {"type": "string", "minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
}  # fmt: skip

# --- fields ---------------------------------------------------------------------------------------

LIMITS: Final[dict[str, Json]] = {
    "limit": {"minimum": 1, "maximum": 100}, "method": {"enum": list(METHODS)}, "key_id": {"format": "uuid"},
    "topup_id": {"format": "uuid"},
}  # fmt: skip
"""What a parameter may be, where its handler takes any text and looks into it later."""

NULL_IN_ANSWERS: Final = {"KeyView.usage_limit_usd", "TopupView.rate_usd"}
"""Money that may be null. Its type cannot say so: it is raw JSON, to stay exact."""

FIELDS: Final[dict[str, tuple[str, Any]]] = {
    "account_id": ("The account's id; no secret.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f10"),
    "action": ("What to do with the finding.", "credit"),
    "additional_status": ("None, PaidPartial, PaidLate, PaidOver or Marked.", "None"),
    "address": ("Where to pay, for methods on a chain.", "bc1q…"),
    "allowed_models": ("The only models this key may call; null for all.", ["openai/gpt-4o"]),
    "amount": ("How much, in `currency`, within the method's limits.", 12000),
    "amount_due": ("What is still to be paid, in the coin.", 0.00012),
    "amount_paid": ("What was paid so far, in the coin.", 0),
    "Resolution.amount_usd": ("How much to credit or debit, USD.", 4.2),
    "api_key": ("An API key. A secret.", "sk-…"),
    "api_key_hash": ("SHA-256 of the key in hex, instead of `api_key`.", "9f86d081884c7d65…"),
    "api_key_preview": ("The key, masked.", "sk-abc…wxyz"),
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
    "cache_input_cost_usd": ("For cached input, USD.", None),
    "cache_read_tokens": ("Input tokens that came from a cache.", None),
    "cache_write_tokens": ("Input tokens that were put into a cache.", None),
    "characters": ("Characters, of speech.", None),
    "charge_id": ("The charge's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f12"),
    "checkout_url": ("A page to pay on.", "https://pay.example.com/i/9XyZ"),
    "context_length": ("The most tokens a call may hold, read and written.", 128000),
    "cost": ("What was charged, by line.", None),
    "cost_usd": ("What the call cost, USD.", 0.0105),
    "created": ("When, Unix seconds.", 1769860800),
    "TopupView.created_at": ("When it was made, Unix seconds.", 1769860800),
    "created_at": ("When it was made.", "2026-01-31T12:00:00Z"),
    "credit_id": ("The account's credit id. A secret, never shown again.", "c0ffee00-1d2e-4f3a-8b4c-5d6e7f809102"),
    "credited_usd": ("What was added to the balance for it, USD.", 0),
    "crypto_amount_due": ("The whole amount to pay, in the coin.", 0.00012),
    "crypto_currency": ("The coin it is paid in.", "BTC"),
    "PriceList.currency": ("Always USD.", "USD"),
    "BalanceView.currency": ("Always USD.", "USD"),
    "currency": ("The currency of `amount`.", "SATS"),
    "current_period_usage_usd": ("Spent in the current window, USD.", 0.42),
    "cursor": ("The `next_cursor` of the page before.", None),
    "data": ("The answer itself.", None),
    "database": ("ok, or unreachable.", "ok"),
    "decision": ("The verdict.", None),
    "default_attributes": ("What a call is taken to ask for when it does not say.", None),
    "deleted_at": ("When it was revoked.", None),
    "dimension": ("What is counted.", "images"),
    "disabled": ("True switches the key off without revoking it.", False),
    "display_name": ("For people.", "Bitcoin Lightning"),
    "endpoint": ("Which of the proxy's endpoints was called.", "/v1/chat/completions"),
    "error": ("The `error` object to send the caller.", {"code": "insufficient_balance", "message": "…"}),
    "expiration_minutes": ("How long an invoice can be paid.", 15),
    "expire_at": ("When the key stops working; null for never.", "2027-01-01T00:00:00Z"),
    "TopupView.expires_at": ("Until when it can be paid, Unix seconds.", 1769861700),
    "expires_at": ("When the hold is freed by itself.", "2026-01-31T12:15:00Z"),
    "fee": ("The network fee that was part of it, in the coin.", 0),
    "fees": ("What a feature costs for one request, USD.", None),
    "flags": ("What is unusual about the charge.", []),
    "granted_output_tokens": ("The most tokens the call may produce, if that was asked.", None),
    "held": ("What calls in flight hold of it, USD.", 0.05),
    "held_usd": ("What calls in flight hold now, USD.", 0.05),
    "hold_id": ("The hold, opaque. Settle or release it.", "pW3k…"),
    "hold_usd": ("What was held, USD.", 0.05),
    "_id": ("The key's id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11"),
    "ModelView.id": ("The model's name in a call.", "openai/gpt-4o"),
    "id": ("Its id.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f13"),
    "include_disabled": ("Show revoked keys too.", None),
    "input_cost_usd": ("For input, USD.", None),
    "input_tokens": ("Tokens read, the cached ones included.", 1200),
    "invoice_id": ("The invoice's id at the payment backend.", "9XyZbTq4"),
    "key_id": ("The key's id, `_id` in a list of keys.", "0198f2a4-5c1e-7d3b-9a6f-2b7c8d9e0f11"),
    "late": ("Did it come after the invoice expired?", False),
    "latency_ms": ("How long the call took.", 1840),
    "lightning_invoice": ("A BOLT 11 invoice.", "lnbc…"),
    "limit": ("Rows a page, 1 to 100.", None),
    "limits": ("The least and the most, for each currency.", {"USD": {"min": 0.1, "max": 1000}}),
    "max": ("The most.", 1000),
    "max_cost_usd": ("The most the call may cost, USD: this is held.", 0.05),
    "media_cost_usd": ("For images, sound and video, USD.", None),
    "message": ("The same, for people.", "API key revoked successfully"),
    "method": (f"A payment method: {', '.join(METHODS)}.", "btc-lightning"),
    "migrations": ("Is the database's schema the one this code needs?", "at head"),
    "min": ("The least.", 0.1),
    "min_input_tokens": ("The size of the whole input from which this price applies.", 0),
    "model": ("The model that was asked for.", "openai/gpt-4o"),
    "name": ("1 to 25 characters, unique among the account's keys. Needed when a key is made.", "my-app"),
    "network_fee": ("Part of what is due, in the coin.", 0),
    "next_cursor": ("Where the next page begins; null after the last.", None),
    "object": ("What kind of thing this is, in OpenAI's words.", None),
    "outcome": ("How the call ended.", "completed"),
    "output_cost_usd": ("For output, USD.", None),
    "output_tokens": ("Tokens written.", 300),
    "owned_by": ("The provider that serves a call which names none.", "openai"),
    "payment_backend": ("ok, or unavailable: then no top-up can be made.", "ok"),
    "payment_hash": ("Of a Lightning payment, hex.", "9f2a…"),
    "payment_method": ("The method's name, for people.", "Bitcoin Lightning"),
    "payment_uri": ("The same for a wallet, as a link or QR code.", "bitcoin:bc1q…"),
    "payments": ("Every payment that came for it.", None),
    "price_usd": ("For one unit, USD.", 0.04),
    "price_version": ("The price list it was priced with, if any.", None),
    "pricing": ("USD per unit of an ordinary call, by dimension.", {"images": 0.04}),
    "pricing_variants": ("Every other price of the model.", None),
    "PriceView.provider": ("Who serves it.", "openai"),
    "provider": ("Who served it.", "openai"),
    "rate_source": ("Who quoted the rate.", "btcpay"),
    "rate_usd": ("USD per coin, fixed when it was made.", 65000),
    "reason": ("Why, for the log.", "upstream refused"),
    "reasoning_tokens": ("Output tokens that were thought, not shown.", None),
    "receipt_url": ("A page to print. The address is its key.", "https://satmeter.example.com/receipts/…"),
    "received_at": ("When it arrived.", "2026-01-31T12:01:07Z"),
    "request_id": ("Your own id for the call, unique for ever.", "call-1"),
    "reset_at": ("When the window ends.", "2026-02-01T00:00:00Z"),
    "reset_period": ("How often the limit starts anew (UTC days, ISO weeks, months); null for never.", "monthly"),
    "review": ("Why it waits for a person.", "settled short"),
    "scopes": ("What the key may do; null for everything a key can.", ["spend", "balance"]),
    "served_model": ("The model that answered.", "gpt-4o-2024-11-20"),
    "show_key": ("Show secrets, if the operator allows it.", None),
    "Denied.status": ("The status to send the caller.", 402),
    "Health.status": ("ok, degraded (metered, but no top-ups) or down.", "ok"),
    "Released.status": ("Always released.", "released"),
    "ReviewedTopup.status": ("New, Processing, Settled, Expired or Invalid.", "Settled"),
    "TopupView.status": ("New, Processing, Settled, Expired or Invalid. Wait for Settled.", "New"),
    "status": ("Did it work.", "success"),
    "stored": ("False for a repeat, or what was not understood.", True),
    "success": ("Always true.", True),
    "supported_currencies": ("What `amount` may be in.", ["USD", "BTC", "SATS"]),
    "supported_methods": ("Every method that can be used here.", None),
    "token": ("The last part of a `receipt_url`.", None),
    "topup": ("The top-up itself.", None),
    "topup_id": ("A top-up's `id`.", None),
    "total_cost_usd": ("What was charged, USD.", 0.0105),
    "total_usage_all_time_usd": ("Spent since the key was made, USD.", 1.87),
    "ttft_ms": ("Time to the first token.", 210),
    "ttl_seconds": ("How long to hold, unless settled before.", 900),
    "txid": ("Of a payment on a chain.", None),
    "unit": ("What one of it is.", "image"),
    "updated_at": ("When it was changed.", "2026-01-31T12:00:00Z"),
    "upstream_id": ("The provider's id for the call.", "chatcmpl-…"),
    "usage": ("What was used, to explain the charge.", None),
    "usage_estimated": ("True if `usage` was not told by the provider.", False),
    "usage_limit_usd": ("The most the key may spend in a window, at least 0.01 USD; null for no limit.", 5),
    "value": ("What was paid, in the coin.", 0.00012),
    "video_seconds": ("Seconds of video.", None),
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
4. A proxy (service token) asks POST /v1/meter/authorize before a call, and tells POST /v1/meter/settle afterwards.

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
