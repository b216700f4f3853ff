"""Fetch the scripts and the stylesheet of the pages once, as `make vendor`: pinned, checked, with their licences.

What it writes is committed, so nobody who installs or runs the service needs npm. A new version is a new line here.
"""

import hashlib
import io
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Final

STATIC: Final = Path(__file__).parents[1] / "app/console/static/vendor"
PACKAGES: Final = (
    ("htmx.org", "4.0.1", "5fba65616ca148a86d377e9771bcada7f35faee3558651feb929eea425e13b3c", {"dist/htmx.min.js": "htmx.js", "dist/ext/hx-sse.min.js": "hx-sse.js", "LICENSE": "htmx.LICENSE"}),
    ("uplot", "1.6.32", "4b8a8191e425658e3ea8c8c1314b0fc679c861ee3a1af2b20c7b16ba50b5133d", {"dist/uPlot.iife.min.js": "uplot.js", "dist/uPlot.min.css": "uplot.css", "LICENSE": "uplot.LICENSE"}),
    ("@knadh/oat", "0.6.1", "137188224700c892d622016c119533b5c027b1db4d1c89c8bbacfb32b71eff7d", {"oat.min.css": "oat.css", "LICENSE": "oat.LICENSE"}),
)  # fmt: skip
"""Name, version, SHA-256 of what npm packs, and which of its files are ours under which name."""


def main() -> int:
    """Write every file and `vendored.json`, which a test compares them with; 1 if npm gave something else than was pinned."""
    STATIC.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, str]] = {}
    for name, version, pinned, files in PACKAGES:
        packed = fetched(f"{name}@{version}")
        if (digest := hashlib.sha256(packed).hexdigest()) != pinned:
            sys.stderr.write(f"{name}@{version} has the SHA-256 {digest}, and {pinned} is pinned\n")
            return 1
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            for path, ours in files.items():
                member = archive.extractfile(f"package/{path}")
                assert member is not None, path
                body = member.read()
                (STATIC / ours).write_bytes(body)
                found[ours] = {"from": f"{name}@{version}/{path}", "sha256": hashlib.sha256(body).hexdigest()}
    (STATIC / "vendored.json").write_text(json.dumps(found, indent=2, sort_keys=True) + "\n")
    return 0


def fetched(package: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        command = ["npm", "pack", "--silent", "--pack-destination", folder, package]  # what it packs is checked
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)  # noqa: S603
        (path,) = Path(folder).glob("*.tgz")
        return path.read_bytes()


if __name__ == "__main__":
    sys.exit(main())
