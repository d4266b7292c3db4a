"""`trace` and `diff` of two traces: two machines that each have one framework."""

import json
import os
import struct
import subprocess
import sys
from contextlib import ExitStack
from types import MethodType

import numpy as np
import pytest
from faults import FAULTS

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.checkpoint import read_header
from modernbert_align.core.rows import MODES
from modernbert_align.core.trace import FORMAT
from modernbert_align.core.trace_file import TraceWriter, open_trace
from modernbert_align.report.json_report import read_report

# Runs the command line where some packages are not installed: importing them says so, looking for them finds nothing.
WITHOUT = """
import sys
from importlib.machinery import PathFinder
absent = set(sys.argv.pop(1).split(","))
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in absent else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
from modernbert_align.cli import main
code = main(sys.argv[1:])
loaded = absent & {name.split(".")[0] for name in sys.modules}
sys.exit(f"loaded {loaded}" if loaded else code)
"""


def without(packages, *arguments):
    """Run the command line in a process that does not have some packages."""
    command = [sys.executable, "-c", WITHOUT, ",".join(packages), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ})
    return done.returncode, done.stdout, done.stderr


def record(cli, backend, out, *arguments):
    code, _, err = cli("trace", "--backend", backend, "--out", out, *arguments)
    assert code == 0, err
    return out


def diff(cli, reference, candidate, folder, *arguments):
    """Compare two traces; gives the exit code and the report."""
    files = ("--reference", reference, "--candidate", candidate)
    code, out, err = cli("diff", *files, "--report-dir", folder, "--json", *arguments)
    assert out, err
    return code, json.loads(out)


def refusal(cli, *arguments):
    """The one line of a refused command."""
    code, out, err = cli(*arguments)
    assert (code, out) == (2, ""), err
    lines = err.splitlines()
    complaint = [line for line in lines if line.startswith("error: ")]
    assert len(complaint) == 1, err
    assert "Traceback" not in err
    return complaint[0]


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    """Both sides of tiny in fp32 and bf16, each recorded where the other side's packages are not installed."""
    folder = tmp_path_factory.mktemp("traces")
    arguments = ("--model", "tiny", "--dtype", "bf16", "--out")
    for backend, others in (("hf", ("paddle", "paddlenlp", "padiff")), ("paddle", ("torch", "transformers", "padiff"))):
        code, out, err = without(others, "trace", "--backend", backend, *arguments, folder / f"{backend}.trace")
        assert code == 0, err
        assert out == f"{folder}/{backend}.trace: {backend} tiny masked_lm bf16, 26 probes, {out.split()[-2]} tensors\n"
    return folder / "hf.trace", folder / "paddle.trace"


@pytest.fixture(scope="module")
def judged(traces, tmp_path_factory):
    """Their comparison, where no framework is installed at all: (report, folder)."""
    folder = tmp_path_factory.mktemp("reports")
    absent = ("torch", "paddle", "transformers", "paddlenlp", "padiff")
    files = ("--reference", traces[0], "--candidate", traces[1])
    code, out, err = without(absent, "diff", *files, "--report-dir", folder)
    assert code == 0, err
    assert "PASS" in out
    return read_report(folder / "diff-tiny-masked_lm-bf16.json"), folder


# --- the literal flow -------------------------------------------------------------------------------------------------


def test_every_row_of_both_modes_and_dtypes_passes_with_every_criterion(judged):
    report, _ = judged
    assert (report.verdict, report.exit_code) == ("PASS", 0)
    assert {(row.dtype, row.mode) for row in report.rows} == {(d, m) for d in ("fp32", "bf16") for m in MODES}
    assert report.coverage.compared == report.coverage.expected == len(report.rows) == 104
    assert report.coverage.weights_compared == report.coverage.weights_expected == 60
    for row in report.rows:
        assert row.status == "pass"
        assert set(row.null_parts) == {"sdpa", "permuted"}
        assert row.candidate_error is not None
        assert (row.ulps is not None) == (row.dtype == "bf16")
    assert any(row.noise_ratio for row in report.rows)
    assert any(row.null_rel_l2 for row in report.rows if row.mode == "isolated")


