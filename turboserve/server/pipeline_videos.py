"""One-shot videos by a local diffusers pipeline (`serve --video-pipeline`), beside the live model.

A child process of the gateway runs the pipeline (runtime/pipeline_worker.py). At the end of every step it waits for
leave to go on, and gets it when no live session is active, or after `STEP_WAIT_MAX_S`: live sessions come first, and a
video still comes to its end. One video at a time; the rest wait, in a bounded queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from turboserve.errors import InvalidRequest, NotFound, Overloaded, QuotaExceeded
from turboserve.session import new_session_id
from turboserve.video.encode import Encoder

STEP_WAIT_MAX_S = 5.0
POLL_S = 0.02
QUEUED_PER_TENANT_MAX = 4
SIDE_MAX = 1920
_LINE_BYTES_MAX = 1 << 16


@dataclass(slots=True)
class PipelineJob:
    """One video. Times are Unix seconds; `waited_s` is how long live sessions had the device instead."""

    tenant: str
    model: str
    prompt: str
    seed: int
    width: int
    height: int
    steps: int
    frames: int
    seconds: float
    path: Path
    id: str = field(default_factory=new_session_id)
    created_unix_s: float = field(default_factory=time.time)
    status: str = "queued"
    done_steps: int = 0
    waited_s: float = 0.0
    error: dict[str, str] | None = None
    completed_unix_s: float | None = None
    cancelled: bool = False

    def as_json(self, kept_s: float) -> dict[str, Any]:
        """The object OpenAI's clients know, with our seed added."""
        progress = 100 if self.status == "completed" else min(99, round(100 * self.done_steps / self.steps))
        return {
            "id": self.id,
            "object": "video",
            "model": self.model,
            "status": self.status,
            "progress": progress,
            "created_at": int(self.created_unix_s),
            "completed_at": int(self.completed_unix_s) if self.completed_unix_s else None,
            "expires_at": int(self.completed_unix_s + kept_s) if self.completed_unix_s else None,
            "seconds": f"{self.seconds:g}",
            "size": f"{self.width}x{self.height}",
            "prompt": self.prompt,
            "seed": self.seed,
            "error": self.error,
            "waited_for_live_s": round(self.waited_s, 3),
        }


class _Child:
    """The pipeline's process and its lines."""

    def __init__(self, process: asyncio.subprocess.Process, facts: dict[str, Any]) -> None:
        self.process = process
        self.facts = facts

    @classmethod
    async def start(cls, folder: str, device: str) -> _Child:
        """Start it and wait until the pipeline is loaded; RuntimeError says why it is not."""
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "turboserve.runtime.pipeline_worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            # Nothing is fetched unless asked, and this was not.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"},
        )
        child = cls(process, {})
        child.send(folder=folder, device=device)
        first = await child.receive()
        if "loaded" not in first:
            await child.stop()
            raise RuntimeError(first.get("failed_to_load", "the pipeline's process ended"))
        child.facts = first["loaded"]
        return child

    @property
    def alive(self) -> bool:
        return self.process.returncode is None

    def send(self, **message: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(message).encode() + b"\n")

    async def receive(self) -> dict[str, Any]:
        """Its next message; {} when it has ended."""
        assert self.process.stdout is not None
        line = await self.process.stdout.readline()
        return json.loads(line) if line else {}

    async def stop(self) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()
        await self.process.communicate()  # waits, and closes the pipes


