"""Videos: films that take minutes, held for a day, made whoever asks or nobody does, charged once when they are here.

`POST` holds the money, writes the job down and gives it to the upstream; `Filming` asks after each until it is over, keeps
the film, and charges it or gives the money back. A caller's `GET` only looks, and has it asked after at once.
"""

import asyncio
import contextlib
import logging
import time
from decimal import Decimal
from io import BytesIO
from typing import Any, Final

import aiohttp
import msgspec

from app.client import Allowed, Attributes, Charged, Denied, Done, Estimate, Hold, Refused, Unavailable, Usage
from app.client.shown import key_hash
from app.gateway import asking
from app.gateway.asking import NotSent, Silent
from app.gateway.billed import CHARGE_WAITED_SECONDS, is_another_worth_asking
from app.gateway.costs import usd_text
from app.gateway.errors import InvalidField, NothingThere, Refusal, Told
from app.gateway.exchange import Body, Exchange
from app.gateway.fields import text_of, words_of
from app.gateway.forms import File, Form, Written, read_form
from app.gateway.jobs import Busy, Job, JobStore, State
from app.gateway.media import TYPES, new_generation
from app.gateway.paid import Gateway, Paid, check_caller, targets_of
from app.gateway.upstreams import Target

log = logging.getLogger("satmeter.gateway")

HOLD_SECONDS: Final = 86_400
_EXTENDED_BEFORE_SECONDS: Final = 43_200
_LOST_AFTER: Final = 5
"""So often in a row an upstream may say that it knows no such film, until it is believed."""
_MOST_SECONDS: Final = 3 * 86_400
"""A film that is not done by then never will be."""
_POLLED_EVERY_SECONDS: Final = ((600, 5), (3600, 15), (_MOST_SECONDS, 60))
_MOST_FILM_BYTES: Final = 2 * 1024**3
_MOST_AT_ONCE: Final = 32
_MOST_ANSWER_BYTES: Final = 4 * 1024 * 1024
_NUSD: Final = 10**9
_DEFAULT_SECONDS: Final = (("veo3", 8), ("sora-2", 10))
"""What is made where no duration is said: the shortest that the model's list of durations has, else 5."""
_LINES: Final = {"480p": 480, "540p": 540, "720p": 720, "768p": 768, "1080p": 1080, "2k": 1440, "4k": 2160}
_RATIOS: Final = {"16:9": (16, 9), "9:16": (9, 16), "1:1": (1, 1), "4:3": (4, 3), "3:4": (3, 4), "21:9": (21, 9)}


class Wish(msgspec.Struct, kw_only=True):
    """What film was asked for."""

    model: str
    prompt: str
    seconds: int
    size: str
    attributes: Attributes
    picture: File | None = None


# --- asked for ------------------------------------------------------------------------------------


async def create(gateway: Gateway, filming: "Filming", exchange: Exchange) -> None:
    """POST /v1/videos: 202 as soon as the upstream has taken it."""
    is_form = exchange.headers.get("content-type", "").startswith("multipart/")
    if is_form:
        await check_caller(gateway, exchange)
    with contextlib.closing(await read_form(exchange) if is_form else Form()) as form:
        body = form.as_body() if is_form else await exchange.json()
        picture = next((file for file in form.files if file.field == "input_reference"), None)
        await _create(gateway, filming, exchange, body, picture)


async def _create(gateway: Gateway, filming: "Filming", exchange: Exchange, body: Body, picture: File | None) -> None:
    wish = read_wish(body)
    targets = targets_of(gateway, wish.model, "videos")
    url = words_of(body, "image_url")
    if url is not None:
        await check_caller(gateway, exchange)
        raw, kind = await gateway.fetcher.picture(url)
        picture = File("input_reference", f"image.{kind}", TYPES[kind], BytesIO(raw), len(raw))
    wish.picture = picture
    estimate = Estimate(
        video_seconds=wish.seconds, quality=wish.attributes.quality, resolution=wish.attributes.resolution
    )
    paid = await Paid.held(gateway, exchange, targets[0], exchange.path, estimate)
    job = _new_job(exchange, wish, paid)
    with filming.jobs.working_on(job.id, new=job):
        await _begun(gateway, filming, exchange, wish, targets, job)
    await exchange.answer(202, shown(job, gateway))


