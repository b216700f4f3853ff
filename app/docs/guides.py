"""The guides before the reference: from nothing to something that works, each a few commands to paste.

`$BASE` stands for the service's address; a test holds every command against the contract.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Step:
    """A command with what it is for, and what to know afterwards."""

    title: str
    code: str
    after: str = ""


@dataclass(frozen=True, slots=True)
class Guide:
    """Some steps that lead to something."""

    id: str
    title: str
    about: str
    steps: tuple[Step, ...]


_JSON: Final = "-H 'Content-Type: application/json'"
_KEY: Final = '-H "Authorization: Bearer $API_KEY"'
_OWNER: Final = '-H "x-credit-id: $CREDIT_ID"'
_PROXY: Final = '-H "Authorization: Bearer $SERVICE_TOKEN"'

GUIDES: Final = (
    Guide(
        "guide-first-call", "Your first call",
        "An account is two secrets and a balance: the credit id owns it, the API key spends from it. No name, no e-mail.",
        (
            Step(
                "Open an account", "curl -X POST $BASE/accounts/create",
                "Keep both: neither can be shown again. Put them into CREDIT_ID and API_KEY.",
            ),
            Step(
                "Put money on it",
                f"curl -X POST $BASE/topup/create/btc-lightning \\\n  {_KEY} \\\n  {_JSON} \\\n  -d '{{\"amount\": 10000, \"currency\": \"SATS\"}}'",
                "Open `checkout_url` and pay with any Lightning wallet. Lightning is there in a second.",
            ),
            Step(
                "See it arrive", f"curl $BASE/credits/balance \\\n  {_KEY}",
                "Now call models with the same key, at the address your provider gave you: it speaks OpenAI's and Anthropic's API.",
            ),
            Step(
                "See what it cost", f"curl \"$BASE/queries/history?limit=5\" \\\n  {_KEY}",
                "`GET /activity/{charge_id}/explain` shows the price lines of one call, to the nano-dollar.",
            ),
        ),
    ),
    Guide(
        "guide-keys", "Keys with limits",
        "Give each app, colleague or agent a key of its own. Only the credit id can make and change them.",
        (
            Step(
                "A key that may spend a dollar a day",
                f"curl -X POST $BASE/keys \\\n  {_OWNER} \\\n  {_JSON} \\\n"
                "  -d '{\"name\": \"my-app\", \"usage_limit_usd\": 1, \"reset_period\": \"daily\"}'",
                "`api_key` is in the answer. `allowed_models`, `max_usd_per_call` and `requests_per_minute` bound it further.",
            ),
            Step("What each has spent", f"curl $BASE/keys \\\n  {_OWNER}"),
            Step(
                "Stop one for a while",
                f"curl -X PATCH $BASE/keys/$KEY_ID \\\n  {_OWNER} \\\n  {_JSON} \\\n  -d '{{\"disabled\": true}}'",
                "It is refused from the moment this is answered; `false` lets it call again.",
            ),
            Step("Take one back for ever", f"curl -X DELETE $BASE/keys/$KEY_ID \\\n  {_OWNER}"),
        ),
    ),
    Guide(
        "guide-topup", "Top up",
        "With Lightning, Bitcoin, Litecoin, Liquid or Monero. A late, partial or double payment is credited for what it is worth.",
        (
            Step("What can be paid with, and how much", "curl $BASE/topup/payment-methods"),
            Step(
                "Ask for an invoice",
                f"curl -X POST $BASE/topup/create/xmr \\\n  {_KEY} \\\n  {_JSON} \\\n  -d '{{\"amount\": 20, \"currency\": \"USD\"}}'",
                "Pay `payment_uri` with a wallet, or send somebody `receipt_url`: a page with a QR code that can be paid at, and is the receipt after.",
            ),
            Step(
                "Has it been paid?", f"curl $BASE/topup/status/$INVOICE_ID \\\n  {_KEY}",
                "Wait for `\"status\": \"Settled\"`; `credited_usd` and `bonus_usd` were then added to the balance.",
            ),
            Step(
                "It was paid, and is not there?",
                f"curl -X POST $BASE/topup/claim \\\n  {_KEY} \\\n  {_JSON} \\\n  -d '{{\"txid\": \"4a5e1e4baab89f3a32518a88c31bc87f618f76673e2cc77ab2127b7afdeda33b\"}}'",
                "We ask the payment backend at once.",
            ),
        ),
    ),
    Guide(
        "guide-auto-topup", "Never run dry",
        "Connect a Lightning wallet with Nostr Wallet Connect (Alby Hub, coinos, LNbits …): it pays when the balance runs low.",
        (
            Step(
                "Connect it",
                f"curl -X POST $BASE/nwc-auto-topup/connect \\\n  {_OWNER} \\\n  {_JSON} \\\n"
                "  -d '{\"nwc_url\": \"nostr+walletconnect://…\", \"threshold_usd\": 5, \"topup_amount_usd\": 10, \"max_per_day_usd\": 50}'",
                "Give the connection a budget in the wallet too. Its secret is sealed here and never shown.",
            ),
            Step("How it stands", f"curl $BASE/nwc-auto-topup \\\n  {_OWNER}", "`paused` comes with why, and when it is tried again."),
            Step("What was tried", f"curl $BASE/nwc-auto-topup/attempts \\\n  {_OWNER}"),
            Step("Disconnect", f"curl -X DELETE $BASE/nwc-auto-topup/connection \\\n  {_OWNER}"),
        ),
    ),
    Guide(
        "guide-agents", "For agents",
        "An agent needs one key, reads one page, and can pay for itself.",
        (
            Step("The whole contract in one short page", "curl $BASE/llms.txt", "The same for programs is `/openapi.json`."),
            Step(
                "A key that can do little harm",
                f"curl -X POST $BASE/keys \\\n  {_OWNER} \\\n  {_JSON} \\\n"
                "  -d '{\"name\": \"agent\", \"usage_limit_usd\": 2, \"reset_period\": \"daily\", \"max_usd_per_call\": 0.25, \"requests_per_minute\": 30}'",
                "Without more scopes it can spend, read its balance and activity, and ask for top-ups; it cannot make keys.",
            ),
            Step(
                "What is left", f"curl $BASE/api/v1/key \\\n  {_KEY}",
                "A 402 says what is missing: `error.metadata.shortfall_usd`, and where to top up. 429 and 503 mean wait, for `Retry-After`"
                " seconds. Decide by `error.code`.",
            ),
            Step(
                "Pay, once, however often it is asked",
                f"curl -X POST $BASE/topup/create/btc-lightning \\\n  {_KEY} \\\n  {_JSON} \\\n  -H 'Idempotency-Key: refill-2026-01-31' \\\n"
                "  -d '{\"amount\": 5, \"currency\": \"USD\"}'",
                "`lightning_invoice` is what its wallet pays.",
            ),
            Step(
                "Open a funded account with one payment",
                f"curl -i -X POST $BASE/accounts/create \\\n  {_JSON} \\\n  -d '{{\"amount\": 5000, \"currency\": \"SATS\"}}'",
                "The answer is a 402 with one Lightning invoice in `error.metadata.lightning_invoice`, and twice in `WWW-Authenticate`: an `L402` and a"
                " `Payment` challenge. A wallet that speaks either (lnget, Alby's `fetch402`, l402-requests) pays it and asks again with the"
                " proof; that is answered 201 with the account. The same proof opens the same account for a day.",
            ),
            Step(
                "A call that is refused for want of money can be paid at once",
                "curl -i $BASE/v1/meter/ext-authz \\\n  -H \"X-Service-Token: $SERVICE_TOKEN\" \\\n  -H \"x-api-key: $API_KEY\"",
                "A 402 `insufficient_balance` bears such an offer, in `error.metadata.offer`. Send the key as `x-api-key`: payers write over"
                " `Authorization`. The proof is `L402 <macaroon>:<preimage>`, which stands for the key again and again, or `Payment <b64>`, good"
                " for one call. A 503 after paying means: send the same proof after `Retry-After`, and never pay twice. `X-Topup-Offer: none`"
                " asks for no offer.",
            ),
            Step(
                "Its tools over MCP",
                "pip install \"satmeter[mcp]\"\nSATMETER_URL=$BASE SATMETER_API_KEY=$API_KEY satmeter mcp",
                "A server over stdio; `--http PORT` serves streamable HTTP on loopback. It reads: `balance`, `activity`, `explain_charge`,"
                " `topup_status`. With `--allow-spend` it commits money and rights too: `create_topup`, `create_child_key` and, where"
                " `SATMETER_CREDIT_ID` is set, `connect_wallet`.",
            ),
        ),
    ),
    Guide(
        "guide-proxy", "Integrate a proxy",
        "Your proxy asks before each call and tells afterwards. Its service token is made by the operator.",
        (
            Step(
                "Before: may it, and hold what it may cost",
                f"curl -X POST $BASE/v1/meter/authorize \\\n  {_PROXY} \\\n  {_JSON} \\\n"
                "  -d '{\"request_id\": \"call-1\", \"api_key\": \"'$API_KEY'\", \"model\": \"gpt-4o-mini\", \"estimate\": {\"input_tokens\": 100, \"max_output_tokens\": 500}}'",
                "The answer is 200 for every verdict. `deny` carries the `status` and `error` to send to your caller; a 5xx is our own failure, never theirs.",
            ),
            Step(
                "After: what was used",
                f"curl -X POST $BASE/v1/meter/settle \\\n  {_PROXY} \\\n  {_JSON} \\\n"
                "  -d '{\"hold_id\": \"'$HOLD_ID'\", \"usage\": {\"input_tokens\": 100, \"output_tokens\": 50}}'",
                "First settle wins; a repeat gets the same answer. Spool what could not be told: `settle/batch` takes 500 at once.",
            ),
            Step(
                "Or: it was not made",
                f"curl -X POST $BASE/v1/meter/release \\\n  {_PROXY} \\\n  {_JSON} \\\n  -d '{{\"hold_id\": \"'$HOLD_ID'\"}}'",
                "A hold that nobody settles ends by itself, as the token's `on_expiry` says.",
            ),
            Step(
                "A gateway that asks with a subrequest",
                f"curl $BASE/v1/meter/ext-authz \\\n  -H \"X-Service-Token: $SERVICE_TOKEN\" \\\n  {_KEY}",
                "For Envoy, nginx, Traefik, Caddy and APISIX; `?mode=nginx` for `auth_request`.",
            ),
        ),
    ),
)  # fmt: skip
