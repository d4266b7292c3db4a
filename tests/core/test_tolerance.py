"""The numbers that decide: what is shipped, where it applies, and what is refused."""

import copy
import math

import pytest

from modernbert_align.core import tolerance as module
from modernbert_align.core.probes import Probe, load_probes
from modernbert_align.core.resources import configs_dir, read_toml
from modernbert_align.core.rows import PHASES
from modernbert_align.core.tolerance import Tolerance, load_tolerance, load_tolerances
from modernbert_align.errors import TableError

FIXTURES = {"tiny", "tiny-sensitive", "base", "large"}


@pytest.fixture
def document():
    raw, _ = read_toml(configs_dir() / "tolerances" / "fp32.toml")
    return copy.deepcopy(raw)


def test_the_contract_is_what_was_agreed():
    assert load_tolerance("fp32").contract.mean_abs == 1e-5
    assert load_tolerance("bf16").contract.mean_abs == 1e-3


def test_unit_roundoffs_are_those_of_the_formats():
    fp32, bf16 = load_tolerance("fp32"), load_tolerance("bf16")
    assert fp32.unit_roundoff == fp32.accumulator_roundoff == 2.0**-24
    assert bf16.unit_roundoff == 2.0**-8
    assert bf16.accumulator_roundoff == 2.0**-24


def test_every_number_says_where_it_comes_from():
    for tolerance in load_tolerances(("fp32", "bf16")).values():
        assert len(tolerance.contract.origin) > 10
        for phase in PHASES:
            criteria = tolerance.criteria(phase)
            assert min(len(part.origin) for part in (criteria.noise, criteria.direct)) > 10
            assert min(len(part.small_origin) for part in (criteria.noise, criteria.direct)) > 10
            assert len(criteria.noise.floor_origin) > 10


def test_the_fp32_contract_covers_every_probe_of_every_fixture():
    contract = load_tolerance("fp32").contract
    for mode in ("isolated", "accumulated"):
        assert set(contract.scope(mode).fixtures) == FIXTURES
        assert contract.scope(mode).covers("layers.{i}.attn")
        assert contract.scope(mode).covers("loss")
        assert contract.scope(mode).exempt == ()


def test_the_bf16_contract_covers_what_an_implementation_can_meet(tiny_config):
    contract = load_tolerance("bf16").contract
    assert set(contract.scope("isolated").fixtures) == FIXTURES
    assert set(contract.scope("accumulated").fixtures) == {"tiny", "base"}
    patterns = {probe.pattern for probe in load_probes(tiny_config(), "masked_lm", "model.")}
    assert {p for p in patterns if contract.scope("isolated").covers(p)} == patterns - {"loss"}
    assert contract.scope("isolated").exempt == ("loss",)
    assert contract.scope("accumulated").exempt == ()
    covered = {p for p in patterns if contract.scope("accumulated").covers(p)}
    assert covered == {"embeddings", "layers.{i}", "final_norm"}


def test_scopes_are_patterns_and_not_prefixes():
    scope = load_tolerance("bf16").contract.scope("accumulated")
    assert scope.covers("layers.{i}")
    assert not scope.covers("layers.{i}.attn")
    assert not scope.covers("layers.0")
    assert not scope.covers("")


def test_what_is_exempt_is_not_covered_whichever_way_it_is_listed(document):
    scope = {"fixtures": ["tiny"], "probes": ["*"], "except": ["loss", "layers.{i}"]}
    document["contract"]["isolated"] = scope
    for listed in (["*"], ["loss", "layers.{i}", "head"]):
        scope["probes"] = listed
        covering = Tolerance.model_validate(document).contract.isolated
        assert covering.covers("head")
        assert not covering.covers("loss")
        assert not covering.covers("layers.{i}")
        assert covering.covers("layers.{i}.attn") is (listed == ["*"])  # patterns and not prefixes
    assert Tolerance.model_validate(document).contract.accumulated.covers("loss")


def test_few_elements_have_a_larger_ratio_up_to_the_limit_and_not_beyond():
    for tolerance in load_tolerances(("fp32", "bf16")).values():
        direct = tolerance.forward.direct
        assert (direct.factor, direct.small_elements, direct.small_factor) == (2.0, 100, 8.0)
        assert {n: direct.factor_for(n) for n in (1, 2, 99, 100, 101, 102, 10_000_000)} == {
            1: 8.0,
            2: 8.0,
            99: 8.0,
            100: 8.0,
            101: 2.0,
            102: 2.0,
            10_000_000: 2.0,
        }


