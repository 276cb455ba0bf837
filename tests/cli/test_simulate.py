"""`turboserve simulate`: what cannot be run is refused before the run, and never with a traceback."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from turboserve.cli import main as root
from turboserve.sim.trace import write_trace
from turboserve.sim.workload import Workload, generate

CUT = "time_s,session_id,event,chunks\n0,a,arrive,\n0,a,active,20\n5,b,arrive,\n6,b,active,4\n10,b,idle,\n"


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("traces") / "short.csv.gz"
    write_trace(generate(Workload(kind="steady", horizon_s=300, mean_active=4, seed=1)), path)
    return str(path)


def simulate(trace: str, out: Path, *more: str) -> Result:
    return CliRunner().invoke(
        root.main, ["simulate", "--trace", trace, "--out", str(out), "--no-html", "--warmup-s", "60", *more]
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max-workers 1 --initial-workers 2", "--initial-workers 2 is more than --max-workers 1"),
        ("--max-workers 0", "--max-workers 0"),
        ("--initial-workers -1", "--initial-workers -1"),
        ("--seed -1", "--seed -1"),
        ("--provision-s nan", "--provision-s nan"),
        ("--provision-s inf", "--provision-s inf"),
        ("--provision-s -1", "--provision-s -1"),
        ("--warmup-s nan", "--warmup-s nan"),
        ("--warmup-s -1", "--warmup-s -1"),
        ("--lose-at nan", "--lose-at nan"),
        ("--lose-at -5", "--lose-at -5"),
        ("--policy hpa --knob target=0", "hpa: knob target=0"),
        ("--policy hpa --knob target=nan", "hpa: knob target=nan"),
        ("--policy published --knob rho=0", "published: knob rho=0"),
        ("--policy lcp --knob provision_s=3", "lcp has no knob provision_s"),
        ("--policy clairvoyant --pace foo", "--pace foo"),
        ("--policy clairvoyant --steps-floor 99", "--steps-floor 99"),
        ("--policy clairvoyant --knob a=1", "clairvoyant has no knob a"),
        ("--policy clairvoyant --provision-s nan", "--provision-s nan"),
        ("--policy clairvoyance", "no policy 'clairvoyance'"),
    ],
)
def test_what_cannot_be_run_is_a_usage_error(trace: str, tmp_path: Path, flags: str, said: str) -> None:
    result = simulate(trace, tmp_path / "out", *flags.split())
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"error: {said}") and "expected:" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("policy", ["turboserve", "clairvoyant"])
def test_a_trace_that_ends_within_the_warm_up_is_said_to(trace: str, tmp_path: Path, policy: str) -> None:
    (tmp_path / "empty.csv").write_text("time_s,session_id,event,chunks\n")
    for path in (trace, str(tmp_path / "empty.csv")):
        result = simulate(path, tmp_path / "out", "--policy", policy, "--warmup-s", "600", "--json")
        assert result.exit_code == 0, result.output
        said = " ".join(result.stderr.split())
        assert "within the warm-up of 600 s" in said and "--warmup-s 0" in said
        found = json.loads(result.stdout)
        assert found["worker_hours"] == found["reference"]["worker_hours"] == 0


def test_the_initial_fleet_is_within_the_largest_one(trace: str, tmp_path: Path) -> None:
    result = simulate(trace, tmp_path / "out", "--policy", "hpa", "--max-workers", "1", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["initial_workers"] == 1


def test_a_place_that_cannot_be_written_is_refused_before_the_run(trace: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = simulate(trace, out)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith(f"error: --out {out} cannot be made") and "a directory" in result.stderr


@pytest.mark.parametrize("policy", ["turboserve", "static-least"])
def test_sessions_that_never_depart_leave_with_the_trace(tmp_path: Path, policy: str) -> None:
    """`serve --record-trace` writes such traces when it is cut."""
    (tmp_path / "cut.csv").write_text(CUT)
    (tmp_path / "whole.csv").write_text(CUT + "10,a,depart,\n10,b,depart,\n")
    fleet = ["--workers", "1"] if policy == "static-least" else []
    found = []
    for name in ("cut", "whole"):
        result = simulate(
            str(tmp_path / f"{name}.csv"), tmp_path / name, "--policy", policy, "--warmup-s", "0", "--json", *fleet
        )
        assert result.exit_code == 0, result.output
        found.append(json.loads(result.stdout) | {"trace": ""})
    assert found[0] == found[1] and found[0]["chunks"] == 24
    assert (tmp_path / "cut" / "chunks.csv.gz").read_bytes() == (tmp_path / "whole" / "chunks.csv.gz").read_bytes()


def test_as_few_workers_as_one_can_be_asked_for(trace: str, tmp_path: Path) -> None:
    result = simulate(trace, tmp_path, "--max-workers", "1", "--initial-workers", "1", "--json")
    assert result.exit_code == 0 and json.loads(result.stdout)["workers"]["max"] == 1
