"""`config show`, and what comes before every command: the project file and the environment."""

import inspect
import os
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modernbert_align.commands import console
from modernbert_align.core.project_file import (
    Command,
    Kind,
    Option,
    ProjectFile,
    check_environment,
    find_project_file,
    read_project_file,
)
from modernbert_align.errors import UsageError

_NOT_SETTINGS = ("help", "install-completion", "show-completion", "version")


def load(root: Any, path: Path | None, no_config: bool) -> ProjectFile:
    """Read the project file and check the environment.

    Args:
        root: The whole command line, a click group.
        path: The project file; None for the nearest.
        no_config: Whether to read none.

    Raises:
        SettingsError: A section, key, value or environment variable is not known.
        UsageError: A file is named, and none is to be read.
    """
    if path is not None and no_config:
        raise UsageError("--config names a project file and --no-config reads none", hint="leave one out")
    commands = dict(_commands(root))
    known = {command: tuple(_options(one)) for command, one in commands.items()}
    check_environment(os.environ, "MODERNBERT_ALIGN_", _variables(known))
    found = None if no_config else path or find_project_file(Path.cwd())
    return ProjectFile(defaults={}) if found is None else read_project_file(found, known)


def show(*, root: Any, as_json: bool) -> int:
    """Print every option's value and origin; returns the exit code."""
    project: ProjectFile = root.obj
    rows = [row for command, one in _commands(root.command) for row in _resolved(root, command, one)]
    limits = [override.model_dump(mode="json") for override in project.overrides]
    if as_json:
        console.print_json(
            {"project_file": str(project.path) if project.path else None, "options": rows, "tolerance": limits}
        )
        return 0
    from rich.table import Table
    from rich.text import Text

    out = console.stdout()
    out.print(f"project file: {project.path or 'none'}", soft_wrap=True, markup=False)
    grid = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("option", "value", "origin"):
        grid.add_column(name, overflow="fold")
    for row in rows:
        shown = row["value"]
        value = "-" if shown in (None, []) else ", ".join(shown) if isinstance(shown, list) else str(shown)
        style = "dim" if row["origin"] == "default" else ""
        grid.add_row(
            *(Text(cell, style=style) for cell in (f"{row['command']} --{row['option']}", value, row["origin"]))
        )
    out.print(grid)
    out.print("- is what the command decides by itself; its --help says how")
    for override in project.overrides:
        out.print(
            f"limit: {override.probe}, {override.dtype} {override.phase} {override.mode or 'both modes'}: "
            f"{override.criterion} at most {override.limit:g}, because {override.reason}",
            soft_wrap=True,
            markup=False,
        )
    return 0


def _commands(root: Any, path: Command = ()) -> Iterator[tuple[Command, Any]]:
    for name, command in root.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, (*path, name))
        else:
            yield (*path, name), command


def _options(command: Any) -> Iterator[Option]:
    hints = typing.get_type_hints(inspect.unwrap(command.callback))
    for parameter in command.params:
        key = max(parameter.opts, key=len).removeprefix("--")
        if parameter.param_type_name == "option" and key not in _NOT_SETTINGS:
            yield Option(key=key, parameter=parameter.name, kind=_kind(hints[parameter.name]))


def _kind(hint: Any) -> Kind:
    plain = [one for one in typing.get_args(hint) or (hint,) if one is not type(None)]
    lists = [one for one in (hint, *plain) if typing.get_origin(one) is list]
    if lists:
        return "paths" if Path in typing.get_args(lists[0]) else "list"
    if bool in plain:
        return "flag"
    if int in plain:
        return "number"
    if Path in plain:
        return "path"
    return "text"


def _variable(command: Command, option: Option) -> str:
    return "_".join(("MODERNBERT_ALIGN", *command, option.parameter)).upper().replace("-", "_")


def _variables(known: dict[Command, tuple[Option, ...]]) -> dict[str, Option]:
    named = {_variable(command, option): option for command, options in known.items() for option in options}
    for one in ("config", "no_config"):  # of the program itself
        named[_variable((), Option(key=one, parameter=one, kind="text"))] = Option(key=one, parameter=one, kind="text")
    return named


def _plain(value: Any) -> Any:
    """A value as JSON and people have it."""
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, Path) else value


def _resolved(root: Any, path: Command, command: Any) -> Iterator[dict[str, Any]]:
    """Value and origin of every option of a command, as it would get them."""
    context = root
    group = root.command
    for name in path:
        group = group.commands[name]
        context = group.make_context(name, [], parent=context, resilient_parsing=True)
    for option in _options(command):
        value = context.params.get(option.parameter)
        source = context.get_parameter_source(option.parameter)
        origin = {
            "ENVIRONMENT": _variable(path, option),
            "DEFAULT_MAP": root.obj.path.name if root.obj.path else "project file",
        }.get(getattr(source, "name", ""), "default")
        yield {
            "command": " ".join(path),
            "option": option.key,
            "value": _plain(value),
            "origin": origin,
        }
