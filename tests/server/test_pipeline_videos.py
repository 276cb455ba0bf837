"""A local diffusers pipeline behind /v1/videos: the frames it makes by itself, and live sessions before it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal

import av
import numpy as np
import pytest
import pytest_asyncio
import torch
from tiny_pipeline import write_pipeline

from turboserve.errors import CheckpointError, InvalidRequest, NotFound, Overloaded, QuotaExceeded
from turboserve.runtime import pipeline_worker
from turboserve.server import pipeline_videos
from turboserve.server.pipeline_videos import PipelineVideos

pytestmark = pytest.mark.timeout(200)
in_one_loop = pytest.mark.asyncio(loop_scope="module")
WISH = {"tenant": "a", "prompt": "a fox", "seed": 5, "size": "32x32", "steps": 3, "seconds": 0.5}


class Log:
    def error(self, event, **fields):
        logging.getLogger(__name__).info("%s %s", event, fields)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pipeline(tmp_path_factory.mktemp("pipeline") / "tiny-pipeline")


class Busy:
    def __init__(self):
        self.now = False

    def __call__(self) -> bool:
        return self.now


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(folder, tmp_path_factory):
    """One process for all tests: to start it takes seconds."""
    videos = tmp_path_factory.mktemp("videos")
    made = PipelineVideos(folder, "cpu", videos, live_busy=Busy(), log=Log(), kept=8, kept_s=60)
    yield made
    await made.close()


@pytest.fixture
def videos(shared):
    shared._live_busy.now = False
    return shared


async def until(true, timeout_s=60.0):
    async with asyncio.timeout(timeout_s):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def finished(job):
    await until(lambda: job.completed_unix_s is not None)
    return job


@in_one_loop
async def test_a_video_is_what_the_pipeline_makes_by_itself(videos, folder, monkeypatch):
    raw = {}
    encode = pipeline_videos._encode

    def keep(path, job, fps):
        raw[job.id] = np.fromfile(path, np.uint8).reshape(-1, 32, 32, 3)
        encode(path, job, fps)

    monkeypatch.setattr(pipeline_videos, "_encode", keep)
    job = await finished(await videos.create(**WISH))
    assert job.status == "completed" and job.done_steps == 3, job.error
    with av.open(str(job.path)) as film:
        assert sum(1 for _ in film.decode(video=0)) == 8
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pipeline = pipeline_worker.load(folder, "cpu")
    wish = {"prompt": "a fox", "seed": 5, "width": 32, "height": 32, "steps": 3, "frames": 8}
    expected = pipeline_worker.make_frames(pipeline, wish, lambda done: None)
    torch.set_num_threads(threads)
    assert expected.shape == (8, 32, 32, 3) and expected.std() > 1
    assert np.array_equal(raw[job.id], expected)
    shown = job.as_json(60)
    assert shown["object"] == "video" and shown["progress"] == 100 and shown["size"] == "32x32"
    with pytest.raises(NotFound):
        videos.find(job.id, "another tenant")
    videos.remove(job.id, "a")
    assert not job.path.exists() and videos.list("a") == []


@in_one_loop
async def test_live_sessions_go_first_at_every_step_s_end(videos):
    videos._live_busy.now = True
    job = await videos.create(**WISH)
    await until(lambda: job.done_steps > 0)
    await asyncio.sleep(0.5)
    assert job.done_steps == 1 and job.status == "in_progress"  # it stands still while a live session is active
    videos._live_busy.now = False
    await finished(job)
    assert job.status == "completed" and job.waited_s >= 0.4


@in_one_loop
async def test_a_video_comes_to_its_end_beside_sessions_that_never_rest(videos, monkeypatch):
    monkeypatch.setattr(videos, "_step_wait_max_s", 0.1)
    videos._live_busy.now = True
    job = await finished(await videos.create(**WISH))
    assert job.status == "completed" and 0.3 <= job.waited_s < 5


@in_one_loop
async def test_a_video_that_is_removed_stops_and_the_next_is_made(videos):
    videos._live_busy.now = True
    first, second = await videos.create(**WISH), await videos.create(**WISH)
    await until(lambda: first.done_steps > 0)
    videos.remove(first.id, "a")
    videos._live_busy.now = False
    await finished(first)
    assert first.status == "failed" and first.done_steps < 3
    assert (await finished(second)).status == "completed"


@in_one_loop
async def test_a_killed_pipeline_fails_its_video_and_comes_back_for_the_next(videos):
    videos._live_busy.now = True
    job = await videos.create(**WISH)
    await until(lambda: job.done_steps > 0)
    os.kill(videos._child.process.pid, signal.SIGKILL)
    videos._live_busy.now = False
    assert (await finished(job)).status == "failed" and "process ended" in job.error["message"]
    assert (await finished(await videos.create(**WISH))).status == "completed"


@in_one_loop
async def test_bounds(videos):
    with pytest.raises(InvalidRequest, match="multiples of 16"):
        await videos.create(**{**WISH, "size": "33x32"})
    videos._live_busy.now = True
    for _ in range(pipeline_videos.QUEUED_PER_TENANT_MAX):
        await videos.create(**WISH)
    with pytest.raises(QuotaExceeded):
        await videos.create(**WISH)
    await videos.create(**{**WISH, "tenant": "b"})
    for one in videos.list("a") + videos.list("b"):
        videos.remove(one.id, one.tenant)


@in_one_loop
async def test_a_folder_that_does_not_load_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    videos = PipelineVideos(
        tmp_path / "empty", "cpu", tmp_path / "v", live_busy=lambda: False, log=Log(), kept=8, kept_s=60
    )
    with pytest.raises(Overloaded, match=r"model_index\.json"):
        await videos.create(**WISH)
    await videos.close()


def test_code_and_unknown_classes_are_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": ["mine", "Pipeline"]}')
    with pytest.raises(CheckpointError, match="a class of diffusers itself"):
        pipeline_worker.check_folder(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    assert pipeline_worker.check_folder(tmp_path) == "WanPipeline"
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "pipeline.py").write_text("print('hello')")
    with pytest.raises(CheckpointError, match=r"unet/pipeline\.py"):
        pipeline_worker.check_folder(tmp_path)


def test_pickled_weights_are_not_opened(folder, tmp_path):
    import shutil

    copy = tmp_path / "pickled"
    shutil.copytree(folder, copy)
    weights = next((copy / "transformer").glob("*.safetensors"))
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"pickled checkpoint"):
        pipeline_worker.load(copy, "cpu")
