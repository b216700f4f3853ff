"""A customer with money, at a Satmeter that sells models, for each test that asks for one."""

import pytest

from tests.client.houses import sells
from tests.rig import Customer, Rig


@pytest.fixture
async def customer(rig: Rig) -> Customer:
    await sells(rig)
    return await rig.customer("10")
