"""Videos: jobs that take a few polls, and an empty film at the end. Source: OpenAI API reference, "Videos"."""

import struct
import time
from collections.abc import Iterator
from typing import Any, Final

from msgspec import Struct

from .ids import new_id
from .orders import Order
from .usage import Counts
from .wire import Answer, Call, Piece, json_answer, refusal

_DEFAULT_SECONDS: Final = 4
_DEFAULT_SIZE: Final = "720x1280"
_FILM_BYTES: Final = 4096
_CHUNK: Final = 48 * 1024


class Job(Struct):
    """One film that is being made. `polls` is how often it will still be asked for in vain."""

    id: str
    model: str
    prompt: str
    seconds: int
    size: str
    created_at: int
    polls: int
    fails: bool
    bytes: int

    @property
    def status(self) -> str:
        if self.polls > 1:
            return "queued"
        if self.polls == 1:
            return "in_progress"
        return "failed" if self.fails else "completed"


Jobs = dict[str, Job]


def start_video(call: Call, order: Order, jobs: Jobs) -> Answer:
    fields = call.fields
    if not fields.get("prompt"):
        return refusal(400, "Missing required parameter: 'prompt'.", "prompt", "missing_required_parameter")
    asked = order.seconds if order.seconds is not None else fields.get("seconds") or _DEFAULT_SECONDS
    job = Job(
        new_id("video_"), call.model, str(fields["prompt"]), int(float(asked)), str(fields.get("size") or _DEFAULT_SIZE),
        int(time.time()), order.polls, order.fail, order.bytes or _FILM_BYTES,
    )  # fmt: skip
    jobs[job.id] = job
    counts = Counts(video_seconds=0 if job.fails else job.seconds)
    return json_answer(_view(job), counts=counts, id=job.id, attributes={"size": job.size})


def poll_video(job: Job) -> Answer:
    """How it stands; it is a poll nearer to its end."""
    answer = json_answer(_view(job), id=job.id)
    job.polls = max(0, job.polls - 1)
    return answer


def list_videos(jobs: Jobs) -> Answer:
    """Newest first."""
    return json_answer({"object": "list", "data": [_view(job) for job in reversed(jobs.values())], "has_more": False})


def send_video(job: Job) -> Answer:
    if job.status != "completed":
        return refusal(404, f"Video {job.id} is not ready: it is {job.status}.")
    return Answer((Piece(chunk) for chunk in film(job.seconds, job.bytes)), "video/mp4", id=job.id, length=job.bytes)


def _view(job: Job) -> dict[str, Any]:
    is_done, is_failed = job.status == "completed", job.status == "failed"
    progress = {"queued": 0, "in_progress": 50}.get(job.status, 100)
    error = {"code": "video_generation_failed", "message": "The sandbox was told to let this job fail."}
    return {
        "id": job.id, "object": "video", "model": job.model, "prompt": job.prompt, "status": job.status, "progress": progress,
        "created_at": job.created_at, "completed_at": job.created_at + job.seconds if is_done else None,
        "expires_at": job.created_at + 3600 if is_done else None, "size": job.size, "seconds": str(job.seconds),
        "quality": "standard", "remixed_from_video_id": None, "error": error if is_failed else None,
    }  # fmt: skip


def film(seconds: int, size: int) -> Iterator[bytes]:
    """An MP4 of so many bytes that says how long it is and has no track: `ftyp`, `moov`, and room to the end."""
    brand = _box(b"ftyp", b"isom" + struct.pack(">I", 512) + b"isommp41")
    matrix = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    times = struct.pack(">IIIII", 0, 0, 0, 1000, seconds * 1000)
    movie = times + struct.pack(">IH10x", 65536, 256) + matrix + bytes(24) + struct.pack(">I", 1)
    head = brand + _box(b"moov", _box(b"mvhd", movie))
    left = max(8, size - len(head))
    yield head + struct.pack(">I", left) + b"free"
    left -= 8
    while left > 0:
        yield bytes(min(left, _CHUNK))
        left -= _CHUNK


def _box(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", 8 + len(data)) + kind + data
