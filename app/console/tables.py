"""What the pages remember: which sessions were signed out."""

import uuid
from datetime import datetime

from sqlalchemy import Index
from sqlalchemy.dialects.postgresql import UUID
from sqlmodel import Field, SQLModel

from app.kernel.tables import when


class SessionOver(SQLModel, table=True):
    """A session that was signed out; `id` is its nonce. Kept until its cookie would be over by itself."""

    __tablename__ = "session_over"
    __table_args__ = (Index("session_over_by_age", "over_at"),)

    id: uuid.UUID = Field(sa_type=UUID, primary_key=True)
    over_at: datetime = when()
