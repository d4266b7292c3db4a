"""Writes the checkpoints that trainings start from, with transformers: `python -m examples.downstream.start DIR`.

One seeded encoder for all; for every seed a head of its own. The tokenizer is trained on the training texts.
"""

import sys
import tempfile
from pathlib import Path

import transformers

from examples.downstream import recipe as recipes
from modernbert_align.backends.fixture_writer import draw_model, train_tokenizer
from modernbert_align.core.fixtures import Fixture, InputSpec, TokenizerSpec

ENCODER_SEED = 0


def main(folder: Path) -> None:
    """Write `seed-N/start-hf` for every seed of the recipe."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    recipe, data = recipes.read_recipe(folder), recipes.read_data(folder)
    ids = TokenizerSpec(vocab_size=recipe.model["vocab_size"], pad_token_id=3, cls_token_id=1, sep_token_id=2)
    fixture = Fixture(
        name="downstream",
        weights="hf-init",
        seed=ENCODER_SEED,
        config={**recipe.model, "num_labels": len(recipe.labels)},
        tokenizer=ids,
        inputs=InputSpec(seed=0, lengths=(2, 2)),
    )
    with tempfile.TemporaryDirectory() as temp:
        corpus = Path(temp) / "corpus.txt"
        corpus.write_text("\n".join(example.text for example in data.train), encoding="utf-8")
        tokenizer = train_tokenizer(ids, corpus)
    architecture = recipes.ARCHITECTURES[recipe.head]
    encoder = draw_model(fixture, architecture, ENCODER_SEED).model.state_dict()
    for seed in recipe.seeds:
        model = draw_model(fixture, architecture, seed)
        model.model.load_state_dict(encoder)
        out = recipes.start_folder(folder, seed, "hf")
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
