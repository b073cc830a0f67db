"""Published recipes, compiled for sixteen TPUs that are not there, by the TPU's own compiler.

Minutes each. Larger pods: `python tests/benchmarks/pod.py`.
"""

from dataclasses import dataclass

import pytest

from sslx.plan import Machine, planned_elsewhere, report

pytest.importorskip("libtpu", reason="NOT CHECKED: recipes on a TPU (pip install 'jax[tpu]')")


@dataclass(frozen=True)
class Gate:
    """Bounds of a recipe's step on v5e:4x4, at a batch whose length no axis of the model has.

    temporary  GB of a device
    sent       GB that a device sends within its slice
    kinds      of collectives that there may be
    """

    recipe: str
    overrides: tuple[str, ...]
    temporary: float
    sent: float
    kinds: frozenset[str] = frozenset({"all-gather", "all-reduce"})


# The state cut in two, of which there are eight copies; and over all sixteen.
GATES = [
    Gate("mae_vit_imagenet", ("variant=L", "batch_size=1072"), 1.45, 2.0),
    Gate("mae_vit_imagenet", ("variant=L", "batch_size=1072", "mesh.fsdp=-1"), 0.9, 2.6),
    Gate("bert_base", ("batch_size=1072",), 2.8, 0.55, frozenset({"all-reduce"})),
]


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: f"{gate.recipe}-{len(gate.overrides)}")
def test_a_recipe_fits_and_sends_what_it_should(gate):
    made = planned_elsewhere(gate.recipe, gate.overrides, Machine("v5e:4x4"))
    said = report(made)
    assert made.fits and made.temporaries < gate.temporary * 1e9, said
    assert {x.kind for x in made.collectives} <= gate.kinds, said
    assert sum(x.bytes for x in made.collectives) < gate.sent * 1e9, said
    assert not any(x.far for x in made.collectives), said
    assert made.whole == () and made.replicated == () and made.bound == "compute", said
