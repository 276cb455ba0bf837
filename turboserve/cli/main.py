"""The command line's root. A command's module is imported only when that command is asked for.

To add a command: write `turboserve/cli/<name with _>.py` with a click command called `command`, and put its name and
one line of help into COMMANDS. A name whose module does not exist is not listed. Every command also gets `--config`,
`--debug` and environment variables TURBOSERVE_<COMMAND>_<OPTION> from here. These and the keys of the file follow the
option as it is typed, not the parameter that it fills.

Exit codes: 0 ok, 1 failed, 2 usage (a wrong setting counts as usage), 130 interrupted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any, NoReturn

import click

from turboserve import __version__
from turboserve.cli.options import RunFlags, error_body, option_name, print_json, say_error
from turboserve.config import ENV_PREFIX, ConfigFile, command_key, load_config, near_match
from turboserve.errors import ConfigError, TurboServeError

COMMANDS: dict[str, str] = {
    "serve": "Start the server: pages, API, workers.",
    "worker": "Join a running server as a worker on this machine.",
    "generate": "Make one video into a file, without a server.",
    "replay": "Regenerate a stream from its card and verify its digest chain.",
    "models": "List what can be served.",
    "status": "Show a running server at a glance.",
    "top": "Watch a running server live in the terminal.",
    "explain": "Show where a chunk's time went, and why.",
    "simulate": "Run a scheduling policy over a trace on simulated time.",
    "compare": "Run several policies over a trace and lay them side by side.",
    "trace": "Make, read, convert, plot and audit traces.",
    "bench": "Measure kernels, offload, migration and serving.",
    "calibrate": "Measure the latency profile of a model on this device.",
    "profile": "Run under a profiler, or open a capture window on a live server.",
    "doctor": "Check this machine and say how to mend what is wrong.",
    "config": "Show every setting and where it came from.",
    "train-shapes": "Train the embedded model again.",
    "score-shapes": "Score the embedded model's videos against their prompts.",
}

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


def module_of(name: str) -> str:
    """`train-shapes` lives in turboserve.cli.train_shapes."""
    return f"turboserve.cli.{name.replace('-', '_')}"


def available_commands() -> list[str]:
    """Commands whose module exists, in the order of COMMANDS; none of them is imported."""
    return [name for name in COMMANDS if importlib.util.find_spec(module_of(name)) is not None]


def command_path(context: click.Context) -> tuple[str, ...]:
    """The names from below the root to this context: ("trace", "synth")."""
    names: list[str] = []
    while context.parent is not None:
        names.insert(0, command_key(context.info_name or ""))
        context = context.parent
    return tuple(names)


def _use_config(context: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    """Make the file's table this command's default map. It runs before every other option (is_eager)."""
    flags = context.find_object(RunFlags)
    if flags is None:  # the command runs alone, in a unit test
        return value
    if value is not None:
        flags.config_file = load_config(value, COMMANDS)
    if flags.config_file is None:
        return value
    # The tables of the groups above are read again: this flag may have come after their turn.
    here: click.Context | None = context
    chain: list[click.Context] = []
    while here is not None and here.parent is not None:
        chain.insert(0, here)
        here = here.parent
    for one in chain:
        one.default_map = _checked_table(flags.config_file, one)
    return value


def _checked_table(file: ConfigFile, context: click.Context) -> dict[str, Any]:
    """The command's values as click looks them up: by parameter, its subcommands' tables by command."""
    command = context.command
    params = {option_name(one): one for one in command.params if one.name and one.expose_value}
    subcommands = command.list_commands(context) if isinstance(command, click.Group) else []
    found: dict[str, Any] = {}
    for key, value in file.options(command_path(context), params, subcommands).items():
        param = params.get(key)
        if param is None or isinstance(value, Mapping):
            found[key] = value
        elif isinstance(param, click.Option) and param.is_flag and not param.is_bool_flag:
            # Several flags fill one parameter (`--torch`, `--nsys`): true chooses this one, false says nothing.
            if not isinstance(value, bool):
                raise ConfigError(f"{file.path}: {key} = {value!r}", expected="true or false")
            if value:
                found[str(param.name)] = param.flag_value
        else:
            found[str(param.name)] = value
    return found


def _use_debug(context: click.Context, _param: click.Parameter, value: bool) -> bool:
    flags = context.find_object(RunFlags)
    if flags is not None and value:
        flags.debug = True
    return value


def _shared_options() -> list[click.Option]:
    return [
        click.Option(
            ["--config"],
            metavar="FILE.toml",
            is_eager=True,
            expose_value=False,
            callback=_use_config,
            help="Settings by command; flags and environment win over it.",
        ),
        click.Option(
            ["--debug"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_use_debug,
            help="Show tracebacks.",
        ),
    ]


def with_shared_options(command: click.Command, path: tuple[str, ...]) -> click.Command:
    """Add `--config` and `--debug` to the command at `path` and all its subcommands, once, and name the environment
    variables of their options."""
    names = {one.name for one in command.params}
    command.params.extend(one for one in _shared_options() if one.name not in names)
    for one in command.params:
        if isinstance(one, click.Option):
            _name_variable(one, path)
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            with_shared_options(child, (*path, name))
    return command


def variable_name(path: tuple[str, ...], option: str) -> str:
    """`--provision-s` of `simulate` as TURBOSERVE_SIMULATE_PROVISION_S."""
    return "_".join((ENV_PREFIX, *path, option)).replace("-", "_").upper()


def _name_variable(option: click.Option, path: tuple[str, ...]) -> None:
    """click would derive the name from the parameter, which need not be called as the option is."""
    named = [option.envvar] if isinstance(option.envvar, str) else list(option.envvar or ())
    ours = variable_name(path, option_name(option))
    option.envvar = named if ours in named else [*named, ours]
    option.allow_from_autoenv = False


class LazyGroup(click.Group):
    """The root: knows the commands by name and imports one when it runs."""

    def list_commands(self, context: click.Context) -> list[str]:
        return available_commands()

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS or importlib.util.find_spec(module_of(name)) is None:
            return None
        return with_shared_options(importlib.import_module(module_of(name)).command, (name,))

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        name = args[0]
        if not name.startswith("-") and self.get_command(context, name) is None:
            close = near_match(name, self.list_commands(context))
            context.fail(f"no command {name!r}." + (f" Did you mean {close!r}?" if close else ""))
        return super().resolve_command(context, args)

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        # click's own asks every command for its help, which would import them all.
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(context)])

    def main(self, *args: Any, standalone_mode: bool = True, **extra: Any) -> Any:
        """click's entry with our exit codes; a command may return its exit code."""
        flags = extra.setdefault("obj", RunFlags())
        if not standalone_mode:
            return super().main(*args, standalone_mode=False, **extra)  # type: ignore[call-overload]
        try:
            result = super().main(*args, standalone_mode=False, **extra)  # type: ignore[call-overload]
            sys.stdout.flush()
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except click.Abort as error:
            _leave_interrupted(error)
        except TurboServeError as error:
            _leave_failed(error, flags)
        except BrokenPipeError:
            # The reader went away (`| head`). Python would complain again when it flushes at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_FAILED)
        sys.exit(result if isinstance(result, int) and not isinstance(result, bool) else 0)


def _leave_interrupted(error: click.Abort) -> NoReturn:
    click.echo("interrupted", err=True)
    sys.exit(EXIT_INTERRUPTED if isinstance(error.__cause__, KeyboardInterrupt) else EXIT_FAILED)


def _leave_failed(error: TurboServeError, flags: RunFlags) -> NoReturn:
    if flags.debug:
        import traceback

        traceback.print_exception(error)
    say_error(error)
    if flags.as_json:
        print_json({"error": error_body(error)})
    sys.exit(EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILED)


@click.command(
    cls=LazyGroup,
    params=_shared_options(),
    context_settings={
        "auto_envvar_prefix": ENV_PREFIX,
        "help_option_names": ["-h", "--help"],
        "show_default": True,
    },
    epilog="Every option can be set as TURBOSERVE_<COMMAND>_<OPTION>, or in the command's table of --config FILE.toml.",
)
@click.version_option(__version__, prog_name="turboserve", message="%(prog)s %(version)s")
def main() -> None:
    """TurboServe: streaming video generation for many viewers at once."""
