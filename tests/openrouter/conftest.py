"""The same past as activity's tests have."""

from tests.activity.conftest import past

__all__ = ["past"]
