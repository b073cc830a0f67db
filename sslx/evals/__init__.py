"""Evaluations of frozen encoders: k-NN, linear probe, health, perplexity, reconstructions."""

from sslx.evals.features import Features, extract
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import LinearProbe
from sslx.evals.probes import Probes
from sslx.evals.text import Perplexity, fill

__all__ = [
    "KNN",
    "Features",
    "Health",
    "LinearProbe",
    "Perplexity",
    "Probes",
    "extract",
    "fill",
]
