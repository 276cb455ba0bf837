"""Settings: flag > environment > file > default, unknown keys, `config show`."""

from __future__ import annotations

import json
import os
import sys
import types
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from turboserve.cli import main as root
from turboserve.cli.config import is_secret
from turboserve.cli.options import json_option, print_json
from turboserve.config import ConfigFile, load_config
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


def every_option() -> list[tuple[tuple[str, ...], click.Command, click.Option]]:
    """(path, command, option) of all commands; one whose extra is not installed is left out."""
    found = []

    def walk(command: click.Command, path: tuple[str, ...], context: click.Context) -> None:
        found.extend((path, command, one) for one in command.params if isinstance(one, click.Option))
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                try:
                    child = command.get_command(context, name)
                except ImportError:
                    continue
                assert child is not None
                walk(child, (*path, name), click.Context(child, parent=context, info_name=name))

    walk(root.main, (), click.Context(root.main, info_name="turboserve", auto_envvar_prefix="TURBOSERVE"))
    return [one for one in found if one[0]]


def test_environment_and_file_call_every_option_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [one for one in os.environ if one.startswith("TURBOSERVE_")]:
        monkeypatch.delenv(name)
    options = every_option()
    assert {path for path, *_ in options} >= {("simulate",), ("compare",), ("trace", "audit"), ("models", "pull")}
    for path, command, option in options:
        typed = max((one for one in option.opts if one.startswith("--")), key=len)
        key = typed.removeprefix("--").replace("-", "_")
        where = (path, typed)
        context = click.Context(command, info_name=path[-1], auto_envvar_prefix="_".join(("TURBOSERVE", *path)).upper())
        # Set by the option's name, and by nothing that only its parameter's name would give.
        variable = "_".join(("TURBOSERVE", *path, key)).replace("-", "_").upper()
        monkeypatch.setenv(variable, "told")
        assert option.resolve_envvar_value(context) == "told", where
        monkeypatch.delenv(variable)
        if option.name != key:
            other = f"{context.auto_envvar_prefix}_{option.name}".replace("-", "_").upper()
            monkeypatch.setenv(other, "told")
            assert option.resolve_envvar_value(context) is None, where
            monkeypatch.delenv(other)
        if not option.expose_value:
            continue
        chain = click.Context(root.main)
        for name in path:
            chain = click.Context(command, parent=chain, info_name=name)
        table: dict[str, object] = {key.replace("_", "-"): True}
        for name in reversed(path):
            table = {name: table}
        several = option.is_flag and not option.is_bool_flag
        expected = {option.name: option.flag_value if several else True}
        assert root._checked_table(ConfigFile("f.toml", table), chain) == expected, where


def test_the_names_work_from_end_to_end(tmp_path: Path) -> None:
    told = CliRunner(env={"TURBOSERVE_SIMULATE_TRACE": "nowhere.csv", "TURBOSERVE_SIMULATE_OUT": str(tmp_path / "o")})
    result = told.invoke(root.main, ["simulate"])
    assert "nowhere.csv: cannot read the trace" in result.stderr
    path = tmp_path / "settings.toml"
    simulate = '[simulate]\ntrace = "nowhere.csv"\nout = "o"\njson = true\n'
    path.write_text(simulate + "[profile]\nnsys = true\ntorch = false\n")
    result = CliRunner().invoke(root.main, ["--config", str(path), "simulate"])
    assert "nowhere.csv" in json.loads(result.stdout)["error"]["message"]
    shown = CliRunner().invoke(root.main, ["--config", str(path), "config", "show", "--json", "simulate"])
    rows = {row["name"]: row for row in json.loads(shown.stdout)["settings"]}
    assert (rows["trace"]["value"], rows["trace"]["source"]) == ("nowhere.csv", "file")
    shown = CliRunner().invoke(root.main, ["--config", str(path), "config", "show", "--json", "profile"])
    rows = {row["name"]: row["value"] for row in json.loads(shown.stdout)["settings"]}
    assert [rows[name] for name in ("torch", "nsys", "ncu")] == [False, True, False]


def test_secrets() -> None:
    assert is_secret("api_key")
    assert is_secret("token")
    assert not is_secret("api_key_file")
    assert not is_secret("monkey")