def test_end_to_end_rows_are_those_of_a_live_comparison(judged, cli, tmp_path):
    report, _ = judged
    code, out, _ = cli(
        "diff", "--model", "tiny", "--dtype", "bf16", "--engine", "stream", "--report-dir", tmp_path, "--json"
    )
    live = json.loads(out)
    traced = json.loads(report.model_dump_json())
    assert code == 0
    for key in ("policy", "execution", "inputs", "thresholds", "coverage", "weights", "dtype"):
        assert traced[key] == live[key], key
    assert traced["model"] | {"candidate_sha256": ""} == live["model"] | {"candidate_sha256": ""}
    end_to_end = [[row for row in one["rows"] if row["mode"] == "accumulated"] for one in (traced, live)]
    for ours, theirs in zip(*end_to_end, strict=True):
        for key in ("candidate_error", "reference_error", "noise_ratio"):  # the oracle's values are kept in float32
            assert (ours.pop(key) or 0) == pytest.approx(theirs.pop(key) or 0, rel=1e-6), ours["probe"]
        assert ours == theirs


def test_the_report_says_what_was_compared_and_a_gate_takes_it(judged, traces, cli):
    report, folder = judged
    assert (report.engine.name, report.engine.passes) == ("trace", ())
    assert [(one.side, one.file) for one in report.engine.traces] == [
        ("reference", str(traces[0])),
        ("candidate", str(traces[1])),
    ]
    documents = [open_trace(path).document for path in traces]
    assert [one.content_sha256 for one in report.engine.traces] == [one.content_sha256 for one in documents]
    assert "torch" in report.engine.traces[0].machine.versions
    assert report.environment.torch_cpu_capability == documents[0].machine.torch_cpu_capability != ""
    assert report.environment.paddle_device == "cpu"
    page = (folder / "diff-tiny-masked_lm-bf16.html").read_text()
    assert all(one.content_sha256 in page for one in documents)
    assert (
        cli("gate", folder / "diff-tiny-masked_lm-bf16.json", "--require", "model=tiny,dtype=fp32,dtype=bf16")[0] == 0
    )


def test_a_classification_head_passes_too_and_its_candidate_may_be_a_folder(cli, tmp_path):
    from modernbert_align.backends.sources import resolve_model
    from modernbert_align.core.convert import Request, convert
    from modernbert_align.core.table import load_table

    head = ("--head", "sequence_classification")
    arguments = ("--model", "tiny-sensitive", "--dtype", "bf16")
    source = resolve_model("tiny-sensitive", load_table(), lambda _message: None, head[1])
    request = Request(folder=source.folder, model="any", revision=None, src="hf", dst="paddle")
    folder = convert(request, load_table(), tmp_path / "candidate", force=False).out
    reference = record(cli, "hf", tmp_path / "r", *arguments, *head)
    candidate = record(cli, "paddle", tmp_path / "c", *arguments, "--candidate", folder)
    code, report = diff(cli, reference, candidate, tmp_path)
    assert (code, report["verdict"]) == (0, "PASS")
    assert report["model"]["candidate"] == str(folder)
    assert {row["status"] for row in report["rows"]} == {"pass"}
    assert {"head", "logits", "output", "loss"} <= {row["probe"] for row in report["rows"]}


def test_a_trace_is_a_safetensors_file_in_the_runs_dtypes(traces):
    for path in traces:
        tensors, metadata = read_header(path)
        assert metadata["format"] == FORMAT
        for name, info in tensors.items():
            narrow = name.startswith("bf16") and not name.endswith(("/oracle", "/loss"))  # losses are float32
            assert info.dtype == ("BF16" if narrow else "F32"), name
        assert "fp32/isolated/layers.0.attn" in tensors


def test_two_recordings_of_a_side_hold_the_same(cli, tmp_path, traces):
    for backend, first in zip(("hf", "paddle"), traces, strict=True):
        second = record(cli, backend, tmp_path / backend, "--model", "tiny", "--dtype", "bf16")
        one, two = (open_trace(path).document for path in (first, second))
        assert one.tensors == two.tensors
        assert one.passes == two.passes
        assert one.weights == two.weights


