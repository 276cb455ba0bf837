"""Failpoints break what they name, where they are told to, and are otherwise not there."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from turboserve.errors import ConfigError
from turboserve.runtime import failpoints

ROOT = Path(__file__).resolve().parents[2]
HIT = """
import sys
from turboserve.runtime.failpoints import failpoint, set_process
set_process("w0")
for _ in range(3):
    failpoint("worker.emit.sent")
    print("passed", flush=True)
"""


def run(armed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), failpoints.VARIABLE: armed}
    return subprocess.run([sys.executable, "-c", HIT], env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("armed", "code", "passed"),
    [
        ("", 0, 3),
        ("worker.emit.ring:kill", 0, 3),
        ("worker.emit.sent:kill", -signal.SIGKILL, 0),
        ("worker.emit.sent:kill@3", -signal.SIGKILL, 2),
        ("w1/worker.emit.sent:kill", 0, 3),
        ("w0/worker.emit.sent:kill@2, worker.emit.ring:stop", -signal.SIGKILL, 1),
        ("worker.emit.sent:raise@2", 1, 1),
        ("worker.emit.sent:enospc", 1, 0),
        ("worker.emit.sent:sleep=0.01", 0, 3),
    ],
)
def test_what_is_armed_happens_and_nothing_else(armed, code, passed):
    done = run(armed)
    assert (done.returncode, done.stdout.count("passed")) == (code, passed), done.stderr


@pytest.mark.parametrize(
    "text", ["no.such:kill", "worker.emit.sent", "worker.emit.sent:explode", "worker.emit.sent:sleep=x", "a", "kill@1"]
)
def test_a_wrong_one_is_refused(text):
    with pytest.raises(ConfigError):
        failpoints.parse(text)


def test_every_failpoint_is_in_the_page_and_in_the_code():
    page = (ROOT / "docs" / "reliability.md").read_text()
    sources = "".join(path.read_text() for path in (ROOT / "turboserve").rglob("*.py") if path.name != "failpoints.py")
    for name, where in failpoints.FAILPOINTS.items():
        assert f"| `{name}` | {where} |" in page
        if not name.startswith("worker.say."):
            assert f'failpoint("{name}")' in sources
    said = sources.split("_SAY")[1].split(")")[0]
    for name in (one for one in failpoints.FAILPOINTS if one.startswith("worker.say.")):
        assert f"m.{name.removeprefix('worker.say.')}" in said


def test_a_device_that_is_lost_ends_the_worker_with_a_code_of_its_own(deterministic):
    import torch
    from tiny_model import TinyModel, session_id

    from turboserve.model.interface import ChunkRequest, Control
    from turboserve.runtime import worker_events as e
    from turboserve.runtime.engine import Engine
    from turboserve.runtime.engine_loop import EngineLoop
    from turboserve.runtime.kv_pool import KvPool
    from turboserve.runtime.worker_config import EXIT_DEVICE_LOST

    class Lost(TinyModel):
        def forward(self, batch):
            raise torch.AcceleratorError("an illegal memory access was encountered")

    model = Lost()
    loop = EngineLoop(Engine(model, KvPool(model.state_layout(), 1)), lambda event, epoch: None)
    loop.put(e.Open(session_id("b"), 1, 1, Control("p")))
    loop.put(e.Begin(session_id("b"), 1, ChunkRequest(0, 4, Control("p")), 0.0, 1.0))
    assert loop.run() == EXIT_DEVICE_LOST == 69
