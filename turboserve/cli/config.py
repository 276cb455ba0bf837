"""`turboserve config show`: every value and where it came from."""

from __future__ import annotations

import copy
from typing import Any

import click

from turboserve.cli.options import console, json_option, option_name, print_json
from turboserve.config import Setting, Source

_SECRET_WORDS = ("key", "token", "secret", "password")

_SOURCES = {
    click.core.ParameterSource.COMMANDLINE: Source.FLAG,
    click.core.ParameterSource.ENVIRONMENT: Source.ENV,
    click.core.ParameterSource.DEFAULT_MAP: Source.FILE,
}


@click.group()
def command() -> None:
    """Show every setting and where it came from."""


@command.command(
    "show", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}, add_help_option=True
)
@json_option
@click.argument("command_name", metavar="[COMMAND]", required=False)
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
@click.pass_context
def show(context: click.Context, as_json: bool, command_name: str | None, args: tuple[str, ...]) -> None:
    """Every value of COMMAND (of every command without one) and its source: flag, env, file or default.

    Flags after COMMAND count as they would in a real call: `turboserve config show serve --port 9000`.
    """
    root = context.find_root()
    group = root.command
    assert isinstance(group, click.Group)
    names = [command_name] if command_name else [one for one in group.list_commands(root) if one != "config"]
    settings: list[Setting] = []
    for name in names:
        found = group.get_command(root, name)
        if found is None:
            raise click.UsageError(f"no command {name!r}", context)
        settings += resolve(root, (name,), found, list(args))
    if as_json:
        rows = [{"command": s.command, "name": s.name, "value": s.value, "source": s.source} for s in settings]
        details = [{"detail": s.detail} if s.detail else {} for s in settings]
        print_json({"settings": [row | detail for row, detail in zip(rows, details, strict=True)]})
    else:
        _print_table(settings)


def resolve(parent: click.Context, path: tuple[str, ...], command: click.Command, args: list[str]) -> list[Setting]:
    """Parse `args` as `command` would, without running it, and say where each value came from.

    A required argument may be missing here; a group's subcommands follow when no arguments were given.
    """
    relaxed = _without_required(command)
    if isinstance(command, click.Group) and args and not args[0].startswith("-"):
        with relaxed.make_context(path[-1], [], parent=parent) as context:
            return resolve(context, (*path, args[0]), _child(command, context, args[0]), args[1:])
    with relaxed.make_context(path[-1], list(args), parent=parent) as context:
        settings = [_setting(context, path, one) for one in command.params if one.expose_value and one.name]
        if isinstance(command, click.Group) and not args:
            for name in command.list_commands(context):
                try:
                    child = _child(command, context, name)
                except ImportError as error:  # what an extra would bring; the others can do without
                    click.echo(f"{' '.join(path)} {name} cannot be shown: {error}", err=True)
                    continue
                settings += resolve(context, (*path, name), child, [])
    return settings


def _child(group: click.Group, context: click.Context, name: str) -> click.Command:
    found = group.get_command(context, name)
    if found is None:
        raise click.UsageError(f"no command {name!r}", context)
    return found


def _without_required(command: click.Command) -> click.Command:
    relaxed = copy.copy(command)
    relaxed.params = [copy.copy(one) for one in command.params]
    for one in relaxed.params:
        one.required = False
    if isinstance(relaxed, click.Group):
        relaxed.invoke_without_command = True
        relaxed.no_args_is_help = False
    return relaxed


def _setting(context: click.Context, path: tuple[str, ...], param: click.Parameter) -> Setting:
    assert param.name is not None
    source = _SOURCES.get(context.get_parameter_source(param.name), Source.DEFAULT)  # type: ignore[arg-type]
    value: Any = context.params.get(param.name)
    name = option_name(param)
    if value is not None and is_secret(name):
        value = "***"
    if isinstance(param, click.Option) and param.is_flag and not param.is_bool_flag:
        value = value == param.flag_value  # one of several flags that fill the same parameter
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, (str, int, float, bool, list, type(None))):
        value = str(value)
    return Setting(" ".join(path), name, value, source, _detail(context, param, source))


def _detail(context: click.Context, param: click.Parameter, source: Source) -> str:
    if source is Source.ENV:
        import os

        named = [param.envvar] if isinstance(param.envvar, str) else list(param.envvar or ())
        return next((one for one in named if os.environ.get(one)), "")
    if source is Source.FILE:
        from turboserve.cli.options import run_flags

        file = run_flags().config_file
        return file.path if file else ""
    return ""


def is_secret(name: str) -> bool:
    """Whether an option holds a credential itself; the name of a file that holds one may be shown."""
    return any(word in name.split("_") for word in _SECRET_WORDS) and not name.endswith("_file")


def _print_table(settings: list[Setting]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("command", "setting", "value", "source", ""):
        table.add_column(heading, overflow="fold")
    for one in settings:
        style = "" if one.source is not Source.DEFAULT else "dim"
        value = "" if one.value is None else str(one.value)
        table.add_row(one.command, one.name, value, str(one.source), one.detail, style=style)
    console().print(table)
