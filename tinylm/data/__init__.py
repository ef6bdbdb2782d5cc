"""Text, tokenizers, tokens on disk, and batches."""

from .batches import fingerprint, get_batch, split
from .languages import Markov, Sentences
from .text import language_reference, read_chunks, read_text
from .tokenizer import TOKENIZERS, ByteTokenizer, CharTokenizer, Tokenizer, make_tokenizer
from .tokens import Tokens, open_tokens

__all__ = [
    "TOKENIZERS",
    "ByteTokenizer",
    "CharTokenizer",
    "Markov",
    "Sentences",
    "Tokenizer",
    "Tokens",
    "fingerprint",
    "get_batch",
    "language_reference",
    "make_tokenizer",
    "open_tokens",
    "read_chunks",
    "read_text",
    "split",
]