def read_wish(body: Body) -> Wish:
    """Raises InvalidField."""
    model = text_of(body, "model")
    quality, ratio = words_of(body, "quality"), words_of(body, "aspect_ratio") or "16:9"
    if ratio not in _RATIOS:
        raise InvalidField(f"aspect_ratio is one of {', '.join(_RATIOS)}", param="aspect_ratio")
    size = words_of(body, "size")
    lines = _LINES.get((quality or "").lower())
    if size is None:
        size = size_of(ratio, lines or 720)
    elif lines is None:
        lines = _lines_of(size)
    attributes = Attributes(resolution=f"{lines}p" if lines else None, quality=None if lines else quality)
    return Wish(
        model=model, prompt=text_of(body, "prompt"), seconds=_seconds_of(body, model), size=size, attributes=attributes
    )


def size_of(ratio: str, lines: int) -> str:
    """`16:9` of 720 lines as `1280x720`: the shorter side has the lines, and both are even."""
    wide, high = _RATIOS[ratio]
    longer = lines * max(wide, high) // min(wide, high) // 2 * 2
    return f"{longer}x{lines}" if wide >= high else f"{lines}x{longer}"


def _lines_of(size: str) -> int:
    wide, by, high = size.partition("x")
    if not (by and wide.isascii() and high.isascii() and wide.isdigit() and high.isdigit() and len(size) < 12):
        raise InvalidField("size is width x height in pixels, such as 1280x720", param="size")
    return min(int(wide), int(high))


def _seconds_of(body: Body, model: str) -> int:
    name = "duration" if words_of(body, "duration") is not None else "seconds"
    text = words_of(body, name)
    if text is None:
        return next((seconds for start, seconds in _DEFAULT_SECONDS if model.startswith(start)), 5)
    text = text.removesuffix(".0").removesuffix("s")
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 120):
        raise InvalidField(f"{name} is a whole number of seconds from 1 to 120", param=name)
    return int(text)


def _new_job(exchange: Exchange, wish: Wish, paid: Paid) -> Job:
    allowed: Allowed = paid.allowed
    now = time.time()
    return Job(
        id=new_generation(), model=wish.model, account_id=allowed.account_id, key_sha256=(exchange.shown().whose or ""),
        request_id=allowed.request_id, hold_id=allowed.hold_id, held_until=now,
        estimated_cost_usd=usd_text(int(paid.estimated_usd * _NUSD)), created=int(now), upstream=paid.target.upstream.name,
        upstream_model=paid.target.upstream_model, provider=paid.target.upstream.provider, seconds=wish.seconds,
        attributes=msgspec.to_builtins(wish.attributes), prompt_sha256=key_hash(wish.prompt),
    )  # fmt: skip


async def _begun(
    gateway: Gateway, filming: "Filming", exchange: Exchange, wish: Wish, targets: list[Target], job: Job
) -> None:
    """Have an upstream take the film, and write down what it calls it. Raises what it was refused with, the money given back."""
    try:
        taken = await _taken(gateway, exchange, wish, targets, job, filming.jobs)
    except Refusal as refusal:
        _fail(job, refusal.code, refusal.message)
        await asyncio.to_thread(filming.jobs.save, job)
        await filming.step(job)
        raise
    job.asked_at = time.time()
    if taken is not None:  # else it is looked for among the upstream's films
        job.upstream_id, job.state = taken, State.MADE
        await filming.keep_hold(job)  # only now for a day: should we die before, nobody's money is held so long
    await asyncio.to_thread(filming.jobs.save, job)


async def _taken(
    gateway: Gateway, exchange: Exchange, wish: Wish, targets: list[Target], job: Job, jobs: JobStore
) -> str | None:
    """The upstream's own id of the film; None where it was asked and said nothing. Raises what it was refused with."""
    refusal: Refusal = asking.failed("No provider of this model can be reached")
    for target in targets:
        upstream = target.upstream
        job.upstream, job.upstream_model, job.provider = upstream.name, target.upstream_model, upstream.provider
        await asyncio.to_thread(jobs.save, job)
        try:
            response = await _submitted(gateway, exchange, wish, target)
        except NotSent:
            continue
        except Silent:
            return None
        if response.status < 400:
            return await _id_in(response)
        refusal = await asking.refusal_of(response, target.upstream)
        if not is_another_worth_asking(refusal):
            break
    raise refusal


