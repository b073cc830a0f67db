"""Counting the floating-point operations of a function, from its trace."""

import math
from collections.abc import Callable

import jax


def flops(function: Callable, *args, **kwargs) -> int:
    """Multiplications and additions in matrix products and convolutions, bodies of scans as often
    as they run; a `while` of unknown length counts once. Traces only; arguments may be abstract.

    (XLA's own cost analysis counts the body of a scan once.)
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _count(jaxpr) -> int:
    return sum(_cost(equation) for equation in jaxpr.eqns)


def _cost(equation) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return (
            2
            * math.prod(equation.outvars[0].aval.shape)
            * math.prod(shape[axis] for axis in contracted)
        )
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = params["dimension_numbers"].rhs_spec[0]
        return (
            2 * math.prod(equation.outvars[0].aval.shape) * (math.prod(kernel) // kernel[outputs])
        )
    if name.startswith("dot_product_attention_"):  # cuDNN's: two products, four more backward
        q, k = (x.aval.shape for x in equation.invars[:2])  # [B, N, heads, d]
        return (4 if "_bwd" in name else 2) * 2 * math.prod(q) * k[1]
    inner = [_count(body) for value in params.values() for body in _bodies(value)]
    if name == "cond":
        return max(inner)
    return sum(inner) * (params["length"] if name == "scan" else 1)


def _bodies(value):
    """The jaxprs in a primitive's parameter: none, one, or a tuple of branches."""
    for part in value if isinstance(value, tuple | list) else (value,):
        part = getattr(part, "jaxpr", part)  # closed or open
        if hasattr(part, "eqns"):
            yield part
