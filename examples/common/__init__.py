"""What several examples share: text that is on every machine, and a tokenizer trained on it."""
