"""How operators ask: a file for each thing they ask about. Which scope a route needs is said in `app/admin/scopes.py`."""

from typing import Any

from app.admin.api.accounts import AdminAccountsController
from app.admin.api.keys import AdminKeysController
from app.admin.api.log import read_admin_log, read_stats
from app.admin.api.prices import AdminPricesController
from app.admin.api.tokens import AdminTokensController
from app.admin.api.topups import AdminTopupsController

handlers: list[Any] = [
    AdminAccountsController, AdminKeysController, AdminTopupsController, AdminPricesController, AdminTokensController,
    read_admin_log, read_stats,
]  # fmt: skip
