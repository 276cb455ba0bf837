"""Settings: flag > environment > file > default, unknown keys, `config show`."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from turboserve.cli import main as root
from turboserve.cli.config import is_secret
from turboserve.cli.options import json_option, print_json
from turboserve.config import load_config
from turboserve.errors import ConfigError


@click.group()
def probe() -> None:
    """A probe."""


@probe.command()
@click.argument("what", required=True)
@click.option("--chunk-target-s", type=float, default=1.0)
@click.option("--port", type=int, default=8000)
@click.option("--at", multiple=True)
@click.option("--api-key")
@json_option
def leaf(as_json: bool, **values: object) -> None:
    print_json(values)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    module = types.ModuleType("turboserve.cli.probe")
    module.command = probe  # type: ignore[attr-defined]
    module.__spec__ = types.SimpleNamespace(name=module.__name__)  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(root.COMMANDS, "probe", "A probe.")

    def invoke(*args: str, **env: str) -> Result:
        return CliRunner(env=env).invoke(root.main, list(args))

    return invoke


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text('[probe.leaf]\nport = 9001\nchunk-target-s = 2.5\nat = ["1s=a", "2s=b"]\n')
    return path


def test_order_of_precedence(run, file: Path) -> None:
    config = ("--config", str(file))
    read = lambda result: json.loads(result.stdout)
    assert read(run("probe", "leaf", "x"))["port"] == 8000
    assert read(run("probe", "leaf", "x", *config))["port"] == 9001
    assert read(run("probe", "leaf", "x", *config, TURBOSERVE_PROBE_LEAF_PORT="9002"))["port"] == 9002
    everything = run("probe", "leaf", "x", *config, "--port", "9003", TURBOSERVE_PROBE_LEAF_PORT="9002")
    assert read(everything)["port"] == 9003


def test_the_file_may_be_named_before_or_after_the_command_or_by_environment(run, file: Path) -> None:
    config = ("--config", str(file))
    for result in (
        run(*config, "probe", "leaf", "x"),
        run("probe", *config, "leaf", "x"),
        run("probe", "leaf", "x", *config),
        run("probe", "leaf", "x", TURBOSERVE_CONFIG=str(file)),
    ):
        values = json.loads(result.stdout)
        assert (values["port"], values["chunk_target_s"], values["at"]) == (9001, 2.5, ["1s=a", "2s=b"])


@pytest.mark.parametrize(
    ("text", "key", "hint"),
    [
        ("[probe.leaf]\nprot = 1\n", "prot", "port"),
        ("[probe.laef]\nport = 1\n", "laef", "leaf"),
        ("[prob]\nport = 1\n", "prob", "probe"),
        ("port = 1\n", "port", "[serve]"),
        ("[probe.leaf.port]\nx = 1\n", "port", ""),
    ],
)
def test_an_unknown_key_is_an_error_that_names_it_and_its_near_match(
    run, tmp_path: Path, text: str, key: str, hint: str
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    result = run("probe", "leaf", "x", "--config", str(path))
    assert result.exit_code == 2
    assert f"unknown key '{key}'" in result.stderr
    assert hint in result.stderr
    assert str(path) in result.stderr


def test_a_wrong_type_in_the_file_is_usage(run, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text('[probe.leaf]\nport = "many"\n')
    result = run("probe", "leaf", "x", "--config", str(path))
    assert result.exit_code == 2
    assert "many" in result.stderr


@pytest.mark.parametrize("text", ["[probe\n", "probe = 3\n"])
def test_a_file_that_is_no_settings_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)):
        load_config(path, ["probe"])
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "absent.toml", ["probe"])


def test_config_show_says_where_each_value_came_from(run, file: Path) -> None:
    result = run(
        *("--config", str(file), "config", "show", "--json", "probe", "leaf", "--port", "1"),
        TURBOSERVE_PROBE_LEAF_API_KEY="hush",
    )
    assert result.exit_code == 0, result.output
    rows = {row["name"]: row for row in json.loads(result.stdout)["settings"]}
    assert rows["port"] == {"command": "probe leaf", "name": "port", "value": 1, "source": "flag"}
    assert rows["chunk_target_s"]["source"] == "file"
    assert rows["chunk_target_s"]["detail"] == str(file)
    assert rows["api_key"]["value"] == "***"
    assert (rows["api_key"]["source"], rows["api_key"]["detail"]) == ("env", "TURBOSERVE_PROBE_LEAF_API_KEY")
    assert rows["what"]["source"] == "default"
    assert "hush" not in result.output


def test_config_show_takes_config_after_the_command_and_prints_a_table(run, file: Path) -> None:
    result = run("config", "show", "probe", "--config", str(file), "leaf")
    assert result.exit_code == 0, result.output
    assert result.stdout == ""
    assert "9001" in run("config", "show", "probe", "leaf", "--config", str(file)).stderr


def test_config_show_without_a_command_shows_all(run) -> None:
    result = run("config", "show", "--json")
    assert result.exit_code == 0, result.output
    assert "probe leaf" in {row["command"] for row in json.loads(result.stdout)["settings"]}
    assert run("config", "show", "prob").exit_code == 2


def test_secrets() -> None:
    assert is_secret("api_key")
    assert is_secret("token")
    assert not is_secret("api_key_file")
    assert not is_secret("monkey")
