"""`turboserve profile`: torch.profiler for real; the Nsight command lines as far as they go without Nsight."""

from __future__ import annotations

import json
import os
import stat
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from turboserve import Session
from turboserve.cli.main import main
from turboserve.cli.profile import nsight_command


def test_torch_writes_a_trace_and_a_table(tmp_path):
    chosen = ["--torch", "--device", "cpu", "--sessions", "2", "--chunks", "1", "--out", str(tmp_path), "--json"]
    result = CliRunner().invoke(main, ["profile", *chosen])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout.splitlines()[-1])
    assert (found["sessions"], found["chunks"]) == (2, 2) and found["passes"] >= 5
    names = {event.get("name", "") for event in json.loads((tmp_path / "turboserve.json").read_text())["traceEvents"]}
    for kind in ("pass", "batch", "attention"):
        assert kind in names
    for kind in ("denoise ", "context pass ", "decode "):
        assert len({name for name in names if name.startswith(kind)}) == 2, kind
    assert "attention" in (tmp_path / "turboserve.txt").read_text()


@pytest.mark.parametrize("tool", ["nsys", "ncu"])
def test_a_tool_that_is_not_here_is_named_with_the_command_that_would_run(tool, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    result = CliRunner().invoke(main, ["profile", f"--{tool}", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert f"{tool} is not on the PATH" in result.stderr and "--none" in result.stderr and "install" in result.stderr


def test_the_tool_gets_the_run_and_its_exit_code_is_ours(tmp_path, monkeypatch):
    """A stand-in for nsys notes its arguments and runs what comes after its options, as nsys does."""
    tool = tmp_path / "nsys"
    tool.write_text(
        f'#!/bin/sh\necho "$@" > {tmp_path}/argv\nwhile [ "$1" != "-m" ]; do last="$1"; shift; done\n'
        f'"$last" "$@" --json > {tmp_path}/answer\nexit 7\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    chosen = ["--nsys", "--device", "cpu", "--sessions", "1", "--chunks", "1", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["profile", *chosen])
    assert result.exit_code == 7, result.output
    assert "--trace=cuda,nvtx" in (tmp_path / "argv").read_text()
    assert json.loads((tmp_path / "answer").read_text())["chunks"] == 1


def test_ncu_takes_the_kernels_of_a_range(tmp_path):
    argv = nsight_command("ncu", tmp_path, ["python", "run.py"], "turboserve@attention/")
    assert argv[:3] == ["ncu", "--nvtx", "--nvtx-include=turboserve@attention/"] and argv[-2:] == ["python", "run.py"]


@pytest.mark.parametrize("chosen", [[], ["--torch", "--worker", "w0"]])
def test_one_thing_at_a_time(chosen):
    result = CliRunner().invoke(main, ["profile", *chosen])
    assert result.exit_code == 2 and "--torch" in result.stderr


def test_a_window_on_a_live_server(real_server):
    """The worker's next chunks end up in the server's data folder, and the answer said where."""
    with Session("a red circle", base_url=real_server.url, pace="free", max_duration_s=6) as session:
        next(iter(session))  # it is on a worker now, and goes on as its chunks are taken
        worker = session.info()["worker"]
        chosen = ["--worker", worker, "--url", real_server.url, "--chunks", "2", "--json"]
        window = CliRunner().invoke(main, ["profile", *chosen])
        assert window.exit_code == 0, window.output
        found = json.loads(window.stdout)
        assert (found["state"], found["chunks"]) == ("capturing", 2)
        trace = Path(found["path"])
        assert trace.is_relative_to(real_server.data_dir / "profiles" / worker)
        assert len(list(session)) >= 4
    until_s = time.monotonic() + 90
    while not trace.exists() and time.monotonic() < until_s:
        time.sleep(0.05)
    names = {one.get("name", "") for one in json.loads(trace.read_text())["traceEvents"]}
    assert any(name.startswith(f"decode {session.id[:8]}") for name in names)


def test_a_worker_that_is_not_there(real_server):
    result = CliRunner().invoke(main, ["profile", "--worker", "nobody", "--url", real_server.url])
    assert result.exit_code == 1 and "no worker" in result.stderr