async def _submitted(gateway: Gateway, exchange: Exchange, wish: Wish, target: Target) -> aiohttp.ClientResponse:
    fields = {"model": target.upstream_model, "prompt": wish.prompt, "seconds": str(wish.seconds), "size": wish.size}
    if wish.picture is None:
        sent: Any = msgspec.json.encode(fields)
        return await asking.ask(gateway.session, target, "videos", sent, exchange.headers)
    written = Written(Form(list(fields.items())).fields, [wish.picture])
    return await asking.ask(
        gateway.session, target, "videos", written.chunks(), exchange.headers, content_type=written.content_type
    )


async def _id_in(response: aiohttp.ClientResponse) -> str | None:
    id = (await _read(response)).get("id")
    return id if isinstance(id, str) and 0 < len(id) <= 500 else None


def _length(said: Any, asked_seconds: float) -> float:
    """How long a film is, as its provider says; as it was asked for where that is no length. It is made, and is charged."""
    try:
        made_seconds = 0.0 if isinstance(said, bool) else float(said)
    except (ValueError, TypeError, OverflowError):
        return asked_seconds
    return made_seconds if 0 < made_seconds < 86_400 else asked_seconds


async def _read(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        raw = bytearray()
        async for chunk in response.content.iter_any():
            raw += chunk
            if len(raw) > _MOST_ANSWER_BYTES:
                return {}
        said = msgspec.json.decode(raw)
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return {}
    finally:
        response.close()
    return said if isinstance(said, dict) else {}


# --- looked for -----------------------------------------------------------------------------------


async def show(gateway: Gateway, filming: "Filming", exchange: Exchange, id: str) -> None:
    """GET /v1/videos/{id}: 202 while it is made, 200 once it is over. Raises NothingThere, Told."""
    verdict = await gateway.meter.verify(exchange.shown())
    job = filming.jobs.find(id)
    is_key = job is not None and job.key_sha256 == (exchange.shown().whose or "")
    if isinstance(verdict, Denied):
        if not (is_key and verdict.status in (402, 429, 503)):  # who has spent all may still see what it was spent on
            raise Told(verdict, gateway.settings.low_balance_status)
    elif job is not None and verdict.account_id != job.account_id:
        job = None
    if job is None:
        raise NothingThere
    if not job.state.is_over and time.time() - job.asked_at >= 1:
        await filming.advance(id)
        job = filming.jobs.find(id) or job
    await exchange.answer(200 if job.state.is_over else 202, shown(job, gateway))


def shown(job: Job, gateway: Gateway) -> bytes:
    body: dict[str, Any] = {"id": job.id, "model": job.model, "status": _status_of(job), "created": job.created}
    if job.state is State.COMPLETED:
        kept = gateway.media.shown(job.id, 0)
        body["data"] = None if kept is None else {"url": kept.url, "content_type": kept.content_type}
        body["cost"] = None if job.cost_usd is None else msgspec.Raw(job.cost_usd.encode())
    elif job.state is State.FAILED:
        body["error"] = job.error
    else:
        body["estimated_cost"] = msgspec.Raw(job.estimated_cost_usd.encode())
    return msgspec.json.encode(body)


def _status_of(job: Job) -> str:
    if job.state.is_over:
        return job.state.value
    return "pending" if job.state in (State.ASKING, State.MADE) and not job.progress else "processing"


# --- made -----------------------------------------------------------------------------------------

_STATUSES: Final = {
    "completed": "completed", "succeeded": "completed", "success": "completed", "failed": "failed", "error": "failed",
    "cancelled": "failed", "canceled": "failed", "expired": "failed", "rejected": "failed",
}  # fmt: skip
"""What the upstream's own word means; any other is a film that is still being made."""


class Filming:
    """Brings every film to its end, whether or not anybody asks for it. `interval_seconds` is how often it looks for one."""

    def __init__(self, gateway: Gateway, jobs: JobStore, interval_seconds: float = 1.0) -> None:
        self.jobs, self._gateway, self._interval_seconds = jobs, gateway, interval_seconds
        self._charging: dict[str, asyncio.Future[Any]] = {}
        self._working: dict[str, asyncio.Task[None]] = {}

    async def run(self) -> None:
        """For as long as the gateway lives."""
        try:
            while True:
                for job in await asyncio.to_thread(self.jobs.open_jobs):
                    self._start(job, time.time())
                await asyncio.sleep(self._interval_seconds)
        finally:
            for task in self._working.values():
                task.cancel()
            await asyncio.gather(*self._working.values(), return_exceptions=True)

    def _start(self, job: Job, now: float) -> None:
        """Ask after one that is due. A film that takes long to fetch keeps no other waiting."""
        is_due = now >= job.asked_at + _wait_seconds(now - job.created) or job.state in (State.STORED, State.FAILING)
        if not is_due or job.id in self._working or len(self._working) >= _MOST_AT_ONCE:
            return
        task = asyncio.create_task(self._advanced(job.id))
        self._working[job.id] = task
        task.add_done_callback(lambda _: self._working.pop(job.id, None))

    async def _advanced(self, id: str) -> None:
        try:
            await self.advance(id)
        except Exception:  # it is tried again, whatever became of it this time
            log.exception("videos.step_failed id=%s", id)

    async def advance(self, id: str) -> None:
        """Bring one film as far as it goes now. Nothing where somebody else does."""
        with contextlib.suppress(Busy, KeyError), self.jobs.working_on(id) as job:
            await self.step(job)

    async def step(self, job: Job) -> None:
        """The same, of a job that is ours to change."""
        done_so_far = None
        while job.state is not done_so_far and not job.state.is_over:
            done_so_far = job.state
            await _STEPS[job.state](self, job)
            await asyncio.to_thread(self.jobs.save, job)

    async def _found_again(self, job: Job) -> None:
        """It was asked for, and nobody knows whether its upstream has it: it is looked for among the upstream's films."""
        await self.keep_hold(job)
        target = self._target(job)
        job.asked_at = time.time()
        if job.asked_at - job.created > _MOST_SECONDS:
            job.may_have_run = True
            return _fail(job, "interrupted", "Its provider could not be asked for three days")
        response = await self._asked(target, "videos?limit=100&order=desc") if target is not None else None
        if response is None or response.status >= 500:
            return
        said = await _read(response) if response.status == 200 else {}
        films = said.get("data")
        known = {each.upstream_id for each in await asyncio.to_thread(self.jobs.all_jobs)}
        found = [each for each in films or () if _is_this(each, job) and each["id"] not in known]
        if found:
            job.upstream_id, job.state = found[0]["id"], State.MADE
            return
        job.may_have_run = not isinstance(films, list)
        _fail(job, "interrupted", "It was interrupted as it was given to its provider; ask again")

    async def _polled(self, job: Job) -> None:
        await self.keep_hold(job)
        now, target = time.time(), self._target(job)
        job.asked_at = now
        if now - job.created > _MOST_SECONDS:
            return _fail(job, "timeout", "It was not made in three days")
        response = None if target is None else await self._asked(target, f"videos/{job.upstream_id}")
        if target is None or response is None:
            return
        if response.status == 404:
            response.close()
            job.lost += 1
            if job.lost >= _LOST_AFTER:
                _fail(job, "lost", "Its provider knows nothing of it any more")
            return
        job.lost = 0
        said = await _read(response) if response.status == 200 else {}
        response.close()
        await self._heard(job, target, said)

    async def _heard(self, job: Job, target: Target, said: dict[str, Any]) -> None:
        status = str(said.get("status", "")).lower()
        meaning = _STATUSES.get(status)
        if meaning == "failed":
            error = said.get("error") if isinstance(said.get("error"), dict) else {}
            message = asking.clean(str((error or {}).get("message") or "It failed at its provider"), target.upstream)
            return _fail(job, str((error or {}).get("code") or "failed")[:100], message)
        progress = said.get("progress")
        job.progress = max(
            1 if status not in ("", "queued", "pending") else 0,
            progress if type(progress) is int and progress <= 100 else 0,
        )
        if meaning == "completed" and await self._downloaded(job, target):
            job.state = State.STORED
            job.seconds = _length(said.get("seconds"), job.seconds)

    async def _downloaded(self, job: Job, target: Target) -> bool:
        """Whether the film is here, whole."""
        response = await self._asked(target, f"videos/{job.upstream_id}/content")
        if response is None:
            return False
        placing = self._gateway.media.place(job.id, 0)
        size = 0
        try:
            if response.status != 200:
                return False
            async for chunk in response.content.iter_any():
                size += len(chunk)
                if size > _MOST_FILM_BYTES:
                    raise OSError("larger than any film")
                placing.write(chunk)
            placing.keep()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            log.warning("videos.download_failed id=%s error=%s", job.id, type(error).__name__)
            return False
        finally:
            placing.drop()
            response.close()
        return True

    async def _charged(self, job: Job) -> None:
        outcome = await self._told(job, lambda hold: self._gateway.meter.settle(hold, _done(job), at_once=True))
        if isinstance(outcome, Charged):
            job.cost_usd = usd_text(int(outcome.cost.total_cost_usd * _NUSD))
        elif isinstance(outcome, Refused):
            log.error("videos.charge_refused id=%s error=%s", job.id, outcome.error.get("code"))
        else:
            return
        job.state, job.ended = State.COMPLETED, time.time()

    async def _given_back(self, job: Job) -> None:
        if job.may_have_run:  # nothing came, so nothing is charged, and nothing given back as if it had not been asked
            nothing = Done(cost_usd=Decimal(0), outcome="partial")
            outcome = await self._told(job, lambda hold: self._gateway.meter.settle(hold, nothing))
        else:
            reason = (job.error or {}).get("message", "failed")
            outcome = await self._told(job, lambda hold: self._gateway.meter.release(hold, reason))
        if outcome is not _NOT_YET:
            job.state, job.ended = State.FAILED, time.time()

    async def _told(self, job: Job, tell: Any) -> Any:
        """What Satmeter answers; `_NOT_YET` where it takes longer than a caller should wait. It is told once a process,
        and what was told twice counts once."""
        if job.id not in self._charging:
            self._charging[job.id] = tell(Hold(job.request_id, job.hold_id))
        try:
            outcome = await asyncio.wait_for(asyncio.shield(self._charging[job.id]), CHARGE_WAITED_SECONDS)
        except TimeoutError:
            return _NOT_YET
        del self._charging[job.id]
        return outcome

    async def keep_hold(self, job: Job) -> None:
        """See to it that the money is held for half a day at least."""
        now = time.time()
        if job.held_until - now > _EXTENDED_BEFORE_SECONDS:
            return
        found = await self._gateway.meter.extend(Hold(job.request_id, job.hold_id), ttl_seconds=HOLD_SECONDS)
        if not isinstance(found, Unavailable | Refused):
            job.held_until = now + HOLD_SECONDS

    async def _asked(self, target: Target, path: str) -> aiohttp.ClientResponse | None:
        try:
            return await asking.ask(self._gateway.session, target, path, None, {}, method="GET")
        except (NotSent, Silent):
            return None

    def _target(self, job: Job) -> Target | None:
        """Who has it, unless the operator has taken them off the list."""
        upstream = next((each for each in self._gateway.settings.upstreams.all if each.name == job.upstream), None)
        if upstream is None:
            log.error("videos.upstream_missing id=%s upstream=%s", job.id, job.upstream)
        return None if upstream is None else Target(job.model, upstream, job.upstream_model)


_NOT_YET: Final = object()
_STEPS: Final = {
    State.ASKING: Filming._found_again,
    State.MADE: Filming._polled,
    State.STORED: Filming._charged,
    State.FAILING: Filming._given_back,
}


def _wait_seconds(age_seconds: float) -> float:
    return next((every for until, every in _POLLED_EVERY_SECONDS if age_seconds < until), 60)


def _fail(job: Job, code: str, message: str) -> None:
    job.state, job.error = State.FAILING, {"code": code, "message": message}


def _is_this(said: Any, job: Job) -> bool:
    """Whether a film in an upstream's list is the one that this job asked for."""
    if not isinstance(said, dict) or not isinstance(said.get("id"), str):
        return False
    created, prompt = said.get("created_at"), said.get("prompt")
    is_new = isinstance(created, int | float) and created >= job.created - 60
    is_prompt = not isinstance(prompt, str) or key_hash(prompt) == job.prompt_sha256
    return (
        is_new
        and is_prompt
        and said.get("model") == job.upstream_model
        and str(said.get("seconds")) == f"{job.seconds:g}"
    )


def _done(job: Job) -> Done:
    return Done(
        usage=Usage(video_seconds=job.seconds), served_model=job.model, provider=job.provider,
        attributes=msgspec.convert(job.attributes, Attributes), upstream_id=job.upstream_id,
        upstream_model=job.upstream_model,
    )  # fmt: skip
