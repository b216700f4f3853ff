"""Videos through a gateway: held for a day, made whoever asks or nobody does, charged once, and through every interruption."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from app.client.meter import key_hash
from app.gateway import videos
from app.gateway.errors import InvalidField
from app.gateway.jobs import Busy, Job, JobStore, State
from app.gateway.videos import read_wish, size_of
from tests.client.houses import calls, eventually, open_holds
from tests.gateway.media_house import DATA_URL, Media, media_house
from tests.rig import Rig
from tests.sandbox.upstream import Upstream, running_upstream

ASK = {
    "model": "kling-2.1-pro",
    "prompt": "A golden retriever running through a meadow",
    "aspect_ratio": "16:9",
    "duration": "5",
}
COST_USD = Decimal("0.2875")


@pytest.fixture
async def offline() -> AsyncIterator[Upstream]:
    async with running_upstream() as found:
        yield found


@pytest.fixture
async def media(rig: Rig, offline: Upstream, tmp_path: Path) -> AsyncIterator[Media]:
    async with media_house(rig, offline, tmp_path) as found:
        yield found


async def submitted(media: Media, **changed: Any) -> dict[str, Any]:
    answer = await media.ask("/v1/videos", ASK | changed)
    assert answer.status_code == 202, answer.text
    return dict(answer.json())


async def ended(media: Media, id: str) -> dict[str, Any]:
    """What a poll says once it is over; the job is made to be asked after at once."""
    for _ in range(300):
        answer = await media.client.get(f"/v1/videos/{id}")
        if answer.status_code == 200:
            return dict(answer.json())
        assert answer.status_code == 202
        assert set(answer.json()) == {"id", "model", "status", "created", "estimated_cost"}
        make_due(media.studio.filming.jobs)
        await asyncio.sleep(0.02)
    raise AssertionError(answer.text)


def make_due(jobs: JobStore) -> None:
    """As if each was asked after long ago."""
    for job in jobs.open_jobs():
        with contextlib.suppress(Busy, KeyError), jobs.working_on(job.id) as found:
            found.asked_at = 0
            jobs.save(found)


async def left_alone(media: Media, seconds: float = 20) -> None:
    """Nobody asks for anything until every job is over."""
    until = time.monotonic() + seconds
    while media.studio.filming.jobs.open_jobs():
        assert time.monotonic() < until
        make_due(media.studio.filming.jobs)
        await asyncio.sleep(0.02)


async def test_a_video_is_submitted_polled_shown_and_charged_as_its_seed_says(media: Media) -> None:
    said = await submitted(media)
    assert set(said) == {"id", "model", "status", "created", "estimated_cost"}
    assert said["id"].startswith("gen_")
    assert (said["model"], said["status"], said["estimated_cost"]) == ("kling-2.1-pro", "pending", float(COST_USD))
    assert open_holds(media.rig) == 1
    with psycopg.connect(media.rig.database_url) as conn:
        (left,) = conn.execute("SELECT extract(epoch FROM expires_at - now()) FROM hold").fetchone() or (0,)
    assert 86_000 < left <= 86_400
    done = await ended(media, said["id"])
    assert (done["status"], done["cost"], done["created"]) == ("completed", float(COST_USD), said["created"])
    assert done["data"]["content_type"] == "video/mp4"
    async with httpx.AsyncClient() as stranger:
        film = await stranger.get(media.reached(done["data"]["url"]))
    assert film.content[4:8] == b"ftyp"
    (charge,) = await media.charged()
    assert await media.spent_usd() == COST_USD
    assert charge["model"] == "kling-2.1-pro"
    assert await ended(media, said["id"]) == done  # however often it is asked for
    assert len(calls(media.rig)) == 1
    (row, *_) = await media.offline.log()
    assert (row["asked"]["seconds"], row["asked"]["size"]) == ("5", "1280x720")


async def test_a_video_that_nobody_asks_for_is_made_and_charged_all_the_same(media: Media) -> None:
    await submitted(media)
    await left_alone(media)
    await media.charged()
    assert await media.spent_usd() == COST_USD


@pytest.mark.parametrize(
    "seconds", [10**400, "9" * 400, "nan", -1, 0, [], {"a": 1}, "five", True, None], ids=lambda value: str(value)[:9]
)
async def test_a_video_of_no_sane_length_or_progress_is_charged_as_it_was_asked_for(
    media: Media, monkeypatch: pytest.MonkeyPatch, seconds: object
) -> None:
    read = videos._read

    async def reading(response: Any) -> dict[str, Any]:
        said = await read(response)
        return said | {"seconds": seconds, "progress": seconds} if "status" in said else said

    monkeypatch.setattr(videos, "_read", reading)
    await submitted(media)
    await left_alone(media)
    await media.charged()
    assert await media.spent_usd() == COST_USD


async def test_a_failed_video_says_why_and_costs_nothing(media: Media) -> None:
    await media.offline.order("fail", path="/videos")
    said = await submitted(media)
    done = await ended(media, said["id"])
    assert done["status"] == "failed"
    assert done["error"] == {"code": "video_generation_failed", "message": "The sandbox was told to let this job fail."}
    await media.nothing_charged()


PRICED: list[tuple[str, dict[str, Any], str]] = [
    ("sora-2-pro", {"quality": "1080p", "duration": "5"}, "2.5"), ("sora-2-pro", {"duration": 10}, "3"), ("veo3", {}, "3.2"),
    ("kling-2.5-turbo", {"duration": 5, "aspect_ratio": "9:16"}, "0.35"),
]  # fmt: skip


async def test_videos_are_charged_by_seconds_and_resolution(media: Media) -> None:
    for model, asked, usd in PRICED:
        answer = await media.ask("/v1/videos", {"model": model, "prompt": "A sea", **asked})
        assert (answer.status_code, Decimal(str(answer.json()["estimated_cost"]))) == (202, Decimal(usd))
        assert Decimal(str((await ended(media, answer.json()["id"]))["cost"])) == Decimal(usd)
    await media.charged(len(PRICED))
    assert await media.spent_usd() == sum(Decimal(usd) for *_, usd in PRICED)


async def test_a_video_of_a_picture_has_it_sent_along(media: Media) -> None:
    await submitted(media, model="kling-2.1-master-i2v", image_url=DATA_URL)
    (row,) = [each for each in await media.offline.log() if each["method"] == "POST"]
    assert row["bytes_in"] > 200
    await left_alone(media)
    await media.charged()


def test_what_film_is_wished_for_is_read_by_the_fields_of_the_seed_and_of_openai() -> None:
    def wish(**fields: Any) -> Any:
        return read_wish(
            {
                name: msgspec.Raw(msgspec.json.encode(each))
                for name, each in ({"model": "m", "prompt": "p"} | fields).items()
            }
        )

    assert (wish().seconds, wish().size) == (5, "1280x720")
    assert wish(model="sora-2").seconds == 10
    assert wish(seconds="8", size="1024x1792").size == "1024x1792"
    assert wish(size="1024x1792").attributes.resolution == "1024p"
    assert wish(quality="1080p", aspect_ratio="1:1").size == "1080x1080"
    assert wish(quality="standard").attributes.quality == "standard"
    assert size_of("9:16", 720) == "720x1280"
    for bad in (
        {"duration": "0"},
        {"duration": "ten"},
        {"duration": 999},
        {"aspect_ratio": "2:1:1"},
        {"size": "big"},
        {"prompt": ""},
        {"duration": True},
    ):
        with pytest.raises(InvalidField):
            wish(**bad)


async def test_what_cannot_be_made_is_refused_before_anybody_is_asked(media: Media) -> None:
    for changed, param in (
        ({"duration": "5 or so"}, "duration"), ({"aspect_ratio": "round"}, "aspect_ratio"), ({"prompt": None}, "prompt"),
        ({"image_url": "http://10.0.0.1/a.png"}, "image_url"), ({"image_url": "https://localhost/a.png"}, "image_url"),
    ):  # fmt: skip
        answer = await media.ask("/v1/videos", ASK | changed)
        assert (answer.status_code, answer.json()["error"]["param"]) == (422, param)
    assert await media.offline.log() == []
    await media.nothing_charged()


async def test_a_video_that_the_upstream_refuses_is_given_back(media: Media) -> None:
    for order, status in (("status=400", 400), ("status=429,retry_after=3", 429), ("status=500", 502)):
        await media.offline.order(order)
        assert (await media.ask("/v1/videos", ASK)).status_code == status
    await media.nothing_charged()
    assert media.studio.filming.jobs.open_jobs() == []


async def test_only_its_own_account_sees_a_video(media: Media) -> None:
    said = await submitted(media)
    other = await media.rig.customer("10")
    for key, status in ((other.api_key, 404), ("sk-nobody", 401), ("", 401)):
        answer = await media.client.get(
            f"/v1/videos/{said['id']}", headers={"authorization": f"Bearer {key}" if key else ""}
        )
        assert answer.status_code == status
    for id in ("gen_" + "0" * 32, "gen_", "x", "..%2f..%2fsecrets"):
        assert (await media.client.get(f"/v1/videos/{id}")).status_code == 404
    await left_alone(media)
    await media.charged()


async def test_whoever_spent_all_may_still_see_what_it_was_spent_on(media: Media) -> None:
    said = await submitted(media, model="sora-2-pro", quality="1080p", duration="20")  # all of the ten dollars
    done = await ended(media, said["id"])
    assert (done["status"], done["cost"]) == ("completed", 10)
    assert (await media.ask("/v1/videos", ASK)).status_code == 402
    await media.charged()


async def test_a_hold_is_extended_before_it_ends(media: Media) -> None:
    await media.offline.order("polls=1000", path="/videos")
    said = await submitted(media)
    jobs = media.studio.filming.jobs
    for _ in range(200):  # whoever works on it just now ends soon
        with contextlib.suppress(Busy), jobs.working_on(said["id"]) as job:
            job.held_until, job.asked_at = time.time() + 60, 0
            jobs.save(job)
            break
        await asyncio.sleep(0.01)
    await eventually(lambda: (found := jobs.find(said["id"])) is not None and found.held_until > time.time() + 80_000)
    assert "/v1/meter/extend" in media.wire.paths
    with psycopg.connect(media.rig.database_url) as conn:
        (left,) = conn.execute("SELECT extract(epoch FROM expires_at - now()) FROM hold").fetchone() or (0,)
    assert left > 80_000
    job = jobs.find(said["id"]) or job
    job.created -= 4 * 86_400  # one that never ends is given up, and given back
    jobs.save(job)
    make_due(jobs)
    await left_alone(media)
    await media.nothing_charged()


async def test_a_video_that_its_upstream_has_lost_is_given_back(media: Media) -> None:
    said = await submitted(media)
    for _ in range(5):
        await media.offline.order("status=404", path=f"/videos/{upstream_id(media, said['id'])}")
    await left_alone(media)
    assert (await ended(media, said["id"]))["error"]["code"] == "lost"
    await media.nothing_charged()


async def test_an_upstream_that_is_away_for_a_while_costs_nobody_their_video(media: Media) -> None:
    said = await submitted(media)
    for order in ("status=500", "cut=0", "cut=1", "status=503"):
        await media.offline.order(order, path=f"/videos/{upstream_id(media, said['id'])}")
    await media.offline.order("cut=1", path="/content")
    await media.offline.order("status=500", path="/content")
    assert (await ended(media, said["id"]))["status"] == "completed"
    await media.charged()
    assert await media.spent_usd() == COST_USD


async def test_a_submission_whose_answer_is_lost_is_found_again(media: Media) -> None:
    await media.offline.order("cut=0", path="/videos")
    said = await submitted(media)
    assert (await ended(media, said["id"]))["status"] == "completed"
    await media.charged()
    assert await media.spent_usd() == COST_USD


async def test_a_video_outlives_satmeters_absence(media: Media) -> None:
    said = await submitted(media)
    media.wire.is_cut = True
    jobs = media.studio.filming.jobs

    def is_stored() -> bool:
        make_due(jobs)
        job = jobs.find(said["id"])
        return job is not None and job.state is State.STORED

    await eventually(is_stored)
    assert calls(media.rig) == []
    media.wire.is_cut = False
    await left_alone(media)
    await media.charged()
    assert (await ended(media, said["id"]))["cost"] == float(COST_USD)


def upstream_id(media: Media, id: str) -> str:
    job = media.studio.filming.jobs.find(id)
    assert job is not None
    assert job.upstream_id is not None
    return job.upstream_id


@pytest.mark.parametrize("state", [State.ASKING, State.MADE, State.STORED, State.FAILING])
async def test_a_restart_in_any_state_brings_a_video_to_its_end_once(
    rig: Rig, offline: Upstream, tmp_path: Path, state: State
) -> None:
    if state is State.FAILING:
        await offline.order("fail", path="/videos")
    async with media_house(rig, offline, tmp_path, interval_seconds=3600) as first:
        said = await submitted(first)
        jobs = first.studio.filming.jobs
        if state is not State.MADE:
            await brought_to(first, said["id"], state)
    assert jobs.find(said["id"]).state is state  # type: ignore[union-attr]
    async with again(first, tmp_path) as second:
        await left_alone(second)
        done = await ended(second, said["id"])
        if state is State.FAILING:
            assert done["status"] == "failed"
            await second.nothing_charged()
        else:
            assert (done["status"], done["cost"]) == ("completed", float(COST_USD))
            await second.charged()
            assert await second.spent_usd() == COST_USD


async def brought_to(media: Media, id: str, state: State) -> None:
    """As it was on disk when the process died."""
    jobs = media.studio.filming.jobs
    if state is State.ASKING:
        with jobs.working_on(id) as job:
            job.state, job.upstream_id = State.ASKING, None
            jobs.save(job)
        return
    media.wire.is_cut = True  # so that it comes no further
    for _ in range(100):
        make_due(jobs)
        with jobs.working_on(id) as job:
            if job.state is state:
                return
            await media.studio.filming._polled(job)
            jobs.save(job)
    raise AssertionError(state)


@contextlib.asynccontextmanager
async def again(before: Media, folder: Path) -> AsyncIterator[Media]:
    """The gateway started again over the same folder, for the same customer."""
    async with media_house(before.rig, before.offline, folder, customer=before.customer) as found:
        yield found


async def test_a_submission_that_the_upstream_never_had_is_given_back(
    rig: Rig, offline: Upstream, tmp_path: Path
) -> None:
    async with media_house(rig, offline, tmp_path, interval_seconds=3600) as first:
        verdict: Any = await first.gateway.meter.authorize(
            first.customer.api_key, model=ASK["model"], max_cost_usd=COST_USD, ttl_seconds=86_400
        )
        job = Job(
            id="gen_" + "a" * 32, model=ASK["model"], account_id=verdict.account_id, key_sha256=key_hash(first.customer.api_key),
            request_id=verdict.request_id, hold_id=verdict.hold_id, held_until=time.time() + 86_400,
            estimated_cost_usd=str(COST_USD), created=int(time.time()), upstream="offline", upstream_model=ASK["model"],
            seconds=5, attributes={}, prompt_sha256=key_hash(ASK["prompt"]),
        )  # fmt: skip
        first.studio.filming.jobs.save(job)
    async with again(first, tmp_path) as second:
        await left_alone(second)
        done = await ended(second, job.id)
        assert (done["status"], done["error"]["code"]) == ("failed", "interrupted")
        await second.nothing_charged()


async def test_two_processes_over_one_folder_charge_a_video_once(media: Media, tmp_path: Path) -> None:
    async with media_house(media.rig, media.offline, tmp_path, customer=media.customer) as other:
        ids = [(await submitted(media))["id"] for _ in range(6)]
        await asyncio.gather(left_alone(media), left_alone(other))
        for id in ids:
            assert (await ended(other, id))["status"] == "completed"
    await media.charged(6)
    assert await media.spent_usd() == 6 * COST_USD


def test_a_job_that_is_over_is_nobodys_to_work_on_and_is_forgotten_in_time(tmp_path: Path) -> None:
    jobs = JobStore(tmp_path)
    job = Job(
        id="gen_" + "a" * 32, model="m", account_id="a", key_sha256="k", request_id="r", hold_id="h", held_until=0,
        estimated_cost_usd="1", created=0, upstream="u", upstream_model="m", seconds=5, attributes={},
    )  # fmt: skip
    jobs.save(job)
    with jobs.working_on(job.id) as found, pytest.raises(Busy), jobs.working_on(found.id):
        pass
    job.state, job.ended = State.COMPLETED, 1000
    jobs.save(job)
    assert jobs.open_jobs() == []
    with pytest.raises(KeyError), jobs.working_on(job.id):
        pass
    jobs.sweep(before=1000)
    assert jobs.find(job.id) == job
    jobs.sweep(before=1001)
    assert jobs.find(job.id) is None
    assert list(tmp_path.rglob("gen_*")) == []
