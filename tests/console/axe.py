"""axe-core, fetched from npm as it is pinned; where that cannot be had, whoever asks is skipped."""

import hashlib
import io
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

PACKAGE = "axe-core@4.14.1"
SHA256 = "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745"
_RUN = """
const [rules, done] = arguments, options = {resultTypes: ['violations']};
if (rules) options.runOnly = {type: 'rule', values: rules};
axe.run(document, options).then(found => done(found.violations));
"""


@cache
def source() -> str:
    """axe.min.js. Skips the test that has no npm, or no network."""
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("there is no npm here to fetch axe-core with")
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([npm, "pack", "--silent", PACKAGE], cwd=folder, check=True, capture_output=True, timeout=60)
        except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
            pytest.skip(f"npm could not fetch {PACKAGE}: {error}")
        (path,) = Path(folder).glob("*.tgz")
        packed = path.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == SHA256
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        member = archive.extractfile("package/axe.min.js")
        assert member is not None
        return member.read().decode()


def bring(browser: Any) -> None:
    """Onto the page that is shown; its policy lets no script in."""
    browser.execute_cdp_cmd("Runtime.evaluate", {"expression": source()})


def serious(browser: Any, *, colours_alone: bool = False) -> list[str]:
    """What axe finds on the page that is serious or critical, a line each."""
    found = browser.execute_async_script(_RUN, ["color-contrast", "link-in-text-block"] if colours_alone else None)
    return [
        f"{each['id']}: {node['target']} {node.get('failureSummary', '')[:200]}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
