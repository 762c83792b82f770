"""Text to token ids and back, from the vocabulary that a GGUF file holds."""

from runtime.tokenizer.stream import StreamDecoder
from runtime.tokenizer.tokenizer import Tokenizer

__all__ = ["StreamDecoder", "Tokenizer"]
