"""The autoscaling study's own arithmetic; its runs take minutes and are started by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from turboserve.bench.autoscale import _pace, compare, cpu_seconds, stretched
from turboserve.runtime.paced import read_profile
from turboserve.sim.profile_files import load_profile


def test_medians_stand_beside_the_simulator() -> None:
    runs = [
        {"on_time_share": share, "worker_seconds": bill} for share, bill in ((0.9, 90.0), (1.0, 110.0), (0.99, 100.0))
    ]
    found = compare(runs, {"on_time_share": 1.0, "worker_seconds": 80.0})
    assert found["on_time_share"]["live_median"] == 0.99 and found["on_time_share"]["difference"] == -0.01
    assert found["worker_seconds"]["live_all"] == [90.0, 110.0, 100.0] and found["worker_seconds"]["difference"] == 0.25


def test_a_stretched_profile_is_the_same_worker_slower(tmp_path: Path) -> None:
    k4 = load_profile("k4")
    slow = stretched(k4, 2.0)
    assert slow.batch_latency(3) == 2 * k4.batch_latency(3) and slow.capacity == k4.capacity and slow.name == "k4-x2"
    assert slow.capacity_at(slow.denoise_steps) == k4.capacity_at(k4.denoise_steps)
    assert stretched(k4, 1.0) == k4
    # Its chunks last as long as the server's, by the wall clock; the server reads the very profile.
    flags = _pace(slow, tmp_path)
    settings = dict(zip(flags[::2], flags[1::2], strict=True))
    assert read_profile(settings["--paced-profile"]) == slow
    assert float(settings["--playback-rate"]) == pytest.approx((1 / 3) / 2.0, rel=1e-5)
    assert settings["--capacity"] == "4"


def test_cpu_time_counts_ended_children() -> None:
    import subprocess
    import sys

    before_s = cpu_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(3_000_000))"], check=True)
    assert cpu_seconds() > before_s
