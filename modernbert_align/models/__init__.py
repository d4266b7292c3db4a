"""Paddle models in PaddleNLP style."""
