"""`turboserve models pull` against a hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from fake_hub import REVISION, FakeHub, fake_hub

WEIGHTS = bytes(range(256)) * 50_000  # above the library's 10 MB steps


@pytest.fixture
def hub():
    files = {
        "transformer/model.safetensors": WEIGHTS,
        "transformer/config.json": b'{"num_layers": 2}',
        "README.md": b"# a model",
        "assets/demo.mp4": b"never fetched",
    }
    return FakeHub("someone/causal-wan", files, "cc-by-nc-sa-4.0")


def pull(url, folder, *arguments):
    environment = {
        **os.environ,
        "HF_ENDPOINT": url,
        "HF_HOME": str(folder / "hub-home"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "turboserve", "models", "pull", *arguments, "-o", str(folder / "out")],
        capture_output=True, text=True, timeout=100, env=environment,
    )  # fmt: skip


def test_pull_fetches_weights_and_configs_checks_them_and_shows_the_licence(hub, tmp_path):
    with fake_hub(hub) as url:
        done = pull(url, tmp_path, "someone/causal-wan@main", "--json")
        assert done.returncode == 0, done.stderr
        made = json.loads(done.stdout)
        assert made["revision"] == REVISION and made["licence"] == "cc-by-nc-sa-4.0"
        assert "does not allow commercial use" in done.stderr
        out = tmp_path / "out"
        assert (out / "transformer" / "model.safetensors").read_bytes() == WEIGHTS
        assert (out / "transformer" / "config.json").is_file() and (out / "README.md").is_file()
        assert not (out / "assets").exists()
        hub.requests.clear()
        assert pull(url, tmp_path, "someone/causal-wan").returncode == 0
        assert not any(method == "GET" and "resolve" in path for method, path, _ in hub.requests)  # all there already


def test_a_download_that_was_cut_goes_on_where_it_stopped(hub, tmp_path):
    hub.cut_after["transformer/model.safetensors"] = 11_500_000
    with fake_hub(hub) as url:
        done = pull(url, tmp_path, "someone/causal-wan", "--include", "transformer/*.safetensors")
        if done.returncode:  # the library may try again by itself, or leave that to the next run
            assert "goes on where it stopped" in done.stderr
            done = pull(url, tmp_path, "someone/causal-wan", "--include", "transformer/*.safetensors")
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "transformer" / "model.safetensors").read_bytes() == WEIGHTS
    resumed = [span for method, _, span in hub.requests if method == "GET" and span]
    assert resumed and int(resumed[-1].removeprefix("bytes=").split("-")[0]) > 0


def test_bytes_that_are_not_what_the_hub_names_are_refused_and_deleted(hub, tmp_path):
    hub.spoil.add("transformer/model.safetensors")
    with fake_hub(hub) as url:
        done = pull(url, tmp_path, "someone/causal-wan")
    assert done.returncode == 1 and "is deleted" in done.stderr
    assert not (tmp_path / "out" / "transformer" / "model.safetensors").exists()


def test_list_fetches_nothing_and_a_wrong_name_says_so(hub, tmp_path):
    with fake_hub(hub) as url:
        done = pull(url, tmp_path, "someone/causal-wan", "--list")
        assert done.returncode == 0 and "transformer/model.safetensors" in done.stderr
        assert not (tmp_path / "out").exists()
        done = pull(url, tmp_path, "someone/else")
        assert done.returncode == 1 and "cannot fetch someone/else" in done.stderr
    assert pull(url, tmp_path, "no-owner").returncode == 2
