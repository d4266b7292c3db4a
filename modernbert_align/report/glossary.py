"""The words of the pages: every column head and every term, explained once."""

import re
from dataclasses import dataclass
from typing import Literal

Group = Literal["comparison", "measure", "verdict", "tables", "selftest"]
GROUPS: dict[Group, str] = {
    "verdict": "Verdicts and statuses",
    "comparison": "What is compared",
    "measure": "Measures and limits",
    "tables": "Other column heads",
    "selftest": "The selftest",
}


@dataclass(frozen=True)
class Term:
    """An entry of the glossary.

    Attributes:
        names: What it is called on the pages; every one of them leads here.
        words: The explanation; its first sentence stands alone as a hint.
    """

    group: Group
    names: tuple[str, ...]
    words: str

    @property
    def anchor(self) -> str:
        """The id of the entry."""
        return "term-" + re.sub(r"\W+", "-", self.names[0]).strip("-").lower()

    @property
    def hint(self) -> str:
        """The first sentence."""
        return self.words.split(". ")[0].rstrip(".") + "."


def _term(group: Group, names: str, words: str) -> Term:
    return Term(group=group, names=tuple(names.split(", ")), words=words)


GLOSSARY: tuple[Term, ...] = (
    _term("verdict", "PASS", "Everything that had to be compared was compared and is within every limit."),
    _term(
        "verdict",
        "EXPLAINED",
        "Some rows exceed the contract, but by no more than rounding explains, and no module is wrong by itself. Only "
        "the policy noise-aware lets that through.",
    ),
    _term("verdict", "FAIL", "Some row or weight is wrong."),
    _term("verdict", "NOT_COMPARED", "Something that had to be compared was not. Never a pass."),
    _term(
        "verdict",
        "status",
        "What became of one row or weight. pass: within every limit. explained: over the contract, but not by more "
        "than rounding explains. fail: beyond a limit. missing: never seen, so not compared. extra: seen, although "
        "nothing of that name was expected. shape_mismatch and dtype_mismatch: the two tensors cannot be compared. "
        "nonfinite: a value is infinite or not a number.",
    ),
    _term(
        "verdict",
        "policy",
        "What a verdict EXPLAINED is worth. contract: it stops a gate, because the agreed numbers were exceeded. "
        "noise-aware: it is let through, because rounding alone explains it; the default for weights that are not a "
        "contract fixture.",
    ),
    _term(
        "verdict",
        "exit code",
        "What the command returned to the shell. 0 aligned, 1 misaligned, 5 nothing or too little was compared.",
    ),
    _term(
        "comparison",
        "reference (Hugging Face), candidate (Paddle), reference, candidate",
        "The Hugging Face model, which is right by definition, and the Paddle model, which is being checked.",
    ),
    _term(
        "comparison",
        "probe, worst probe, owned by probe",
        "One part of the model whose output was recorded on both sides, such as layers.7.attn. One probe, dtype and "
        "way of running make one row. In the backward and step phases a weight is a probe too.",
    ),
    _term(
        "comparison",
        "kind",
        "Probes that are the same part of different layers, such as attn for layers.0.attn, layers.1.attn and so on.",
    ),
    _term(
        "comparison",
        "phase",
        "What was compared: outputs (forward), gradients (backward), or the weights, moments and losses after some "
        "AdamW steps (step). A report holds one phase, and none stands for another.",
    ),
    _term("comparison", "dtype", "The precision of the model: fp32 (float32) or bf16 (bfloat16)."),
    _term("comparison", "head", "The task layer on top of the model, such as masked_lm; base is none."),
    _term(
        "comparison",
        "mode, own error, end to end, isolated, accumulated",
        "The two ways of running. Own error (isolated): each module is fed exactly what the reference's was fed, so "
        "its error is its own, or that of what its layer does between two modules; the output of a layer then only "
        "shows how the layer adds up its parts, and is exactly 0 when that is right. End to end (accumulated): both "
        "models run from the tokens to the end, and errors of earlier layers add up.",
    ),
    _term(
        "comparison",
        "loss, projection loss, head loss",
        "What was differentiated. projection: all outputs summed up with fixed random weights. head: the loss of the "
        "model's own head.",
    ),
    _term(
        "comparison",
        "native, emulated",
        "Run on the device's own kernels for the dtype, or in float32 with every result rounded to the dtype.",
    ),
    _term(
        "comparison",
        "fixture, contract fixture",
        "A small or full-sized model with weights from a fixed seed, on which the contract was agreed.",
    ),
    _term("measure", "mean_abs", "Mean absolute difference over all compared elements. Padding is left out."),
    _term(
        "measure",
        "max_abs",
        "Largest absolute difference of one element. In bf16 it is shown but does not decide: one rounding step of a "
        "large value may exceed the contract.",
    ),
    _term("measure", "rel_l2", "Size of the difference over size of the reference's tensor, both as root mean square."),
    _term(
        "measure",
        "contract limit, contract",
        "The largest mean_abs that was agreed on. It applies to the rows in which any implementation can meet it; the "
        "others have no contract.",
    ),
    _term(
        "measure",
        "null, null band",
        "How far the reference differs from itself with another attention kernel or with the terms of its sums in "
        "another order, or one unit of rounding if that is larger. The honest size of rounding: the grey band in the "
        "charts. The null of a gradient also counts the reference's own distance from the oracle.",
    ),
    _term(
        "measure",
        "times the null",
        "rel_l2 over the null. About 1 is what rounding does; beyond the direct limit rounding is no explanation.",
    ),
    _term(
        "measure",
        "direct limit, direct",
        "The largest rel_l2 that a faithful implementation shows: a small multiple of the null.",
    ),
    _term(
        "measure",
        "oracle",
        "The same model computed in float64, where rounding does not count. It tells which of the two sides is off.",
    ),
    _term(
        "measure",
        "noise ratio, noise",
        "Paddle's error over the reference's, both measured against the oracle. About 1: equally exact. Not given "
        "where the error is below one unit of rounding.",
    ),
    _term(
        "measure",
        "hygiene",
        "What must hold before numbers mean anything: every probe seen on both sides, equal shapes and dtypes, finite "
        "values.",
    ),
    _term(
        "measure",
        "equal bits",
        "Share of elements that are equal in every bit. Low is normal where sums are long; it does not decide.",
    ),
    _term(
        "measure",
        "ulp",
        "One step between neighbouring bf16 values. The histograms count how many steps each element is away from the "
        "reference's. Rounding moves most elements by 0 or 1 and few by more; a mistake moves many, and far. Elements "
        "so near zero that steps mean nothing are counted apart.",
    ),
    _term(
        "measure",
        "worst element",
        "Where max_abs occurs, then Paddle's value / the reference's. Indices are the tensor's own, in most probes "
        "[batch, position, feature].",
    ),
    _term(
        "measure",
        "PaDiff says, its opinion",
        "The elementwise opinion of the tool that drives both models. It decides nothing here.",
    ),
    _term("tables", "mistake", "A known mistake that was made on purpose in the oracle, to see whether it explains."),
    _term("tables", "which", "Which one, where a mistake comes with different numbers."),
    _term(
        "tables",
        "leaves of the difference",
        "What is left of the difference between Paddle and the reference once the mistake is made in the oracle too. 1 "
        "explains nothing, 0 everything.",
    ),
    _term("tables", "expected", "How many the name table lists for this model."),
    _term("tables", "compared", "How many of them were compared."),
    _term("tables", "of all ranks", "What was compared between the processes that share the candidate's weights."),
    _term("tables", "wrong", "What is not the same on all ranks and must be, or the other way round."),
    _term("tables", "differ, elements that differ", "How many are not equal bit for bit."),
    _term("tables", "Paddle name", "The weight's name in the Paddle model."),
    _term("tables", "Hugging Face name", "The weight's name in the Hugging Face model, by the name table."),
    _term("tables", "problem", "What is wrong with the weight: values, shape, dtype, missing, or not in the table."),
    _term("tables", "looks like", "What the difference resembles, such as transposed; a guess, not a measurement."),
    _term("tables", "run", "One run of both models: a dtype and a way of running."),
    _term("tables", "error", "What the engine complained of in that run."),
    _term(
        "tables",
        "criterion",
        "The rule a number belongs to. All of them have to hold: hygiene, contract, noise and direct; weights have to "
        "be equal bit for bit.",
    ),
    _term("tables", "measure", "The number that is compared with the limit."),
    _term("tables", "largest allowed, limit", "The largest value that passes."),
    _term("tables", "value", "What was measured."),
    _term("tables", "times over", "The value as a multiple of the limit."),
    _term("tables", "applied here", "Whether any row of this report was judged by it."),
    _term("tables", "origin", "Where the number comes from: agreed, or measured, and how."),
    _term("tables", "reason", "Why the user changed the limit, in the user's words."),
    _term("tables", "rows", "How many rows the changed limit applies to."),
    _term("tables", "which means", "What the arithmetic says about what was proved."),
    _term("selftest", "fault", "A known bug that was put into the Paddle model on purpose."),
    _term("selftest", "weights", "The bit-for-bit comparison of the weights."),
    _term("selftest", "seen by", "The criteria that found the fault: in the module itself (own) or end to end (end)."),
    _term("selftest", "times rounding", "How large the fault's effect is, in units of what rounding explains."),
    _term("selftest", "found at", "The probe the comparison names first."),
    _term(
        "selftest",
        "outcome",
        "killed: found. SURVIVED: missed although it had to be found. within rounding: too small to tell in this "
        "precision. harmless: changes nothing and must pass.",
    ),
    _term("selftest", "cause", "The mistake the report names by itself."),
)

_BY_NAME = {name: term for term in reversed(GLOSSARY) for name in term.names}


def term_of(name: str) -> Term:
    """The entry a column head leads to.

    Raises:
        KeyError: The glossary has none.
    """
    return _BY_NAME[name]
