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

    overrides: tuple[str, ...]
    temporary: float
    sent: float
    kinds: frozenset[str] = frozenset({"all-gather", "all-reduce"})


GATES = {
    "mae_vit_imagenet": Gate(("variant=L", "batch_size=1072"), 1.2, 2.6),
    "bert_base": Gate(("batch_size=1072",), 2.5, 1.0),
}


@pytest.mark.parametrize("recipe", GATES)
def test_a_recipe_fits_and_sends_what_it_should(recipe):
    gate = GATES[recipe]
    made = planned_elsewhere(recipe, gate.overrides, Machine("v5e:4x4"))
    said = report(made)
    assert made.fits and made.temporaries < gate.temporary * 1e9, said
    assert {x.kind for x in made.collectives} <= gate.kinds, said
    assert sum(x.bytes for x in made.collectives) < gate.sent * 1e9, said
    assert not any(x.far for x in made.collectives), said
    assert made.whole == () and made.replicated == () and made.bound == "compute", said
