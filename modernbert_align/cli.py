"""The command line: verbs, the one error boundary, exit codes.

Imports nothing heavy: `modernbert-align --help` must answer at once. Every verb imports its command when it runs.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from modernbert_align import __version__
from modernbert_align.commands.console import one_line
from modernbert_align.errors import EXIT_BUG, EXIT_INTERRUPTED, EXIT_USAGE, AlignError

# Looking for pydantic plugins reads the metadata of every installed package, and none is meant for this program.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

app = typer.Typer(
    name="modernbert-align",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="ModernBERT in Paddle: convert checkpoints and prove, layer by layer, that both frameworks agree.",
    epilog="Exit codes: 0 aligned, 1 misaligned, 2 wrong usage or input, 3 bug, 4 package or kernel missing, "
    "5 nothing or too little compared, 130 interrupted.",
)
table_app = typer.Typer(no_args_is_help=True, help="The name-mapping table that conversion and comparison share.")
app.add_typer(table_app, name="table")

_MODEL = (
    "A checkpoint folder, a hub id (answerdotai/ModernBERT-base) or a fixture "
    "(tiny, tiny-sensitive, base or large; with -stress: tiny-stress, base-stress, large-stress)."
)

_HEADS = "base, masked_lm, sequence_classification, token_classification, question_answering or multiple_choice."


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"modernbert-align {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    src: Annotated[str, typer.Option(help="Framework of the source: hf or paddle.", metavar="hf|paddle")],
    dst: Annotated[str, typer.Option(help="Framework of the output: paddle or hf.", metavar="paddle|hf")],
    model: Annotated[
        str | None, typer.Option(help=f"{_MODEL} Default: base (with --src paddle there is none).")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Output folder. Default: checkpoints/<model>-<dst>.")] = None,
    head: Annotated[
        str | None,
        typer.Option(help="base drops the checkpoint's head; a fixture gets the head named.", metavar="HEAD"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Cast all weights.", metavar="keep|fp32|bf16|fp16")] = "keep",
    allow_overflow: Annotated[
        bool, typer.Option("--allow-overflow", help="Let a cast turn values that do not fit into infinities.")
    ] = False,
    shard_size: Annotated[
        str,
        typer.Option(
            help="Split the output: keep the source's shards, none, or up to SIZE each.", metavar="keep|none|SIZE"
        ),
    ] = "keep",
    digest: Annotated[
        str, typer.Option(help="Digest of every tensor and weight file.", metavar="sha256|crc32|none")
    ] = "sha256",
    prove: Annotated[
        str | None,
        typer.Option(
            help="tensors reads back what was written, dye follows every element, roundtrip converts back to the "
            "source's SHA-256; several with commas. Default: tensors.",
            metavar="tensors,dye,roundtrip|none",
        ),
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Name-mapping table. Default: by the model's type.", metavar="NAME|FILE.toml")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read headers, print the plan, write nothing.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue a conversion whose process died; else it is started over.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Convert a checkpoint from one framework to the other.

    Example: modernbert-align convert --src hf --dst paddle --model answerdotai/ModernBERT-base
    """
    from modernbert_align.commands import convert as command

    raise typer.Exit(
        command.run(
            src=src,
            dst=dst,
            model=model,
            out=out,
            head=head,
            dtype=dtype,
            allow_overflow=allow_overflow,
            shard_size=shard_size,
            digest=digest,
            prove=prove,
            table_name=table,
            dry_run=dry_run,
            resume=resume,
            force=force,
            as_json=as_json,
        )
    )


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(help="A folder that convert wrote.", metavar="DIR", show_default=False)],
    source: Annotated[
        Path | None, typer.Option(help="The source checkpoint. Default: the folder the manifest names.")
    ] = None,
    table: Annotated[
        str | None, typer.Option(help="Name-mapping table. Default: by the model's type.", metavar="NAME|FILE.toml")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Check a finished conversion again: files, tensors, and a new conversion of the source if it is there.

    Example: modernbert-align verify checkpoints/base-paddle
    """
    from modernbert_align.commands import verify as command

    raise typer.Exit(command.run(folder=folder, source=source, table_name=table, as_json=as_json))


@app.command()
def diff(
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision; bf16 runs fp32 first. Default: fp32; of traces, what they hold.", metavar="fp32|bf16"
        ),
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{_MODEL} Default: base.")] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="What `trace --backend hf` wrote; nothing is run then.", metavar="TRACE"),
    ] = None,
    candidate: Annotated[
        Path | None,
        typer.Option(
            help="Paddle checkpoint to compare, or what `trace --backend paddle` wrote. "
            "Default: convert the model just now.",
            metavar="DIR|TRACE",
        ),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help=f"{_HEADS} Default: what config.json declares.", metavar="HEAD")
    ] = None,
    report_dir: Annotated[Path, typer.Option(help="Where the JSON and HTML reports go.")] = Path("reports"),
    phase: Annotated[
        str,
        typer.Option(
            help="What is compared: outputs, gradients, or the weights after some AdamW steps.",
            metavar="forward|backward|step",
        ),
    ] = "forward",
    steps: Annotated[
        int | None, typer.Option(help="Optimizer steps of --phase step. Default: 3.", show_default=False)
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Of the forward phase: padiff (default) runs a pass at a time, stream all of them in lock-step.",
            metavar="padiff|stream",
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Whether rounding beyond the contract is accepted. Default: contract for fixtures, else noise-aware.",
            metavar="contract|noise-aware",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")] = False,
) -> None:
    """Compare Paddle with Hugging Face, layer by layer, and write a report.

    Example: modernbert-align diff --dtype bf16 --model tiny

    Of two machines: modernbert-align diff --reference reference.trace --candidate candidate.trace
    """
    from modernbert_align.commands import diff as command

    raise typer.Exit(
        command.run(
            dtype=dtype,
            model=model,
            reference=reference,
            candidate=candidate,
            head=head,
            report_dir=report_dir,
            policy=policy,
            engine=engine,
            phase=phase,
            steps=steps,
            as_json=as_json,
        )
    )


@app.command()
def trace(
    backend: Annotated[str, typer.Option(help="Which side: hf (the reference) or paddle.", metavar="hf|paddle")],
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE")],
    model: Annotated[str, typer.Option(help=_MODEL)] = "base",
    candidate: Annotated[
        Path | None,
        typer.Option(help="With --backend paddle: the checkpoint to record. Default: convert the model just now."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision; bf16 records fp32 too.", metavar="fp32|bf16")] = "fp32",
    head: Annotated[
        str | None, typer.Option(help=f"{_HEADS} Default: what config.json declares.", metavar="HEAD")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Record one side of a comparison on a machine that has only one framework; `diff` judges two such files.

    Example: modernbert-align trace --backend paddle --model tiny --out candidate.trace
    """
    from modernbert_align.commands import trace as command

    raise typer.Exit(
        command.run(backend=backend, out=out, model=model, candidate=candidate, dtype=dtype, head=head, force=force)
    )


@app.command()
def selftest(
    dtype: Annotated[str, typer.Option(help="Precision; bf16 runs fp32 too.", metavar="fp32|bf16")] = "fp32",
    head: Annotated[
        str | None,
        typer.Option(
            help=f"{_HEADS} `all`: every fault on every head that can have it. Default: each on the first.",
            metavar="HEAD|all",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="A fixture; in the default no term of the model is zero.", metavar="FIXTURE")
    ] = "tiny-sensitive",
    phase: Annotated[
        str | None, typer.Option(help="One phase of diff alone. Default: all.", metavar="forward|backward|step")
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(help="How many unbroken models per head, with other weights and inputs, must raise no alarm."),
    ] = 20,
    report_dir: Annotated[Path, typer.Option(help="Where the JSON and HTML reports go.")] = Path("reports"),
    as_json: Annotated[bool, typer.Option("--json", help="Print the kill matrix as JSON on stdout.")] = False,
) -> None:
    """Prove that the comparison can fail: inject known bugs, check that each is found; exit code 1 if not.

    Writes the kill matrix as selftest-MODEL-DTYPE.json and .html.

    Example: modernbert-align selftest --seeds 5
    """
    from modernbert_align.commands import selftest as command

    raise typer.Exit(
        command.run(
            dtype=dtype,
            head=head,
            model=model,
            phase=phase,
            seeds=seeds,
            report_dir=report_dir,
            as_json=as_json,
        )
    )


@app.command()
def gate(
    reports: Annotated[list[Path], typer.Argument(help="JSON reports written by diff.")],
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be there, for example model=base,dtype=fp32,dtype=bf16; also phase= and head=. Repeatable."
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(help="As in diff. Default: by kind of model.", metavar="contract|noise-aware"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcome as JSON on stdout.")] = False,
) -> None:
    """Judge saved reports again with the installed tolerances; the exit code is for CI to merge on.

    Example: modernbert-align gate reports/*.json --require model=base,dtype=fp32,dtype=bf16
    """
    from modernbert_align.commands import gate as command

    raise typer.Exit(command.run(reports=reports, require=require or [], policy=policy, as_json=as_json))


@app.command()
def report(
    path: Annotated[
        Path | None, typer.Argument(help="A JSON report written by diff.", metavar="REPORT.json", show_default=False)
    ] = None,
    report_dir: Annotated[
        Path | None, typer.Option(help="Where the HTML page goes. Default: beside the report.")
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of reports instead.")] = False,
) -> None:
    """Make the HTML page from a JSON report again."""
    from modernbert_align.commands import report as command

    raise typer.Exit(command.run(path=path, report_dir=report_dir, schema=schema))


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Show versions, processor, and which operations Paddle has kernels for."""
    from modernbert_align.commands import doctor as command

    raise typer.Exit(command.run(as_json=as_json))


_TABLE = (
    "A shipped table (modernbert, modernbert-decoder) or a TOML file. Default: by the model's type, else modernbert."
)
_TABLE_MODEL = f"{_MODEL} The fixtures are modernbert's. Default: the table's default sizes; for modernbert,"


@table_app.command("show")
def table_show(
    table: Annotated[str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml")] = None,
    model: Annotated[str | None, typer.Option(help=f"{_TABLE_MODEL} base.")] = None,
    head: Annotated[str | None, typer.Option(help=_HEADS, metavar="HEAD")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Print a table's rows for one model.

    Example: modernbert-align table show --model tiny --head base
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.show(table_name=table, model=model, head=head, as_json=as_json))


@table_app.command("lint")
def table_lint(
    table: Annotated[str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml")] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"{_TABLE_MODEL} tiny. Its config decides the live models."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Hold a table against seven rules and against live models of both frameworks; exit code 1 if it breaks one.

    Example: modernbert-align table lint --table modernbert-decoder
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.lint(table_name=table, model=model, as_json=as_json))


@table_app.command("explain")
def table_explain(
    name: Annotated[str, typer.Argument(help="A weight, as either side or an old checkpoint calls it.")],
    table: Annotated[str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml")] = None,
    model: Annotated[str | None, typer.Option(help=f"{_TABLE_MODEL} base.")] = None,
    head: Annotated[str | None, typer.Option(help=f"Only this head. {_HEADS}", metavar="HEAD")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Say everything a table knows about one weight.

    Example: modernbert-align table explain model.layers.3.attn.Wo.weight
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.explain(name=name, table_name=table, model=model, head=head, as_json=as_json))


@table_app.command("diff")
def table_diff(
    first: Annotated[str, typer.Argument(help="A shipped table or a TOML file.", metavar="A")],
    second: Annotated[str, typer.Argument(help="The other one.", metavar="B")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")] = False,
) -> None:
    """Compare two tables by what they say; exit code 1 if they differ.

    Example: modernbert-align table diff modernbert my-variant.toml
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.diff(first=first, second=second, as_json=as_json))


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code; see `modernbert_align.errors`.
    """
    try:
        code = app(args=argv, prog_name="modernbert-align", standalone_mode=False)
    except AlignError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted", "")
        return EXIT_INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the boundary: usage errors get a line, bugs their traceback
        if hasattr(error, "format_message"):  # typer's usage errors, which it does not export under a name
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else "modernbert-align"
            _complain(error.format_message().rstrip("."), f"see `{path} --help`")
            return EXIT_USAGE
        import traceback

        traceback.print_exc()
        _complain("this is a bug in modernbert-align", "please report it with the lines above")
        return EXIT_BUG
    if code == EXIT_INTERRUPTED:  # what typer makes of the interrupt key
        _complain("interrupted", "")
    return code if isinstance(code, int) else 0


def _complain(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {one_line(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {one_line(hint)}\n")


if __name__ == "__main__":
    sys.exit(main())
