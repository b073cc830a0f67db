"""sslx: self-supervised pretraining in JAX.

Names load on first use: Grain's workers import `sslx.data`, and must not load jax with it.
"""

import importlib

_HOMES = {
    # a run
    "Config": "sslx.config",
    "load": "sslx.recipes",
    "fit": "sslx.run",
    "Run": "sslx.run",
    "Start": "sslx.start",
    "train_step": "sslx.engine",
    "TrainState": "sslx.state",
    # data and views
    "Pipeline": "sslx.data.pipeline",
    "arrays": "sslx.data.formats.arrays",
    "Image": "sslx.data.image",
    "Window": "sslx.data.text.windows",
    "Vocabulary": "sslx.vocabulary",
    "Views": "sslx.views",
    # methods and models
    "Objective": "sslx.objectives.base",
    "MAE": "sslx.objectives.mae",
    "Decoder": "sslx.objectives.mae",
    "SimCLR": "sslx.objectives.simclr",
    "BYOL": "sslx.objectives.byol",
    "MLM": "sslx.objectives.mlm",
    "Masking": "sslx.objectives.mlm",
    "Encoder": "sslx.models.encoder",
    "Signature": "sslx.models.encoder",
    "ViT": "sslx.models.vit",
    "vit": "sslx.models.vit",
    "ResNet": "sslx.models.resnet",
    "resnet": "sslx.models.resnet",
    "MaskedLM": "sslx.models.text",
    "bert": "sslx.models.text",
    "roberta": "sslx.models.text",
    "Siamese": "sslx.models.heads",
    "Head": "sslx.models.heads",
    # optimization
    "AdamW": "sslx.optim",
    "SGD": "sslx.optim",
    "LARS": "sslx.optim",
    "LAMB": "sslx.optim",
    "Grouped": "sslx.groups",
    "Group": "sslx.groups",
    "Constant": "sslx.schedules",
    "Linear": "sslx.schedules",
    "Cosine": "sslx.schedules",
    "Warmup": "sslx.schedules",
    "Mesh": "sslx.sharding",
    # results
    "Probes": "sslx.evals.probes",
    "KNN": "sslx.evals.knn",
    "LinearProbe": "sslx.evals.linear",
    "Health": "sslx.evals.health",
    "Checkpoints": "sslx.checkpoint",
    "Retention": "sslx.checkpoint",
}

# Files that recipes and notebooks name whole, as in sslx.views.mae(224).
_FILES = ("evals", "groups", "optim", "schedules", "views")

__version__ = "0.1.0"
__all__ = [*_HOMES, *_FILES]


def __getattr__(name: str):
    if name in _FILES:
        return importlib.import_module(f"sslx.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'sslx' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__():
    return [*__all__, "__version__"]