class PipelineVideos:
    """All videos of the pipeline. `live_busy` tells whether a live session wants the device now."""

    def __init__(
        self,
        pipeline: Path,
        device: str,
        folder: Path,
        *,
        live_busy: Callable[[], bool],
        log: Any,
        kept: int,
        kept_s: float,
        step_wait_max_s: float = STEP_WAIT_MAX_S,
    ) -> None:
        self.name = pipeline.name
        self._pipeline, self._device, self._folder = pipeline, device, folder
        self._live_busy, self._log = live_busy, log
        self._kept, self._kept_s, self._step_wait_max_s = kept, kept_s, step_wait_max_s
        self._jobs: dict[str, PipelineJob] = {}
        self._waiting: asyncio.Queue[PipelineJob] = asyncio.Queue()
        self._child: _Child | None = None
        self._task: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for left in folder.glob("pipeline-*"):
            left.unlink(missing_ok=True)

    def as_model(self) -> dict[str, Any]:
        """Its entry of GET /v1/models: for /v1/videos alone."""
        return {
            "id": self.name,
            "object": "model",
            "owned_by": "turboserve",
            "about": "a local diffusers pipeline for /v1/videos; live sessions go before it at every step's end",
            "routes": ["/v1/videos"],
        }

    async def create(
        self, *, tenant: str, prompt: str, seed: int, size: str | None, steps: int | None, seconds: float
    ) -> PipelineJob:
        """Queue a video. InvalidRequest names a field that does not fit; QuotaExceeded and Overloaded: it is full."""
        self.expire()
        open_jobs = [one for one in self._jobs.values() if one.completed_unix_s is None]
        if sum(one.tenant == tenant for one in open_jobs) >= QUEUED_PER_TENANT_MAX:
            raise QuotaExceeded("too many videos of this key are waiting", retry_after_s=30.0)
        if len(self._jobs) >= self._kept:
            finished = [one for one in self._jobs.values() if one.completed_unix_s is not None]
            if not finished:
                raise Overloaded("too many videos are being made", retry_after_s=30.0)
            self.remove(finished[0].id, finished[0].tenant)
        child = await self._loaded()
        width, height = self._size(size, child.facts)
        job = PipelineJob(
            tenant=tenant,
            model=self.name,
            prompt=prompt,
            seed=seed,
            width=width,
            height=height,
            steps=steps or int(child.facts["steps"]),
            frames=max(1, round(seconds * float(child.facts["fps"]))),
            seconds=seconds,
            path=self._folder / f"pipeline-{new_session_id()}.mp4",
        )
        self._jobs[job.id] = job
        self._waiting.put_nowait(job)
        if self._task is None:
            self._task = asyncio.create_task(self._work(), name="pipeline-videos")
        return job

    @staticmethod
    def _size(size: str | None, facts: dict[str, Any]) -> tuple[int, int]:
        if size is None:
            return int(facts["width"]), int(facts["height"])
        width, _, height = size.partition("x")
        sides = [int(one) for one in (width, height) if one.isdecimal()]
        if len(sides) != 2 or any(one % 16 or not 16 <= one <= SIDE_MAX for one in sides):
            error = InvalidRequest("size does not fit", expected=f"WxH, both multiples of 16 up to {SIDE_MAX}")
            error.param = "size"  # type: ignore[attr-defined]
            raise error
        return sides[0], sides[1]

    def find(self, video_id: str, tenant: str) -> PipelineJob:
        self.expire()
        job = self._jobs.get(video_id)
        if job is None or job.tenant != tenant:
            raise NotFound("no such video", hint="it may have expired, or belong to another key")
        return job

    def list(self, tenant: str) -> list[PipelineJob]:
        self.expire()
        return [one for one in self._jobs.values() if one.tenant == tenant]

    def remove(self, video_id: str, tenant: str) -> None:
        """Forget a video; one in work stops at its next step's end."""
        job = self.find(video_id, tenant)
        job.cancelled = True
        del self._jobs[video_id]
        job.path.unlink(missing_ok=True)

    def expire(self) -> None:
        for job in list(self._jobs.values()):
            if job.completed_unix_s is not None and time.time() > job.completed_unix_s + self._kept_s:
                job.path.unlink(missing_ok=True)
                del self._jobs[job.id]

    async def close(self) -> None:
        """End the pipeline's process; videos that are not finished never will be."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._child is not None:
            await self._child.stop()

    # -- making --

    async def _loaded(self) -> _Child:
        """The child, started again if it has died; Overloaded says why it cannot be."""
        async with self._starting:
            if self._child is None or not self._child.alive:
                try:
                    self._child = await _Child.start(str(self._pipeline), self._device)
                except RuntimeError as error:
                    self._log.error("the video pipeline does not load", error=str(error))
                    raise Overloaded(f"the video pipeline does not load: {error}") from None
            return self._child

    async def _work(self) -> None:
        while True:
            job = await self._waiting.get()
            if not job.cancelled:
                await self._make(job)

    async def _make(self, job: PipelineJob) -> None:
        raw = job.path.with_suffix(".rgb")
        try:
            child = await self._loaded()
            job.status = "in_progress"
            child.send(
                job={
                    "id": job.id,
                    "prompt": job.prompt,
                    "seed": job.seed,
                    "width": job.width,
                    "height": job.height,
                    "steps": job.steps,
                    "frames": job.frames,
                    "output": str(raw),
                }
            )
            await self._follow(child, job)
            if job.status == "in_progress":
                await asyncio.to_thread(_encode, raw, job, float(child.facts["fps"]))
                job.status = "completed"
        except (OSError, Overloaded) as error:
            self._fail(job, str(error))
        finally:
            raw.unlink(missing_ok=True)
            job.completed_unix_s = time.time()
            if job.cancelled:
                job.path.unlink(missing_ok=True)

    async def _follow(self, child: _Child, job: PipelineJob) -> None:
        """Take its messages until the frames are there; at each step's end it waits for us, we for live sessions."""
        while True:
            message = await child.receive()
            if not message:
                # It may be dead and not yet reaped; the next job must not be given to it.
                self._child = None
                await child.stop()
                self._fail(job, "the pipeline's process ended")
                return
            if message.get("job") != job.id:
                continue
            if "step" in message:
                job.done_steps = message["step"]
                if not job.cancelled:
                    job.waited_s += await self._until_live_rests()
                child.send(**({"cancel": job.id} if job.cancelled else {"go": job.id}))
            elif "done" in message:
                return
            else:
                self._fail(job, message.get("failed", "it was removed"))
                return

    async def _until_live_rests(self) -> float:
        began_s = time.monotonic()
        # Sessions change state in a hundred places; asking is cheap.
        while self._live_busy() and time.monotonic() - began_s < self._step_wait_max_s:  # noqa: ASYNC110
            await asyncio.sleep(POLL_S)
        return time.monotonic() - began_s

    def _fail(self, job: PipelineJob, message: str) -> None:
        job.status, job.error = "failed", {"code": "video_failed", "message": message}
        self._log.error("video failed", video=job.id, error=message)


def _encode(raw: Path, job: PipelineJob, fps: float) -> None:
    frames = np.fromfile(raw, np.uint8).reshape(-1, job.height, job.width, 3)
    encoder = Encoder("mp4", job.width, job.height, fps)
    data = encoder.encode_chunk(frames, 0)
    job.path.write_bytes((encoder.init_segment() or b"") + data)
