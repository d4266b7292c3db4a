"""The JSON report as text, and read back."""

import json
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from modernbert_align.core.json_input import parse_json
from modernbert_align.errors import ReportError
from modernbert_align.report.schema import SCHEMA_VERSION, Report


def to_json(report: Report) -> str:
    """The report as text: two-space indent, keys in schema order, a final newline."""
    return json.dumps(report.model_dump(mode="json"), indent=2, allow_nan=False) + "\n"


def read_report(path: Path) -> Report:
    """Read a report and check that it is whole and unchanged.

    Raises:
        ReportError: No such file, not JSON, another schema, or edited after it was written.
    """
    try:
        document = parse_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise ReportError(f"cannot read the report `{path}`: {error.strerror}", hint="run `diff` to make one") from None
    except (ValueError, UnicodeDecodeError) as error:
        raise ReportError(f"`{path}` is not a whole JSON report: {error}", hint="run `diff` again") from None
    version = document.get("schema_version") if isinstance(document, dict) else None
    if version != SCHEMA_VERSION:
        raise ReportError(
            f"`{path}` has the report schema `{version}`, this version reads {SCHEMA_VERSION}",
            hint="run `diff` again with the installed version",
        )
    try:
        report = Report.model_validate_json(json.dumps(document))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ReportError(f"`{path}` is not a valid report: {place}: {first['msg']}", hint="run `diff` again") from None
    if report.content_sha256 != report.digest():
        raise ReportError(f"`{path}` was changed after it was written", hint="run `diff` again")
    return report


def json_schema() -> dict[str, Any]:
    """JSON Schema of the report."""
    return Report.model_json_schema(mode="serialization")
