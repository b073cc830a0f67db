"""BERT (arXiv:1810.04805) on any tokenized corpus, without the prediction of next sentences.

    sslx tokenize 'CORPUS/*.jsonl.gz' WINDOWS --tokenizer tokenizer.json --length 128
    sslx train configs/bert_base.py data=tokens:WINDOWS windows=N --workdir runs/bert

N is the number of windows that `sslx tokenize` says; the default and 40 epochs make the published
million steps of 256. Google trains nine tenths of them at length 128 and the rest at 512: for that,
`sslx export` and `sslx import` between the two, or length=512 from the start. Other variants
(arXiv:1908.08962): tiny, mini, small, medium, large. With a vocabulary that sslx trained:
vocabulary_size=8192.

Departures: masks are drawn anew at every step, where Google repeats ten; an unknown word is never
chosen; the rate falls from where the warm-up ends, Google's from the start (.99e-4 after it); no
short windows, of which Google has a tenth. All but params, norms' statistics, softmaxes and the
loss is bfloat16, the residual stream too; Google's code is float32 throughout.

Published after the next-sentence task too: base, GLUE 79.6. Ours: no run yet.
"""

import math

import jax.numpy as jnp

from sslx.config import Config
from sslx.data.pipeline import Pipeline
from sslx.data.text.windows import Window
from sslx.evals.text import Perplexity
from sslx.models.text import MaskedLM, bert
from sslx.objectives.mlm import MLM, Masking
from sslx.optim import BERTAdam
from sslx.schedules import Linear, Warmup
from sslx.vocabulary import BERT, Vocabulary


def config(
    data: str = "tokens:windows",
    test: str = "",
    variant: str = "base",
    length: int = 128,
    epochs: int = 40,
    batch_size: int = 256,
    windows: int = 6_400_000,  # of the corpus
    vocabulary_size: int = BERT.size,
    learning_rate: float = 1e-4,
) -> Config:
    words = BERT if vocabulary_size == BERT.size else Vocabulary(vocabulary_size)
    window = Window(length, words)
    steps = epochs * windows // batch_size
    warm = min(10_000, steps // 10)
    encoder = bert(variant, words, max(512, length), dtype=jnp.bfloat16)
    held_out = {"perplexity": Perplexity(Pipeline(test, window), 256)} if test else {}
    return Config(
        objective=MLM(MaskedLM(encoder), Masking(most=math.ceil(0.15 * length))),
        data=Pipeline(data, window),
        optimizer=BERTAdam(Warmup(warm, Linear(learning_rate, 0.0, steps - warm))),
        steps=steps,
        batch_size=batch_size,
        evals=held_out,
        log_every=100,
        save_every=5000,
        eval_every=25_000,
    )
