"""Real text without a download: Python's own standard library, or any other folder of Python files.

Documents come in the order of their paths, so that the same Python has the same corpus everywhere.
"""

import ast
import sysconfig
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from modernbert_align.errors import UsageError

# Installed packages are not the standard library; tests repeat themselves.
SKIPPED = frozenset({"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"})


@dataclass(frozen=True)
class Document:
    """A text.

    Attributes:
        path: Of the file it is from, relative to the corpus' folder, with `/`.
        name: The file's path, for a docstring also what it is of, as in `json/decoder.py:JSONDecoder.decode`.
    """

    path: str
    name: str
    text: str


def standard_library() -> Path:
    """Where Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def source_files(root: Path | None = None, include: Sequence[str] = ("**/*.py",)) -> list[Document]:
    """Python files that can be read and parsed, tests and installed packages left out.

    Args:
        root: The folder; the standard library by default.
        include: Patterns of paths below it.

    Raises:
        UsageError: No file is left.
    """
    folder = standard_library() if root is None else root
    paths = {path for pattern in include for path in folder.glob(pattern) if path.suffix == ".py" and path.is_file()}
    named = sorted((path.relative_to(folder).as_posix(), path) for path in paths)
    documents = []
    for name, path in named:
        if SKIPPED.isdisjoint(name.split("/")):
            text = _text(path)
            if text is not None:
                documents.append(Document(path=name, name=name, text=text))
    if not documents:
        raise UsageError(
            f"no Python file matches {', '.join(include)} in `{folder}`", hint="name a folder that has some"
        )
    return documents


def _text(path: Path) -> str | None:
    """The file's text; None if it has none that Python can read."""
    try:
        text = path.read_text(encoding="utf-8")
        _tree(text)
    except (OSError, ValueError, SyntaxError):  # ValueError: not UTF-8, or with null bytes
        return None
    return text if text.strip() else None


def _tree(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes in files that are not ours
        return ast.parse(text)


def docstrings(files: Sequence[Document]) -> list[Document]:
    """The docstrings of modules, classes and functions, in the order of the files."""
    return [
        Document(path=file.path, name=f"{file.path}:{name}", text=text)
        for file in files
        for name, text in _docstrings(_tree(file.text), "")
    ]


def _docstrings(node: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield prefix, text
    for child in ast.iter_child_nodes(node):
        own = getattr(child, "name", None)
        named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        yield from _docstrings(child, ".".join(filter(None, (prefix, own))) if named else prefix)
