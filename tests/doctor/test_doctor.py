"""`turboserve doctor`: every check that can fail on this machine is made to fail for real."""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from turboserve.cli.main import main
from turboserve.doctor import gpu, machine
from turboserve.doctor import model as model_checks
from turboserve.doctor.findings import Status

NOBODY = 65534


def doctor(*chosen: str) -> tuple[int, dict[str, dict[str, str]]]:
    result = CliRunner().invoke(main, ["doctor", "--json", *chosen])
    found = json.loads(result.stdout)
    assert found["ok"] == (result.exit_code == 0) == (not found["failed"])
    return result.exit_code, {one["name"]: one for one in found["checks"]}


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_machine_that_can_serve_on_its_cpu(tmp_path):
    code, checks = doctor("--device", "cpu", "--port", str(free_port()), "--data-dir", str(tmp_path))
    assert list(checks) == [
        *("python", "torch", "driver", "triton", "cupy", "nccl", "peer access", "memlock", "shm", "memory", "disk"),
        *("port", "extension", "checkpoint"),
    ]
    assert code == 0, checks
    assert checks["checkpoint"]["found"].startswith("shapes: 96x96")


def test_deep_says_which_bits_it_makes(tmp_path):
    finding = model_checks.check_numerics("shapes", "cpu")
    assert finding.status is Status.OK and "packed rows equal" in finding.found


def test_a_taken_port_names_its_owner_and_a_free_one(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        code, checks = doctor("--port", str(sock.getsockname()[1]), "--data-dir", str(tmp_path))
    assert code == 1
    assert f"pid {os.getpid()}" in checks["port"]["found"] and "--port" in checks["port"]["mend"]


def test_a_missing_checkpoint(tmp_path):
    chosen = ["--port", str(free_port()), "--data-dir", str(tmp_path)]
    code, checks = doctor("shaps", *chosen)
    assert code == 1 and "did you mean 'shapes'" in checks["checkpoint"]["mend"]
    code, checks = doctor(str(tmp_path / "model.toml"), *chosen)
    assert code == 1 and checks["checkpoint"]["status"] == "failed"
    (tmp_path / "empty").mkdir()
    code, checks = doctor(str(tmp_path / "empty"), *chosen)
    assert code == 1 and checks["checkpoint"]["found"]


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_a_gpu_that_is_not_there(tmp_path):
    code, checks = doctor("--device", "cuda", "--port", str(free_port()), "--data-dir", str(tmp_path))
    assert code == 1
    assert checks["driver"]["status"] == "failed" and "nvidia-smi" in checks["driver"]["mend"]


def test_a_data_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    code, checks = doctor("--port", str(free_port()), "--data-dir", str(tmp_path / "file" / "data"))
    assert code == 1 and "directory" in checks["disk"]["found"].lower()


def test_too_little_disk(tmp_path):
    finding = machine.check_disk(tmp_path, wanted_bytes=1 << 60)
    assert finding.status is Status.FAILED and "df -h" in finding.mend


def in_child(code: str, *, as_nobody: bool = False) -> str:
    """What `code` prints in a process of its own, which may first become nobody: root has no limits."""
    head = "import os, resource, sys; from pathlib import Path; from turboserve.doctor import machine\n"
    if as_nobody and os.geteuid() == 0:
        code = f"os.setgid({NOBODY}); os.setuid({NOBODY})\n{code}"
    done = subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    return done.stdout


def test_a_tiny_limit_on_locked_memory():
    limit = "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))\n"
    seen = in_child(limit + "print(machine.check_memlock())", as_nobody=True)
    assert "failed" in seen and "the limit is 0.0625 MiB" in seen and "ulimit -l" in seen
    seen = in_child(limit + "print(machine.check_memlock(needed=False).status)", as_nobody=True)
    assert seen.strip() == "ok"
    assert resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] != 65536


def test_a_full_shared_memory(tmp_path):
    """On a tmpfs of 64 KiB, mounted in a namespace of its own."""
    mount = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}"
    if subprocess.run(["unshare", "-rm", "sh", "-c", mount], capture_output=True).returncode != 0:
        pytest.skip("this machine lets nobody mount in a namespace")
    code = (
        "from pathlib import Path; from turboserve.doctor import machine;"
        f"folder = Path({str(tmp_path)!r});"
        "print(machine.check_shm(folder, 1 << 20), machine.check_shm(folder, 1 << 20, needed=False).status,"
        "machine.check_shm(folder, 4096).status, machine.check_disk(folder, 1 << 20).status)"
    )
    argv = ["unshare", "-rm", "sh", "-c", f'{mount} && exec "$0" -c "$1"', sys.executable, code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-1000:]
    assert "No space left" in done.stdout and "--shm-size" in done.stdout
    assert done.stdout.split()[-3:] == ["warning", "ok", "failed"]


def test_versions_that_do_not_fit():
    assert gpu.check_torch(None).status is Status.FAILED
    assert gpu.check_torch("2.10.1").status is Status.FAILED
    assert gpu.check_torch("2.14.0").mend == "pip install 'torch>=2.11,<2.14'"
    assert gpu.check_torch("2.13.0+cpu").status is Status.OK
    assert gpu.check_triton("3.9.0", has_gpu=True).status is Status.FAILED
    assert gpu.check_triton(None, has_gpu=False).status is Status.SKIPPED
    both = {"cupy-cuda12x": "14.2", "cupy-cuda13x": "14.2"}
    assert "same files" in gpu.check_cupy(both, "13.0").expected
    assert gpu.check_cupy({"cupy-cuda12x": "14.2"}, "13.0").mend.endswith("pip install cupy-cuda13x")
    assert gpu.check_cupy({"cupy-cuda13x": "14.2"}, "13.0").status is Status.OK


def test_people_read_what_mends_it(tmp_path):
    result = CliRunner().invoke(main, ["doctor", "shaps", "--port", str(free_port()), "--data-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "failed" in result.stderr and "mend: did you mean" in result.stderr


def test_the_bounds_are_those_of_the_package():
    text = (Path(__file__).resolve().parents[2] / "pyproject.toml").read_text()
    for name, bounds in (("torch", gpu.TORCH_RANGE), ("triton", gpu.TRITON_RANGE)):
        low, high = (".".join(map(str, one)) for one in bounds)
        assert f'"{name}>={low},<{high}"' in text
