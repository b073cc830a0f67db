"""What a compiled program says of itself: its collectives, its loops, its arrays.

Everything is read from the text of the optimized HLO. A loop's body counts as often as it runs,
where its condition compares with a constant, as a scan's does.
"""

import collections
import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SHAPE = re.compile(r"\b(pred|bf16|c64|c128|f8\w+|[suf]\d+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
HOSTED = {x.upper().replace("-", "_"): x for x in KINDS}  # as a TPU's host names them
BITS = {"pred": 8, "c64": 64, "c128": 128}
IOTA = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
MESH = re.compile(
    rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((?:{IOTA}|([\d,]+))\))? ?\{{([^}}]*)\}}"
)
FREE = ("parameter", "bitcast", "get-tuple-element", "tuple")  # they make no array of their own


@dataclass(frozen=True)
class Instruction:
    """One line of an HLO text: `name = shapes opcode(rest`, in a computation."""

    computation: str
    name: str
    shapes: str
    opcode: str
    rest: str

    @property
    def place(self) -> str:
        """Where in the traced program it comes from."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind and reach: what one device sends in a step.

    far    whether they go between slices (TPU) or nodes (GPU)
    count  instructions of the program
    bytes  that a device sends, in a ring
    """

    kind: str
    far: bool
    count: int
    bytes: float


def instructions(text: str) -> list[Instruction]:
    """Every instruction of an HLO text."""
    found, computation = [], ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        elif match := INSTRUCTION.match(line):
            found.append(Instruction(computation, *match.groups()))
    return found


def size(shapes: str) -> int:
    """Bytes of all arrays that a shape, or a tuple of them, names."""
    total = 0
    for kind, dims in SHAPE.findall(shapes):
        bits = BITS.get(kind) or int(re.search(r"\d+", kind)[0])
        elements = np.prod([int(n) for n in dims.split(",") if n], dtype=np.int64)
        total += int(elements) * bits // 8
    return total


def runs(listing: Sequence[Instruction]):
    """A function: how often each computation runs in a step."""
    limits = {
        x.computation: int(x.rest.split(")")[0])
        for x in listing
        if x.opcode == "constant" and x.shapes.startswith("s32[]")
    }
    calls = collections.defaultdict(list)
    for x in listing:
        if x.opcode == "while":
            test, body = (re.search(rf"{k}=%?([\w.-]+)", x.rest)[1] for k in ("condition", "body"))
            known = re.search(r'"known_trip_count":\{"n":"(\d+)"', x.rest)
            calls[body].append((x.computation, int(known[1]) if known else limits.get(test, 1)))
        for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", x.rest):
            calls[called].append((x.computation, 1))

    @functools.cache
    def times(computation: str) -> int:
        callers = calls.get(computation)
        return sum(times(c) * n for c, n in callers) if callers else 1

    return times


