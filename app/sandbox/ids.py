"""Random names that look like BTCPay's."""

import secrets

BASE58 = "123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"


def new_id(length: int = 22) -> str:
    """A random base58 name; BTCPay's own are 16 random bytes, 22 characters."""
    return "".join(secrets.choice(BASE58) for _ in range(length))