# --- it can fail ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sensitive(tmp_path_factory):
    """The reference's trace, and a function that records a changed candidate."""
    from modernbert_align.cli import main

    folder = tmp_path_factory.mktemp("sensitive")
    arguments = ["trace", "--model", "tiny-sensitive", "--backend"]
    assert main([*arguments, "hf", "--out", str(folder / "reference")]) == 0
    load = paddle_backend.load

    def recorded(inject):
        with ExitStack() as stack, pytest.MonkeyPatch.context() as patch:

            def broken(*given):
                model = load(*given)
                stack.enter_context(inject(model))
                return model

            patch.setattr(paddle_backend, "load", broken)
            assert main([*arguments, "paddle", "--out", str(folder / "candidate"), "--force"]) == 0
        return folder / "candidate"

    return folder / "reference", recorded


CAUGHT = (
    "tanh GELU",
    "epsilon 1e-6 in one norm",
    "thetas swapped",
    "window one wider",
    "padding mask dropped",
    "norm in layer 0",
    "residual missing",
    "NaN output",
    "probe never ran",
    "probe ran twice",
    "extra output of the model",
    "extra output of a probe",
    "SiLU in the head",
    "loss over every position",
)


@pytest.mark.parametrize("name", CAUGHT)
def test_a_fault_is_found_where_a_live_comparison_finds_it(cli, tmp_path, sensitive, name):
    fault = FAULTS[name]
    reference, recorded = sensitive
    code, report = diff(cli, reference, recorded(fault.inject), tmp_path)
    assert report["verdict"] == fault.verdict
    assert code == (5 if fault.verdict == "NOT_COMPARED" else 1)
    first = report["first_failing"]
    assert first["probe"] == fault.first
    assert first["status"] == (fault.status or "fail")


def changed(change):
    """A change to a model that is thrown away afterwards."""

    def inject(model):
        change(model)
        return ExitStack()

    return inject


def raising(model):
    def forward(_x):
        raise RuntimeError("no kernel today")

    model.model.layers[2].mlp.forward = forward


def narrower(model):
    model.head.register_forward_post_hook(lambda _layer, _inputs, out: out[:, :-1])


def wider(model):
    model.model.final_norm.register_forward_post_hook(lambda _layer, _inputs, out: out.astype("float64"))


@pytest.mark.parametrize(
    ("change", "probe", "status", "code"),
    [
        (raising, "layers.2.mlp", "missing", 5),
        (narrower, "head", "shape_mismatch", 1),
        (wider, "final_norm", "dtype_mismatch", 1),
    ],
)
def test_what_a_candidate_does_wrong_is_in_its_trace(cli, tmp_path, sensitive, change, probe, status, code):
    reference, recorded = sensitive
    found, report = diff(cli, reference, recorded(changed(change)), tmp_path)
    assert found == code
    assert (report["first_failing"]["probe"], report["first_failing"]["status"]) == (probe, status)
    if change is raising:
        reasons = {row["reason"] for row in report["rows"] if row["status"] == "missing"}
        assert reasons == {"RuntimeError: no kernel today"}


def test_a_module_that_one_side_did_not_run_leaves_nothing_green_that_depends_on_it(cli, tmp_path, sensitive):
    reference, recorded = sensitive
    code, report = diff(cli, reference, recorded(FAULTS["probe never ran"].inject), tmp_path)
    rows = {(row["probe"], row["mode"]): row for row in report["rows"]}
    assert code == 5
    assert rows["layers.2.mlp", "isolated"]["reason"] == "no call of this module was seen in the candidate"
    assert rows["layers.2", "isolated"]["status"] == "missing"
    assert "layers.2.mlp" in rows["layers.2", "isolated"]["reason"]
    assert rows["layers.2", "accumulated"]["status"] == "pass"
    assert rows["layers.3.attn_norm", "isolated"]["status"] == "pass"


