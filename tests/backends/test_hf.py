"""What the reference is measured against itself with: other attention, and sums in another order."""

import pytest
import torch

from modernbert_align.backends import hf
from modernbert_align.core.fixtures import load_fixture, make_inputs
from modernbert_align.core.model_config import parse_config, read_config_file


@pytest.fixture
def layers():
    """Linear layers of several widths, with and without bias, one of them more than one block of rows tall."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(48, 96),
        torch.nn.GELU(),
        torch.nn.Linear(96, 48, bias=False),
        torch.nn.Sequential(torch.nn.LayerNorm(48), torch.nn.Linear(48, hf._ROWS + 7)),
    )


@pytest.fixture(scope="module")
def reference(fixture_folder):
    """The tiny model, and its inputs."""
    folder = fixture_folder("tiny")
    config = parse_config(read_config_file(folder))
    batch = make_inputs(load_fixture("tiny")[0].inputs, config, "masked_lm")
    return hf.load(folder, "ModernBertForMaskedLM", "fp32"), hf.inputs(batch)


def run(model, *arguments, **named):
    with torch.no_grad():
        return model(*arguments, **named)


def test_in_float64_another_order_changes_nothing_but_rounding(layers):
    layers.double()
    x = torch.randn(3, 5, 48, dtype=torch.float64)
    plain = run(layers, x)
    sums = hf.PermutedSums(layers)
    sums.active = True
    permuted = run(layers, x)
    assert permuted.shape == plain.shape
    assert torch.allclose(permuted, plain, rtol=0, atol=1e-12)
    assert not torch.equal(permuted, plain)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2)])
def test_in_the_models_dtype_the_difference_is_rounding_and_there_is_one(layers, dtype, most):
    layers.to(dtype)
    x = torch.randn(400, 48).to(dtype)  # in bfloat16 few results round differently
    plain = run(layers, x)
    sums = hf.PermutedSums(layers)
    sums.active = True
    permuted = run(layers, x)
    assert permuted.dtype == dtype
    apart = ((permuted - plain).double().norm() / plain.double().norm()).item()
    assert 0 < apart < most


def test_the_whole_reference_differs_by_rounding_only_and_comes_back(reference):
    model, batch = reference
    plain = run(model, **batch)
    sums = hf.PermutedSums(model)
    off = run(model, **batch)
    assert torch.equal(off.logits, plain.logits)
    sums.active = True
    permuted = run(model, **batch)
    apart = ((permuted.logits - plain.logits).norm() / plain.logits.norm()).item()
    assert 1e-8 < apart < 1e-5
    assert not torch.equal(permuted.logits, plain.logits)
    sums.active = False
    assert torch.equal(run(model, **batch).logits, plain.logits)
    sums.remove()
    assert torch.equal(run(model, **batch).logits, plain.logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_inactive_it_changes_no_bit(layers, dtype):
    layers.to(dtype)
    x = torch.randn(3, 5, 48).to(dtype)
    plain = run(layers, x)
    sums = hf.PermutedSums(layers)
    assert sums.active is False
    assert torch.equal(run(layers, x), plain)


def test_removed_every_module_has_its_own_forward_again(layers):
    linears = [module for module in layers.modules() if isinstance(module, torch.nn.Linear)]
    x = torch.randn(3, 48)
    plain = run(layers, x)
    sums = hf.PermutedSums(layers)
    sums.active = True
    assert all("forward" in vars(module) for module in linears)
    sums.remove()
    assert not any("forward" in vars(module) for module in layers.modules())
    assert all(module.forward.__func__ is torch.nn.Linear.forward for module in linears)
    assert torch.equal(run(layers, x), plain)
    sums.remove()


def test_weights_are_neither_changed_nor_kept(layers):
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    sums = hf.PermutedSums(layers)
    sums.active = True
    run(layers, torch.randn(3, 48))
    assert all(torch.equal(value, before[name]) for name, value in layers.state_dict().items())
    kept = [value for value in vars(sums).values() if torch.is_tensor(value)]
    kept += [order for order in sums._orders.values() if order.dtype != torch.int64]
    assert kept == []


def test_the_order_is_the_same_every_time_and_leaves_the_random_state_alone(layers):
    x = torch.randn(3, 48)
    found = []
    for _ in range(2):
        state = torch.random.get_rng_state()
        sums = hf.PermutedSums(layers)
        assert torch.equal(torch.random.get_rng_state(), state)
        sums.active = True
        found.append(run(layers, x))
        sums.remove()
        torch.randn(3)  # the second time the state is another
    assert torch.equal(*found)


def test_every_width_is_really_permuted(layers):
    orders = hf.PermutedSums(layers)._orders
    assert set(orders) == {48, 96}
    for width, order in orders.items():
        assert sorted(order.tolist()) == list(range(width))
        assert order.tolist() != list(range(width))


def test_attention_is_switched_on_the_loaded_model(reference):
    model, batch = reference
    plain = run(model, **batch)
    real = batch["attention_mask"].bool()
    hf.set_attention(model, "sdpa")
    other = run(model, **batch)
    hf.set_attention(model, "eager")
    assert not torch.equal(other.logits[real], plain.logits[real])
    assert torch.allclose(other.logits[real], plain.logits[real], atol=1e-5)
    assert torch.equal(run(model, **batch).logits, plain.logits)
