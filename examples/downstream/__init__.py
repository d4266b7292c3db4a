"""What the downstream examples share: one recipe in Paddle and in PyTorch, and the comparison of the curves."""
