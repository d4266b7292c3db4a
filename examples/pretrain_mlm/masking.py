"""Chooses the tokens to be predicted and hides them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IGNORED = -100  # label of a position that is not predicted

Ids = npt.NDArray[np.int64]


def mask_tokens(
    input_ids: Ids,
    generator: np.random.Generator,
    *,
    probability: float,
    masked: float,
    random: float,
    mask_token_id: int,
    special_ids: Sequence[int],
    vocab_size: int,
) -> tuple[Ids, Ids]:
    """Hide tokens and label them.

    Every token that is not special is chosen on its own; if none is, one of them is. Of those chosen, a share is
    replaced by [MASK], a share by any token that is not special, and the rest stays.

    Args:
        input_ids: Any shape; at least one token is not special.
        probability: Of a token to be chosen.
        masked, random: Shares of the chosen ones.

    Returns:
        Inputs and labels, both of the same shape; labels are `IGNORED` where nothing was chosen.

    Source: AnswerDotAI/ModernBERT, `SequencePacker.mlm_masking` of src/sequence_packer.py, for the shares.
    """
    special = np.isin(input_ids, special_ids)
    draws = np.where(special, 1.0, generator.random(input_ids.shape))
    chosen = draws < probability
    if not chosen.any():
        chosen.flat[int(draws.argmin())] = True
    branch = generator.random(input_ids.shape)
    ordinary = np.setdiff1d(np.arange(vocab_size), special_ids)
    others = generator.choice(ordinary, size=input_ids.shape)
    hidden = np.where(chosen & (branch < masked), mask_token_id, input_ids)
    hidden = np.where(chosen & (branch >= masked) & (branch < masked + random), others, hidden)
    return hidden, np.where(chosen, input_ids, IGNORED)
