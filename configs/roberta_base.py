"""RoBERTa (arXiv:1907.11692) on any tokenized corpus, by fairseq's numbers.

    sslx tokenize 'CORPUS/*.jsonl.gz' WINDOWS --tokenizer tokenizer.json --length 512
    sslx train configs/roberta_base.py data=tokens:WINDOWS windows=N --workdir runs/roberta

N is the number of windows that `sslx tokenize` says; the default and 40 epochs make the 125,000
steps of 2,048 of `examples/roberta/config/pretraining/base.yaml`. Its learning rates: 1e-4 for
batches of 256, 5e-4 for 2,048, 7e-4 for 8,192. On few devices add accumulate=16. With a vocabulary
that sslx trained: vocabulary_size=32768.

Published: base, 500,000 steps of 8,192 on 160 GB, MNLI 87.6. Ours: no run yet.

Departures: special tokens are never masked, which fairseq does; windows may end within a sentence;
the residual stream is bfloat16, fairseq's is float16 (`--fp16`, with a scaler).
"""

import math

import jax.numpy as jnp

from sslx.config import Config
from sslx.data.pipeline import Pipeline
from sslx.data.text.windows import Window
from sslx.evals.text import Perplexity
from sslx.models.text import MaskedLM, roberta
from sslx.objectives.mlm import MLM, Masking
from sslx.optim import AdamW
from sslx.schedules import Polynomial, Warmup
from sslx.vocabulary import ROBERTA, Vocabulary


def config(
    data: str = "tokens:windows",
    test: str = "",
    variant: str = "base",
    length: int = 512,
    epochs: int = 40,
    batch_size: int = 2048,
    windows: int = 6_400_000,  # of the corpus
    vocabulary_size: int = ROBERTA.size,
    learning_rate: float = 5e-4,
) -> Config:
    words = ROBERTA if vocabulary_size == ROBERTA.size else Vocabulary(vocabulary_size)
    window = Window(length, words)
    steps = epochs * windows // batch_size
    warm = min(10_000, steps // 10)
    encoder = roberta(variant, words, max(512, length), dtype=jnp.bfloat16)
    masking = Masking(most=math.ceil(0.15 * length), count="random", swaps="ordinary")
    held_out = {"perplexity": Perplexity(Pipeline(test, window), 256)} if test else {}
    return Config(
        objective=MLM(MaskedLM(encoder), masking, epsilon=0.0),
        data=Pipeline(data, window),
        optimizer=AdamW(
            Warmup(warm, Polynomial(learning_rate, 0.0, steps - warm)),
            b2=0.98,
            epsilon=1e-6,
            weight_decay=0.01,
            no_decay="",  # fairseq's decays biases and norms too
        ),
        steps=steps,
        batch_size=batch_size,
        evals=held_out,
        log_every=100,
        save_every=2500,
        eval_every=12_500,
    )
