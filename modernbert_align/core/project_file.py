"""The project file: defaults of options, and a project's own limits, in `modernbert-align.toml` or `pyproject.toml`.

A key that is not known is an error, never ignored: a misspelt limit would otherwise look as if it held.
"""

import difflib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from modernbert_align.core.resources import read_toml
from modernbert_align.errors import AlignError, SettingsError

if TYPE_CHECKING:
    from modernbert_align.core.tolerance import Override

FILE = "modernbert-align.toml"
PYPROJECT = "pyproject.toml"
TOLERANCE = "tolerance"
Kind = Literal["text", "number", "flag", "list", "path", "paths"]
Command = tuple[str, ...]  # ("diff",) or ("table", "show")


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option of a command.

    Attributes:
        key: Its long name without the dashes, as a project file has it.
        parameter: What the command calls it.
    """

    key: str
    parameter: str
    kind: Kind


Known = Mapping[Command, tuple[Option, ...]]


@dataclass(frozen=True, kw_only=True)
class ProjectFile:
    """What a project file says.

    Attributes:
        path: None where there is none.
        defaults: Nested by command: parameter -> value.
        overrides: Its own limits.
    """

    path: Path | None = None
    defaults: Mapping[str, Any]
    overrides: "tuple[Override, ...]" = ()


def find_project_file(start: Path) -> Path | None:
    """The nearest project file in a folder or the ones above it; None if there is none.

    Raises:
        SettingsError: A folder has both kinds, or a file on the way is not valid TOML.
    """
    for folder in (start, *start.parents):
        own, pyproject = folder / FILE, folder / PYPROJECT
        misnamed = folder / FILE.replace("-", "_")
        if misnamed.exists():
            raise SettingsError(f"`{misnamed}` is not read", hint=f"the file is called {FILE}")
        if os.path.lexists(own) and not own.is_file():
            raise SettingsError(f"`{own}` is no file that can be read")
        said = pyproject.is_file() and _of_pyproject(_read(pyproject)) is not None
        if own.is_file() and said:
            raise SettingsError(f"`{own}` and `{pyproject}` both configure modernbert-align", hint="keep one of them")
        if own.is_file():
            return own
        if said:
            return pyproject
    return None


def read_project_file(path: Path, known: Known) -> ProjectFile:
    """Read and check a project file.

    Relative paths in it are relative to its folder.

    Args:
        known: Every command and its options.

    Raises:
        SettingsError: It cannot be read, or a section, key or value is not one.
    """
    document = _read(path)
    if path.name == PYPROJECT:
        section = _of_pyproject(document)
        if section is None:
            raise SettingsError(f"`{path}` has no section [tool.modernbert-align]")
        document = section
    defaults: dict[str, Any] = {}
    overrides: tuple[Override, ...] = ()
    for name, section in document.items():
        if name == TOLERANCE:
            overrides = _overrides(section, path)
        elif (name,) in known:
            defaults[name] = _section(_table(section, name, path), (name,), known, path)
        elif any(command[0] == name for command in known):
            defaults[name] = {}
            for sub, inner in _table(section, name, path).items():
                if (name, sub) not in known:
                    others = [command[1] for command in known if command[0] == name]
                    raise _unknown(f"section [{name}.{sub}]", sub, others, path)
                defaults[name][sub] = _section(_table(inner, f"{name}.{sub}", path), (name, sub), known, path)
        else:
            raise _unknown(f"section [{name}]", name, [TOLERANCE, *(command[0] for command in known)], path)
    return ProjectFile(path=path, defaults=defaults, overrides=overrides)


def check_environment(variables: Mapping[str, str], prefix: str, known: Mapping[str, Any]) -> None:
    """Refuse environment variables that look like an option's and are none, or that say nothing.

    Args:
        variables: All environment variables.
        prefix: What those of this program start with.
        known: Those that are read.

    Raises:
        SettingsError: One is not known.
    """
    for name in sorted(variables):
        if name.startswith(prefix) and name not in known:
            raise SettingsError(
                f"the environment variable {name} is not known", hint=_suggest(name, known) or "unset it"
            )
        if name.startswith(prefix) and not variables[name].strip():
            raise SettingsError(f"the environment variable {name} is empty", hint="give it a value or unset it")


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)[0]
    except OSError as error:
        raise SettingsError(f"cannot read the project file `{path}`: {error.strerror}") from None
    except AlignError as error:
        raise SettingsError(error.message, hint=error.hint) from None


def _of_pyproject(document: Mapping[str, Any]) -> dict[str, Any] | None:
    tool = document.get("tool")
    if not isinstance(tool, dict):
        return None
    if "modernbert_align" in tool:
        raise SettingsError(f"`{PYPROJECT}`: [tool.modernbert_align] is not read", hint="write [tool.modernbert-align]")
    found = tool.get("modernbert-align")
    if found is not None and not isinstance(found, dict):
        raise SettingsError(f"`{PYPROJECT}`: `tool.modernbert-align` is not a section")
    return found


def _table(value: Any, name: str, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise SettingsError(f"`{path}`: `{name}` is not a section", hint=f"write [{name}] and its keys below it")
    return value


def _section(section: Mapping[str, Any], command: Command, known: Known, path: Path) -> dict[str, Any]:
    options = {option.key: option for option in known[command]}
    values = {}
    for key, value in section.items():
        if key not in options:
            raise _unknown(f"key `{key}` in [{'.'.join(command)}]", key.replace("_", "-"), list(options), path)
        values[options[key].parameter] = _value(value, options[key], f"`{path}`: {'.'.join((*command, key))}", path)
    return values


def _value(value: Any, option: Option, where: str, path: Path) -> Any:
    strings = isinstance(value, list) and all(isinstance(item, str) for item in value)
    if option.kind == "flag" and isinstance(value, bool):
        return value
    if option.kind == "number" and isinstance(value, int) and not isinstance(value, bool):
        return value
    if option.kind == "list" and (strings or isinstance(value, str)):
        return [value] if isinstance(value, str) else value
    if option.kind == "path" and isinstance(value, str):
        return str(path.parent / value)
    if option.kind == "paths" and (strings or isinstance(value, str)):
        return [str(path.parent / one) for one in ([value] if isinstance(value, str) else value)]
    if option.kind == "text" and (isinstance(value, str) or (strings and value)):
        return value if isinstance(value, str) else ",".join(value)
    wanted = {
        "flag": "true or false",
        "number": "a whole number",
        "list": "a list of texts",
        "path": "a path in quotes",
        "paths": "a list of paths in quotes",
        "text": "a text in quotes",
    }
    raise SettingsError(f"{where} is {value!r}", hint=f"it must be {wanted[option.kind]}")


def _overrides(section: Any, path: Path) -> "tuple[Override, ...]":
    from pydantic import ValidationError  # costs more than all the rest, and most projects have no limit of their own

    from modernbert_align.core.tolerance import Override

    if not isinstance(section, list):
        raise SettingsError(f"`{path}`: `{TOLERANCE}` is not a list", hint=f"write [[{TOLERANCE}]] before each limit")
    found = []
    for number, entry in enumerate(section, start=1):
        try:
            found.append(Override.model_validate(entry))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"]))
            hint = "a limit of your own needs its reason in writing" if key == "reason" else ""
            if first["type"] == "extra_forbidden":
                hint = _suggest(key, Override.model_fields)
            raise SettingsError(f"`{path}`: {TOLERANCE} {number}: {key}: {first['msg']}", hint=hint) from None
    return tuple(found)


def _unknown(what: str, name: str, names: Iterable[str], path: Path) -> SettingsError:
    return SettingsError(f"`{path}`: unknown {what}", hint=_suggest(name, names))


def _suggest(name: str, names: Iterable[str]) -> str:
    names = sorted(set(names))
    near = difflib.get_close_matches(name, names, n=1)
    return f"did you mean `{near[0]}`?" if near else f"known are {', '.join(names)}"
