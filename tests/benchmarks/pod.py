"""Compile a recipe's train step for a TPU pod that is not there, with the TPU's own compiler.

    python tests/benchmarks/pod.py configs/mae_vit_imagenet.py variant=L batch_size=1024
        --topology v5e:4x4 [--slices N]

Needs the libtpu that jax's `tpu` extra pins, and no TPU. Prints bytes of one device, collectives
with their bytes, and arrays that still hold the whole batch: their count, and the largest by name.
A global batch that is also a dimension of the model (1024 is ViT-L's width) hides the last: choose
another for that, such as 16 devices * 67.
"""

import argparse
import collections
import functools
import json
import os
import re
import time

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

import jax
from jax.experimental import topologies

from sslx.engine import jitted_step
from sslx.recipes import load
from sslx.state import abstract_batch, abstract_state

SHAPE = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def compiled_step(config, topology, slices=1):
    """The executable of one train step on every device of `topology`, and its mesh."""
    pod = topologies.get_topology_desc(platform="tpu", topology_name=topology, num_slices=slices)
    mesh = config.mesh.build(pod.devices)
    with jax.set_mesh(mesh):
        step = jitted_step(config, mesh)
        given = abstract_state(config, mesh), abstract_batch(config, mesh)
        return step.lower(*given).compile(), mesh


def instructions(text):
    """(computation, name, shapes, opcode, rest of the line) of every instruction of an HLO text."""
    computation = ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            computation = line.removeprefix("ENTRY ").split()[0].lstrip("%")
        elif found := INSTRUCTION.match(line):
            yield computation, *found.groups()


def times(listing):
    """How often each computation runs: a loop's body as often as its condition's constant says."""
    limits = {c: int(rest.split(")")[0]) for c, _, shape, op, rest in listing if limit(shape, op)}
    calls = collections.defaultdict(list)
    for computation, _, _, opcode, rest in listing:
        if opcode == "while":
            test, body = (re.search(rf"{x}=%?([\w.-]+)", rest)[1] for x in ("condition", "body"))
            calls[body].append((computation, limits.get(test, 1)))
        for called in re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", rest):
            calls[called].append((computation, 1))

    @functools.cache
    def runs(computation):
        callers = calls.get(computation)
        return sum(runs(c) * n for c, n in callers) if callers else 1

    return runs


def limit(shape, opcode):
    return opcode == "constant" and shape.startswith("s32[]")


def estimate(listing):
    """Clock cycles of a step by the compiler's own cost model, collectives' waits not counted."""
    runs, cycles = times(listing), 0
    for computation, _, _, _, rest in listing:
        if found := re.search(r'"estimated_cycles":"(\d+)"', rest):
            cycles += int(found[1]) * runs(computation)
    return cycles


def size(shapes):
    """Bytes of all arrays that a shape, or a tuple of them, names."""
    total = 0
    for kind, dims in SHAPE.findall(shapes):
        bits = 8 if kind == "pred" else int(re.search(r"\d+", kind)[0])
        elements = 1
        for n in filter(None, dims.split(",")):
            elements *= int(n)
        total += elements * bits // 8
    return total


def collectives(listing):
    """Kind -> (instructions, bytes that one device's results hold in a step).

    An asynchronous one is written in many stages, which share its channel.
    """
    runs, seen = times(listing), {}
    for computation, _, shapes, opcode, rest in listing:
        kind = opcode.removesuffix("-start")
        if kind in KINDS:
            arrays = re.findall(r"\w+\[[\d,]*\]", shapes)
            arrays = arrays[1:2] if opcode.endswith("-start") else arrays  # operand, result, ...
            channel = re.search(r"channel_id=(\d+)", rest)
            total = sum(map(size, arrays)) * runs(computation)
            key = kind, channel[1] if channel else len(seen)
            seen[key] = max(total, seen.get(key, 0))
    found = collections.defaultdict(lambda: (0, 0))
    for (kind, _), total in seen.items():
        found[kind] = found[kind][0] + 1, found[kind][1] + total
    return dict(found)


def whole_batch(listing, batch_size, shards):
    """Arrays with a dimension of the global batch, on a device that should hold a part of it."""
    found = {}
    for _, _, shapes, opcode, rest in listing:
        if shards == 1 or opcode in ("parameter", "bitcast", "get-tuple-element", "tuple"):
            continue
        for kind, dims in SHAPE.findall(shapes):
            if str(batch_size) in dims.split(","):
                name = re.search(r'op_name="([^"]*)"', rest)
                array = f"{kind}[{dims}]"
                found[array] = (size(array), opcode, name[1] if name else "")
    return sorted(((*facts, array) for array, facts in found.items()), reverse=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--slices", type=int, default=1)
    parser.add_argument("--hlo", help="write the optimized HLO to this file")
    args = parser.parse_intermixed_args()
    config = load(args.recipe, *args.overrides)
    start = time.perf_counter()
    executable, mesh = compiled_step(config, args.topology, args.slices)
    seconds = time.perf_counter() - start
    text, memory = executable.as_text(), executable.memory_analysis()
    if args.hlo:
        with open(args.hlo, "w") as file:
            file.write(text)
    listing = list(instructions(text))
    print(f"{args.recipe} {' '.join(args.overrides)} on {args.topology} x {args.slices}")
    print(f"mesh {json.dumps(dict(mesh.shape))}, batch {config.batch_size}, {seconds:.0f} s")
    for name in ("temp", "argument", "output", "alias"):
        print(f"  {name:20}{getattr(memory, f'{name}_size_in_bytes') / 1e9:9.3f} GB a device")
    print(f"  {'estimated':20}{estimate(listing) / 1e6:9.1f} million cycles a step")
    for kind, (count, total) in sorted(collectives(listing).items()):
        print(f"  {kind:20}{total / 1e9:9.3f} GB a step and device, {count} instructions")
    shards = mesh.shape["replica"] * mesh.shape["fsdp"]
    whole = whole_batch(listing, config.batch_size, shards)
    print(f"  arrays of the whole batch: {len(whole)}")
    for total, opcode, name, array in whole[:12]:
        print(f"    {total / 1e6:9.3f} MB {array} {opcode} {name}")


if __name__ == "__main__":
    main()
