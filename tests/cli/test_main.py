"""The root: lazy, quick, exit codes, errors as people and scripts read them."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner, Result

from turboserve.cli import main as root
from turboserve.cli.options import json_option, print_json
from turboserve.errors import ConfigError, Overloaded

HEAVY = ("torch", "numpy", "fastapi", "httpx", "websockets", "av", "rich", "numba", "msgspec", "structlog")

Install = Callable[[click.Command], Callable[..., Result]]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Puts a click command under the root as `probe`; returns how to run it."""

    def put(command: click.Command) -> Callable[..., Result]:
        module = types.ModuleType("turboserve.cli.probe")
        module.command = command  # type: ignore[attr-defined]
        module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setitem(root.COMMANDS, "probe", "A probe.")

        def run(*args: str, **options: object) -> Result:
            return CliRunner().invoke(root.main, list(args), **options)  # type: ignore[arg-type]

        return run

    return put


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    """0.3 s of CPU is promised; the best of three is compared, since other work shares this machine."""
    code = (
        "import sys, runpy\n"
        "sys.argv = ['turboserve', '--help']\n"
        "try:\n    runpy.run_module('turboserve', run_name='__main__')\n"
        "except SystemExit as leave:\n    assert leave.code == 0, leave.code\n"
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "generate" in done.stdout or "config" in done.stdout
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.3, spent


def test_only_commands_that_exist_are_listed() -> None:
    listed = root.available_commands()
    assert "config" in listed
    for name in root.COMMANDS:
        path = os.path.join(os.path.dirname(root.__file__), name.replace("-", "_"))
        assert (name in listed) == (os.path.exists(path + ".py") or os.path.isdir(path)), name


def test_every_listed_command_loads_and_has_help() -> None:
    for name in root.available_commands():
        result = CliRunner().invoke(root.main, [name, "--help"])
        assert result.exit_code == 0, (name, result.output)
        assert "--config" in result.output, name


def test_an_unknown_command_is_usage_and_names_the_near_match() -> None:
    result = CliRunner().invoke(root.main, ["confg"])
    assert result.exit_code == 2
    assert "Did you mean 'config'" in result.output


def test_version() -> None:
    result = CliRunner().invoke(root.main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("turboserve 0.")


@click.command()
@json_option
@click.option("--how", default="ok")
def probe(as_json: bool, how: str) -> int | None:
    if how == "failed":
        raise Overloaded("the queue is full", expected="room", hint="try later")
    if how == "setting":
        raise ConfigError("port is taken")
    if how == "interrupt":
        raise KeyboardInterrupt
    if how == "code":
        return 1
    if as_json:
        print_json({"how": how})
    return None


def test_exit_codes(install: Install) -> None:
    run = install(probe)
    assert run("probe").exit_code == 0
    assert run("probe", "--how", "failed").exit_code == 1
    assert run("probe", "--how", "code").exit_code == 1
    assert run("probe", "--how", "setting").exit_code == 2
    assert run("probe", "--nonsense").exit_code == 2
    assert run("probe", "--how", "interrupt").exit_code == 130


def test_an_error_says_what_was_wrong_expected_and_to_do(install: Install) -> None:
    result = install(probe)("probe", "--how", "failed")
    assert result.stdout == ""
    assert result.stderr == "error: the queue is full\n  expected: room\n  hint: try later\n"


def test_debug_shows_the_traceback(install: Install) -> None:
    run = install(probe)
    assert "Traceback" not in run("probe", "--how", "failed").stderr
    assert "Traceback" in run("probe", "--debug", "--how", "failed").stderr
    assert "Traceback" in run("--debug", "probe", "--how", "failed").stderr


def test_json_is_one_object_on_stdout_for_errors_too(install: Install) -> None:
    run = install(probe)
    assert json.loads(run("probe", "--json").stdout) == {"how": "ok"}
    body = json.loads(run("probe", "--json", "--how", "failed").stdout)
    assert body == {
        "error": {
            "code": "overloaded",
            "message": "the queue is full",
            "retryable": True,
            "expected": "room",
            "hint": "try later",
        }
    }


def test_ctrl_c_ends_with_130(tmp_path) -> None:
    """A real signal to a real process, in the middle of a command."""
    code = (
        "import sys, types, time, click\n"
        "from turboserve.cli import main as root\n"
        "@click.command()\n"
        "def command():\n    print('up', flush=True); time.sleep(30)\n"
        "module = types.ModuleType('turboserve.cli.probe'); module.command = command\n"
        "module.__spec__ = types.SimpleNamespace(name=module.__name__)\n"
        "sys.modules[module.__name__] = module; root.COMMANDS['probe'] = ''\n"
        "root.main(['probe'])\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    process.send_signal(2)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors
