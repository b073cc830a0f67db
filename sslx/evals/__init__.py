"""Frozen backbones become numbers: k-NN, linear probe, health; each yields (name, value)."""

from sslx.evals.features import Features, Pixels, extract
from sslx.evals.health import Health
from sslx.evals.knn import KNN
from sslx.evals.linear import Linear
from sslx.evals.probes import Probes

__all__ = ["KNN", "Features", "Health", "Linear", "Pixels", "Probes", "extract"]
