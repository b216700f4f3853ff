"""`python -m app` and `satmeter`: may be interrupted from the first moment on, before the imports that take a second."""

import os
import signal
import sys
from typing import NoReturn

INTERRUPTED = 130
"""What a shell expects of a program that Ctrl-C ended."""


def start() -> int:
    """Run what the command line says. A SIGINT that was ignored when we came (`nohup satmeter run &`) stays ignored."""
    is_heeded = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    if is_heeded:
        signal.signal(signal.SIGINT, _leave)
    if sys.argv[1:2] == ["run"]:
        os.write(1, b"Starting Satmeter ...\n")
        import app.jobs
        import app.run  # noqa: F401 - all that it takes, while an interruption finds nothing that has to be stopped
    from app.cli import main

    if is_heeded:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return main()
    except KeyboardInterrupt:  # it came while the first one was being dealt with
        _leave()
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # there is nothing left to interrupt


def _leave(*_: object) -> NoReturn:
    """Nothing has been started yet, so there is nothing to stop."""
    os.write(2, b"satmeter: interrupted\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(start())
