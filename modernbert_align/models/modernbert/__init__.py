"""ModernBERT in PaddleNLP's file set: configuration, modeling, attention.

Importing a submodule imports paddle and paddlenlp.
"""
