"""Frozen backbones become numbers: k-NN, linear probe, health; each yields (name, value)."""

from sslx.evals.features import Counts, Features, Pixels, extract
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import Linear
from sslx.evals.probes import Probes
from sslx.evals.text import Perplexity, fill

__all__ = [
    "KNN",
    "Counts",
    "Features",
    "Health",
    "Linear",
    "Perplexity",
    "Pixels",
    "Probes",
    "extract",
    "fill",
]
