"""How the processes that run tests share them: file by file, the longest first, and programs one by one."""

from typing import Any, Final

import pytest
from xdist.scheduler import LoadFileScheduling

_ONE_BY_ONE: Final = ("tests/test_run.py",)
"""Files of long tests that want nothing of each other; one process alone with such a file would be the last to end."""


class Shares(LoadFileScheduling):  # type: ignore[misc]
    """A file goes to one process, for its module's fixtures and for what its tests count together."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return nodeid if file in _ONE_BY_ONE else file


def make(config: pytest.Config, log: Any) -> Shares:
    config.option.loadscopereorder = False  # xdist's own measure is how many tests a file has, not how long they are
    return Shares(config, log)
