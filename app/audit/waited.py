"""Who may be blamed for what is late: a job that was there since, and not one that stood still with the whole service.

After hours of standing still (an outage, a restored backup) much is late, and done within seconds of the start.
"""

from typing import Final

from app.kernel.figures import JOB

_CHANCE: Final = "interval '5 minutes'"
"""What a job has after the service wakes up."""
_LAST_LIFE: Final = "coalesce(greatest((SELECT max(created_at) FROM hold), (SELECT max(created_at) FROM entry)), now())"


def in_vain(job: str, due: str) -> str:
    """An SQL condition: `due`, a moment that is over, was waited for in vain.

    Either the job has been done since then; or calls came for longer than it may take, and it was not. Where no job has ever been
    done, as in a database that only calls were made in, any call or entry since then says that there was time.
    """
    done = f"(SELECT max(found_at) FROM figure WHERE name = '{JOB}{job}')"
    woken = f"(SELECT min(created_at) FROM hold WHERE created_at > {done} + {_CHANCE})"
    return f"""{due} < now() AND CASE WHEN {done} IS NULL THEN {_LAST_LIFE} >= {due}
                                      ELSE {done} >= {due} OR coalesce({woken} < now() - {_CHANCE}, false) END"""