def without_a_module(model):
    """The code is there and the module is not."""
    layer = model.model.layers[0]
    norm = layer.attn_norm
    del layer.attn_norm
    object.__setattr__(layer, "attn_norm", norm.forward)


def test_a_module_that_one_side_does_not_have_is_named_and_what_depends_on_it_is_not_compared(cli, tmp_path, sensitive):
    reference, recorded = sensitive
    code, report = diff(cli, reference, recorded(changed(without_a_module)), tmp_path)
    assert (code, report["verdict"]) == (5, "NOT_COMPARED")
    isolated = {row["probe"]: row for row in report["rows"] if row["mode"] == "isolated"}
    assert isolated["layers.0.attn_norm"]["reason"] == "the candidate has no module `model.layers.0.attn_norm`"
    missing = [probe for probe, row in isolated.items() if row["status"] == "missing"]
    assert missing == ["layers.0.attn_norm", *(f"layers.0{part}" for part in (".attn", ".mlp_norm", ".mlp", ""))]
    assert {row["status"] for probe, row in isolated.items() if probe not in missing} == {"pass"}


def norm_before_its_time(model):
    """The result is right, and a module runs before it is due."""
    layer = model.model.layers[1]

    def forward(self, hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        self.mlp_norm(hidden_states)
        attended, _ = self.attn(self.attn_norm(hidden_states), position_embeddings, attention_bias)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.mlp_norm.forward(hidden_states))

    layer.forward = MethodType(forward, layer)


def test_a_module_that_runs_before_its_time_is_not_compared_with_another(cli, tmp_path, sensitive):
    reference, recorded = sensitive
    _, report = diff(cli, reference, recorded(changed(norm_before_its_time)), tmp_path)
    rows = {(row["probe"], row["mode"]): row for row in report["rows"]}
    for mode in MODES:
        for probe in ("layers.1.attn_norm", "layers.1.attn"):
            assert rows[probe, mode]["reason"] == "the candidate ran this module out of the reference's order"
        assert rows["layers.1.mlp_norm", mode]["status"] == "fail"
        assert rows["layers.0", mode]["status"] == "pass"


def test_a_reference_that_is_not_finite_never_passes(cli, tmp_path, monkeypatch, sensitive):
    load = hf.load

    def broken(*arguments):
        model = load(*arguments)
        model.model.final_norm.register_forward_hook(lambda _module, _inputs, out: out * float("nan"))
        return model

    _, recorded = sensitive
    monkeypatch.setattr(hf, "load", broken)
    reference = record(cli, "hf", tmp_path / "r", "--model", "tiny-sensitive")
    code, report = diff(cli, reference, recorded(changed(lambda _model: None)), tmp_path)
    assert code == 1
    assert (report["first_failing"]["probe"], report["first_failing"]["status"]) == ("final_norm", "nonfinite")


# --- what does not belong together ------------------------------------------------------------------------------------


def test_weights_that_differ_are_refused_by_name(cli, tmp_path, sensitive):
    reference, recorded = sensitive
    for fault, weight in (
        ("one weight element off by 1e-3", "model.layers.3.mlp.Wi.weight"),
        ("attn.Wo untransposed", "model.layers.1.attn.Wo.weight"),
    ):
        candidate = recorded(FAULTS[fault].inject)
        files = ("--reference", reference, "--candidate", candidate)
        assert f"the weight `{weight}` is not the same" in refusal(cli, "diff", *files, "--report-dir", tmp_path)
    assert not list(tmp_path.iterdir())


def rewritten(path, out, change):
    """A copy of a trace whose document says something else, sealed as if it had been recorded so."""
    trace = open_trace(path)
    document = change(trace.document)
    with TraceWriter(out, 1 << 20) as writer:
        for name in trace.document.tensors:
            info = read_header(path)[0][name]
            bits = np.fromfile(
                path, dtype=f"u{info.size_bytes // info.elements}", count=info.elements, offset=info.offset
            )
            writer.add(name, bits.reshape(info.shape), {"F32": "float32", "BF16": "bfloat16"}[info.dtype])
        writer.finish(document.sealed())
    return out


