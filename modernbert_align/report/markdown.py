"""A report as Markdown: for job summaries, merge requests and issues, never larger than what GitHub takes.

Names and sentences may come from a hostile file. Words that are nothing but words stay; everything else becomes a code
span, in which no renderer looks for markup, mentions (`@name`), references (`#1`) or addresses.
"""

import re
from collections.abc import Iterator, Sequence

from modernbert_align.core.text import one_line
from modernbert_align.core.verdict import explain, place
from modernbert_align.report.html_report import EXIT_MEANING, SYMBOLS, verdict_sentence
from modernbert_align.report.schema import Report, rank_line
from modernbert_align.report.terminal import CAUSE, cause_sentence, override_line, worst_by_kind, worst_first

# Source: actions/runner, CreateStepSummaryCommand: a larger summary is refused as a whole.
LARGEST = 1024 * 1024
_OPEN = 10  # rows and weights that are not folded away
_MOST = 20  # hints, gaps and limits of the project's own
_LONGEST_COMMAND = 4000
_HEADS = 2000  # bytes kept for the headings of lists and for saying how many of their lines were left out

_WORD = re.compile(r"(?!www\.|GH-)(?:[^\W_]|[.+/'-])+", re.IGNORECASE)
_PUNCTUATED = re.compile(r"""([("']*)(.+?)([.,:;)"']*)""", re.DOTALL)


