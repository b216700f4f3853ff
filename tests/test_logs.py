"""Whoever has something to say in a process of ours, a library or Python itself, says it through the allow-list."""

import json
import subprocess
import sys
from typing import Any

import pytest

from app.kernel.logs import ALLOWED_FIELDS
from tests.program import ROOT

SPEAKERS = {
    "a library's warning": "logging.getLogger('psycopg.pool').warning('sesame %s', 'sesame')",
    "a library's traceback": """
try: raise ValueError('sesame')
except ValueError: logging.getLogger('apscheduler').exception('sesame')""",
    "an error in place of a message": "logging.getLogger('uvicorn.error').error(ValueError('sesame'))",
    "a record that does not fit its words": "logging.getLogger('httpx').warning('sesame %d %d', 'sesame')",
    "a line of several": "logging.getLogger('uvicorn.error').warning('sesame\\nsesame\\n')",
    "a stack": "logging.getLogger('asyncio').warning('sesame', stack_info=True)",
    "a task that nobody waited for": """
async def fail(): raise ValueError('sesame')
async def main():
    asyncio.create_task(fail()); await asyncio.sleep(0.01); gc.collect()
asyncio.run(main())""",
    "a callback of the loop": """
def fail(): raise ValueError('sesame')
async def main():
    asyncio.get_running_loop().call_soon(fail); await asyncio.sleep(0.01)
asyncio.run(main())""",
    "a callback of uvloop": """
import uvloop
def fail(): raise ValueError('sesame')
async def main():
    asyncio.get_running_loop().call_soon(fail); await asyncio.sleep(0.01)
uvloop.run(main())""",
    "a thread": """
def fail(): raise ValueError('sesame')
thread = threading.Thread(target=fail, name='sesame'); thread.start(); thread.join()""",
    "a finaliser": """
class Sesame:
    def __del__(self): raise ValueError('sesame')
Sesame()""",
    "a warning": "warnings.warn('sesame', UserWarning)",
    "a deprecation": "warnings.simplefilter('always'); warnings.warn('sesame', DeprecationWarning)",
    "what nobody caught": "raise ValueError('sesame')",
    "a group that nobody caught": "raise ExceptionGroup('sesame', [ValueError('sesame')])",
}


def lines(text: str) -> list[dict[str, Any]]:
    """Each line is one event with allowed fields, and nothing of what was said."""
    events = [json.loads(line) for line in text.splitlines()]
    assert all(set(event) <= ALLOWED_FIELDS for event in events), text
    assert "sesame" not in text
    return events


@pytest.mark.parametrize("speaker", SPEAKERS)
def test_every_line_goes_through_the_allow_list(speaker: str) -> None:
    program = f"""
import asyncio, gc, logging, threading, warnings
from app.kernel import logs
logs.configure('INFO'); logs.catch_all()
{SPEAKERS[speaker]}
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == ""
    (event,) = lines(done.stderr)
    assert event["level"] in ("warning", "error")
    assert event["where"]


def test_an_application_that_raises_is_one_event_whoever_serves_it() -> None:
    """As the sandbox, in its child, is served; in a process of its own, as libraries' loggers are the process's."""
    program = """
import asyncio
from app.kernel import logs
from tests.test_connections import HEAD, LIMITS, serving
logs.configure('INFO'); logs.catch_all()
async def app(scope, receive, send): raise ValueError('sesame')
async def main():
    async with serving(LIMITS, app) as served:
        caller = await served.connect(HEAD + b'Connection: close\\r\\n\\r\\n')
        assert b'500' in await caller.answer()
asyncio.run(main())"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
    (event,) = lines(done.stderr)
    assert (event["event"], event["where"], event["exc_type"]) == ("library.error", "uvicorn.error", "ValueError")


def test_what_our_client_says_is_an_event_by_its_own_name_and_nothing_else_of_it() -> None:
    program = """
import logging
from app.client.meter import log
from app.kernel import logs
logs.configure('INFO')
log.warning('satmeter.away reason=%s', 'sesame')
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    (event,) = lines(done.stderr)
    assert (event["event"], event["where"], event["level"]) == ("satmeter.away", "satmeter.client", "warning")
