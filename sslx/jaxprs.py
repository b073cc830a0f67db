"""What a traced program tells: where its numbers first stop being finite, what it reads when."""

import functools
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal, jaxpr_as_fun

from sslx.types import Array, Tree

INFINITE, NAN = 1, 2  # what an operation's results hold at worst

# Operations that compute what a jaxpr in their parameters says, of the same arguments.
CALLS = ("jit", "closed_call", "core_call", "remat2", "custom_jvp_call", "custom_vjp_call")

LIBRARIES = sysconfig.get_path("purelib")


# Operations that hand on what they are given: a NaN in them is from elsewhere, or a constant.
MOVES = ("broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "gather")
MOVES += ("dynamic_slice", "dynamic_update_slice", "expand_dims", "neg", "optimization_barrier")
MOVES += ("pad", "reshape", "rev", "sharding_constraint", "slice", "split", "squeeze", "transpose")


@dataclass(frozen=True)
class Note:
    """An operation in words; of a loop the notes of its body, and its turns in their order."""

    text: str
    body: tuple["Note", ...] = ()
    turns: tuple[int, ...] = ()


def first_nonfinite(function: Callable, *arguments: Tree) -> list[str]:
    """Which operations of `function(*arguments)` first give an infinity and a NaN, in words.

    Empty where all is finite. One program computes the function and looks at the result of every
    operation, in loops at every turn. An infinity alone may be meant, as a mask's.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    notes: list[Note] = []

    def watched(arguments):
        flags: list = []
        notes[:] = evaluated(closed, jax.tree.leaves(arguments), flags)[1]
        return flags

    flags = jax.device_get(jax.jit(watched)(arguments))
    lines = []
    for least, name in ((INFINITE, "infinity"), (NAN, "NaN")):
        if where := first(notes, flags, least):
            lines.append(f"the first {name} comes from {where}")
    if len(lines) == 2 and lines[0].partition("from")[2] == lines[1].partition("from")[2]:
        return lines[1:]
    return lines


def evaluated(
    closed: ClosedJaxpr, arguments: list, flags: list, scope: str = "", line: str = ""
) -> tuple[list, list[Note]]:
    """(results, notes) of a program, whose flags are added to `flags`, a tree for each note.

    `scope` is what it is part of; with `line` its operations are said to be there.
    """
    jaxpr, known, notes = closed.jaxpr, {}, []
    known |= dict(zip(jaxpr.constvars, closed.consts, strict=True))
    known |= dict(zip(jaxpr.invars, arguments, strict=True))
    for eqn in jaxpr.eqns:
        given = [x.val if isinstance(x, Literal) else known[x] for x in eqn.invars]
        name, at = eqn.primitive.name, line or line_of(eqn)
        within = "/".join(part for part in (scope, str(eqn.source_info.name_stack)) if part)
        if name in CALLS and (inner := called(eqn)):
            if eqn.params.get("differentiated"):  # else what is to be computed anew would be kept
                given = lax.optimization_barrier(given)
            # What jax.numpy compiles by itself was traced once, wherever it was called first.
            where = (within, at if name == "jit" else line)
            results, more = evaluated(inner, given, flags, *where)
            notes += more
        elif name == "scan":
            results, note, flag = scanned(eqn, given, within, line)
            notes, flags[len(flags) :] = [*notes, note], [flag]
        else:
            free = {x: known[x] for x in eqn.invars if not isinstance(x, Literal)}
            alone = jaxpr.replace(constvars=[], invars=[*free], outvars=[*eqn.outvars], eqns=[eqn])
            results = jaxpr_as_fun(ClosedJaxpr(alone, ()))(*free.values())
            if name not in MOVES and any(map(is_float, results)):
                notes.append(Note(name + at + f" in {within}" * bool(within)))
                flags.append(worst(results))
        known |= dict(zip(eqn.outvars, results, strict=True))
    return [x.val if isinstance(x, Literal) else known[x] for x in jaxpr.outvars], notes


def called(eqn: JaxprEqn) -> ClosedJaxpr | None:
    """The program that an operation calls."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if (inner := eqn.params.get(name)) is not None:
            return inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ())
    return None


def scanned(eqn: JaxprEqn, given: list, scope: str, line: str) -> tuple[list, Note, list]:
    """(results, note, flags [turns, ...]) of a loop."""
    consts, carries = eqn.params["num_consts"], eqn.params["num_carry"]
    fixed, start = given[:consts], given[consts : consts + carries]
    notes: list[Note] = []

    def body(carry, xs):
        flags: list = []
        results, inner = evaluated(eqn.params["jaxpr"], [*fixed, *carry, *xs], flags, scope, line)
        notes[:] = inner
        return results[:carries], (results[carries:], flags)

    options = {name: eqn.params[name] for name in ("length", "reverse")}
    carry, (stacked, flags) = lax.scan(body, start, given[consts + carries :], **options)
    turns = range(options["length"])
    turns = tuple(reversed(turns) if options["reverse"] else turns)
    return [*carry, *stacked], Note("", tuple(notes), turns), flags


def is_float(x: Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def worst(results: list[Array]) -> Array:
    """INFINITE or NAN where results are, else 0."""
    kinds = [
        jnp.where(jnp.isnan(x), NAN, jnp.where(jnp.isinf(x), INFINITE, 0)).astype(jnp.int8).max()
        for x in results
        if is_float(x) and x.size
    ]
    return functools.reduce(jnp.maximum, kinds, jnp.int8(0))


def first(notes, flags: list, least: int) -> str:
    """The first operation whose flag is at least `least`, in words; empty if there is none."""
    for note, flag in zip(notes, flags, strict=True):
        if not note.turns and flag >= least:
            return note.text
        for turn in note.turns:
            if where := first(note.body, jax.tree.map(lambda x, t=turn: x[t], flag), least):
                return f"{where}, at {turn} of 0 to {len(note.turns) - 1}"
    return ""


def line_of(eqn: JaxprEqn) -> str:
    """The file, line and function of the code that an operation stands for, outside of libraries;
    empty if there is none."""
    trace = eqn.source_info.traceback
    for frame in trace.frames if trace else ():
        if not frame.file_name.startswith((LIBRARIES, "<")):
            file, name = Path(frame.file_name).name, frame.function_name.split(".")[-1]
            return f" at {file}:{frame.line_num} ({name})"
    return ""


# ---- what is read when ----


def first_uses(function: Callable, *arguments: Tree) -> list[int]:
    """The numbers of the leaves of `arguments` in the order in which the program reads them first,
    without those that it never does."""
    closed = jax.make_jaxpr(function)(*arguments)
    numbers = dict(zip(closed.jaxpr.invars, range(len(closed.jaxpr.invars)), strict=True))
    return list(dict.fromkeys(uses(closed, numbers)))


def uses(closed: ClosedJaxpr, numbers: dict) -> Iterator[int]:
    """The numbers of the variables that a program reads, as often as it does."""
    for eqn in closed.jaxpr.eqns:
        given = [numbers.get(x) if not isinstance(x, Literal) else None for x in eqn.invars]
        inner = called(eqn) if eqn.primitive.name in (*CALLS, "scan") else None
        if inner is not None:
            pairs = zip(inner.jaxpr.invars, given, strict=True)
            yield from uses(inner, {x: n for x, n in pairs if n is not None})
        else:
            yield from (n for n in given if n is not None)