def test_the_noise_limits_are_those_found_by_injecting_faults():
    for tolerance in load_tolerances(("fp32", "bf16")).values():
        noise = tolerance.forward.noise
        assert (noise.factor, noise.small_elements, noise.floor) == (1.5, 4095, 0.25)
        small = {"fp32": 8.0, "bf16": 3.0}[tolerance.dtype]
        assert noise.small_floor == 1.0
        assert {n: noise.factor_for(n) for n in (1, 4094, 4095, 4096, 10_000_000)} == {
            1: small,
            4094: small,
            4095: small,
            4096: 1.5,
            10_000_000: 1.5,
        }


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("criterion", ["noise", "direct"])
def test_the_larger_ratio_is_the_one_declared(document, criterion, phase):
    numbers = document[phase][criterion]
    numbers |= {"factor": 3.0, "small_elements": 7, "small_factor": 5.0}
    ratio = getattr(Tolerance.model_validate(document).criteria(phase), criterion)
    assert [ratio.factor_for(n) for n in (1, 7, 8)] == [5.0, 5.0, 3.0]
    numbers["small_elements"] = 0
    assert getattr(Tolerance.model_validate(document).criteria(phase), criterion).factor_for(1) == 3.0


def probe(fan_in, **changes):
    return Probe(name="x", pattern="x", hf="x", paddle="x", fan_in=fan_in, **changes)


def test_the_floor_is_one_rounding_and_that_of_a_sum(document):
    tolerance = Tolerance.model_validate(document | {"unit_roundoff": 0.25, "accumulator_roundoff": 0.01})
    assert tolerance.floor(probe(16)) == 0.25 + 0.04
    assert load_tolerance("bf16").floor(probe(768)) == pytest.approx(2**-8 + 2**-24 * math.sqrt(768), rel=1e-12)
    assert load_tolerance("fp32").floor(probe(2304)) == pytest.approx(2**-24 * 49, rel=1e-12)


def test_what_is_kept_in_float32_has_its_floor_in_every_dtype():
    assert load_tolerance("bf16").roundoff(probe(1, float32=True)) == 2.0**-24
    assert load_tolerance("bf16").floor(probe(1, float32=True)) == 2.0**-23


def test_tolerances_are_loaded_by_dtype():
    loaded = load_tolerances(("fp32", "bf16"))
    assert {dtype: tolerance.dtype for dtype, tolerance in loaded.items()} == {"fp32": "fp32", "bf16": "bf16"}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("unit_roundoff", 0),
        ("accumulator_roundoff", -1e-8),
        ("contract.mean_abs", 0),
        ("contract.origin", ""),
        ("contract.max_abs", 1e-3),
        ("contract.isolated.heads", ["base"]),
        ("contract.isolated.except", "loss"),
        ("forward.noise.factor", 0),
        ("forward.noise.floor", 0),
        ("forward.noise.floor", -0.25),
        ("forward.noise.floor_origin", ""),
        ("forward.noise.small_factor", 0),
        ("forward.noise.small_elements", -1),
        ("forward.noise.origin", ""),
        ("forward.direct.floor", 0.25),
        ("forward.direct.factor", -2),
        ("forward.direct.origin", ""),
        ("forward.direct.small_factor", 0),
        ("forward.direct.small_elements", -1),
        ("forward.direct.small_elements", 1.5),
        ("forward.direct.small_origin", ""),
        ("forward.direct.tiny_factor", 9.0),
        ("dtype", "fp8"),
        ("rescue", True),
    ],
)
def test_a_wrong_or_unknown_entry_is_refused_by_name(document, tmp_path, monkeypatch, path, value):
    *parents, key = path.split(".")
    (tmp_path / "tolerances").mkdir()
    (tmp_path / "tolerances" / "fp32.toml").touch()
    monkeypatch.setattr(module, "configs_dir", lambda: tmp_path)
    monkeypatch.setattr(module, "read_toml", lambda _path: (document, "digest"))
    assert load_tolerance("fp32").contract.mean_abs == 1e-5
    place = document
    for parent in parents:
        place = place[parent]
    place[key] = value
    with pytest.raises(TableError) as refused:
        load_tolerance("fp32")
    assert refused.value.message.startswith(f"`fp32.toml`: {path}: ")


@pytest.mark.parametrize(
    "path",
    [
        "contract",
        "forward.direct",
        "forward.noise",
        "unit_roundoff",
        "forward.noise.floor",
        "forward.noise.floor_origin",
        "forward.noise.small_factor",
        "forward.direct.small_elements",
        "forward.direct.small_factor",
        "forward.direct.small_origin",
    ],
)
def test_a_missing_entry_is_refused_by_name(document, monkeypatch, path):
    monkeypatch.setattr(module, "read_toml", lambda _path: (document, "digest"))
    *parents, key = path.split(".")
    place = document
    for parent in parents:
        place = place[parent]
    del place[key]
    with pytest.raises(TableError, match=f"`fp32.toml`: {path}: "):
        load_tolerance("fp32")
