"""What a model computes, alone or as one rank of several; test_parallel.py starts this as a process for every rank.

Alone and divided run the same functions on the same checkpoints, so that a test only has to compare what came out.
"""

import os
import sys
from pathlib import Path

import numpy as np

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "pad_token_id": 5,
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
BIASES = {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True}
CASES = {  # name -> class and configuration
    "encoder": ("Model", BIASES),
    "masked_lm": ("ForMaskedLM", BIASES),
    "masked_lm without biases": ("ForMaskedLM", {"decoder_bias": False}),
    "masked_lm untied": ("ForMaskedLM", {**BIASES, "tie_word_embeddings": False}),
    "masked_lm sparse": ("ForMaskedLM", {**BIASES, "sparse_prediction": True}),
    "masked_lm vocabulary of 98": ("ForMaskedLM", {**BIASES, "vocab_size": 98}),  # 2 divides it, 4 does not
    "masked_lm vocabulary of 97": ("ForMaskedLM", {**BIASES, "vocab_size": 97, "tie_word_embeddings": False}),
    "token_classification": ("ForTokenClassification", {**BIASES, "num_labels": 3}),
    "question_answering": ("ForQuestionAnswering", {**BIASES, "num_labels": 2}),
    "sequence_classification": ("ForSequenceClassification", {**BIASES, "num_labels": 3, "classifier_pooling": "mean"}),
    "multiple_choice": ("ForMultipleChoice", BIASES),
}
INPUTS = ("eager", "blockwise", "packed", "packed eager")
LENGTHS = (20, 13, 7, 20)
UNCOUNTED = (8, 0, 0, 2)  # labels that do not count; both halves of the batch have 25 that do
STEPS = 3
DROPOUT = {f"{place}_dropout": 0.5 for place in ("attention", "mlp", "embedding", "classifier")}
SEED = 7


def model_class(case):
    from modernbert_align.models import modernbert

    return getattr(modernbert, f"ModernBert{CASES[case][0]}")


def write(case, folder):
    """A checkpoint whose every weight is random: ones and zeros would hide what is done with them."""
    import paddle

    from modernbert_align.models.modernbert import ModernBertConfig

    paddle.seed(0)
    model = model_class(case)(ModernBertConfig(**{**SIZES, **CASES[case][1]}))
    random = np.random.default_rng(0)
    for name, parameter in model.named_parameters():
        values = random.normal(1.0 if "norm.weight" in name else 0.0, 0.2, parameter.shape)
        parameter.set_value(values.astype("float32"))
    model.save_pretrained(str(folder), safe_serialization=True)


def read(case, folder, ranks=None, **changes):
    """The model in a folder; this rank's share of it with `ranks`."""
    place = {} if ranks is None else {"tensor_parallel_degree": ranks.degree, "tensor_parallel_rank": ranks.rank}
    model = model_class(case).from_pretrained(str(folder), **place, **changes)
    model.eval()
    return model


def inputs(case, kind, rows=slice(None)):
    """Arguments of a forward pass with labels; `rows` of a padded batch."""
    import paddle

    random = np.random.default_rng(1)
    longest = max(LENGTHS)
    there = np.arange(longest) < np.array(LENGTHS)[:, None]  # [4 longest]
    ids = np.where(there, random.integers(6, SIZES["vocab_size"], there.shape), SIZES["pad_token_id"])
    classes = {"token_classification": 3}.get(case, SIZES["vocab_size"])
    labels = np.where(there, random.integers(0, classes, there.shape), -100)
    labels[np.arange(longest) < np.array(UNCOUNTED)[:, None]] = -100
    found = {"input_ids": ids, "attention_mask": there.astype("int64")}
    if case.startswith("masked_lm") or case == "token_classification":
        found["labels"] = labels
    elif case == "question_answering":
        found |= {"start_positions": np.array([3, 0, 2, 19]), "end_positions": np.array([5, 12, 6, 40])}
    elif case == "sequence_classification":
        found["labels"] = np.array([0, 2, 1, 1])
    elif case == "multiple_choice":
        found = {name: values.reshape([2, 2, longest]) for name, values in found.items()} | {"labels": np.array([1, 0])}
    if kind.startswith("packed"):
        per_token = [name for name in ("input_ids", "labels") if name in found and found[name].size == ids.size]
        found |= {name: found[name].reshape(ids.shape)[there][None] for name in per_token}
        found["cu_seqlens"] = np.cumsum([0, *LENGTHS])
        del found["attention_mask"]
    tensors = {name: paddle.to_tensor(values[rows]) for name, values in found.items()}
    return tensors | ({"num_choices": 2} if kind.startswith("packed") and case == "multiple_choice" else {})


