"""The streaming engine: what PaDiff's passes measure, nothing left behind, nothing kept."""

import gc
import weakref
from contextlib import contextmanager
from dataclasses import replace
from types import MethodType, SimpleNamespace

import numpy as np
import paddle
import paddle.nn.functional as F
import pytest
import torch
from faults import FAULTS

from modernbert_align.backends import hf
from modernbert_align.backends import paddle as paddle_backend
from modernbert_align.core.compare import rel_l2
from modernbert_align.core.fixtures import InputSpec, make_inputs
from modernbert_align.core.metrics import ByRow
from modernbert_align.core.rows import MODES
from modernbert_align.core.tolerance import load_tolerances
from modernbert_align.core.verdict import Expectation, judge
from modernbert_align.core.weight_check import check_weights
from modernbert_align.engines import padiff_engine, passes, reference_side
from modernbert_align.engines import stream_engine as engine
from modernbert_align.engines.faults import Fault

ISOLATED, ACCUMULATED = MODES


def measured(records):
    """Everything but PaDiff's opinion."""
    return [record.model_copy(update={"padiff_equal": None}) for record in records]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """So small sums are done before a second thread has woken up; the results are the same."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- the same as PaDiff -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "head"),
    [
        ("tiny", "fp32", "masked_lm"),
        ("tiny", "bf16", "masked_lm"),
        ("tiny-sensitive", "fp32", "masked_lm"),
        ("tiny-sensitive", "bf16", "masked_lm"),
        ("tiny-sensitive", "fp32", "multiple_choice"),
        ("tiny-sensitive", "bf16", "question_answering"),
    ],
)
def test_both_engines_measure_the_same_in_every_row(load_models, name, dtype, head):
    models = load_models(name, dtype, head)
    nulls = models.nulls()
    streamed, driven = models.stream_records(), models.padiff_records(nulls)
    assert [(r.probe, r.mode) for r in streamed] == [(p.name, mode) for mode in MODES for p in models.probes]
    assert measured(streamed) == measured(driven)
    assert all(r.padiff_equal is None for r in streamed)
    for record in streamed:
        assert record.observation == "compared"
        assert record.candidate_error is not None
        assert record.reference_error is not None
        assert (record.ulps is not None) == (dtype == "bf16")
        assert record.null_parts == nulls[record.probe, record.mode]
        assert set(record.null_parts) == {"sdpa", "permuted"}


class Judging:
    """One reference, measured against itself once, beside one candidate after another."""

    def __init__(self, models):
        self.models = models
        self.nulls = models.nulls()

    def judge(self, records):
        models = self.models
        bits = paddle_backend.state_bits(models.candidate), hf.state_bits(models.reference)
        weights = [check_weights(models.entries, *bits, models.dtype)]
        expectation = Expectation(
            probes=models.probes, dtypes=("fp32",), weights=len(models.entries), fixture=models.name, needs={}
        )
        return judge(records, weights, expectation, load_tolerances(("fp32",)), "contract")

    def both(self, inject):
        """The judgement of an injected fault by engine; each sees a candidate of its own."""
        found = {}
        for name in ("stream", "padiff"):
            self.models = self.models.with_new_candidate()
            with inject(self.models.candidate):
                run = self.models.stream_records if name == "stream" else lambda: self.models.padiff_records(self.nulls)
                found[name] = self.judge(run())
        return found["stream"], found["padiff"]


@pytest.fixture(scope="module")
def sensitive(load_models):
    return Judging(load_models("tiny-sensitive"))


def lasting(change):
    """A change to a candidate that is thrown away afterwards."""

    @contextmanager
    def inject(model):
        change(model)
        yield

    return inject


def raising(kind):
    def change(model):
        def forward(_x):
            raise kind("no kernel today")

        model.model.layers[2].mlp.forward = forward

    return change


def raising_at_the_end(model):
    predict = model.forward

    def forward(self, input_ids, **rest):
        predict(input_ids, **rest)
        raise ValueError("no output today")

    model.forward = MethodType(forward, model)


def module_missing(model):
    """The code is there and the module is not."""
    layer = model.model.layers[1]
    norm = layer.mlp_norm
    del layer.mlp_norm
    object.__setattr__(layer, "mlp_norm", norm.forward)


def one_output_less_of_the_model(model):
    predict = model.forward

    def forward(self, input_ids, **rest):
        return {"logits": predict(input_ids, **{**rest, "return_dict": True})["logits"]}

    model.forward = MethodType(forward, model)


def one_token_less(model):
    model.head.register_forward_post_hook(lambda _layer, _inputs, out: out[:, :-1])


def another_dtype(model):
    model.model.final_norm.register_forward_post_hook(lambda _layer, _inputs, out: out.astype("float64"))


def modules_in_another_order(model):
    """The result is right and the norm runs before it is due."""
    layer = model.model.layers[1]

    def forward(self, hidden_states, position_embeddings, attention_bias=None, output_attentions=False):
        self.mlp_norm(hidden_states)
        attended, _ = self.attn(self.attn_norm(hidden_states), position_embeddings, attention_bias)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(F.layer_norm(hidden_states, [64], self.mlp_norm.weight, None, 1e-5))

    layer.forward = MethodType(forward, layer)


MORE_FAULTS = {
    name: Fault(name=name, inject=lasting(change), first=first, status=status, verdict=verdict)
    for name, change, first, status, verdict in (
        ("RuntimeError", raising(RuntimeError), "layers.2.mlp", "missing", "NOT_COMPARED"),
        ("AttributeError", raising(AttributeError), "layers.2.mlp", "missing", "NOT_COMPARED"),
        ("KeyError", raising(KeyError), "layers.2.mlp", "missing", "NOT_COMPARED"),
        ("raises at the end", raising_at_the_end, "output", "missing", "NOT_COMPARED"),
        ("module missing", module_missing, "layers.1.mlp_norm", "weights", "FAIL"),
        ("no loss", one_output_less_of_the_model, "output", "extra", "FAIL"),
        ("one token less", one_token_less, "head", "shape_mismatch", "FAIL"),
        ("another dtype", another_dtype, "final_norm", "dtype_mismatch", "FAIL"),
    )
}


@pytest.mark.parametrize("name", [*FAULTS, *MORE_FAULTS])
def test_both_engines_catch_a_fault_in_the_same_place(sensitive, name):
    fault = (FAULTS | MORE_FAULTS)[name]
    streamed, driven = sensitive.both(fault.inject)
    for judgement in (streamed, driven):
        assert judgement.verdict == fault.verdict, judgement.first_failing
        assert judgement.exit_code == (5 if fault.verdict == "NOT_COMPARED" else 1)
        assert judgement.first_failing.probe == fault.first
        assert judgement.first_failing.status == (fault.status or judgement.first_failing.status)
    ours, theirs = streamed.first_failing, driven.first_failing
    assert (ours.status, ours.mode) == (theirs.status, theirs.mode)
    differing = {(a.probe, a.status) for a, b in zip(streamed.rows, driven.rows, strict=True) if a.status != b.status}
    if name == "module missing":  # to PaDiff's, what comes next has no oracle: it does not run the reference there
        assert differing == {("layers.1.mlp", "pass")}
    elif name != "probe ran twice":
        assert not differing
    else:  # PaDiff's injection stops there; here only what the candidate had passed by is missing
        assert {place for place in differing if place[1] != "pass"} == {
            ("layers.1.attn_norm", "missing"),
            ("layers.1.attn", "missing"),
        }


def test_a_missing_row_says_which_side_lacks_it(sensitive):
    def reason(inject):
        streamed, driven = sensitive.both(inject)
        return [next(r.reason for r in j.rows if r.probe == "layers.2.mlp") for j in (streamed, driven)]

    assert reason(FAULTS["probe never ran"].inject) == ["no call of this module was seen in the candidate"] * 2
    assert all("no kernel today" in text for text in reason(lasting(raising(RuntimeError))))


def test_a_module_that_runs_before_its_time_is_not_compared_with_another(sensitive):
    models = sensitive.models = sensitive.models.with_new_candidate()
    modules_in_another_order(models.candidate)
    for mode in MODES:
        rows = {r.probe: r for r in sensitive.judge(models.stream_records()).rows if r.mode == mode}
        for probe in ("layers.1.attn_norm", "layers.1.attn"):
            assert (rows[probe].status, rows[probe].reason) == (
                "missing",
                "the candidate ran this module out of the reference's order",
            )
        assert rows["layers.1.mlp_norm"].status == "fail"
        assert rows["layers.0"].status == "pass"


# --- nothing is left behind -------------------------------------------------------------------------------------------


def traces(models):
    """Whatever a run could have left on either model."""
    found = []
    for side in (models.candidate.sublayers(include_self=True), models.reference.modules()):
        for module in side:
            for registry in ("_forward_hooks", "_forward_pre_hooks", "_forward_post_hooks"):
                found += [(type(module).__name__, registry)] * len(getattr(module, registry, {}))
    for module in models.reference.modules():
        if isinstance(module, torch.nn.Linear):
            found += ["forward"] if module.forward.__func__ is not torch.nn.Linear.forward else []
        found += ["own forward"] if "forward" in vars(module) else []
    found += [] if models.reference.config._attn_implementation == "eager" else ["attention"]
    return found


@pytest.fixture(scope="module")
def tiny(load_models):
    return load_models("tiny")


@pytest.fixture(scope="module")
def usual(tiny):
    """What an undisturbed run measures."""
    return tiny.stream_records()


def test_a_run_leaves_nothing_behind_and_the_next_measures_the_same(tiny, usual):
    assert traces(tiny) == []
    assert tiny.stream_records() == usual
    tiny.nulls()
    assert traces(tiny) == []
    assert tiny.stream_records() == usual


def test_gradients_and_randomness_are_as_they_were(tiny, usual):
    before = torch.random.get_rng_state()
    assert tiny.stream_records() == usual
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()
    assert paddle.is_grad_enabled()


@pytest.mark.parametrize("place", ["model.embeddings", "model.layers.2.mlp", "decoder"])
@pytest.mark.parametrize("kind", [RuntimeError, AttributeError])
def test_a_candidate_that_raises_leaves_nothing_behind(tiny, usual, place, kind):
    layer = dict(tiny.candidate.named_sublayers())[place]

    def explode(*_args, **_named):
        raise kind("no kernel today")

    layer.forward = explode
    try:
        records = tiny.stream_records()
    finally:
        del layer.forward
    assert traces(tiny) == []
    order = [probe.name for probe in tiny.probes]
    first = order.index(next(probe.name for probe in tiny.probes if probe.paddle == place))
    for record, undisturbed in zip(records, usual, strict=True):
        if order.index(record.probe) < first:
            assert record == undisturbed
        else:
            assert (record.observation, record.reason) == ("missing", f"{kind.__name__}: {kind('no kernel today')}")
    assert tiny.stream_records() == usual


def test_a_reference_that_raises_leaves_nothing_behind(tiny, usual):
    layer = tiny.reference.model.layers[2]

    def explode(*_args, **_named):
        raise RuntimeError("no kernel today")

    layer.mlp.forward = explode
    try:
        records = {(r.probe, r.mode): r for r in tiny.stream_records()}
    finally:
        del layer.mlp.forward
    assert traces(tiny) == []
    for mode in MODES:
        assert records["layers.1", mode].observation == "compared"
        for probe in ("layers.2.mlp", "logits", "output"):
            assert records[probe, mode].reason == "RuntimeError: no kernel today"
    assert tiny.stream_records() == usual


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_ends_the_run_and_leaves_nothing_behind(tiny, usual, kind):
    layer = tiny.candidate.model.layers[2].mlp

    def interrupt(_x):
        raise kind

    layer.forward = interrupt
    try:
        with pytest.raises(kind):
            tiny.stream_records()
    finally:
        del layer.forward
    assert traces(tiny) == []
    assert tiny.stream_records() == usual


def test_an_error_of_the_measuring_leaves_nothing_behind(tiny, usual, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(engine, "compare", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            tiny.stream_records()
    assert traces(tiny) == []
    assert tiny.stream_records() == usual


def test_hooks_that_were_there_stay_and_run_once_in_every_pass(tiny, usual):
    calls = []
    handle = tiny.candidate.model.final_norm.register_forward_post_hook(lambda *_: calls.append("candidate"))
    other = tiny.reference.model.final_norm.register_forward_hook(lambda *_: calls.append("reference"))
    assert tiny.stream_records() == usual
    assert len(traces(tiny)) == 2
    assert (calls.count("candidate"), calls.count("reference")) == (2, 5)
    handle.remove()
    other.remove()
    assert traces(tiny) == []


# --- beside a recorded reference --------------------------------------------------------------------------------------


def record(models):
    return reference_side.record(models.reference, models.batch, models.probes, models.oracle)


def replay(models, recording):
    return engine.run_beside(recording, models.candidate, models.batch, models.probes, models.dtype)


@pytest.mark.parametrize(
    ("name", "dtype", "head"),
    [
        ("tiny", "fp32", "masked_lm"),
        ("tiny-stress", "bf16", "masked_lm"),
        ("tiny-sensitive", "fp32", "question_answering"),
        ("tiny-sensitive", "bf16", "multiple_choice"),
        ("tiny", "fp32", "base"),
    ],
)
def test_beside_a_recording_every_row_is_the_same_as_beside_the_live_reference(load_models, name, dtype, head):
    models = load_models(name, dtype, head)
    live = models.stream_records()
    recording = record(models)
    assert [expected.probe.name for expected in recording.steps()] == [probe.name for probe in models.probes]
    for _ in range(2):
        assert replay(models, recording) == live


@pytest.mark.parametrize(
    "name", [*MORE_FAULTS, "NaN output", "probe never ran", "probe ran twice", "extra output of a probe", "theta 80000"]
)
def test_beside_a_recording_a_fault_looks_the_same(sensitive, name):
    recording = record(sensitive.models)
    models = sensitive.models.with_new_candidate()
    usual = replay(models, recording)
    with (FAULTS | MORE_FAULTS)[name].inject(models.candidate):
        assert replay(models, recording) == models.stream_records() != usual


def test_beside_a_recording_only_the_candidate_runs_twice(tiny, usual):
    recording = record(tiny)
    calls = []
    handles = [
        tiny.candidate.register_forward_pre_hook(lambda *_: calls.append("candidate")),
        tiny.reference.register_forward_pre_hook(lambda *_: calls.append("reference")),
    ]
    try:
        assert replay(tiny, recording) == usual
    finally:
        for handle in handles:
            handle.remove()
    assert calls == ["candidate"] * 2


def test_a_recorded_reference_that_raised_is_no_more_than_it_was(tiny, usual):
    layer = tiny.reference.model.layers[2]

    def explode(*_args, **_named):
        raise RuntimeError("no kernel today")

    layer.mlp.forward = explode
    try:
        live, recording = tiny.stream_records(), record(tiny)
    finally:
        del layer.mlp.forward
    assert replay(tiny, recording) == live
    assert traces(tiny) == []
    assert live != usual


def test_a_module_that_only_one_side_has_is_missing_and_the_others_are_compared(tiny):
    for side, path in (("reference", {"hf": "model.layers.9.mlp_norm"}), ("candidate", {"paddle": "gone"})):
        probes = (*tiny.probes[:3], replace(tiny.probes[3], **path), *tiny.probes[4:])
        models = replace(tiny, probes=probes)
        recording = record(models)
        records = models.stream_records()
        assert replay(models, recording) == records
        found = {r.probe: (r.observation, r.reason) for r in records if r.mode == ACCUMULATED}
        missing = f"the {side} has no module `{next(iter(path.values()))}`"
        assert found.pop(probes[3].name) == ("missing", missing)
        assert {observation for observation, _ in found.values()} == {"compared"}


def test_a_candidate_that_writes_to_what_it_is_given_changes_no_reference(tiny, usual):
    """The isolated pass is given the reference's values; were they shared, both would be wrong alike."""
    recording = record(tiny)
    before = [torch.clone(value) for expected in recording.steps() for value in expected.outputs.values()]
    layer = tiny.candidate.model.layers[2].attn_norm
    norm = layer.forward

    def overwriting(x):
        out = norm(x)
        x.set_value(paddle.zeros_like(x))
        return out

    layer.forward = overwriting
    try:
        live, replayed = tiny.stream_records(), replay(tiny, recording)
    finally:
        del layer.forward
    after = [value for expected in recording.steps() for value in expected.outputs.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    wrong = [a.probe for a, b in zip(live, usual, strict=True) if a != b and a.mode == ISOLATED]
    assert wrong == ["layers.2.mlp_norm", "layers.2"]
    assert replayed == live
    assert [r.null_parts for r in live] == [r.null_parts for r in usual]


# --- passes side by side are passes one by one ------------------------------------------------------------------------


def test_the_order_of_the_passes_changes_nothing(tiny, usual, monkeypatch):
    monkeypatch.setattr(reference_side, "VARIATIONS", tuple(reversed(reference_side.VARIATIONS)))
    for side in (reference_side, engine):
        monkeypatch.setattr(side, "MODES", tuple(reversed(MODES)))
    records = tiny.stream_records()
    assert [r.mode for r in records] == [*[ACCUMULATED] * len(tiny.probes), *[ISOLATED] * len(tiny.probes)]
    assert sorted(records, key=lambda r: MODES.index(r.mode)) == list(usual)


def recorded(models, forward):
    """What the reference's probes return in an ordinary forward pass: name -> values."""
    found, handles = {}, []
    modules = dict(models.reference.named_modules())

    def keep(name):
        return lambda _module, _inputs, out: found.update({name: hf.to_numpy(out if torch.is_tensor(out) else out[0])})

    for probe in models.probes:
        if not probe.key:
            handles.append(modules[probe.hf].register_forward_hook(keep(probe.name)))
    with torch.no_grad():
        output = forward()
    for handle in handles:
        handle.remove()
    return {name: values.copy() for name, values in found.items()} | {
        probe.name: hf.to_numpy(output[probe.key]) for probe in models.probes if probe.key
    }


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_nulls_are_those_of_passes_that_run_alone(load_models, dtype):
    models = load_models("tiny-sensitive", dtype)
    batch = hf.inputs(models.batch)
    eager = recorded(models, lambda: models.reference(**batch))
    hf.set_attention(models.reference, "sdpa")
    sdpa = recorded(models, lambda: models.reference(**batch))
    hf.set_attention(models.reference, "eager")
    sums = hf.PermutedSums(models.reference)
    sums.active = True
    permuted = recorded(models, lambda: models.reference(**batch))
    sums.remove()
    mask = models.batch.attention_mask.astype(bool)
    expected = {
        (probe.name, ACCUMULATED): {
            "sdpa": rel_l2(probe, mask if probe.tokens else None, sdpa[probe.name], eager[probe.name]),
            "permuted": rel_l2(probe, mask if probe.tokens else None, permuted[probe.name], eager[probe.name]),
        }
        for probe in models.probes
    }
    nulls = models.nulls()
    assert {key: parts for key, parts in nulls.items() if key[1] == ACCUMULATED} == expected
    assert nulls == {(r.probe, r.mode): r.null_parts for r in models.stream_records()}


def test_both_variations_differ_where_they_can_and_nowhere_else(tiny):
    nulls = tiny.nulls()
    assert set(nulls) == {(probe.name, mode) for probe in tiny.probes for mode in MODES}
    assert all(set(parts) == {"sdpa", "permuted"} for parts in nulls.values())

    def differing(variation, mode):
        return {name for (name, its), parts in nulls.items() if its == mode and parts[variation] > 0}

    attention = {f"layers.{i}.attn" for i in range(4)}
    assert differing("sdpa", ISOLATED) == attention
    assert differing("permuted", ISOLATED) == attention | {f"layers.{i}.mlp" for i in range(4)} | {"head", "logits"}
    every = [probe.name for probe in tiny.probes]
    for variation in reference_side.VARIATIONS:
        downstream = differing(variation, ACCUMULATED)
        assert set(every[2:]) - {"loss"} <= downstream <= set(every[2:])  # one number may round alike


def test_without_a_module_the_reference_has_no_null_there(tiny):
    probes = (*tiny.probes[:3], replace(tiny.probes[3], hf="model.layers.9.mlp_norm"), *tiny.probes[4:])
    nulls = reference_side.measure_nulls(tiny.reference, tiny.batch, probes)
    assert (tiny.probes[3].name, ISOLATED) not in nulls
    assert nulls["layers.1.attn", ISOLATED]["sdpa"] > 0
    assert traces(tiny) == []


# --- nothing is kept --------------------------------------------------------------------------------------------------


def test_outputs_of_earlier_layers_are_not_kept(tiny, usual, monkeypatch):
    """When a layer is measured, of those before it only the last one's output is alive.

    The models themselves keep the embeddings (for masks) and, in Paddle, what goes into each layer.
    """
    references, alive = [], []
    compare = engine.compare

    def watching(probe, context, ours, theirs, beside):
        alive.append((probe, {name for name, ref in references if ref() is not None}))
        if probe.name != "embeddings" and not probe.key and probe.name != "layers.0.attn_norm":  # which is the same
            references.extend((probe.name, weakref.ref(value)) for value in theirs.values())
            if probe.pattern != "layers.{i}":
                references.extend((probe.name, weakref.ref(value)) for value in ours.values())
        return compare(probe, context, ours, theirs, beside)

    monkeypatch.setattr(engine, "compare", watching)
    gc.collect()
    gc.disable()
    try:
        assert tiny.stream_records() == usual
    finally:
        gc.enable()
    assert {name for name, _ in references} == {probe.name for probe in tiny.probes if not probe.key} - {
        "embeddings",
        "layers.0.attn_norm",
    }
    for probe, names in alive:
        if probe.name.startswith("layers."):
            layer = int(probe.name.split(".")[1])
            old = {name for name in names if not f"{name}.".startswith(f"layers.{layer}.")}
            assert old <= {f"layers.{layer - 1}"}, probe.name
    assert {name for name, ref in references if ref() is not None} == set()


def test_logits_of_the_oracle_are_computed_a_sequence_at_a_time_and_recorded_whole(tiny):
    with reference_side.live(tiny.reference, tiny.batch, tiny.probes, tiny.oracle) as run:
        values = {(e.probe.name, mode): e.beside[mode].oracle for e in run.steps() for mode in MODES}
    recorded = {(e.probe.name, mode): e.beside[mode].oracle for e in record(tiny).steps() for mode in MODES}
    by_row = {key for key, value in values.items() if isinstance(value, ByRow)}
    assert by_row == {(name, mode) for name in ("logits", "output") for mode in MODES}
    for key, value in values.items():
        whole = value.whole() if key in by_row else value
        np.testing.assert_array_equal(recorded[key], whole)
        assert whole.dtype == np.float64
    whole = dict(tiny.oracle.accumulated(tiny.batch))
    for name in ("logits", "output"):
        np.testing.assert_allclose(recorded[name, ACCUMULATED], whole[name].numpy(), rtol=1e-12, atol=1e-15)


def test_variations_are_gone_when_the_candidate_reaches_the_last_probe(tiny, usual, monkeypatch):
    """Each holds whole logits at its end, so they are measured one after the other and forgotten."""
    alive, found = [], []
    add_null = reference_side._Live._add_null

    def watching(self, probe, name, mode, theirs, variation):
        if probe.key == "logits" and mode == ACCUMULATED:
            alive.append(weakref.ref(variation["logits"]))
        return add_null(self, probe, name, mode, theirs, variation)

    def comparing(probe, *rest):
        found.extend((probe.name, ref() is not None) for ref in alive)
        return engine_compare(probe, *rest)

    engine_compare = engine.compare
    monkeypatch.setattr(reference_side._Live, "_add_null", watching)
    monkeypatch.setattr(engine, "compare", comparing)
    assert tiny.stream_records() == usual
    assert len(alive) == len(reference_side.VARIATIONS)
    assert {name for name, _ in found} == {"logits", "output", "loss"}
    assert not any(living for _, living in found)


# --- outputs and their replacements -----------------------------------------------------------------------------------


def test_injection_replaces_what_the_reference_returns_and_keeps_the_rest():
    ours = (paddle.zeros([2]), paddle.ones([3]))
    for theirs, first in ((torch.full((2,), 5.0), 5.0), ((torch.full((2,), 6.0),), 6.0)):
        values = [paddle_backend.from_torch(value) for value in reference_side.torch_outputs(theirs).values()]
        injected = passes.replaced(ours, values)
        assert isinstance(injected, tuple)
        assert [tensor.tolist() for tensor in injected] == [[first] * 2, [1.0] * 3]
    values = [paddle_backend.from_torch(torch.full((n,), 5.0)) for n in (2, 3)]
    assert passes.replaced(ours[0], values).tolist() == [5.0, 5.0]
    assert passes.replaced([ours[0], None], values[:1])[1] is None


def test_injection_keeps_bfloat16_bits():
    values = torch.tensor([1.0, 2.5, -3.140625, 1e-30], dtype=torch.bfloat16)
    tensor = paddle_backend.from_torch(values)
    assert tensor.dtype == paddle.bfloat16
    np.testing.assert_array_equal(tensor.astype("float32").numpy(), values.float().numpy())
    turned = torch.arange(6.0).reshape(2, 3).T  # not contiguous
    np.testing.assert_array_equal(paddle_backend.from_torch(turned).numpy(), turned.numpy())


def test_outputs_are_named_alike_by_both_engines():
    tensors = [torch.full((2,), float(n)) for n in range(4)]
    for output in (
        tensors[0],
        tuple(tensors[:2]),
        (tensors[0], None),
        [tensors[0], (tensors[1], tensors[2])],
        {"loss": tensors[0], "hidden_states": tuple(tensors[1:]), "none": None},
    ):
        ours = reference_side.torch_outputs(output)
        theirs = padiff_engine._outputs(SimpleNamespace(output=output))
        assert list(ours) == list(theirs)
        assert all(ours[name] is theirs[name] for name in ours)


# --- other inputs, and blockwise attention ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 193, 77), (64, 64), (511, 2)])
def test_blockwise_attention_is_measured_like_eager_attention(load_models, lengths, dtype):
    models = load_models("tiny-sensitive", dtype)
    batch = make_inputs(InputSpec(seed=1, lengths=lengths), models.config, models.head)
    models.candidate.config.attn_implementation = "blockwise"
    records = engine.run(
        models.candidate, models.reference, models.oracle, batch, models.probes, dtype, attention="blockwise"
    )
    assert [(r.probe, r.mode) for r in records] == [(p.name, mode) for mode in MODES for p in models.probes]
    assert {r.observation for r in records} == {"compared"}
    assert {r.elements for r in records if r.probe == "layers.1.attn"} == {sum(lengths) * models.config.hidden_size}
    expectation = Expectation(
        probes=models.probes, dtypes=(dtype,), weights=len(models.entries), fixture=models.name, needs={}
    )
    bits = paddle_backend.state_bits(models.candidate), hf.state_bits(models.reference)
    weights = [check_weights(models.entries, *bits, dtype)]
    judgement = judge(records, weights, expectation, load_tolerances((dtype,)), "contract")
    assert [row for row in judgement.rows if row.status != "pass"] == []
