"""The compilers that pyproject.toml lets in compute what is written."""

import os
import subprocess
import sys

# In a process of its own: what is wrong may be a segmentation fault. Without conftest's flags, for
# users have none.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np

random = np.random.default_rng(0)
m, rows = (random.normal(size=shape).astype(np.float32) for shape in ((3, 3), (32769, 3)))
got = jax.jit(jax.vmap(lambda row: ((m @ row) ** 2).sum()))(rows)
np.testing.assert_allclose(got, ((rows.astype(np.float64) @ m.T) ** 2).sum(1), rtol=1e-5)

a, b = (random.normal(size=(3, 1, 2, 2, 8, 8, 8)).astype(np.float32) for _ in range(2))
got = jax.jit(lambda a, b: (a * b).sum(3))(a, b)
np.testing.assert_allclose(got, (a.astype(np.float64) * b).sum(3), rtol=1e-4, atol=1e-6)
"""


def test_sums_on_the_cpu_are_right():
    """jaxlib 0.10.2 errs by 35 % in the first (jax-ml/jax#39103) and crashes in the second."""
    env = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"}
    subprocess.run([sys.executable, "-c", PROGRAM], env=env, check=True)
