"""What tests of offers share: time for a busy machine, but where a test is about that time and sets it itself."""

import pytest

from tests.rig import Rig


@pytest.fixture
def rig(rig: Rig) -> Rig:
    rig.house.mint.patience_seconds = 20
    return rig
