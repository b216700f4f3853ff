"""How HTTP asks for an account that is paid for: the part of `POST /accounts/create` that knows of offers."""

from typing import Any

import msgspec
from litestar import Request

from app.accounts.api import NewAccount, NewAccountRequest
from app.kernel.errors import AppError
from app.kernel.money import is_given, usd
from app.keys.verify import Shown
from app.offers.mint import METHOD
from app.offers.opening import Openings
from app.topups.create import Wish
from app.topups.methods import checked_amount, currency_named


class AtTheDoor:
    """A stranger who pays: an offer first, then the account."""

    def __init__(self, openings: Openings) -> None:
        self._openings = openings

    async def buy(self, request: Request[Any, Any, Any], data: NewAccountRequest | None) -> NewAccount | None:
        """See accounts/api.py."""
        wish = None if data is None or not is_given(data.amount) else _wish(data)
        proof = Shown.of(request.headers.multi_items()).proof
        if proof is not None:
            bought = await self._openings.bought(proof)
            if not isinstance(bought, AppError):
                request.scope["state"]["payment_receipt"] = bought.receipt
                code = msgspec.UNSET if bought.recovery_code is None else bought.recovery_code
                return NewAccount(True, bought.credit_id, bought.api_key, usd(bought.balance_nusd), code)
            if wish is None:
                raise bought
        if wish is None:
            return None
        address = request.client.host if request.client else "unknown"
        agent, with_recovery = request.headers.get("user-agent", ""), data is not None and data.recovery
        raise await self._openings.refused(address, agent, wish, with_recovery=with_recovery)


def _wish(data: NewAccountRequest) -> Wish:
    """Raises UnsupportedCurrency, InvalidField, AmountOutOfRange."""
    currency = currency_named(data.currency)
    return Wish(METHOD, currency, checked_amount(METHOD, currency, data.amount))
