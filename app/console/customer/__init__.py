"""A customer's pages."""

from app.console.customer import account, activity, autotopup, charge, home, keys, topup

handlers = (
    *home.handlers, *topup.handlers, *keys.handlers, *activity.handlers, *charge.handlers, *autotopup.handlers, *account.handlers
)  # fmt: skip
