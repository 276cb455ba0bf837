"""Capture windows: on the engine's own loop with a real trace at the end, and what is refused."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_model import TinyModel, session_id

from turboserve import ranges
from turboserve.errors import Conflict, StateError
from turboserve.model.interface import ChunkRequest, Control
from turboserve.runtime import profile_window
from turboserve.runtime import worker_events as e
from turboserve.runtime.engine import Engine
from turboserve.runtime.engine_loop import EngineLoop, Quit
from turboserve.runtime.kv_pool import KvPool
from turboserve.runtime.profile_window import ProfileWindow

CPU = torch.device("cpu")


class Loop:
    """An engine loop on a thread, its answers in order."""

    def __init__(self, folder) -> None:
        model = TinyModel("cpu")
        self.answers: list[e.EngineEvent] = []
        engine = Engine(model, KvPool(model.state_layout(), 2, "cpu"))
        self.loop = EngineLoop(engine, lambda event, epoch: self.answers.append(event), folder)
        self.thread = threading.Thread(target=self.loop.run)

    def __enter__(self) -> Loop:
        self.thread.start()
        return self

    def __exit__(self, *raised) -> None:
        self.loop.put(Quit())
        self.thread.join(20)
        assert not self.thread.is_alive()

    def chunks(self, first: int, count: int) -> None:
        now_s = time.monotonic()
        for index in range(first, first + count):
            request = ChunkRequest(index, 4, Control("a"))
            self.loop.put(e.Begin(session_id("a"), 1, request, now_s, now_s + 1))

    def wait(self, kind: type, count: int = 1) -> list:
        until_s = time.monotonic() + 20
        while len(found := [one for one in self.answers if isinstance(one, kind)]) < count:
            assert time.monotonic() < until_s, self.answers
            time.sleep(0.01)
        return found


def test_a_window_on_a_running_engine_ends_by_itself_and_its_trace_shows_the_chunks(tmp_path):
    with Loop(tmp_path / "profiles") as one:
        one.loop.put(e.Open(session_id("a"), 1, 3, Control("a")))
        one.loop.put(e.Profile(7, 2))
        (told,) = one.wait(e.Profiling)
        assert told.op_id == 7 and not told.code
        one.loop.put(e.Profile(7, 2))  # the same wish again: the same answer, no second window
        one.loop.put(e.Profile(8, 2))
        again, refused = one.wait(e.Profiling, 3)[1:]
        assert again == told and refused.code == Conflict.code and told.path in refused.message
        one.chunks(0, 4)
        one.wait(e.FinishedChunk, 4)
    folder = tmp_path / "profiles"
    (trace,) = folder.glob("*.json")
    assert str(trace) == told.path
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    short = session_id("a")[:8]
    assert {"batch", "pass", f"denoise {short} #0", f"context pass {short} #0", f"decode {short} #1"} <= names
    assert f"decode {short} #3" not in names
    assert "pass" in trace.with_suffix(".txt").read_text()
    assert not list(folder.glob(".*")) and not ranges.listening()


def test_a_window_on_an_idle_engine_closes_when_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_window, "WINDOW_MAX_S", 0.2)
    with Loop(tmp_path) as one:
        one.loop.put(e.Profile(7, 2))
        (told,) = one.wait(e.Profiling)
        until_s = time.monotonic() + 20
        while not Path(told.path).exists():
            assert time.monotonic() < until_s, "the window stays open"
            time.sleep(0.01)
    assert not ranges.listening()


def test_without_a_folder_it_says_so():
    with Loop(None) as one:
        one.loop.put(e.Profile(1, 2))
        assert one.wait(e.Profiling)[0].code == "not_offered"


def test_a_window_closes_when_its_time_is_over_and_one_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(profile_window, "WINDOW_MAX_S", 0.0)
    window = ProfileWindow(CPU)
    window.open(tmp_path / "a.json", 1000)
    with pytest.raises(Conflict):
        window.open(tmp_path / "b.json", 1)
    assert window.is_due
    assert window.close().exists() and not window.is_open


def test_a_folder_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot be written"):
        ProfileWindow(CPU).open(tmp_path / "file" / "a.json", 1)
    assert not ranges.listening()
