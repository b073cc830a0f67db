"""Which operations of a traced program lose precision in bfloat16: what item 11 of the contract
looks for."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

SENSITIVE = {"exp", "exp2", "log", "log1p", "expm1", "rsqrt", "logsumexp", "logistic"}
REDUCTIONS = {"reduce_sum", "reduce_prod", "cumsum", "cumlogsumexp", "reduce_window_sum"}
SHORT = (jnp.bfloat16, jnp.float16)


def half(value):
    """An objective or module, all of whose modules compute in bfloat16."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    names = {f.name for f in dataclasses.fields(value) if f.init} - {"parent", "name"}
    changed = {name: half(getattr(value, name)) for name in names}
    if "dtype" in names:
        changed["dtype"] = jnp.bfloat16
    changed = {name: x for name, x in changed.items() if x is not getattr(value, name)}
    if not changed:
        return value
    copy = (
        value.clone
        if isinstance(value, nn.Module)
        else functools.partial(dataclasses.replace, value)
    )
    return copy(**changed)


def losses(program: ClosedJaxpr) -> list[str]:
    """What a program computes in half precision and should not, each as a line.

    An exp, log, rsqrt or sum of half precision, and an exp of the product of two matrices that was
    rounded to half precision first, such as attention's scores.
    """
    return sorted(set(_walk(program.jaxpr, [False] * len(program.jaxpr.invars))[0]))


def _walk(jaxpr: Jaxpr, rounded: list[bool]) -> tuple[list[str], list[bool]]:
    """(lines, which outputs are products that were rounded), given which inputs are."""
    known = dict(zip(jaxpr.invars, rounded, strict=True))
    is_rounded = lambda x: not isinstance(x, Literal) and known.get(x, False)  # noqa: E731
    lines = []
    for eqn in jaxpr.eqns:
        name, inputs = eqn.primitive.name, [is_rounded(x) for x in eqn.invars]
        dtypes = [x.aval.dtype for x in eqn.invars if hasattr(x.aval, "dtype")]
        short = any(dtype in SHORT for dtype in dtypes)
        out = [any(inputs)] * len(eqn.outvars)
        if inner := list(_inner(eqn)):
            for program in inner:
                given = inputs[-len(program.invars) :] if program.invars else []
                more, results = _walk(program, given)
                lines += more
            out = results if len(results) == len(out) else out
        elif name == "dot_general":
            out = [eqn.outvars[0].aval.dtype in SHORT]
        elif name in SENSITIVE | REDUCTIONS and short:
            lines.append(f"{name} of {dtypes[0]}{list(eqn.invars[0].aval.shape)}")
        elif name == "exp" and any(inputs):
            lines.append(f"exp of a rounded product {list(eqn.invars[0].aval.shape)}")
        known.update(zip(eqn.outvars, out, strict=True))
    return lines, [is_rounded(x) for x in jaxpr.outvars]


def _inner(eqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(eqn.params, is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value
