"""What is remembered of prices: versions as imported, and what the operator says on top of them.

Reference data: a row is added or ended, never edited, so that what a call cost can be recomputed for ever.
Prices are pico-USD for so many units, such as 60 seconds.
"""

import uuid
from datetime import datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import BigInteger, CheckConstraint, DateTime, Index, SmallInteger, func, text
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import money, when, words


class VersionState(StrEnum):
    """A draft was imported and sells nothing yet; a retired one still prices the calls that began under it."""

    DRAFT = "draft"
    ACTIVE = "active"
    RETIRED = "retired"


def _key(**kwargs: Any) -> Any:
    return words(primary_key=True, **kwargs)


def _start_key() -> Any:
    return Field(sa_type=DateTime(timezone=True), primary_key=True, sa_column_kwargs={"server_default": func.now()})


def _version_key() -> Any:
    return Field(sa_type=SmallInteger, primary_key=True, foreign_key="price_version.id")


class PriceVersion(SQLModel, table=True):
    """One import, or the starter catalogue. `revision` counts the changes of what stands on top of it."""

    __tablename__ = "price_version"
    __table_args__ = (
        CheckConstraint("state IN ('draft', 'active', 'retired')", name="price_version_state_known"),
        Index("price_version_one_active", "state", unique=True, postgresql_where=text("state = 'active'")),
    )

    id: int = Field(sa_type=SmallInteger, primary_key=True, sa_column_kwargs={"autoincrement": False})
    source: str = words()
    source_hash: str = words()
    note: str = words(default="", sa_column_kwargs={"server_default": ""})
    state: str = words(default="draft", sa_column_kwargs={"server_default": "draft"})
    revision: int = money()
    created_at: datetime = when()
    activated_at: datetime | None = when(nullable=True)


class PricedModel(SQLModel, table=True):
    """What a version knows of a model besides its prices. `default_attributes` stand in for what a call leaves out, and
    `match` is JSON: which other names mean it."""

    __tablename__ = "priced_model"

    version_id: int = _version_key()
    model: str = _key()
    provider: str = _key()
    mode: str = words(default="", sa_column_kwargs={"server_default": ""})
    max_output_tokens: int | None = Field(default=None, sa_type=BigInteger)
    context_tokens: int | None = Field(default=None, sa_type=BigInteger)
    default_attributes: str = words(default="", sa_column_kwargs={"server_default": ""})
    match: str = words(default="", sa_column_kwargs={"server_default": ""})


class Price(SQLModel, table=True):
    """One line of a version: pico-USD for `per_units` of a dimension, from `tier_min` input tokens in the call on."""

    __table_args__ = (
        CheckConstraint("price_pusd >= 0", name="price_not_negative"),
        CheckConstraint("per_units > 0", name="price_per_units_positive"),
        CheckConstraint("tier_min >= 0", name="price_tier_not_negative"),
    )

    version_id: int = _version_key()
    model: str = _key()
    provider: str = _key()
    dimension: str = _key()
    tier_min: int = Field(
        default=0,
        sa_type=BigInteger,
        primary_key=True,
        sa_column_kwargs={"autoincrement": False, "server_default": "0"},
    )
    attributes: str = _key(default="", sa_column_kwargs={"server_default": ""})
    price_pusd: int = money(default=None)
    per_units: int = money(default=1)
    effective_from: datetime = _start_key()
    effective_to: datetime | None = when(nullable=True)


class PriceOverride(SQLModel, table=True):
    """What the operator asks instead, whatever is imported. Provider `''` means every provider.

    It never begins in the past: what a call has cost stays what it was.
    """

    __tablename__ = "price_override"
    __table_args__ = (
        CheckConstraint("price_pusd >= 0", name="price_override_not_negative"),
        CheckConstraint("per_units > 0", name="price_override_per_units_positive"),
        CheckConstraint("tier_min >= 0", name="price_override_tier_not_negative"),
        CheckConstraint("effective_from >= created_at", name="price_override_not_backdated"),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    model: str = words()
    provider: str = words(default="", sa_column_kwargs={"server_default": ""})
    dimension: str = words()
    tier_min: int = money()
    attributes: str = words(default="", sa_column_kwargs={"server_default": ""})
    price_pusd: int = money(default=None)
    per_units: int = money(default=1)
    created_at: datetime = when()
    effective_from: datetime = when()
    effective_to: datetime | None = when(nullable=True)


class Markup(SQLModel, table=True):
    """What is put on a price: parts per million of it (1,000,000 = as it is), and nano-USD for each call."""

    __table_args__ = (
        CheckConstraint("scope IN ('default', 'provider', 'model', 'account')", name="markup_scope_known"),
        CheckConstraint("(scope = 'default') = (subject = '')", name="markup_subject_when_scoped"),
        CheckConstraint("multiplier_ppm >= 0 AND fixed_per_request_nusd >= 0", name="markup_not_negative"),
        CheckConstraint("effective_from >= created_at", name="markup_not_backdated"),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    scope: str = words()
    subject: str = words(default="", sa_column_kwargs={"server_default": ""})
    multiplier_ppm: int = money(default=1_000_000)
    fixed_per_request_nusd: int = money()
    created_at: datetime = when()
    effective_from: datetime = when()
    effective_to: datetime | None = when(nullable=True)


class Fee(SQLModel, table=True):
    """What a feature, such as the web plugin, costs for one request. No markup is put on it."""

    __table_args__ = (
        CheckConstraint("price_nusd >= 0", name="fee_not_negative"),
        CheckConstraint("effective_from >= created_at", name="fee_not_backdated"),
    )

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    feature: str = words()
    price_nusd: int = money(default=None)
    created_at: datetime = when()
    effective_from: datetime = when()
    effective_to: datetime | None = when(nullable=True)
