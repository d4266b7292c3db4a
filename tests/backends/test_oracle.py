"""The float64 oracle: against the reference's own code in float64, against 40 digits, and where it must disagree."""

import dataclasses
import itertools
import json

import mpmath
import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import modeling_rope_utils
from transformers.models.modernbert import modeling_modernbert

from modernbert_align.backends import hf, oracle
from modernbert_align.backends.fixture_writer import make_sensitive
from modernbert_align.backends.oracle import Oracle
from modernbert_align.core.fixtures import InputSpec, load_fixture, make_inputs
from modernbert_align.core.model_config import FULL, SLIDING, RopeScaling, parse_config, read_config_file
from modernbert_align.core.probes import load_probes
from modernbert_align.core.training import EMBEDDED

VERSION = int(transformers.__version__.split(".")[0])
HEADS = {
    "base": "ModernBertModel",
    "masked_lm": "ModernBertForMaskedLM",
    "sequence_classification": "ModernBertForSequenceClassification",
    "token_classification": "ModernBertForTokenClassification",
    "question_answering": "ModernBertForQuestionAnswering",
    "multiple_choice": "ModernBertForMultipleChoice",
}
SIZES = {
    "vocab_size": 97,
    "hidden_size": 24,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 4,
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
}
LENGTHS = (40, 25)
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
BIASES = ("attention_bias", "mlp_bias", "norm_bias", "classifier_bias")


def record(model, batch, probes):
    """The first output of every probe of the reference: probe name -> values, float32 or wider."""
    found = {}

    def keep(name):
        def hook(_module, _inputs, output):
            found[name] = hf.to_numpy(output if isinstance(output, torch.Tensor) else output[0])

        return hook

    modules = dict(model.named_modules())
    handles = [modules[probe.hf].register_forward_hook(keep(probe.name)) for probe in probes if probe.hf]
    try:
        with torch.no_grad():
            output = model(**hf.inputs(batch))
    finally:
        for handle in handles:
            handle.remove()
    return found | {probe.name: hf.to_numpy(output[probe.key]) for probe in probes if probe.key}


class Case:
    """A reference with its configuration, inputs and probes."""

    def __init__(self, config, model, head, lengths):
        self.head, self.config, self.model = head, config, model
        self.probes = load_probes(self.config, head, "" if head == "base" else "model.")
        self.inputs = make_inputs(InputSpec(seed=0, lengths=lengths), self.config, head)

    def oracle(self, **changes):
        return Oracle(dataclasses.replace(self.config, **changes), self.head, self.model)

    def accumulated(self, **changes):
        values = dict(self.oracle(**changes).accumulated(self.inputs))
        values.pop(EMBEDDED)
        return {name: value.numpy() for name, value in values.items()}

    def recorded(self):
        return record(self.model, self.inputs, self.probes)

    def errors(self, values, expected):
        """Relative error over the compared elements, by probe."""
        keep = self.inputs.attention_mask.astype(bool)
        return {p.name: distance(values[p.name], expected[p.name], keep if p.tokens else ...) for p in self.probes}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operations this small only lose time to a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case():
    """Builds a case from a small random model, every bias and norm weight away from its default."""

    def build(head="masked_lm", lengths=LENGTHS, **changes):
        torch.manual_seed(0)
        config = transformers.ModernBertConfig(**{**SIZES, **changes}, attn_implementation="eager")
        config.reference_compile = False
        model = getattr(transformers, HEADS[head])(config).eval()
        make_sensitive(model)
        return Case(parse_config(json.loads(config.to_json_string())), model, head, lengths)

    return build


@pytest.fixture(scope="module")
def seeded(fixture_folder):
    """Gives the case of a fixture, with the fixture's own inputs."""

    def build(name, dtype):
        folder, lengths = fixture_folder(name), load_fixture(name)[0].inputs.lengths
        model = hf.load(folder, HEADS["masked_lm"], dtype)
        return Case(parse_config(read_config_file(folder)), model, "masked_lm", lengths)

    return build


