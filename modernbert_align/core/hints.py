"""What a failing row usually means: first thing to check, in one sentence."""

from collections.abc import Sequence

from modernbert_align.core.cause import Cause
from modernbert_align.core.rows import Phase, WeightCheck
from modernbert_align.core.verdict import Failing, Judgement
from modernbert_align.errors import EXIT_ALIGNED

_BY_KIND = {
    "embeddings": "compare the token table, `norm_eps`, and whether padding ids are looked up like any other token",
    "attn_norm": "compare `norm_eps` and remember that layer 0 has no attention norm",
    "attn": "compare the RoPE base of this layer kind, the window (|i - j| <= local_attention // 2, inclusive), the "
    "padding mask, the scale head_dim ** -0.5, and the order of q, k and v in Wqkv",
    "mlp_norm": "compare `norm_eps`, and the residual after the attention",
    "mlp": "compare the activation (GELU is the exact one, not tanh) and which half of Wi is activated",
    "layer": "every part is right by itself: compare how the residuals add them up",
    "final_norm": "compare `norm_eps` and the order of the layers",
    "head": "compare the order norm(act(dense(x))) and the transpose of the square `head.dense`",
    "logits": "compare the decoder's or classifier's weight and bias",
    "loss": "compare which labels count and how the mean is taken",
    "output": "the model computes the right values and returns something else: compare what forward() returns",
}

_BY_PHASE = {
    "backward": "if `diff --phase forward` passes, look for what only gradients see: a detach or stop_gradient, a tied "
    "weight that is a copy, a custom backward",
    "step": "if `diff --phase backward` passes, compare the optimizers: which weights are decayed, betas, epsilon, "
    "bias correction, and whether weights are kept in float32",
}


def hints(
    judgement: Judgement,
    weights: Sequence[WeightCheck],
    config_differences: Sequence[str],
    cause: Cause | None = None,
    phase: Phase = "forward",
) -> tuple[str, ...]:
    """Advice for a verdict that is not PASS, most specific first; none where the cause has been found."""
    found: list[str] = []
    for check in weights:
        for difference in check.differences[:3]:
            where = difference.paddle or difference.hf
            what = difference.looks or f"{difference.differing} of {difference.elements} elements differ"
            found.append(f"weight `{where}` ({check.dtype}): {what}")
        if len(check.differences) > 3:
            found.append(f"{len(check.differences) - 3} more weights differ ({check.dtype})")
    found += [f"the candidate's config.json differs: {difference}" for difference in config_differences]
    first = judgement.first_failing
    if judgement.verdict == "EXPLAINED":
        accepts = "" if judgement.exit_code == EXIT_ALIGNED else "; --policy noise-aware accepts that"
        found.append(f"the contract is exceeded by no more than rounding explains{accepts}")
    elif first is not None and first.probe and first.status == "missing" and phase == "forward":
        found.append(
            f"{first.probe}: no call of it was seen. If all the rest agrees, the model computes the same in another "
            "way: call the module itself, not its forward() or a copy of what it does"
        )
    elif cause is not None and cause.level == "explained":
        pass
    elif first is not None and first.probe and phase != "forward":
        found.append(f"{first.probe}: {_BY_PHASE[phase]}")
    elif first is not None and first.mode == "accumulated" and judgement.verdict == "FAIL":
        found.append(
            f"{first.probe}: every part is right on the reference's inputs and only the whole is not: compare what is "
            "handed from one module to the next"
        )
    elif first is not None and first.probe and cause is not None and cause.tried:
        found.append(
            f"{first.probe}: the known mistakes were tried and are not it: look for something of this model's own, "
            "where the modules that are wrong by themselves differ from those of the same kind that are right"
        )
    elif first is not None and first.probe:
        found.append(f"{first.probe}: {_BY_KIND[_kind(first)]}")
    return tuple(found)


def _kind(first: Failing) -> str:
    parts = first.probe.split(".")
    if parts[0] != "layers":
        return parts[0] if parts[0] in _BY_KIND else "output"
    kind = parts[2] if len(parts) > 2 else "layer"
    return kind if kind in _BY_KIND else "output"
