"""Text: corpora, tokenizers, windows of tokens, and the sources made of them."""
