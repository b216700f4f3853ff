"""How the proxies behave: what each holds, since when, and how soon it settles."""

from collections.abc import Sequence

from sqlalchemy.ext.asyncio import AsyncSession

from app.kernel.db import Row, rows


async def proxies(session: AsyncSession) -> Sequence[Row]:
    """A row for each service that has a token or holds something, by name.

    `open_holds`, `open_nusd`, `oldest_at` and `overdue` are of its open holds; `settled`, `median_seconds` and
    `slowest_seconds` are from authorize to settle, of the newest 5,000 holds that were closed in the last hour.
    """
    return await rows(
        session,
        """WITH open AS (SELECT service, count(*) AS holds, sum(amount_nusd)::bigint AS nusd, min(created_at) AS oldest_at,
                                count(*) FILTER (WHERE expires_at <= now()) AS overdue
                         FROM hold WHERE state = 'open' GROUP BY 1),
                closed AS (SELECT service, count(*) AS settled,
                                  percentile_cont(0.5) WITHIN GROUP (ORDER BY extract(epoch FROM closed_at - created_at)) AS median_seconds,
                                  max(extract(epoch FROM closed_at - created_at))::float8 AS slowest_seconds
                           FROM (SELECT service, state, created_at, closed_at FROM hold
                                 WHERE closed_at > now() - interval '1 hour' ORDER BY closed_at DESC LIMIT 5000) h
                           WHERE state = 'settled' GROUP BY 1),
                seen AS (SELECT t.name, max(u.last_used_at) AS last_used_at FROM service_token t
                         LEFT JOIN token_use u ON u.token_id = t.id GROUP BY 1)
           SELECT service, coalesce(o.holds, 0) AS open_holds, coalesce(o.nusd, 0) AS open_nusd, o.oldest_at,
                  coalesce(o.overdue, 0) AS overdue, coalesce(c.settled, 0) AS settled, c.median_seconds, c.slowest_seconds,
                  s.last_used_at
           FROM (SELECT service FROM open UNION SELECT service FROM closed UNION SELECT name FROM seen) every
           LEFT JOIN open o USING (service) LEFT JOIN closed c USING (service) LEFT JOIN seen s ON s.name = service
           ORDER BY service""",
    )
