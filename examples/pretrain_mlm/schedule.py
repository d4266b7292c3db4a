"""How learning rate and batch size change over a stage."""

import math

from examples.pretrain_mlm.recipe import Stage


def learning_rate(stage: Stage, step: int) -> float:
    """Trapezoid with a curved end: linear warm-up, constant, then 1 - sqrt.

    The first step of the warm-up already moves, the first of the decay still has the full rate.

    Args:
        step: Within the stage, from 0.

    Source: ModernBERT paper (arXiv 2412.13663), section 2.2.2; its decay after Hägele et al. 2024 (arXiv 2405.18392).
    """
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    into_decay = step - (stage.steps - stage.decay)
    if into_decay > 0:
        return stage.learning_rate * (1 - math.sqrt(into_decay / stage.decay))
    return stage.learning_rate


def batch_rows(stage: Stage, step: int) -> int:
    """Packed rows of a batch: growing one by one during the warm-up, every size for as many steps.

    Args:
        step: Within the stage, from 0.

    Source: ModernBERT paper, section 2.2.2, on the batch-size schedule.
    """
    if step >= stage.rows_warmup:
        return stage.rows
    return stage.first_rows + step * (stage.rows - stage.first_rows) // stage.rows_warmup


def rows_before(stage: Stage, step: int) -> int:
    """Packed rows of all steps of the stage before one."""
    warming = min(step, stage.rows_warmup)
    return sum(batch_rows(stage, earlier) for earlier in range(warming)) + (step - warming) * stage.rows
