"""How the sandbox's wallet was told to behave, and what that makes of its answers.

Amounts are millisatoshis.
"""

import secrets
from enum import StrEnum
from typing import Any

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from .ciphers import Scheme
from .errors import Invalid
from .lines import is_relay_address

FIRST_BALANCE_MSAT = 2_000_000_000
UNREADABLE = "this is not encrypted at all"

Reply = dict[str, Any] | str
"""What is sent back: NIP-47's object, or, from a wallet that is out of its mind, any text."""


class Behaviour(StrEnum):
    """What the wallet makes of a request that it would otherwise carry out."""

    PAYS = "pays"
    """as it should"""
    REFUSES = "refuses"
    """does nothing, and says why: `code`"""
    SILENT = "silent"
    """does nothing and says nothing"""
    LOSES_ANSWER = "loses_answer"
    """pays, and says nothing"""
    ANSWERS_LATE = "answers_late"
    """pays at once, and says so after `delay_seconds`"""
    PAYS_LATE = "pays_late"
    """pays after `delay_seconds`, and says so then"""
    ANSWERS_TWICE = "answers_twice"
    """pays once, and says so in two events"""
    WRONG_PREIMAGE = "wrong_preimage"
    """pays, and shows a preimage that is not the payment's"""
    ZERO_PREIMAGE = "zero_preimage"
    """pays, and shows zeros, as LNbits does where it has no preimage"""
    LIES = "lies"
    """does not pay, and says that it did, with a preimage that is no such thing"""
    GARBAGE = "garbage"
    """pays, and answers what nobody can read, then what is no JSON"""


class Offer(StrEnum):
    """What the wallet says that it can decrypt. `untold` is nip04 without a word about it, as LNbits has it."""

    BOTH = "both"
    NIP44 = "nip44_v2"
    NIP04 = "nip04"
    UNTOLD = "untold"

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What it can decrypt, the best first."""
        return {Offer.BOTH: (Scheme.NIP44, Scheme.NIP04), Offer.NIP44: (Scheme.NIP44,)}.get(self, (Scheme.NIP04,))


class State(Struct, frozen=True):
    """What is kept between runs. `relays` empty means the sandbox's own, `methods` empty every method."""

    wallet_key: str
    client_key: str
    balance_msat: int = FIRST_BALANCE_MSAT
    budget_msat: int | None = None
    behaviour: Behaviour = Behaviour.PAYS
    code: str = "INSUFFICIENT_BALANCE"
    delay_seconds: float = 5.0
    methods: tuple[str, ...] = ("pay_invoice",)
    encryption: Offer = Offer.BOTH
    relays: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"State(behaviour={self.behaviour.value!r}, balance_msat={self.balance_msat})"


class _Orders(Struct, frozen=True, forbid_unknown_fields=True):
    """What the driver may change; what is left out stays as it was."""

    behaviour: Behaviour | msgspec.UnsetType = msgspec.UNSET
    code: str | msgspec.UnsetType = msgspec.UNSET
    delay_seconds: float | msgspec.UnsetType = msgspec.UNSET
    methods: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET
    encryption: Offer | msgspec.UnsetType = msgspec.UNSET
    balance_msat: int | msgspec.UnsetType = msgspec.UNSET
    budget_msat: int | None | msgspec.UnsetType = msgspec.UNSET
    relays: tuple[str, ...] | msgspec.UnsetType = msgspec.UNSET


def ordered(state: State, raw: bytes) -> State:
    """The state as the driver's JSON wants it. Raises Invalid."""
    try:
        orders = msgspec.json.decode(raw or b"{}", type=_Orders)
    except msgspec.DecodeError as error:
        raise Invalid(("wallet", str(error))) from error
    wanted = {name: value for name, value in msgspec.structs.asdict(orders).items() if value is not msgspec.UNSET}
    if "behaviour" in wanted:
        # A wallet that pays badly still says who it is; one that is silent is silent altogether.
        wanted.setdefault("methods", () if wanted["behaviour"] is Behaviour.SILENT else ("pay_invoice",))
    if not 0 <= wanted.get("delay_seconds", 0) <= 3600:
        raise Invalid(("delay_seconds", "A delay has 0 to 3600 seconds"))
    if not all(map(is_relay_address, wanted.get("relays", ()))):
        raise Invalid(("relays", "A relay's address begins with ws:// or wss://"))
    return replace(state, **wanted)


def distorted(reply: dict[str, Any], behaviour: Behaviour) -> list[Reply]:
    """What is said of an answer by a wallet that behaves so. A refusal is never distorted into a payment."""
    if behaviour is Behaviour.LOSES_ANSWER:
        return []
    if behaviour is Behaviour.ANSWERS_TWICE:
        return [reply, reply]
    if behaviour is Behaviour.GARBAGE:
        return [UNREADABLE, "this is no JSON"]
    wrong = {Behaviour.WRONG_PREIMAGE: secrets.token_hex(32), Behaviour.ZERO_PREIMAGE: "00" * 32}.get(behaviour)
    if wrong is not None and reply["error"] is None and "preimage" in reply["result"]:
        return [{**reply, "result": {**reply["result"], "preimage": wrong}}]
    return [reply]