def groups(rest: str) -> list[list[int]]:
    """The groups of partitions that a collective joins; [] where it says none, which is all.

    Raises ValueError for groups in a form that is not known: taken for all, they would be counted
    as too many.
    """
    if pairs := re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", rest):
        return [[*map(int, pair.split(","))] for pair in re.findall(r"\{([\d,]+)\}", pairs[1])]
    if mesh := MESH.search(rest):
        return _of_mesh(*mesh.groups())
    if iota := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={IOTA}", rest):
        rows, columns, *dims = iota.groups()
        return _iota(*dims).reshape(int(rows), int(columns)).tolist()
    if listed := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", rest):
        return [[*map(int, group.split(","))] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    if unread := re.search(r"(?:replica_groups|source_target_pairs)=(?!\{\}).{,80}", rest):
        raise ValueError(f"The compiler wrote {unread[0]!r}, which sslx.hlo does not read.")
    return []


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Numbers from 0 in an array of these dimensions, transposed."""
    shape = _numbers(dims)
    ids = np.arange(np.prod(shape)).reshape(shape)
    return ids.transpose(_numbers(order)) if order else ids


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _of_mesh(
    axes: str, dims: str | None, order: str | None, listed: str | None, joined: str
) -> list[list[int]]:
    """Groups along some axes of a mesh: `'a'=2,'b'=4` and `'b'`, or `'b':(2)2`, which is the part
    of size 2 of b that comes after one of size 2. Its devices are numbered, or `listed`."""
    sizes = {name: int(n) for name, n in re.findall(r"'([^']+)'=(\d+)", axes)}
    cut = {name: (1, size, 1) for name, size in sizes.items()}
    parts = re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", joined)
    for name, before, size in parts:
        if size:
            cut[name] = int(before), int(size), sizes[name] // (int(before) * int(size))
    names = [name for name, _, _ in parts]
    ids = _iota(dims, order) if dims else np.arange(np.prod([*sizes.values()]))
    ids = np.array(_numbers(listed)) if listed else ids
    ids = ids.reshape([n for name in sizes for n in cut[name]])
    places = {name: 3 * i + 1 for i, name in enumerate(sizes)}
    last = [places[name] for name in names]
    count = int(np.prod([cut[name][1] for name in names]))
    return np.moveaxis(ids, last, range(-len(last), 0)).reshape(-1, count).tolist()


def sent(kind: str, result: int, count: int) -> float:
    """Bytes that a device sends for a collective of `count` devices whose result has `result`
    bytes on each, in a ring: no way needs less."""
    share = (count - 1) / count
    return (
        result
        * {
            "all-gather": share,
            "all-reduce": 2 * share,
            "reduce-scatter": count - 1.0,
            "all-to-all": share,
            "collective-permute": 1.0,
        }[kind]
    )


def legs(kind: str, result: int, near: int, far: int) -> tuple[float, float]:
    """Bytes that a device sends within its island and to others, for a collective over `far`
    islands of `near` devices: the least that can go between islands, each device its own part."""
    if kind == "collective-permute":
        return (0.0, float(result)) if far > 1 else (float(result), 0.0)
    if kind == "all-to-all":
        between = result * (far - 1) / far
        return sent(kind, result, near * far) - between, between
    if kind == "reduce-scatter":
        return sent(kind, result * far, near), sent(kind, result, far)
    return sent(kind, result, near), sent(kind, result, far) / near


def collectives(listing: Sequence[Instruction], islands: Sequence[int]) -> list[Collective]:
    """What a device sends in a step, by kind and reach; `islands` is each partition's slice or
    node. An asynchronous collective is written in many stages, which share its channel. Between
    slices of TPUs the host does it: the device sends it its part."""
    times, seen = runs(listing), {}
    for x in listing:
        arrays = re.findall(r"\w+\[[\d,]*\]", x.shapes)
        if x.opcode == "send" and (hosted := re.search(r'_transfer_type="(\w+)"', x.rest)):
            kind = HOSTED.get(hosted[1], "collective-permute")
            part = sent(kind, size(arrays[0]), len(set(islands)))
            seen[kind, True, len(seen)] = part * times(x.computation)
            continue
        kind = x.opcode.removesuffix("-start")
        if kind not in KINDS:
            continue
        if x.opcode.endswith("-start") and kind != "all-reduce":  # operands, results, and words
            arrays = [array for array in arrays if array != "u32[]"]
            arrays = arrays[len(arrays) // 2 :]
        joined = groups(x.rest) or [[*range(len(islands))]]
        crowds = [collections.Counter(islands[i] for i in group) for group in joined]
        near, far = (max(map(f, crowds)) for f in (lambda c: max(c.values()), len))
        parts = legs(kind, sum(map(size, arrays)), near, far)
        channel = re.search(r"channel_id=(\d+)", x.rest)
        number = channel[1] if channel else len(seen)
        for between, part in zip((False, True), parts, strict=True):
            if part or between == (far > 1):
                key = kind, between, number
                seen[key] = max(part * times(x.computation), seen.get(key, 0))
    found = collections.defaultdict(list)
    for (kind, far, _), total in seen.items():
        found[kind, far].append(total)
    return [Collective(*key, len(each), sum(each)) for key, each in sorted(found.items())]


def arrays(listing: Sequence[Instruction]) -> Iterator[tuple[int, str, tuple[int, ...], str]]:
    """(bytes, dtype, shape, place) of every array that the program makes, largest first, each
    shape once."""
    found = {}
    for x in listing:
        if x.opcode in FREE:
            continue
        for kind, dims in SHAPE.findall(x.shapes):
            shape = tuple(int(n) for n in dims.split(",") if n)
            found.setdefault((kind, shape), (size(f"{kind}[{dims}]"), kind, shape, x.place))
    yield from sorted(found.values(), key=lambda array: -array[0])


def memory(assignment: str) -> dict[str, int]:
    """A device's memory by use, from the text of a TPU program's buffer assignment: the bytes of
    arguments, outputs, what is both, and temporaries, in the memory that arrays share (color 0).
    """
    used = dict.fromkeys(("arguments", "outputs", "aliased", "temporaries"), 0)
    for size, kind in re.findall(r"^allocation \d+: size (\d+), (.*):$", assignment, re.M):
        if re.search(r"\bcolor [1-9]", kind):
            continue
        argument, output = "parameter" in kind, "output shape" in kind or "maybe-live-out" in kind
        used["arguments"] += int(size) * argument
        used["outputs"] += int(size) * output
        used["aliased"] += int(size) * (argument and output)
        used["temporaries"] += int(size) * ("preallocated-temp" in kind)
    return used
