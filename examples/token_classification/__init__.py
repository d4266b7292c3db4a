"""Token classification of the standard library's sources, in Paddle and in PyTorch."""
