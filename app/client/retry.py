"""What is safe to repeat, and how often: the one retry policy of this package.

Every question has an id that Satmeter knows again: a request_id, a hold_id. Asked twice, each is answered as it was the
first time and has one effect, so that whatever got no answer, or a 5xx, may be asked again. What differs is for how long: a
caller waits for an authorize, so that it is given up within `ask_seconds`; a settle is told until it is answered.
"""

import asyncio
import random
import time
from collections.abc import Mapping
from typing import Final

from app.client.line import Line, Stuck
from app.client.transport import Answer, AnswerLost, NotReached, Transport

_PAUSES_SECONDS: Final = (0.02, 0.06)
"""A caller waits: three attempts within a tenth of a second where nobody listens."""
_LONGEST_PAUSE_SECONDS: Final = 5.0
_AT_ONCE: Final = 32
"""So many questions at once that each is answered in time."""


class Away(Exception):
    """Satmeter gave no answer. `may_have_happened`: it may have got the question all the same."""

    def __init__(self, message: str, *, may_have_happened: bool) -> None:
        self.may_have_happened = may_have_happened
        super().__init__(message)


class Asking:
    """Questions to one Satmeter as one service."""

    def __init__(self, url: str, token: str, transport: Transport) -> None:
        self._url, self._transport, self._line = url.rstrip("/"), transport, Line(_AT_ONCE)
        self._headers: Mapping[str, str] = {
            "authorization": f"Bearer {token}", "content-type": "application/json", "user-agent": "satmeter-client",
        }  # fmt: skip

    async def once(self, path: str, body: bytes, seconds: float) -> Answer:
        """Raises Away, also for a 5xx."""
        try:
            answer = await self._transport.post(self._url + path, self._headers, body, seconds)
        except NotReached as error:
            raise Away(f"Satmeter was not reached: {error}", may_have_happened=False) from error
        except AnswerLost as error:
            raise Away(f"Satmeter's answer was lost: {error}", may_have_happened=True) from error
        if answer.status >= 500:
            raise Away(f"Satmeter answered {answer.status}", may_have_happened=True)
        return answer

    async def within(self, path: str, body: bytes, seconds: float) -> Answer:
        """Ask up to three times in `seconds` all in all, once it is our turn. Raises Away."""
        try:
            async with self._line.turn(seconds):
                return await self._within(path, body, seconds)
        except Stuck:
            raise Away("Satmeter answers nobody", may_have_happened=False) from None

    async def _within(self, path: str, body: bytes, seconds: float) -> Answer:
        deadline, sent = time.monotonic() + seconds, False
        for pause in (*_PAUSES_SECONDS, None):
            left = deadline - time.monotonic()
            try:
                # Half of what is left: a first attempt that hangs leaves time for a second one.
                return await self.once(path, body, left if pause is None else left / 2)
            except Away as away:
                sent = sent or away.may_have_happened
                if pause is None or time.monotonic() + pause >= deadline:
                    raise Away(str(away), may_have_happened=sent) from away
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def close(self) -> None:
        await self._transport.close()


def pause_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row, where nobody waits: doubled up to five seconds, spread."""
    return float(min(_LONGEST_PAUSE_SECONDS, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1))  # noqa: S311
