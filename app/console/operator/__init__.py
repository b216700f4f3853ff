"""The operator's six pages, on the admin API's own verbs: whatever is done here stands in the same log, under the same scopes."""

from app.console.operator import accounts, audit, prices, today, tokens, topups

handlers = (
    *today.handlers, *accounts.handlers, *topups.handlers, *prices.handlers, *tokens.handlers, *audit.handlers,
)  # fmt: skip