def with_model(**changes):
    return lambda document: document.model_copy(update={"model": document.model.model_copy(update=changes)})


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda d: d.model_copy(update={"inputs": d.inputs.model_copy(update={"sha256": "0" * 64})}),
            "the inputs of",
        ),
        (
            lambda d: d.model_copy(update={"inputs": d.inputs.model_copy(update={"drawn_sha256": "0" * 64})}),
            "the inputs of",
        ),
        (lambda d: d.model_copy(update={"probes_sha256": "0" * 64}), "another name-mapping table or probe list"),
        (with_model(table_sha256="0" * 64), "another name-mapping table or probe list"),
        (with_model(head="base"), "head is masked_lm in"),
        (
            lambda d: with_model(config=d.model.config | {"norm_eps": 0.5})(d),
            "norm_eps is 1e-05 in",
        ),
        (lambda d: d.model_copy(update={"backend": "hf"}), "is not a trace of the candidate"),
        (
            lambda d: d.model_copy(
                update={
                    "dtypes": ("fp32",),
                    "passes": d.passes[:2],
                    "weights": d.weights[:1],
                    "execution": {"fp32": "native"},
                }
            ),
            "dtypes is fp32, bf16 in",
        ),
        (
            lambda d: d.model_copy(update={"weights": (d.weights[0].model_copy(update={"sha256": {}}), d.weights[1])}),
            "the weight `model.embeddings.tok_embeddings.weight` is not in the candidate, and",
        ),
        (
            lambda d: d.model_copy(
                update={"weights": (d.weights[0].model_copy(update={"unmapped": ("x",)}), *d.weights[1:])}
            ),
            "only the candidate has the weight `x`",
        ),
        (lambda d: d.model_copy(update={"passes": d.passes[:3]}), "does not have every pass of"),
        (lambda d: d.model_copy(update={"trace_version": 2}), "has the trace version `2`, this version reads 1"),
    ],
)
def test_traces_that_do_not_belong_together_are_refused(cli, tmp_path, traces, change, complaint):
    candidate = rewritten(traces[1], tmp_path / "candidate", change)
    files = ("--reference", traces[0], "--candidate", candidate)
    assert complaint in refusal(cli, "diff", *files, "--report-dir", tmp_path / "reports")
    assert not (tmp_path / "reports").exists()


def test_both_sides_are_traces_or_neither_and_traces_leave_no_choice(cli, tmp_path, traces, converted):
    reference, candidate = traces
    both = ("--reference", reference, "--candidate", candidate)
    for arguments, complaint in (
        (("--reference", reference), "needs the candidate's"),
        (("--candidate", candidate), "is a file and no checkpoint folder"),
        (("--reference", reference, "--candidate", converted("tiny")), "either both sides are traces or neither is"),
        (("--reference", converted("tiny"), "--candidate", candidate), "either both sides are traces or neither is"),
        (("--reference", candidate, "--candidate", reference), "is not a trace of the reference"),
        (("--reference", tmp_path / "none", "--candidate", candidate), "cannot read the trace"),
        ((*both, "--model", "tiny"), "--model cannot be chosen for traces"),
        ((*both, "--head", "base"), "--head cannot be chosen for traces"),
        ((*both, "--engine", "padiff"), "--engine cannot be chosen for traces"),
        ((*both, "--dtype", "fp32"), "--dtype is fp32, and the traces are of bf16"),
    ):
        assert complaint in refusal(cli, "diff", *arguments, "--report-dir", tmp_path / "r"), arguments
    assert diff(cli, *traces, tmp_path / "r", "--dtype", "bf16")[0] == 0


# --- damaged files ----------------------------------------------------------------------------------------------------


def header_of(path):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    return data, json.loads(data[8 : 8 + length])


def with_header(path, change):
    data, header = header_of(path)
    length = struct.unpack("<Q", data[:8])[0]
    change(header)
    text = json.dumps(header).encode().ljust(length)
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def with_document(path, change):
    def edit(header):
        document = json.loads(header["__metadata__"]["trace"])
        change(document)
        header["__metadata__"]["trace"] = json.dumps(document)

    return with_header(path, edit)


