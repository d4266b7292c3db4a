"""The command line: verbs, the one error boundary, exit codes.

Imports nothing heavy: `modernbert-align --help` must answer at once. Every verb imports its command when it runs.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from modernbert_align import __version__
from modernbert_align.commands import console
from modernbert_align.commands.options import (
    COMPARED,
    HEADS,
    HOW,
    JUDGED,
    MODEL,
    OUTPUT,
    RUN,
    SOURCE,
    WRITTEN,
    AsJson,
    Format,
    Quiet,
    ReportDir,
    Verbose,
    complete_dtype,
    complete_head,
    complete_model,
    complete_table,
    one_of,
)
from modernbert_align.core.text import one_line
from modernbert_align.errors import EXIT_BUG, EXIT_CLOSED_PIPE, EXIT_INTERRUPTED, EXIT_USAGE, AlignError

# Looking for pydantic plugins reads the metadata of every installed package, and none is meant for this program.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

PREFIX = "MODERNBERT_ALIGN"  # of environment variables

app = typer.Typer(
    name="modernbert-align",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "auto_envvar_prefix": PREFIX},
    help="ModernBERT in Paddle: convert checkpoints and prove, layer by layer, that both frameworks agree.",
    epilog="Exit codes: 0 aligned, 1 misaligned, 2 wrong usage or input, 3 bug, 4 package or kernel missing, "
    "5 nothing or too little compared, 130 interrupted. Every option can also stand in modernbert-align.toml, in "
    "pyproject.toml, or in the environment as MODERNBERT_ALIGN_<COMMAND>_<OPTION>; `config show` says what holds.",
)
table_app = typer.Typer(no_args_is_help=True, help="The name-mapping table that conversion and comparison share.")
config_app = typer.Typer(no_args_is_help=True, help="Defaults from the project file and the environment.")
baseline_app = typer.Typer(no_args_is_help=True, help="Reports that later ones must not be worse than.")


def _version(value: bool) -> None:
    if value:
        sys.stdout.write(f"modernbert-align {__version__}\n")
        raise typer.Exit


@app.callback()
def _main(
    ctx: typer.Context,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The project file. Default: the nearest modernbert-align.toml, or pyproject.toml that has a "
            "\\[tool.modernbert-align] section, in this folder or above.",
            metavar="FILE",
        ),
    ] = None,
    no_config: Annotated[bool, typer.Option("--no-config", help="Read no project file.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    from modernbert_align.commands import config as command

    project = command.load(ctx.command, config, no_config)
    ctx.default_map = dict(project.defaults)
    ctx.obj = project


@app.command()
def convert(
    src: Annotated[
        str,
        typer.Option(
            help="Framework of the source: hf or paddle.",
            metavar="hf|paddle",
            rich_help_panel=SOURCE,
            autocompletion=one_of("hf", "paddle"),
        ),
    ],
    dst: Annotated[
        str | None,
        typer.Option(
            help="Framework of the output: paddle or hf. Needed, but with --merge paddle by default.",
            metavar="paddle|hf",
            rich_help_panel=SOURCE,
            autocompletion=one_of("hf", "paddle"),
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"{MODEL} Default: base (with --src paddle there is none).",
            rich_help_panel=SOURCE,
            autocompletion=complete_model,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Default: checkpoints/<model>-<dst>.", rich_help_panel=OUTPUT)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="base drops the checkpoint's head; a fixture gets the head named.",
            metavar="HEAD",
            rich_help_panel=SOURCE,
            autocompletion=complete_head,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Cast all weights.",
            metavar="keep|fp32|bf16|fp16",
            rich_help_panel=WRITTEN,
            autocompletion=one_of("keep", "fp32", "bf16", "fp16"),
        ),
    ] = "keep",
    allow_overflow: Annotated[
        bool,
        typer.Option(
            "--allow-overflow", help="Let a cast turn values that do not fit into infinities.", rich_help_panel=WRITTEN
        ),
    ] = False,
    shard_size: Annotated[
        str,
        typer.Option(
            help="Split the output: keep the source's shards, none, or up to SIZE each.",
            metavar="keep|none|SIZE",
            rich_help_panel=WRITTEN,
            autocompletion=one_of("keep", "none"),
        ),
    ] = "keep",
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Divide a Paddle output among N tensor-parallel ranks, a file for each, as PaddleNLP does.",
            metavar="N",
            rich_help_panel=WRITTEN,
        ),
    ] = 1,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge",
            help="Join the rank files of a Paddle checkpoint; with --dst hf that happens by itself.",
            rich_help_panel=WRITTEN,
        ),
    ] = False,
    digest: Annotated[
        str,
        typer.Option(
            help="Digest of every tensor and weight file.",
            metavar="sha256|crc32|none",
            rich_help_panel=WRITTEN,
            autocompletion=one_of("sha256", "crc32", "none"),
        ),
    ] = "sha256",
    prove: Annotated[
        str | None,
        typer.Option(
            help="tensors reads back what was written, dye follows every element, roundtrip converts back to the "
            "source's SHA-256; several with commas. Default: tensors.",
            metavar="tensors,dye,roundtrip|none",
            rich_help_panel=WRITTEN,
            autocompletion=one_of("tensors", "dye", "roundtrip", "none"),
        ),
    ] = None,
    table: Annotated[
        str | None,
        typer.Option(
            help="Name-mapping table. Default: by the model's type.",
            metavar="NAME|FILE.toml",
            rich_help_panel=SOURCE,
            autocompletion=complete_table,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Read headers, print the plan, write nothing.", rich_help_panel=RUN)
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue a conversion whose process died; else it is started over.", rich_help_panel=RUN
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier conversion.", rich_help_panel=RUN)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Convert a checkpoint from one framework to the other; divide it among tensor-parallel ranks or join those.

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
            tensor_parallel=tensor_parallel,
            merge=merge,
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
        str | None,
        typer.Option(
            help="Name-mapping table. Default: by the model's type.",
            metavar="NAME|FILE.toml",
            autocompletion=complete_table,
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Check a finished conversion again: files, tensors, and a new conversion of the source if it is there.

    Example: modernbert-align verify checkpoints/base-paddle
    """
    from modernbert_align.commands import verify as command

    raise typer.Exit(command.run(folder=folder, source=source, table_name=table, as_json=as_json))


