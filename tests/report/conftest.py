"""Small reports made in code, judged by the real `judge`, so that no saved file has to be kept in step."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from modernbert_align.core.probes import Probe
from modernbert_align.core.rows import MODES, Dtype, Mode, RankCheck, RankFact, Record, WeightCheck, WeightDifference
from modernbert_align.core.tolerance import Override, load_tolerance, load_tolerances
from modernbert_align.core.verdict import Expectation, default_policy, judge
from modernbert_align.report.schema import (
    ConversionInfo,
    Engine,
    EnginePass,
    Environment,
    Execution,
    InputInfo,
    ModelInfo,
    Report,
    Threshold,
)

DTYPES: tuple[Dtype, ...] = ("fp32", "bf16")
RANKS: dict[RankFact, int] = {"weights": 6, "values": 6, "randomness": 6}
Key = tuple[str, Dtype, Mode]
MakeReport = Callable[..., Report]


def probes_of(layers: int) -> list[Probe]:
    parts = ("attn_norm", "attn", "mlp_norm", "mlp")
    names = [("embeddings", "embeddings")]
    for i in range(layers):
        names += [(f"layers.{i}.{part}", f"layers.{{i}}.{part}") for part in parts]
        names.append((f"layers.{i}", "layers.{i}"))
    names += [(name, name) for name in ("final_norm", "head", "logits", "output")]
    return [Probe(name=n, pattern=p, hf=n, paddle=n, fan_in=64) for n, p in names]


def record_of(probe: str, dtype: Dtype, mode: Mode, n: int) -> Record:
    """A good row; layer rows of an isolated pass are exact."""
    error = 0.0 if mode == "isolated" and probe.count(".") == 1 else (3e-8 if dtype == "fp32" else 2e-5) * (1 + n / 9)
    rounding = 0.98 * load_tolerance(dtype).unit_roundoff
    return Record(
        probe=probe,
        dtype=dtype,
        mode=mode,
        observation="compared",
        shape=(2, 192, 64),
        elements=21888,
        mean_abs=error,
        max_abs=4 * error,
        rel_l2=2 * error,
        reference_rms=0.98,
        equal_share=1.0 if error == 0 else 0.51342,
        worst_index=(0, 17, 14),
        worst_candidate=-2.0636465549468994,
        worst_reference=-2.0636470317840576,
        candidate_error=(0.2 if probe == "embeddings" else 0.375) * rounding,  # the first is below the floor
        reference_error=0.3 * rounding,
        ulps=None if dtype == "fp32" else (11000, 10000, 500, 200, 0, 0, 0, 0, 188),
        null_rel_l2=2e-7 if probe.endswith("attn") else 0.0,
        null_parts={"sdpa": 2e-7 if probe.endswith("attn") else 0.0, "permuted": 0.0},
        padiff_equal=True if dtype == "fp32" else None,
    )


@pytest.fixture
def make_report() -> MakeReport:
    """Build a report.

    Its arguments: `layers`; `changes`, fields of records to change by probe, dtype and mode, or None to leave
    the record out; `extra`, more records; `differences`, of fp32 weights; `fixture`, None for weights not under
    contract; `needs`, what the inputs exercised; `overrides`, limits of the project's own; `ranks`, what the ranks of
    a candidate divided in two showed, each of 6; any other field of `Report`.
    """

    def make(
        *,
        layers: int = 3,
        changes: Mapping[Key, Mapping[str, object] | None] | None = None,
        extra: Sequence[Record] = (),
        differences: Sequence[WeightDifference] = (),
        fixture: str | None = "tiny",
        needs: Mapping[str, bool] | None = None,
        overrides: Sequence[Override] = (),
        ranks: Sequence[RankCheck] | None = None,
        **fields: object,
    ) -> Report:
        changes = changes or {}
        probes = probes_of(layers)
        records = []
        for dtype in DTYPES:
            for mode in MODES:
                for n, probe in enumerate(probes):
                    change = changes.get((probe.name, dtype, mode), {})
                    if change is not None:
                        records.append(record_of(probe.name, dtype, mode, n).model_copy(update=change))
        weights = tuple(
            WeightCheck(dtype=d, expected=6, compared=6, differences=tuple(differences) if d == "fp32" else ())
            for d in DTYPES
        )
        expectation = Expectation(
            probes=probes,
            dtypes=DTYPES,
            weights=6,
            fixture=fixture,
            needs=needs or {},
            ranks={} if ranks is None else RANKS,
        )
        policy = default_policy(fixture)
        judged = judge(
            [*records, *extra], weights, expectation, load_tolerances(DTYPES), policy, overrides, ranks or ()
        )
        report = Report(
            tool_version="0.1.0",
            created="2026-01-02T03:04:05+00:00",
            verdict=judged.verdict,
            exit_code=judged.exit_code,
            policy=policy,
            dtype="bf16",
            phase="forward",
            steps=None,
            attention="eager",
            tensor_parallel=1 if ranks is None else 2,
            ranks=tuple(ranks or ()),
            execution={
                "fp32": Execution(reference="native", candidate="native"),
                "bf16": Execution(reference="native", candidate="emulated"),
            },
            model=ModelInfo(
                name="tiny",
                kind="fixture",
                fixture=fixture,
                revision=None,
                head="masked_lm",
                architecture="ModernBertForMaskedLM",
                candidate="converted",
                reference_sha256="a" * 64,
                candidate_sha256="b" * 64,
                table="modernbert/1",
                table_sha256="c" * 64,
                config={"hidden_size": 64, "layer_types": ["full_attention", "sliding_attention"]},
                candidate_config_differences=(),
            ),
            conversion=ConversionInfo(
                dtype="keep",
                lossless=True,
                table="modernbert/1",
                table_sha256="c" * 64,
                tensors=27,
                files=1,
                size_bytes=596_000,
                operations={"id": 10, "T": 17, "tie": 1},
                tied=(("decoder.weight", "model.embeddings.tok_embeddings.weight"),),
                dropped=(),
                proofs=("27 tensors were read back from the disk and are what was written",),
            ),
            inputs=InputInfo(seed=0, lengths=(192, 150), sha256="d" * 64, padded=True, window_bites=True),
            thresholds=(
                Threshold(
                    dtype="fp32",
                    criterion="contract",
                    measure="mean_abs",
                    value=1e-5,
                    origin="agreed",
                    applied=True,
                ),
            ),
            overrides=judged.overrides,
            coverage=judged.coverage,
            weights=weights,
            rows=judged.rows,
            first_failing=judged.first_failing,
            hints=(),
            engine=Engine(
                name="padiff",
                version="0.2.0",
                passes=tuple(EnginePass(dtype=d, mode=m, padiff_verdict=None, error="") for d in DTYPES for m in MODES),
            ),
            environment=Environment(
                versions={"torch": "2.13.0", "paddlepaddle": "3.3.1"},
                platform="Linux",
                cpu="a CPU",
                cpu_flags=("avx2", "fma"),
                pins={"ONEDNN_MAX_CPU_ISA": "AVX2"},
                torch_cpu_capability="AVX2",
                torch_threads=2,
                paddle_device="cpu",
            ),
            timings_s={"fp32_isolated": 1.25},
            command="modernbert-align diff --dtype bf16",
        )
        return report.model_copy(update=fields).sealed()

    return make


@pytest.fixture
def broken_attention() -> dict[Key, dict[str, object]]:
    """A model whose second layer's attention is wrong: by itself there, end to end from there on."""
    wrong = {"mean_abs": 4e-3, "max_abs": 0.3, "rel_l2": 0.08, "equal_share": 0.00001, "padiff_equal": False}
    wrong |= {"candidate_error": 0.0784}
    names = [probe.name for probe in probes_of(3)]
    return {("layers.1.attn", "fp32", "isolated"): wrong} | {
        (name, "fp32", "accumulated"): wrong for name in names[names.index("layers.1.attn") :]
    }


@pytest.fixture
def rank_checks() -> Callable[..., list[RankCheck]]:
    """What two ranks showed of both dtypes; `wrong` and `compared` are of the fp32 values."""

    def make(wrong: Sequence[str] = (), compared: int = 6) -> list[RankCheck]:
        return [
            RankCheck(
                dtype=dtype,
                what=what,
                expected=6,
                compared=compared if (dtype, what) == ("fp32", "values") else 6,
                wrong=tuple(wrong) if (dtype, what) == ("fp32", "values") else (),
            )
            for dtype in DTYPES
            for what in RANKS
        ]

    return make