DAMAGE = {
    "empty": (lambda path: b"", "is not a whole safetensors file"),
    "cut": (lambda path: path.read_bytes()[:-1], "is truncated"),
    "cut in the header": (lambda path: path.read_bytes()[:5000], "is not a whole safetensors file"),
    "text": (lambda path: b"this is not a trace, " * 100, "is not a whole safetensors file"),
    "another safetensors": (
        lambda path: with_header(path, lambda h: h["__metadata__"].update(format="pt")),
        "is a safetensors file and not a trace",
    ),
    "no document": (lambda path: with_header(path, lambda h: h["__metadata__"].pop("trace")), "and not a trace"),
    "half a document": (
        lambda path: with_header(path, lambda h: h["__metadata__"].update(trace='{"trace_version": 1,')),
        "cannot be read",
    ),
    "a number too few": (lambda path: with_document(path, lambda d: d.pop("passes")), "is not a valid trace: passes"),
    "edited": (lambda path: with_document(path, lambda d: d.update(created="")), "was changed after it was written"),
    "a null that was smaller": (
        lambda path: with_document(path, lambda d: d["passes"][0]["probes"]["head"].update(null_parts={"sdpa": 9.0})),
        "was changed after it was written",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_a_damaged_trace_is_refused_in_one_line(cli, tmp_path, traces, name, side):
    damage, complaint = DAMAGE[name]
    files = {"reference": traces[0], "candidate": traces[1]}
    (tmp_path / "damaged").write_bytes(damage(files[side]))
    files[side] = tmp_path / "damaged"
    arguments = ("--reference", files["reference"], "--candidate", files["candidate"])
    assert complaint in refusal(cli, "diff", *arguments, "--report-dir", tmp_path / "r")


@pytest.mark.parametrize("side", [0, 1])
def test_one_flipped_bit_of_a_value_is_found(cli, tmp_path, traces, side):
    info = read_header(traces[side])[0]["bf16/accumulated/layers.3"]
    data = bytearray(traces[side].read_bytes())
    data[info.offset + 1000] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    files = [*traces]
    files[side] = tmp_path / "flipped"
    arguments = ("--reference", files[0], "--candidate", files[1], "--report-dir", tmp_path / "r")
    assert "`bf16/accumulated/layers.3` in" in refusal(cli, "diff", *arguments)
    assert not (tmp_path / "r").exists()


# --- writing ----------------------------------------------------------------------------------------------------------


def test_an_existing_file_is_kept_unless_forced(cli, tmp_path):
    out = tmp_path / "t"
    out.write_text("mine")
    assert "exists" in refusal(cli, "trace", "--backend", "paddle", "--model", "tiny", "--out", out)
    assert out.read_text() == "mine"
    record(cli, "paddle", out, "--model", "tiny", "--force")
    assert open_trace(out).document.dtypes == ("fp32",)


def test_a_recording_that_fails_leaves_nothing(cli, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(paddle_backend, "state_bits", interrupted)
    out = tmp_path / "folder" / "t"
    assert cli("trace", "--backend", "paddle", "--model", "tiny", "--out", out)[0] == 130
    assert not list(out.parent.iterdir())


def test_wrong_arguments_are_refused_before_anything_is_imported(cli, tmp_path, converted):
    out = ("--out", tmp_path / "t")
    for arguments, complaint in (
        (("--backend", "jax", *out), "unknown backend `jax`"),
        (("--backend", "hf", "--dtype", "fp16", *out), "unknown dtype `fp16`"),
        (("--backend", "hf", "--head", "tail", *out), "unknown head `tail`"),
        (("--backend", "hf", "--model", "tiny", "--candidate", converted("tiny"), *out), "--candidate is a Paddle"),
        (("--backend", "paddle", "--model", "tinny", "--candidate", converted("tiny"), *out), "`tinny` is neither"),
        (("--backend", "hf", "--out", tmp_path), "is a directory"),
        (("--backend", "hf", "--model", converted("tiny"), *out), "already"),
    ):
        assert complaint in refusal(cli, "trace", *arguments), arguments
    assert not list(tmp_path.iterdir())