def outcome(case, model, arguments):
    """The outputs of a forward pass, and its loss as a tensor."""
    import paddle

    outputs = model(**arguments, return_dict=True)
    names = ("last_hidden_state", "logits", "start_logits", "end_logits", "loss")
    found = {name: outputs[name] for name in names if name in outputs and outputs[name] is not None}
    if case == "encoder":
        weights = np.random.default_rng(2).normal(size=found["last_hidden_state"].shape).astype("float32")
        found["loss"] = (found["last_hidden_state"] * paddle.to_tensor(weights)).mean()
    return found


def gradients(model):
    found = {f"gradient/{name}": array(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.clear_gradients()
    return found


def weights(model):
    return {f"weight/{name}": array(parameter) for name, parameter in model.named_parameters()}


def array(tensor):
    return np.ascontiguousarray(tensor.astype("float32").numpy())


def observe(case, model, kind):
    """Outputs, loss and gradients of one forward and backward pass."""
    model.config.attn_implementation = "blockwise" if kind in ("blockwise", "packed") else "eager"
    found = outcome(case, model, inputs(case, kind))
    found["loss"].backward()
    return {name: array(values) for name, values in found.items()} | gradients(model)


def attentions(case, model):
    model.config.attn_implementation = "eager"
    outputs = model(**inputs(case, "eager"), return_dict=True, output_attentions=True)
    return {f"attention/{index}": array(values) for index, values in enumerate(outputs.attentions)}


def train(case, model, rows=slice(None), wrap=lambda optimizer: optimizer):
    """Weights after a few steps; AdamW's epsilon is so large that the clipped norm decides how far they go."""
    import paddle

    model.train()
    optimizer = wrap(
        paddle.optimizer.AdamW(
            0.5, epsilon=1.0, parameters=model.parameters(), grad_clip=paddle.nn.ClipGradByGlobalNorm(0.05)
        )
    )
    losses = []
    for _ in range(STEPS):
        loss = outcome(case, model, inputs(case, "eager", rows))["loss"]
        losses.append(array(loss))
        loss.backward()
        optimizer.step()
        optimizer.clear_grad()
    return weights(model) | {"losses": np.stack(losses)}


class Ranks:
    """The processes that share one model, as fleet knows them."""

    def __init__(self, data, degree):
        from paddle.distributed import fleet

        strategy = fleet.DistributedStrategy()
        strategy.hybrid_configs = {"dp_degree": data, "mp_degree": degree, "pp_degree": 1, "sharding_degree": 1}
        strategy.tensor_parallel_configs = {"tensor_init_seed": SEED}
        fleet.init(is_collective=True, strategy=strategy)
        self.groups = fleet.get_hybrid_communicate_group()
        self.degree, self.data = degree, data
        self.rank = self.groups.get_model_parallel_rank()
        self.replica = self.groups.get_data_parallel_rank()

    def optimizer(self, inner):
        from paddle.distributed import fleet

        return fleet.distributed_optimizer(inner)


def every_case(folder, ranks):
    """Every head, every kind of input."""
    found = {}
    for case in CASES:
        model = read(case, folder / case, ranks)
        for kind in INPUTS:
            found |= {f"{case}/{kind}/{name}": values for name, values in observe(case, model, kind).items()}
        distributed = {name: np.array(bool(p.is_distributed)) for name, p in model.named_parameters()}
        found |= {f"{case}/distributed/{name}": value for name, value in distributed.items()}
    model = read("masked_lm", folder / "masked_lm", ranks)
    found |= {f"masked_lm/{name}": values for name, values in attentions("masked_lm", model).items()}
    half = read("masked_lm", folder / "masked_lm", ranks, dtype="bfloat16")
    return found | {f"bf16/{name}": values for name, values in observe("masked_lm", half, "eager").items()}


def training(folder, ranks):
    """Steps of an optimizer, through fleet's wrappers as far as they run here."""
    from paddle.distributed import fleet

    found = {}
    for case in ("masked_lm", "masked_lm untied", "masked_lm vocabulary of 97"):
        model = read(case, folder / case, ranks)
        fleet.distributed_model(model)  # makes what is not divided equal on all ranks
        found |= {f"{case}/{name}": values for name, values in train(case, model, wrap=ranks.optimizer).items()}
    return found


def recomputed(folder, ranks):
    """Gradients with and without recompute, without and with dropout."""
    found = {}
    for dropout, changes in (("without dropout", {}), ("with dropout", DROPOUT)):
        model = read("masked_lm", folder / "masked_lm", ranks, **changes)
        model.train()
        for how, reentrant in (("stored", None), ("recomputed", False), ("recomputed, reentrant", True)):
            seed()
            model.model.enable_recompute = reentrant is not None
            model.config.recompute_use_reentrant = bool(reentrant)
            values = observe("masked_lm", model, "eager")
            found |= {f"{dropout}/{how}/{name}": value for name, value in values.items()}
    return found


def seed():
    from paddle.distributed import fleet

    fleet.meta_parallel.model_parallel_random_seed(SEED)


def dropped(folder, ranks):
    """What dropout leaves, in training, of values that all ranks have and of values that only one has."""
    found = {}

    def record(name, layer):
        layer.register_forward_post_hook(lambda _layer, _inputs, output: found.update({name: array(output)}))

    model = read("token_classification", folder / "token_classification", ranks, **DROPOUT)
    model.train()
    first = model.model.layers[0]
    record("common/embeddings", model.model.embeddings.drop)
    record("common/attention output", first.attn.out_drop)
    record("common/classifier", model.drop)
    record("own/feed-forward units", first.mlp.drop)
    model.config.attn_implementation = "eager"
    seed()
    arguments = inputs("token_classification", "eager")
    del arguments["attention_mask"]  # zeros are those of dropout alone
    outputs = model(**arguments, return_dict=True, output_attentions=True)
    heads = outputs.attentions[0].split(ranks.degree, axis=1)[ranks.rank]
    found |= {"own/attention probabilities": array(heads), "common/logits": array(outputs.logits)}
    packed = observe("token_classification", model, "packed")  # calls the hooks again; blockwise attention drops too
    return found | {"common/packed logits": packed["logits"], "common/packed loss": packed["loss"]}


def fresh(folder, ranks):
    """Weights that are drawn: of a new model, and of a head that the checkpoint does not have."""
    import paddle

    from modernbert_align.models.modernbert import ModernBertConfig

    seed()
    case, place = "masked_lm untied", {"tensor_parallel_degree": ranks.degree, "tensor_parallel_rank": ranks.rank}
    model = model_class(case)(ModernBertConfig(**{**SIZES, **CASES[case][1], **place}))
    head = read("token_classification", folder / "masked_lm", ranks, num_labels=3)
    paddle.seed(100 + ranks.rank)
    unseeded = read("token_classification", folder / "masked_lm", ranks, num_labels=3)
    classifiers = {"classifier": head.classifier.weight, "classifier without a seed": unseeded.classifier.weight}
    return weights(model) | {name: array(weight) for name, weight in classifiers.items()}


def files(folder, ranks):
    """What ranks load from, and save to, files of their own and one for all."""
    from paddle.distributed import barrier

    found = {}
    for case in ("masked_lm", "masked_lm untied"):
        model = read(case, folder / case, ranks)
        found |= {f"{case}/whole/{name}": values for name, values in weights(model).items()}
        for kind, safe in (("safetensors", True), ("pdparams", False)):
            whole, shards = (folder / f"{case} {what} {kind}" for what in ("whole", "shards"))
            model.save_pretrained(str(whole), merge_tensor_parallel=True, safe_serialization=safe)
            model.save_pretrained(str(shards), safe_serialization=safe)
            barrier()
            again = read(case, shards, ranks)
            found |= {f"{case}/{kind}/{name}": values for name, values in weights(again).items()}
    return found


def refusals(folder, ranks):
    """What is said where a model cannot be divided as asked."""
    import paddle
    from paddle.distributed.fleet.layers.mpu.random import get_rng_state_tracker

    from modernbert_align.models.modernbert import ModernBertConfig, ModernBertModel

    def build(degree, rank, **changes):
        place = {"tensor_parallel_degree": degree, "tensor_parallel_rank": rank}
        return ModernBertModel(ModernBertConfig(**{**SIZES, **changes, **place}))

    def without_a_common_seed():
        model = build(ranks.degree, ranks.rank, embedding_dropout=0.5)
        paddle.seed(100 + ranks.rank)
        model.eval()
        model(**{"input_ids": inputs("encoder", "eager")["input_ids"]})  # has no dropout
        model.train()
        model(**{"input_ids": inputs("encoder", "eager")["input_ids"]})

    def without_states():
        seed()
        model = build(ranks.degree, ranks.rank, mlp_dropout=0.5)
        model.train()
        get_rng_state_tracker().reset()
        model(**{"input_ids": inputs("encoder", "eager")["input_ids"]})

    attempts = {
        "degree": lambda: build(4 if ranks.degree == 2 else 2, ranks.rank),
        "rank": lambda: build(ranks.degree, (ranks.rank + 1) % ranks.degree),
        "vocabulary": lambda: build(ranks.degree, ranks.rank).resize_token_embeddings(100),
        "seeds": without_a_common_seed,
        "random states": without_states,
    }
    said = {name: refusal(attempt) for name, attempt in attempts.items()}
    return {name: np.frombuffer(message.encode(), np.uint8) for name, message in said.items()}


def refusal(attempt):
    from modernbert_align.errors import AlignError

    try:
        attempt()
    except AlignError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"


def replicas(folder, ranks):
    """Data parallelism over divided models: each replica has half of the batch, and recompute is on."""
    from paddle.distributed.fleet.utils.hybrid_parallel_util import fused_allreduce_gradients

    half = slice(2 * ranks.replica, 2 * ranks.replica + 2)
    model = read("masked_lm", folder / "masked_lm", ranks)
    model.train()
    model.model.enable_recompute = True
    outcome("masked_lm", model, inputs("masked_lm", "eager", half))["loss"].backward()
    fused_allreduce_gradients(list(model.parameters()), ranks.groups)
    found = gradients(model)
    return found | train("masked_lm", model, half, ranks.optimizer)  # fleet's optimizer reduces by itself


LAUNCHES = {  # name -> data parallel degree, tensor parallel degree, jobs; fleet.init works once in a process
    "two": (1, 2, (every_case, training, recomputed, dropped, fresh, files, refusals)),
    "four": (1, 4, (every_case, training)),
    "two by two": (2, 2, (replicas,)),
}


def main(launch, folder):
    """One rank: run the jobs of a launch and write what came out."""
    from safetensors.numpy import save_file

    from modernbert_align.backends import runtime

    runtime.pin()
    from modernbert_align.backends.gloo import give_groups_own_stores

    give_groups_own_stores()
    data, degree, jobs = LAUNCHES[launch]
    ranks = Ranks(data, degree)
    found = {f"{job.__name__}/{name}": values for job in jobs for name, values in job(folder, ranks).items()}
    save_file(found, folder / f"{launch} {os.environ['PADDLE_TRAINER_ID']}.safetensors")
    leave()


def leave():
    """End this process when all have done their work; a few were seen to abort in the interpreter's shutdown."""
    from paddle.distributed import barrier

    barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
