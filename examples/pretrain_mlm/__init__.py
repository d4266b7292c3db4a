"""ModernBERT's pretraining in Paddle, small: masked tokens, packed rows, three stages, exact resume."""
