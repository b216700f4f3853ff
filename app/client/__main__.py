"""`python -m app.client report FOLDER [--json]`: what a spool has in it. Exit code 1 if somebody has to look at it."""

import argparse
import sys
from pathlib import Path

import msgspec

from app.client.report import as_text, report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m app.client", description=__doc__)
    verbs = parser.add_subparsers(required=True)
    asked = verbs.add_parser("report", help="what is yet to be told, and what Satmeter refuses")
    asked.add_argument("folder", type=Path)
    asked.add_argument("--json", action="store_true")
    given = parser.parse_args()
    try:
        found = report(given.folder)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print(msgspec.json.encode(found).decode() if given.json else as_text(found))
    return 0 if found.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