@app.command()
def tile(
    to: Annotated[
        str,
        typer.Option(
            help="The larger model: a fixture (large), or a folder or config.json that says its sizes.",
            metavar="NAME|DIR|FILE",
            rich_help_panel=SOURCE,
            autocompletion=complete_model,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help=f"{MODEL} Of either framework. Default: base.",
            rich_help_panel=SOURCE,
            autocompletion=complete_model,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Output folder. Default: checkpoints/<to>-from-<model>.", rich_help_panel=OUTPUT)
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="base drops the checkpoint's head; a fixture gets the head named.",
            metavar="HEAD",
            rich_help_panel=SOURCE,
            autocompletion=complete_head,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier tiling.", rich_help_panel=RUN)] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Start a large checkpoint from the weights of a smaller one: center tiling with wraparound.

    Example: modernbert-align tile --model answerdotai/ModernBERT-base --to large
    """
    from modernbert_align.commands import tile as command

    raise typer.Exit(command.run(model=model, to=to, out=out, head=head, force=force, as_json=as_json))


@app.command()
def diff(
    ctx: typer.Context,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Precision; bf16 runs fp32 first. Default: fp32; of traces, what they hold.",
            metavar="fp32|bf16",
            rich_help_panel=COMPARED,
            autocompletion=complete_dtype,
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help=f"{MODEL} Default: base.", rich_help_panel=COMPARED, autocompletion=complete_model
        ),
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(
            help="What `trace --backend hf` wrote; nothing is run then.", metavar="TRACE", rich_help_panel=COMPARED
        ),
    ] = None,
    candidate: Annotated[
        Path | None,
        typer.Option(
            help="Paddle checkpoint to compare, or what `trace --backend paddle` wrote. "
            "Default: convert the model just now.",
            metavar="DIR|TRACE",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help=f"{HEADS} Default: what config.json declares.",
            metavar="HEAD",
            rich_help_panel=COMPARED,
            autocompletion=complete_head,
        ),
    ] = None,
    report_dir: ReportDir = Path("reports"),
    format: Format = "json,html",
    phase: Annotated[
        str,
        typer.Option(
            help="What is compared: outputs, gradients, or the weights after some AdamW steps.",
            metavar="forward|backward|step",
            rich_help_panel=COMPARED,
            autocompletion=one_of("forward", "backward", "step"),
        ),
    ] = "forward",
    steps: Annotated[
        int | None,
        typer.Option(help="Optimizer steps of --phase step. Default: 3.", show_default=False, rich_help_panel=COMPARED),
    ] = None,
    attention: Annotated[
        str,
        typer.Option(
            help="How the Paddle model computes attention. blockwise: forward phase, engine stream.",
            metavar="eager|blockwise",
            rich_help_panel=COMPARED,
            autocompletion=one_of("eager", "blockwise"),
        ),
    ] = "eager",
    tensor_parallel: Annotated[
        int,
        typer.Option(
            help="Divide the Paddle model's weights among that many local processes.",
            metavar="RANKS",
            rich_help_panel=COMPARED,
        ),
    ] = 1,
    rank_timeout: Annotated[
        float | None,
        typer.Option(
            help="Give up on a rank that takes longer for one answer. Default: 600.",
            metavar="SECONDS",
            show_default=False,
            rich_help_panel=HOW,
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="Of the forward phase: padiff (default) runs a pass at a time, stream all of them in lock-step.",
            metavar="padiff|stream",
            rich_help_panel=HOW,
            autocompletion=one_of("padiff", "stream"),
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="Whether rounding beyond the contract is accepted. Default: contract for fixtures, else noise-aware.",
            metavar="contract|noise-aware",
            rich_help_panel=JUDGED,
            autocompletion=one_of("contract", "noise-aware"),
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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
            formats=format,
            policy=policy,
            engine=engine,
            phase=phase,
            steps=steps,
            attention=attention,
            tensor_parallel=tensor_parallel,
            rank_timeout=rank_timeout,
            as_json=as_json,
            overrides=ctx.obj.overrides,
            typed=_typed(ctx),
        )
    )


@app.command()
def trace(
    backend: Annotated[
        str,
        typer.Option(
            help="Which side: hf (the reference) or paddle.",
            metavar="hf|paddle",
            rich_help_panel=COMPARED,
            autocompletion=one_of("hf", "paddle"),
        ),
    ],
    out: Annotated[Path, typer.Option(help="The file to write.", metavar="FILE", rich_help_panel=OUTPUT)],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help=MODEL, rich_help_panel=COMPARED, autocompletion=complete_model)
    ] = "base",
    candidate: Annotated[
        Path | None,
        typer.Option(
            help="With --backend paddle: the checkpoint to record. Default: convert the model just now.",
            rich_help_panel=COMPARED,
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision; bf16 records fp32 too.",
            metavar="fp32|bf16",
            rich_help_panel=COMPARED,
            autocompletion=complete_dtype,
        ),
    ] = "fp32",
    head: Annotated[
        str | None,
        typer.Option(
            help=f"{HEADS} Default: what config.json declares.",
            metavar="HEAD",
            rich_help_panel=COMPARED,
            autocompletion=complete_head,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.", rich_help_panel=OUTPUT)] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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
    dtype: Annotated[
        str,
        typer.Option(
            help="Precision; bf16 runs fp32 too.",
            metavar="fp32|bf16",
            rich_help_panel=COMPARED,
            autocompletion=complete_dtype,
        ),
    ] = "fp32",
    head: Annotated[
        str | None,
        typer.Option(
            help=f"{HEADS} `all`: every fault on every head that can have it. Default: each on the first.",
            metavar="HEAD|all",
            rich_help_panel=COMPARED,
            autocompletion=complete_head,
        ),
    ] = None,
    model: Annotated[
        str,
        typer.Option(
            help="A fixture; in the default no term of the model is zero.",
            metavar="FIXTURE",
            rich_help_panel=COMPARED,
            autocompletion=complete_model,
        ),
    ] = "tiny-sensitive",
    phase: Annotated[
        str | None,
        typer.Option(
            help="One phase of diff alone. Default: all.",
            metavar="forward|backward|step",
            rich_help_panel=COMPARED,
            autocompletion=one_of("forward", "backward", "step"),
        ),
    ] = None,
    seeds: Annotated[
        int,
        typer.Option(
            help="How many unbroken models per head, with other weights and inputs, must raise no alarm.",
            rich_help_panel=COMPARED,
        ),
    ] = 20,
    report_dir: ReportDir = Path("reports"),
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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


class _TakesManyBaselines(typer.core.TyperCommand):
    """A command whose `--baseline` takes every argument up to the next option: what a shell makes of a pattern."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else len(args)
        spread: list[str] = []
        more = False  # whether --baseline has its first value
        for before, argument in zip(["", *args], args[:end], strict=False):
            if argument.startswith("-"):
                more = False
            elif more:
                spread.append("--baseline")
            else:
                more = before == "--baseline"
            spread.append(argument)
        return super().parse_args(ctx, spread + args[end:])


@app.command(cls=_TakesManyBaselines)
def gate(
    ctx: typer.Context,
    reports: Annotated[
        list[Path] | None, typer.Argument(help="JSON reports written by diff.", show_default=False)
    ] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(
            help="What the reports must not be worse than: files, folders or patterns, up to the next option.",
            metavar="PATH...",
            rich_help_panel=JUDGED,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            help="What must be there, for example model=base,dtype=fp32,dtype=bf16; also phase= and head=. Repeatable.",
            rich_help_panel=JUDGED,
        ),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            help="As in diff. Default: by kind of model.",
            metavar="contract|noise-aware",
            rich_help_panel=JUDGED,
            autocompletion=one_of("contract", "noise-aware"),
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Judge saved reports again with the installed tolerances; the exit code is for CI to merge on.

    Example: modernbert-align gate reports/diff-*.json --require model=base,dtype=fp32,dtype=bf16

    Against baselines: modernbert-align gate reports/diff-*.json --baseline reports/baseline/*.json
    """
    from modernbert_align.commands import gate as command

    raise typer.Exit(
        command.run(
            reports=reports or [],
            baselines=[str(path) for path in baseline or []],
            require=require or [],
            policy=policy,
            as_json=as_json,
            overrides=ctx.obj.overrides,
        )
    )


@app.command()
def compare(
    ctx: typer.Context,
    old: Annotated[
        Path | None, typer.Argument(help="The older report.", metavar="OLD.json", show_default=False)
    ] = None,
    new: Annotated[
        Path | None,
        typer.Argument(help="The newer, of the same comparison.", metavar="NEW.json", show_default=False),
    ] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of comparisons instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what changed between two reports; exit code 1 if something got worse, 5 if something is gone.

    Example: modernbert-align compare reports/baseline/diff-tiny-masked_lm-bf16.json diff-tiny-masked_lm-bf16.json
    """
    from modernbert_align.commands import compare as command

    raise typer.Exit(command.run(old=old, new=new, as_json=as_json, schema=schema, overrides=ctx.obj.overrides))


BaselineDir = Annotated[Path, typer.Option(help="Where the baselines are.", rich_help_panel=OUTPUT)]


@baseline_app.command("update")
def baseline_update(
    ctx: typer.Context,
    reports: Annotated[list[Path], typer.Argument(help="JSON reports written by diff that pass gate.")],
    baseline_dir: BaselineDir = Path("reports/baseline"),
    policy: Annotated[
        str | None,
        typer.Option(
            help="As in diff. Default: by kind of model.",
            metavar="contract|noise-aware",
            rich_help_panel=JUDGED,
            autocompletion=one_of("contract", "noise-aware"),
        ),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Make reports the baselines of what they compare, all or none; shows what changes.

    Example: modernbert-align baseline update reports/diff-base-masked_lm-bf16.json
    """
    from modernbert_align.commands import baseline as command

    raise typer.Exit(
        command.update(
            reports=reports,
            baseline_dir=baseline_dir,
            policy=policy,
            as_json=as_json,
            overrides=ctx.obj.overrides,
        )
    )


@baseline_app.command("show")
def baseline_show(
    ctx: typer.Context,
    baseline_dir: BaselineDir = Path("reports/baseline"),
    as_json: AsJson = False,
) -> None:
    """List the baselines: of what, with which verdict, made when and with what."""
    from modernbert_align.commands import baseline as command

    raise typer.Exit(command.show(baseline_dir=baseline_dir, as_json=as_json, overrides=ctx.obj.overrides))


@app.command()
def report(
    path: Annotated[
        Path | None, typer.Argument(help="A JSON report written by diff.", metavar="REPORT.json", show_default=False)
    ] = None,
    report_dir: Annotated[Path | None, typer.Option(help="Where the files go. Default: beside the report.")] = None,
    format: Format = "html",
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of reports instead.")] = False,
) -> None:
    """Make the HTML page, or another format, from a JSON report.

    Example: modernbert-align report reports/diff-base-masked_lm-fp32.json --format junit,markdown
    """
    from modernbert_align.commands import report as command

    raise typer.Exit(command.run(path=path, report_dir=report_dir, formats=format, schema=schema))


@app.command()
def doctor(
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show versions, processor, and which operations Paddle has kernels for."""
    from modernbert_align.commands import doctor as command

    raise typer.Exit(command.run(as_json=as_json))


_TABLE = (
    "A shipped table (modernbert, modernbert-decoder) or a TOML file. Default: by the model's type, else modernbert."
)
_OF_TABLE = f"{MODEL} The fixtures are modernbert's. Default: the table's default sizes; for modernbert,"


@table_app.command("show")
def table_show(
    table: Annotated[
        str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml", autocompletion=complete_table)
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{_OF_TABLE} base.", autocompletion=complete_model)] = None,
    head: Annotated[str | None, typer.Option(help=HEADS, metavar="HEAD", autocompletion=complete_head)] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Print a table's rows for one model.

    Example: modernbert-align table show --model tiny --head base
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.show(table_name=table, model=model, head=head, as_json=as_json))


@table_app.command("lint")
def table_lint(
    table: Annotated[
        str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml", autocompletion=complete_table)
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"{_OF_TABLE} tiny. Its config decides the live models.", autocompletion=complete_model),
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Hold a table against seven rules and against live models of both frameworks; exit code 1 if it breaks one.

    Example: modernbert-align table lint --table modernbert-decoder
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.lint(table_name=table, model=model, as_json=as_json))


@table_app.command("explain")
def table_explain(
    name: Annotated[str, typer.Argument(help="A weight, as either side or an old checkpoint calls it.")],
    table: Annotated[
        str | None, typer.Option(help=_TABLE, metavar="NAME|FILE.toml", autocompletion=complete_table)
    ] = None,
    model: Annotated[str | None, typer.Option(help=f"{_OF_TABLE} base.", autocompletion=complete_model)] = None,
    head: Annotated[
        str | None, typer.Option(help=f"Only this head. {HEADS}", metavar="HEAD", autocompletion=complete_head)
    ] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
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
    as_json: AsJson = False,
) -> None:
    """Compare two tables by what they say; exit code 1 if they differ.

    Example: modernbert-align table diff modernbert my-variant.toml
    """
    from modernbert_align.commands import table as command

    raise typer.Exit(command.diff(first=first, second=second, as_json=as_json))


@config_app.command("show")
def config_show(
    ctx: typer.Context,
    as_json: AsJson = False,
) -> None:
    """Print the value of every option and where it comes from: environment, project file or default.

    What the command line says comes before all of these. Example: modernbert-align config show
    """
    from modernbert_align.commands import config as command

    raise typer.Exit(command.show(root=ctx.find_root(), as_json=as_json))


# In the order of the help.
app.add_typer(table_app, name="table")
app.add_typer(baseline_app, name="baseline")
app.add_typer(config_app, name="config")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code; see `modernbert_align.errors`.
    """
    console.set_quiet(False)
    console.set_verbose(False)
    return guarded(
        lambda: _command()(args=argv, prog_name="modernbert-align", standalone_mode=False), "modernbert-align"
    )


def guarded(call: Callable[[], Any], program: str) -> int:
    """Run a command line behind the error boundary: what the user can fix is a line, a bug keeps its traceback.

    Args:
        call: Gives the exit code; anything but a number is 0.
        program: Its name, for messages.

    Returns:
        The exit code; see `modernbert_align.errors`.
    """
    try:
        code = call()
    except AlignError as error:
        _complain(error.message, error.hint)
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted", "")
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # whoever reads has seen enough; Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CLOSED_PIPE
    except Exception as error:  # noqa: BLE001 - the boundary: usage errors get a line, bugs their traceback
        if hasattr(error, "format_message"):  # typer's usage errors, which it does not export under a name
            context = getattr(error, "ctx", None)
            path = context.command_path if context is not None else program
            if error.format_message():  # without a verb the help was printed, and that says it
                _complain(error.format_message().rstrip("."), f"see `{path} --help`")
            return EXIT_USAGE
        import traceback

        traceback.print_exc()
        _complain("this is a bug in modernbert-align", "please report it with the lines above")
        return EXIT_BUG
    if code == EXIT_INTERRUPTED:  # what typer makes of the interrupt key
        _complain("interrupted", "")
    return code if isinstance(code, int) else 0


def _command() -> Any:
    """The command line, whose help leaves out the environment variables: they follow a rule."""
    command = typer.main.get_command(app)
    stack: list[Any] = [command]
    while stack:
        one = stack.pop()
        stack += getattr(one, "commands", {}).values()
        for parameter in one.params:
            parameter.show_envvar = False
    return command


def _typed(ctx: typer.Context) -> tuple[str, ...]:
    """The parameters that stand on the command line, not in the environment or the project file."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    return tuple(name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE")


def _complain(message: str, hint: str) -> None:
    sys.stderr.write(f"error: {one_line(message)}\n")
    if hint:
        sys.stderr.write(f"hint: {one_line(hint)}\n")


if __name__ == "__main__":
    sys.exit(main())