def distance(values, expected, keep=...):
    values, expected = (np.asarray(x, dtype=np.float64)[keep] for x in (values, expected))
    assert values.shape == expected.shape
    assert np.isfinite(values).all()
    return np.linalg.norm(values - expected) / (np.linalg.norm(expected) or 1.0)


class Lifted:
    """The torch module as a transformers module sees it, without a float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def in_float64(case):
    """What transformers' own code gives when all its float32 is float64, by probe; the model stays in float64."""
    model = case.model.double().requires_grad_(False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        for module in (modeling_modernbert, modeling_rope_utils):
            patch.setattr(module, "torch", Lifted())
        for module in model.modules():
            if isinstance(module, modeling_modernbert.ModernBertRotaryEmbedding):
                lift_frequencies(module)
        labels = {k: v if v.dtype == np.int64 else v.astype(np.float64) for k, v in case.inputs.labels.items()}
        return record(model, dataclasses.replace(case.inputs, labels=labels), case.probes)


def lift_frequencies(rotary):
    if VERSION < 5:
        rotary.inv_freq = rotary.rope_init_fn(rotary.config)[0]
        assert rotary.inv_freq.dtype == torch.float64
        return
    for kind in rotary.layer_types:
        scaled = rotary.rope_type[kind] != "default"
        compute = modeling_rope_utils.ROPE_INIT_FUNCTIONS[rotary.rope_type[kind]] if scaled else None
        inv_freq, _ = (compute or rotary.compute_default_rope_parameters)(rotary.config, layer_type=kind)
        assert inv_freq.dtype == torch.float64
        setattr(rotary, f"{kind}_inv_freq", inv_freq)


def check(case):
    """The oracle equals the lifted reference at every probe and position, and the float32 reference is further away."""
    values, recorded = case.accumulated(), case.recorded()
    expected = in_float64(case)
    assert list(values) == [p.name for p in case.probes]
    worst = {name: distance(values[name], expected[name]) for name in expected}
    assert all(error < 1e-13 for error in worst.values()), worst
    assert {v.dtype for v in values.values()} == {np.dtype("float64")}
    assert distance(recorded["final_norm"], expected["final_norm"]) > 1e-8


CONFIGS = {
    "default": {},
    **{name: {name: True} for name in BIASES},
    "all biases": dict.fromkeys(BIASES, True),
    "no decoder bias": {"decoder_bias": False},
    "untied": {"tie_word_embeddings": False},
    "sparse prediction": {"sparse_prediction": True},
    "silu": {"hidden_activation": "silu", "classifier_activation": "silu"},
    "one silu": {"classifier_activation": "silu"},
    "thetas": {"global_rope_theta": 80000.0, "local_rope_theta": 40.0},
    "every second layer full": {"global_attn_every_n_layers": 2},
    "sliding first": {"layer_types": [SLIDING, SLIDING, FULL, SLIDING]},
    "wide window": {"local_attention": 128},
    "odd window": {"local_attention": 5},
    "epsilon": {"norm_eps": 1e-3},
    "linear RoPE": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "YaRN": {"rope_scaling": YARN},
    "YaRN, not stretched": {"rope_scaling": {**YARN, "factor": 0.5}},
    "YaRN with its own magnitudes": {"rope_scaling": {**YARN, "mscale": 2.0, "mscale_all_dim": 0.7}},
    "YaRN with an attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.3}},
    "YaRN, longer than the model, in full layers only": {
        "max_position_embeddings": 64,
        "rope_parameters": {
            FULL: {"rope_type": "yarn", "factor": 2.5, "rope_theta": 900.0, "beta_fast": 4, "beta_slow": 0.5},
            SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        },
    },
    "YaRN, ramp of no width": {"rope_scaling": {**YARN, "beta_fast": 4.0, "beta_slow": 3.0}},
}
V5_ONLY = ("sliding first", "linear RoPE", *(name for name in CONFIGS if name.startswith("YaRN")))


@pytest.mark.parametrize("name", CONFIGS)
def test_configuration_agrees_with_the_reference_in_float64(case, name):
    if VERSION < 5 and name in V5_ONLY:
        pytest.skip("transformers 4 cannot express it")
    check(case(**CONFIGS[name]))


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("head", HEADS)
def test_head_agrees_with_the_reference_in_float64(case, head, pooling, biases):
    check(case(head, classifier_pooling=pooling, num_labels=2, **dict.fromkeys(BIASES, biases)))


@pytest.mark.parametrize(
    ("num_labels", "problem_type"),
    [
        (1, None),
        (3, None),
        (3, "regression"),
        (3, "single_label_classification"),
        (3, "multi_label_classification"),
    ],
)
def test_sequence_losses_agree_with_the_reference_in_float64(case, num_labels, problem_type):
    check(case("sequence_classification", num_labels=num_labels, problem_type=problem_type))


def test_several_labels_are_told_by_their_dtype(case):
    built = case("sequence_classification", num_labels=3)
    labels = {"labels": np.array([[1, 0, 1], [0, 0, 1]], dtype=np.float32)}
    built.inputs = dataclasses.replace(built.inputs, labels=labels)
    check(built)


@pytest.mark.parametrize("end", [(9, 12), (39, 45), (-3, 40)])
def test_spans_beyond_the_sequence_do_not_count(case, end):
    built = case("question_answering")
    labels = {"start_positions": np.array([1, 4]), "end_positions": np.array(end)}
    built.inputs = dataclasses.replace(built.inputs, labels=labels)
    check(built)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lengths", [(1, 1), (2, 1), (37, 36, 1), (131, 40)])
def test_length_agrees_with_the_reference_in_float64(case, head, lengths):
    check(case(head, lengths, classifier_pooling="mean"))


@pytest.mark.parametrize("padded", [(7, 0), (21, 40), (0, 39)])
@pytest.mark.parametrize("head", HEADS)
def test_padding_on_the_left_and_rows_of_padding_agree_with_the_reference_in_float64(case, head, padded):
    if VERSION < 5 and head == "multiple_choice":
        pytest.skip("transformers 4 takes the first position there, padding or not")
    built = case(head, (40, 40))
    mask = (np.arange(40)[None, :] >= np.array(padded)[:, None]).astype(np.int64)
    built.inputs = dataclasses.replace(built.inputs, attention_mask=mask)
    check(built)


def test_ignored_label_of_sparse_prediction_does_not_count(case):
    built = case(sparse_prediction=True, sparse_pred_ignore_index=7)
    labels = np.random.default_rng(0).integers(5, 9, (2, 40))
    labels[0, :5] = -100
    logits = torch.from_numpy(built.accumulated()["logits"])
    loss = built.oracle().loss(logits, {"labels": labels})
    counted = (labels != 7) & (labels != -100)
    picked = logits.log_softmax(-1)[counted][torch.arange(counted.sum()), labels[counted]]
    assert float(loss) == pytest.approx(float(-picked.mean()), rel=1e-14)


def test_loss_over_nothing_is_not_a_number(case):
    built = case()
    logits = torch.from_numpy(built.accumulated()["logits"])
    assert built.oracle().loss(logits, {"labels": np.full((2, 40), -100)}).isnan()


@pytest.mark.parametrize("name", ["tiny", "tiny-sensitive"])
def test_reference_converges_to_the_oracle_with_its_precision(seeded, name):
    found = {}
    for dtype in ("fp32", "bf16"):
        built = seeded(name, dtype)
        found[dtype] = built.errors(built.recorded(), built.accumulated())
        del found[dtype]["loss"]  # one number, whose error may be anywhere below its bound
    for probe, fine in found["fp32"].items():
        coarse = found["bf16"][probe]
        assert 2e-8 < fine < 5e-7, probe
        assert 1e-3 < coarse < 1e-2, probe
        # Less than the 2**16 between their roundoffs: in bfloat16, sums are kept in float32.
        assert 2**13 < coarse / fine < 2**16, probe


@pytest.mark.parametrize("name", ["tiny", "tiny-sensitive"])
@pytest.mark.parametrize(("dtype", "roundoff"), [("fp32", 2.0**-24), ("bf16", 2.0**-8)])
def test_reference_is_close_to_the_isolated_values(seeded, name, dtype, roundoff):
    built = seeded(name, dtype)
    recorded = built.recorded()
    truth = built.oracle()
    values = {p.name: truth.isolated(p.name, built.inputs, recorded).numpy() for p in built.probes}
    for probe, error in built.errors(recorded, values).items():
        assert error < 8 * roundoff, probe
    assert built.errors(recorded, values)["output"] == 0


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_isolated_values_start_from_what_the_reference_gave_the_module(seeded, dtype):
    built = seeded("tiny-sensitive", dtype)
    truth, recorded, modules = built.oracle(), built.recorded(), dict(built.model.named_modules())
    mask = torch.from_numpy(built.inputs.attention_mask)
    arguments, handles = {}, []
    for probe in built.probes:
        if probe.hf:

            def keep(_module, args, name=probe.name):
                arguments[name] = args[0] if args else None

            handles.append(modules[probe.hf].register_forward_pre_hook(keep))
    with torch.no_grad():
        built.model(**hf.inputs(built.inputs))
    for handle in handles:
        handle.remove()
    direct = {"final_norm": truth.final_norm, "head": truth.head, "logits": truth.logits}
    for i in range(built.config.num_hidden_layers):
        direct[f"layers.{i}.attn_norm"] = lambda x, i=i: truth.attn_norm(i, x)
        direct[f"layers.{i}.attn"] = lambda x, i=i: truth.attn(i, x, mask)
        direct[f"layers.{i}.mlp_norm"] = lambda x, i=i: truth.mlp_norm(i, x)
        direct[f"layers.{i}.mlp"] = lambda x, i=i: truth.mlp(i, x)
    for name, function in direct.items():
        expected = function(arguments[name])
        assert torch.equal(truth.isolated(name, built.inputs, recorded), expected), name


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_isolated_values_are_the_accumulated_ones_on_the_oracles_own_values(case, head, pooling):
    built = case(head, classifier_pooling=pooling)
    built.model.double().requires_grad_(False)
    truth = built.oracle()
    own = dict(truth.accumulated(built.inputs))
    for name, value in own.items():
        assert torch.equal(truth.isolated(name, built.inputs, own), value), name


def test_isolated_value_needs_only_what_the_probe_starts_from(case):
    built = case()
    truth = built.oracle()
    own = dict(truth.accumulated(built.inputs))
    needed = {"layers.2": ("layers.1", "layers.2.attn", "layers.2.mlp"), "layers.0.mlp": ("layers.0.mlp_norm",)}
    for probe, names in needed.items():
        truth.isolated(probe, built.inputs, {name: own[name] for name in names})
        for absent in names:
            with pytest.raises(KeyError, match=absent):
                truth.isolated(probe, built.inputs, {name: own[name] for name in names if name != absent})
    with pytest.raises(KeyError, match="pooler"):
        truth.isolated("pooler", built.inputs, own)


def test_a_layer_is_its_modules_in_the_order_of_the_accumulated_pass(case):
    built = case()
    truth = built.oracle()
    own = dict(truth.accumulated(built.inputs))
    mask = torch.from_numpy(built.inputs.attention_mask)
    for i in range(4):
        before = own[f"layers.{i - 1}" if i else "embeddings"]
        assert torch.equal(truth.layer(i, before, mask), own[f"layers.{i}"])


FAULTS = {
    "theta of full layers": ({"full_rope_theta": 160_001.0}, "layers.0.attn"),
    "theta of sliding layers": ({"sliding_rope_theta": 10_001.0}, "layers.1.attn"),
    "scaled RoPE": ({"full_rope_scaling": RopeScaling(rope_type="linear", factor=1.0001)}, "layers.0.attn"),
    "window one wider": ({"local_attention": 10}, "layers.1.attn"),
    "window one narrower": ({"local_attention": 6}, "layers.1.attn"),
    "epsilon": ({"norm_eps": 1.0001e-5}, "embeddings"),
    "activation": ({"hidden_activation": "silu"}, "layers.0.mlp"),
    "activation of the head": ({"classifier_activation": "silu"}, "head"),
    "pooling": ({"classifier_pooling": "mean"}, "head"),
    "layer pattern": ({"layer_types": (FULL, FULL, SLIDING, SLIDING)}, "layers.1.attn"),
    "number of heads": ({"num_attention_heads": 2}, "layers.0.attn"),
    "kind of loss": ({"problem_type": "regression"}, "loss"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_configuration_breaks_the_agreement_where_it_is_used(case, name):
    changes, first = FAULTS[name]
    built = case("sequence_classification", num_labels=2)
    built.inputs = dataclasses.replace(built.inputs, labels={"labels": np.array([[0.0, 1.0], [1.0, 1.0]], np.float32)})
    expected = in_float64(built)
    wrong = built.accumulated(**changes)
    off = [p.name for p in built.probes if distance(wrong[p.name], expected[p.name]) > 1e-13]
    assert off
    assert off[0] == first


def test_every_weight_is_felt_below_float32(case):
    """Doubling a change of 1e-11 doubles what comes out of it: nothing on the way is rounded to anything coarser."""
    built = case(num_hidden_layers=2, tie_word_embeddings=False, **dict.fromkeys(BIASES, True))
    built.model.double().requires_grad_(False)
    before = built.accumulated()["logits"]
    for name, parameter in built.model.named_parameters():
        exact = parameter.detach().clone()
        moved = []
        for step in (1e-11, 2e-11):
            pattern = torch.arange(exact.numel(), dtype=torch.float64).remainder(3).view(exact.shape)
            parameter.data = exact * (1 + step * pattern)
            moved.append(built.accumulated()["logits"] - before)
        parameter.data = exact
        assert 0 < np.linalg.norm(moved[0]) < 1e-9 * np.linalg.norm(before), name
        assert distance(moved[1], 2 * moved[0]) < 1e-2, name


class Watch(TorchDispatchMode):
    """Notes the operations that return floats narrower than float64, and the shapes of what is float64."""

    def __init__(self):
        super().__init__()
        self.narrow, self.shapes = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                self.shapes.add(tuple(tensor.shape))
            elif isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.narrow.add(func.overloadpacket.__name__)
        return out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_nothing_is_computed_in_less_than_float64(seeded, dtype):
    built = seeded("tiny-sensitive", dtype)
    with Watch() as watch:
        built.accumulated()
    assert watch.narrow <= {"detach", "slice", "embedding"}  # weights before they are widened


def test_no_whole_decoder_and_no_whole_attention_in_float64(seeded, monkeypatch):
    built = seeded("tiny-sensitive", "fp32")
    whole = built.accumulated()
    with Watch() as watch:
        built.accumulated()
    decoder, scores = (512, 64), (2, 4, 192, 192)
    assert {decoder, scores} <= watch.shapes
    monkeypatch.setattr(oracle, "_BLOCK", 10_000)
    with Watch() as watch:
        blocks = built.accumulated()
    assert not {decoder, decoder[::-1], scores} & watch.shapes
    assert (2, 4, 6, 192) in watch.shapes
    assert (156, 64) in watch.shapes
    for name, value in whole.items():
        assert distance(blocks[name], value) < 1e-14, name


def test_values_carry_no_gradient(case):
    built = case()
    assert torch.is_grad_enabled()
    assert not any(value.requires_grad for _, value in built.oracle().accumulated(built.inputs))


class Digits:
    """A masked-LM forward in 40 digits, one sequence without padding, straight from the formulas."""

    def __init__(self, built):
        self.config, self.state = built.config, built.model.state_dict()

    def weight(self, name):
        tensor = self.state.get(name)
        return None if tensor is None else tensor.double().numpy()

    def linear(self, rows, name):
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        return [
            [
                mpmath.fdot(row, map(mpmath.mpf, weight[o])) + (0 if bias is None else mpmath.mpf(bias[o]))
                for o in range(len(weight))
            ]
            for row in rows
        ]

    def norm(self, rows, name):
        weight, bias = self.weight(f"{name}.weight"), self.weight(f"{name}.bias")
        done = []
        for row in rows:
            mean = mpmath.fsum(row) / len(row)
            variance = mpmath.fsum((x - mean) ** 2 for x in row) / len(row)
            scale = 1 / mpmath.sqrt(variance + mpmath.mpf(self.config.norm_eps))
            done.append([(x - mean) * scale * w + b for x, w, b in zip(row, weight, bias, strict=True)])
        return done

    def gelu(self, x):
        return x * (1 + mpmath.erf(x / mpmath.sqrt(2))) / 2

    def rotated(self, vector, position, theta):
        half = len(vector) // 2
        out = [None] * len(vector)
        for k in range(half):
            angle = position * mpmath.mpf(theta) ** (-mpmath.mpf(k) / half)
            cos, sin = mpmath.cos(angle), mpmath.sin(angle)
            out[k] = vector[k] * cos - vector[k + half] * sin
            out[k + half] = vector[k + half] * cos + vector[k] * sin
        return out

    def attention(self, rows, layer):
        config = self.config
        kind, width, hidden = config.layer_types[layer], config.head_dim, config.hidden_size
        qkv = self.linear(rows, f"model.layers.{layer}.attn.Wqkv")
        mixed = [[] for _ in rows]
        for start in range(0, hidden, width):
            q, k, v = (
                [row[offset + start : offset + start + width] for row in qkv] for offset in (0, hidden, 2 * hidden)
            )
            q, k = ([self.rotated(x, n, config.rope_theta(kind)) for n, x in enumerate(part)] for part in (q, k))
            for i in range(len(rows)):
                seen = [j for j in range(len(rows)) if kind == FULL or abs(i - j) <= config.local_attention // 2]
                powers = [mpmath.exp(mpmath.fdot(q[i], k[j]) / mpmath.sqrt(width)) for j in seen]
                total = mpmath.fsum(powers)
                mixed[i] += [
                    mpmath.fsum(p * v[j][d] for p, j in zip(powers, seen, strict=True)) / total for d in range(width)
                ]
        return self.linear(mixed, f"model.layers.{layer}.attn.Wo")

    def forward(self, ids):
        def add(a, b):
            return [[x + y for x, y in zip(*pair, strict=True)] for pair in zip(a, b, strict=True)]

        table = self.weight("model.embeddings.tok_embeddings.weight")
        x = self.norm([[mpmath.mpf(v) for v in table[token]] for token in ids], "model.embeddings.norm")
        yield "embeddings", x
        for layer in range(self.config.num_hidden_layers):
            path = f"model.layers.{layer}"
            x = add(x, self.attention(self.norm(x, f"{path}.attn_norm") if layer else x, layer))
            inner = self.linear(self.norm(x, f"{path}.mlp_norm"), f"{path}.mlp.Wi")
            half = self.config.intermediate_size
            gated = [[self.gelu(a) * b for a, b in zip(row[:half], row[half:], strict=True)] for row in inner]
            x = add(x, self.linear(gated, f"{path}.mlp.Wo"))
            yield f"layers.{layer}", x
        x = self.norm(x, "model.final_norm")
        yield "final_norm", x
        x = self.norm([[self.gelu(v) for v in row] for row in self.linear(x, "head.dense")], "head.norm")
        yield "head", x
        yield "logits", self.linear(x, "decoder")


def test_oracle_agrees_with_forty_digits(case):
    built = case(
        lengths=(6, 6),
        vocab_size=11,
        hidden_size=8,
        num_attention_heads=2,
        intermediate_size=6,
        num_hidden_layers=2,
        local_attention=4,
        **dict.fromkeys(BIASES, True),
    )
    values = built.accumulated()
    with mpmath.workdps(40):
        for name, exact in Digits(built).forward(built.inputs.input_ids[0].tolist()):
            error = max(
                abs(mpmath.mpf(a) - b) for a, b in zip(values[name][0].flat, itertools.chain(*exact), strict=True)
            )
            assert error < 1e-14 * float(np.abs(values[name][0]).max()), name