def render_markdown(report: Report, largest: int = LARGEST) -> str:
    """The report as GitHub-flavoured Markdown.

    Args:
        largest: Bytes it may have. Rows are left out first, and counted; the verdict stays as long as it fits.

    Returns:
        The text; empty if not even the verdict fits.
    """
    verdict, facts, end = _verdict(report), _facts(report), _end(report)
    room = largest - sum(map(_size, (verdict, facts, end))) - _HEADS
    if room < 0:
        alone = verdict + "\nThe rest was left out: there is no room for it.\n"
        return alone if _size(alone) <= largest else ""
    worst = _worst_table(report, room // 2)
    rows = _folded("Rows that are not a pass", list(_rows(report)), room - _size(worst))
    weights = _folded("Weights that are not the reference's", list(_weights(report)), room - _size(worst) - _size(rows))
    return verdict + facts + weights + rows + worst + end


def code(text: str) -> str:
    """Any text as a code span that is safe in a table cell too."""
    shown = one_line(text)
    if not shown:
        return "-"
    if shown == shown.strip() and not any(c in "`|\\<>&" for c in shown):
        return f"`{shown}`"
    return f"<code>{''.join(c if c.isalnum() else f'&#{ord(c)};' for c in shown)}</code>"


def prose(text: str) -> str:
    """A sentence in which all but plain words are code spans; for use after other text on a line."""
    return " ".join(map(_word, one_line(text).split()))


def _word(word: str) -> str:
    match = _PUNCTUATED.fullmatch(word)
    before, core, after = match.groups() if match else ("", word, "")
    if len(core) > 2 and core[0] == core[-1] == "`":
        return before + code(core[1:-1]) + after
    return word if _WORD.fullmatch(core) else before + code(core) + after


def _size(text: str) -> int:
    return len(text.encode())


def _verdict(report: Report) -> str:
    model = report.model
    return (
        f"## {SYMBOLS[report.verdict]} {report.verdict}: {code(model.name)} {code(model.head)} {report.dtype} "
        f"{report.run}\n\n{prose(verdict_sentence(report))}\n"
    )


def _facts(report: Report) -> str:
    model, coverage = report.model, report.coverage
    meaning = EXIT_MEANING.get(report.exit_code, "not an exit code of a comparison")
    lines = [
        "",
        f"- model {code(model.name)}, head {code(model.head)}, candidate {code(model.candidate)}, {report.run} in "
        f"{report.dtype}",
        f"- policy {report.policy}, exit code {report.exit_code}: {meaning}",
        f"- compared {coverage.compared} of {coverage.expected} rows and {coverage.weights_compared} of "
        f"{coverage.weights_expected} weights",
        *_bounded(coverage.missing, "  - not compared: "),
        *([f"- {rank_line(report)}"] if report.tensor_parallel > 1 else []),
    ]
    for dtype, execution in report.execution.items():
        candidate = "float32 kernels, each result rounded (emulated)" if execution.candidate == "emulated" else "native"
        lines.append(f"- {dtype}: the candidate ran {candidate}, the reference {execution.reference}")
    lines += _bounded([override_line(override) for override in report.overrides], "- ")
    if report.first_failing is not None:
        first = report.first_failing
        lines += ["", f"**First failing:** {code(first.place)}: {prose(first.detail)}"]
    if report.cause is not None and report.cause.level != "structural":
        name = CAUSE[report.cause.level]
        lines += ["", f"**{name[0].upper()}{name[1:]}:** {prose(cause_sentence(report.cause))}"]
    if report.hints:
        lines += ["", *_bounded(report.hints, "- hint: ")]
    return "\n".join(lines) + "\n"


def _bounded(texts: Sequence[str], bullet: str) -> Iterator[str]:
    for text in texts[:_MOST]:
        yield bullet + prose(text)
    if len(texts) > _MOST:
        yield f"{bullet}{len(texts) - _MOST} more, see the report"


def _worst_table(report: Report, room: int) -> str:
    forward = report.phase == "forward"
    names = ["dtype", *([] if forward else ["loss"]), "mode", "worst probe"]
    numbers = ["mean_abs", "limit", "max_abs", "null x"] if forward else ["rel_l2", "limit", "null x"]
    head = "".join(
        f"{line}\n"
        for line in (
            "",
            "### Worst row per kind",
            "",
            f"| {' | '.join([*names, *numbers, 'status'])} |",
            f"|{' --- |' * len(names)}{' ---: |' * len(numbers)} --- |",
        )
    )
    lines = []
    for row in worst_by_kind(report):
        measured = (row.mean_abs, row.contract_limit, row.max_abs) if forward else (row.rel_l2, row.direct_limit)
        cells = [row.dtype, *([] if forward else [row.loss or ""]), row.mode, code(row.probe), *map(_number, measured)]
        cells += ["-" if row.null_ratio is None else f"{row.null_ratio:.3g}", row.status.replace("_", " ")]
        lines.append(f"| {' | '.join(cells)} |\n")
    shown = _fitting(lines, room)
    left = len(lines) - len(shown)
    return head + "".join(shown) + (f"\n{left} more were left out: there is no room for them.\n" if left else "")


def _folded(title: str, lines: Sequence[str], room: int) -> str:
    """A list whose first lines are open and whose rest is folded away, as far as there is room."""
    if not lines:
        return ""
    shown = _fitting(lines, room)
    opened, folded, left = shown[:_OPEN], shown[_OPEN:], len(lines) - len(shown)
    text = f"\n### {title} ({len(lines)})\n\n{''.join(opened)}"
    if folded:
        text += f"\n<details><summary>{len(folded)} more</summary>\n\n{''.join(folded)}\n</details>\n"
    return text + (f"\n{left} more were left out: there is no room for them.\n" if left else "")


def _fitting(lines: Sequence[str], room: int) -> Sequence[str]:
    """The first lines that take no more than `room` bytes together."""
    for n, line in enumerate(lines):
        room -= _size(line)
        if room < 0:
            return lines[:n]
    return lines


def _rows(report: Report) -> Iterator[str]:
    for row in worst_first(report):
        yield f"- {code(place(row))} {row.status.replace('_', ' ')}: {prose(explain(row))}\n"


def _weights(report: Report) -> Iterator[str]:
    for check in report.weights:
        for d in check.differences:
            count = "" if d.differing is None else f", {d.differing} of {d.elements} elements"
            looks = f", {prose(d.looks)}" if d.looks else ""
            yield f"- {code(d.paddle)} ({check.dtype}, reference {code(d.hf)}): {d.problem}{count}{looks}\n"


def _end(report: Report) -> str:
    command = one_line(report.command, _LONGEST_COMMAND)
    environment = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return (
        f"\n### Reproduce\n\n```console\n$ {command}\n```\n\n"
        f"Versions: {code(versions)}; CPU {code(environment.cpu)}; report {code(report.content_sha256)}\n"
    )


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"
