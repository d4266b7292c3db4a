"""Text classification of the standard library's functions, in Paddle and in PyTorch."""
