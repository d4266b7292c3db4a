"""ModernBERT for Paddle, with conversion from Hugging Face and a layer-by-layer proof that both agree.

Importing this package imports no framework.
"""

__version__ = "0.1.0"
