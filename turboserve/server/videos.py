"""One-shot videos on top of sessions: a session at free pace whose viewer is a file being written.

Files lie in the data directory, named by ids of our own; their number and age are bounded.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from turboserve.errors import NotFound, Overloaded
from turboserve.server.attach_encoder import AttachEncoder
from turboserve.server.auth import Identity
from turboserve.server.catalogue import Catalogue, Choice
from turboserve.server.gateway import Gateway
from turboserve.server.gateway_logic import NewSession
from turboserve.server.pacing import Pace
from turboserve.server.session_stream import SessionStream, StoredChunk


@dataclass(slots=True)
class VideoJob:
    """One video. Its id is the session's."""

    wish: NewSession
    choice: Choice
    seconds: float
    path: Path
    created_unix_s: float
    status: str = "queued"
    done: int = 0
    error: dict[str, str] | None = None
    completed_unix_s: float | None = None
    task: asyncio.Task[None] | None = None
    queue: deque[StoredChunk | dict[str, Any] | None] = field(default_factory=deque)
    filled: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def id(self) -> str:
        return self.wish.sid

    # As a viewer of the gateway:

    def message(self, message: dict[str, Any]) -> None:
        if message["type"] == "error":
            self.error = {"code": message["code"], "message": message["message"]}

    def chunk(self, chunk: StoredChunk) -> None:
        self.queue.append(chunk)
        self.filled.set()

    def close(self, code: int, reason: str) -> None:
        if code != 1000 and self.error is None:
            self.error = {"code": "session_failed", "message": reason}
        self.queue.append(None)
        self.filled.set()

    def as_json(self, kept_s: float) -> dict[str, Any]:
        """The object OpenAI's clients know, with our seed and model hash added."""
        shape = self.choice.shape
        most = self.choice.max_chunks or 1
        return {
            "id": self.wish.sid,
            "object": "video",
            "model": shape.model,
            "status": self.status,
            "progress": 100 if self.status == "completed" else min(99, round(100 * self.done / most)),
            "created_at": int(self.created_unix_s),
            "completed_at": int(self.completed_unix_s) if self.completed_unix_s else None,
            "expires_at": int(self.completed_unix_s + kept_s) if self.completed_unix_s else None,
            "seconds": f"{self.seconds:g}",
            "size": f"{shape.width}x{shape.height}",
            "prompt": self.wish.prompt,
            "seed": self.wish.seed,
            "error": self.error,
        }


class VideoJobs:
    """All videos of a gateway. They do not outlive it: a restart forgets them and removes their files."""

    def __init__(self, gateway: Gateway, catalogue: Catalogue) -> None:
        self._gateway = gateway
        self._catalogue = catalogue
        self._jobs: dict[str, VideoJob] = {}
        self._folder = Path(gateway.config.data_dir) / "videos"
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in self._folder.glob("*.mp4"):
            left.unlink(missing_ok=True)

    async def create(self, identity: Identity, wish: NewSession, choice: Choice, seconds: float) -> VideoJob:
        """Start a video; quotas and refusals are the session's."""
        self.expire()
        limits = self._gateway.config.limits
        if len(self._jobs) >= limits.videos_kept:
            finished = [one for one in self._jobs.values() if one.task is None or one.task.done()]
            if not finished:
                raise Overloaded("too many videos are being made", retry_after_s=10.0)
            self.remove(finished[0].wish.sid, finished[0].wish.tenant)
        job = VideoJob(wish, choice, seconds, self._folder / f"{wish.sid}.mp4", time.time())
        await self._gateway.create(wish)
        self._jobs[wish.sid] = job
        job.task = asyncio.create_task(self._make(job))
        return job

    def find(self, video_id: str, tenant: str) -> VideoJob:
        self.expire()
        job = self._jobs.get(video_id)
        if job is None or job.wish.tenant != tenant:
            raise NotFound("no such video", hint="it may have expired, or belong to another key")
        return job

    def list(self, tenant: str) -> list[VideoJob]:
        self.expire()
        return [one for one in self._jobs.values() if one.wish.tenant == tenant]

    def remove(self, video_id: str, tenant: str) -> None:
        job = self.find(video_id, tenant)
        del self._jobs[video_id]
        if job.task is not None:
            job.task.cancel()
        job.path.unlink(missing_ok=True)

    def expire(self) -> None:
        """Forget what is older than it may become."""
        kept_s = self._gateway.config.limits.videos_kept_s
        for job in list(self._jobs.values()):
            if job.completed_unix_s is not None and time.time() > job.completed_unix_s + kept_s:
                job.path.unlink(missing_ok=True)
                del self._jobs[job.wish.sid]

    def close(self) -> None:
        for job in self._jobs.values():
            if job.task is not None:
                job.task.cancel()

    async def _make(self, job: VideoJob) -> None:
        """The viewer's side of the session: take chunks, append them to the file, ack."""
        gateway, sid, shape = self._gateway, job.wish.sid, job.choice.shape
        loop = asyncio.get_running_loop()
        connection = gateway.add_viewer(job)
        encoder = AttachEncoder("mp4", shape, 0)
        try:
            gateway.attach(connection, sid, job.wish.token, 0, encoder.format, Pace.FREE)
            with open(job.path, "wb") as file:  # noqa: ASYNC230 - a local file; writes go through the pool below
                while (chunk := await _next(job)) is not None:
                    job.status = "in_progress"
                    await loop.run_in_executor(gateway.encoders, _append, file, encoder, chunk)
                    job.done += 1
                    gateway.act(connection, sid, partial(_ack, connection, chunk.index))
            job.status = "completed" if job.error is None else "failed"
        except OSError as error:
            gateway.log.error("video file failed", video=sid, error=str(error))
            job.status, job.error = "failed", {"code": "internal", "message": "the file could not be written"}
        finally:
            job.completed_unix_s = time.time()
            gateway.remove_viewer(connection, sid)
            session = gateway.logic.sessions.get(sid)
            if session is not None and session.ended_s is None:
                gateway.end(sid, None, "video_done")
            if job.status != "completed":
                job.path.unlink(missing_ok=True)


def _ack(connection: int, index: int, session: SessionStream, now_s: float) -> None:
    session.ack(connection, index, now_s)


async def _next(job: VideoJob) -> StoredChunk | None:
    while not job.queue:
        job.filled.clear()
        await job.filled.wait()
    item = job.queue.popleft()
    assert not isinstance(item, dict)
    return item


def _append(file: Any, encoder: AttachEncoder, chunk: StoredChunk) -> None:
    first = encoder.init if chunk.index == 0 else b""
    encoded = encoder.encode(chunk)
    file.write(encoded.init or first)
    file.write(encoded.data)
    file.flush()
