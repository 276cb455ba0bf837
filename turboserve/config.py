"""Settings from a TOML file: one table per command, an unknown key is an error that names the near match.

    # turboserve.toml, for `turboserve serve --config turboserve.toml`
    [serve]
    port = 8001
    workers = 2
    [trace.synth]
    seed = 7

The order of precedence is flag > environment > file > default. click resolves it; this module reads and checks the
file. It imports nothing heavy, so that `turboserve --help` stays quick.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from turboserve.errors import ConfigError

ENV_PREFIX = "TURBOSERVE"


class Source(StrEnum):
    """Where a value came from, the strongest first."""

    FLAG = "flag"
    ENV = "env"
    FILE = "file"
    DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Setting:
    """One resolved value. `detail` names the environment variable or the file, where there is one."""

    command: str
    name: str
    value: Any
    source: Source
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """A parsed file. Table names are command names (`train-shapes`), keys are option names (`chunk_target_s`)."""

    path: str
    tables: Mapping[str, Any] = field(default_factory=dict)

    def section(self, command_path: Iterable[str]) -> dict[str, Any]:
        """The table of one command, `("trace", "synth")` say; empty when the file does not mention it."""
        table: Any = self.tables
        for name in command_path:
            table = table.get(command_key(name), {})
            if not isinstance(table, Mapping):
                raise ConfigError(
                    f"{self.path}: {name!r} is a value where a table is needed", expected=f"a table [{name}]"
                )
        return dict(table)

    def options(
        self, command_path: tuple[str, ...], known: Iterable[str], subcommands: Iterable[str]
    ) -> dict[str, Any]:
        """A command's values by option name, its subcommands' tables left in; any other key is a ConfigError."""
        names = {option_key(one) for one in known}
        children = {command_key(one) for one in subcommands}
        values: dict[str, Any] = {}
        for key, value in self.section(command_path).items():
            if isinstance(value, Mapping) and command_key(key) in children:
                values[command_key(key)] = value
            elif option_key(key) in names and not isinstance(value, Mapping):
                values[option_key(key)] = value
            else:
                where = ".".join(command_path)
                raise unknown_key(key, f"[{where}] of {self.path}", names | children)
        return values


def option_key(name: str) -> str:
    """An option as click calls it: `chunk-target-s` and `chunk_target_s` are the same key."""
    return name.replace("-", "_")


def command_key(name: str) -> str:
    """A command as it is typed: `train_shapes` and `train-shapes` are the same table."""
    return name.replace("_", "-")


def near_match(name: str, known: Iterable[str]) -> str | None:
    """The known name that `name` was most likely meant to be, or None."""
    found = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.6)
    return found[0] if found else None


def unknown_key(key: str, where: str, known: Iterable[str]) -> ConfigError:
    """The error for a key that nobody reads. A typo in silence would run with a default instead."""
    names = sorted(known)
    close = near_match(key, names)
    return ConfigError(
        f"unknown key {key!r} in {where}",
        expected=f"one of {', '.join(names)}" if names else "no key here",
        hint=f"did you mean {close!r}?" if close else None,
    )


def load_config(path: str | Path, commands: Iterable[str]) -> ConfigFile:
    """Read a TOML file; its top level holds tables named after commands and nothing else."""
    import tomllib

    text = str(path)
    try:
        with open(path, "rb") as file:
            raw = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"cannot read {text}: {error.strerror}", expected="a readable TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{text} is not valid TOML: {error}") from None
    names = {command_key(one) for one in commands}
    for key, value in raw.items():
        if command_key(key) not in names:
            unknown = unknown_key(key, f"the top level of {text}", names)
            if not isinstance(value, Mapping):
                unknown.hint = "options stand in their command's table, for example [serve]"
            raise unknown
        if not isinstance(value, Mapping):
            raise ConfigError(f"{text}: {key!r} is a value where a table is needed", expected=f"a table [{key}]")
    return ConfigFile(text, {command_key(key): value for key, value in raw.items()})
