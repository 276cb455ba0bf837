"""What commands share: `--json`, errors on stderr, a progress bar only where there is a terminal.

A command's module stays small:

    @click.command()
    @json_option
    def command(as_json: bool) -> None:
        "One line of help."
        if as_json:
            print_json({"answer": 42})
        else:
            console().print("the answer is 42")

Results go to stdout, everything else to stderr. rich is imported when the first console is made.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from turboserve.config import ConfigFile, option_key
from turboserve.errors import ConfigError, TurboServeError

if TYPE_CHECKING:
    from rich.console import Console

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(slots=True)
class RunFlags:
    """What a whole invocation shares; click carries it as the context's object."""

    debug: bool = False
    as_json: bool = False
    config_file: ConfigFile | None = None


def run_flags() -> RunFlags:
    """The flags of this invocation; fresh ones where a command runs outside the root (in a unit test)."""
    context = click.get_current_context(silent=True)
    found = context.find_object(RunFlags) if context else None
    return found or RunFlags()


def option_name(param: click.Parameter) -> str:
    """What the environment and the config file call an option: its longest `--name` with underscores.

    An argument has no name to type, so its parameter's stands for it.
    """
    typed = [one[2:] for one in param.opts if one.startswith("--")] if isinstance(param, click.Option) else []
    return option_key(max(typed, key=len) if typed else param.name or "")


def make_folder(option: str, path: Path) -> None:
    """Make the directory that results go to, before the work: a run whose files cannot be written is lost."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{option} {path} cannot be made: {error.strerror}", expected="a directory, or a path where one can be made"
        ) from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{option} {path} cannot be written to", expected="a directory of yours")


def _note_json(context: click.Context, _param: click.Parameter, value: bool) -> bool:
    flags = context.find_object(RunFlags)
    if flags is not None and value:
        flags.as_json = True
    return value


def json_option(function: _Function) -> _Function:
    """Adds `--json`, which reaches the command as `as_json`."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        callback=_note_json,
        help="Print one JSON object on stdout; everything else goes to stderr.",
    )(function)


def print_json(value: Mapping[str, Any]) -> None:
    """The one JSON object of a command. NaN is no JSON, so it is an error here."""
    click.echo(json.dumps(value, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False, allow_nan=False))


def error_body(error: TurboServeError) -> dict[str, Any]:
    """The same shape as an HTTP error's `error`, so that scripts read one form."""
    body: dict[str, Any] = {"code": error.code, "message": error.message, "retryable": error.retryable}
    if error.expected:
        body["expected"] = error.expected
    if error.hint:
        body["hint"] = error.hint
    return body


def say_error(error: TurboServeError) -> None:
    """An error as people read it: what was wrong, what was expected, what to do."""
    click.echo(f"{click.style('error', fg='red', bold=True)}: {error.message}", err=True)
    if error.expected:
        click.echo(f"  expected: {error.expected}", err=True)
    if error.hint:
        click.echo(f"  hint: {error.hint}", err=True)


def console() -> Console:
    """A console on stderr: tables, notes and bars. Plain text where stderr is no terminal."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)
