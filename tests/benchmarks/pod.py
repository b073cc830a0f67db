"""Plans of the published recipes on pods that are not there, as the tables of launch/README.md.

    python tests/benchmarks/pod.py                     every recipe on v5e, v5p and many slices
    python tests/benchmarks/pod.py --set weak          as many examples a chip, 16 to 4,096 chips
    python tests/benchmarks/pod.py --set chips         every kind of chip that trains today
    python tests/benchmarks/pod.py --recipes mae-L --machines v5e:4x4 H100:32x8

Needs the libtpu that jax's `tpu` extra pins, no TPU, and minutes for each line, which is printed
when it is there. The exit code is 1 if one does not fit.
"""

import argparse
import math
import sys

from sslx.plan import Machine, Plan, advice, planned_elsewhere

RECIPES = {
    "mae-L": ("mae_vit_imagenet", "variant=L"),
    "mae-H": ("mae_vit_imagenet", "variant=H"),
    "simclr": ("simclr_resnet50_imagenet",),
    "byol": ("byol_resnet50_imagenet",),
    "bert-large": ("bert_base", "variant=large", "batch_size=8192"),
}
WEAK = {"mae-L": 16, "bert-large": 32}  # examples of a chip, those of the recipe on 256
SETS = {
    "pods": ("v5e:16x16", "v5p:8x8x8", "2*v5e:16x16", "16*v5e:16x16"),
    "weak": ("v5e:4x4", "v5e:16x16", "16*v5e:16x16"),
    "chips": ("2*v5e:16x16", "v5p:8x8x8", "v6e:16x16", "tpu7x:4x4x4"),
}
HEAD = (
    "recipe on machine | batch, a device | mesh | memory of one: state, temporary | "
    "sent within, between slices | floors: compute, memory, links, network | peak | verdict"
)


def machine(text: str) -> Machine:
    """`2*v5e:16x16` is two slices."""
    slices, star, topology = text.rpartition("*")
    return Machine(topology, int(slices) if star else 1)


def line(name: str, text: str, made: Plan) -> str:
    """A row of the table."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in made.mesh.items() if n > 1)
    floors = [f"{1e3 * s:.2f}" for s in made.floors.values()]
    longest = list(made.floors).index(made.bound) if floors else 0
    near, far = made.sent
    cells = (
        f"{name} on {text}",
        f"{made.batch_size:,}, {made.each:g}",
        mesh,
        f"{made.arguments / 1e9:.2f}, {made.temporaries / 1e9:.2f} GB",
        f"{near / 1e9:.2f}, {far / 1e9:.3f} GB",
        ", ".join(f"**{x}**" if i == longest else x for i, x in enumerate(floors)) + " ms",
        f"{made.share:.0%}",
        made.refused or advice(made).partition(":")[0],
    )
    return f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=SETS, default="pods")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES)
    parser.add_argument("--machines", nargs="+", metavar="[N*]TOPOLOGY")
    args = parser.parse_args()
    print(f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1), sep="\n")
    fit = True
    for name in args.recipes or (WEAK if args.set == "weak" else RECIPES):
        recipe, *overrides = RECIPES[name]
        for text in args.machines or SETS[args.set]:
            on = machine(text)
            if args.set == "weak":
                chips = on.slices * math.prod(map(int, on.topology.partition(":")[2].split("x")))
                overrides = [*overrides, f"batch_size={chips * WEAK[name]}"]
            made = planned_elsewhere(recipe, overrides, on)
            print(line(name, text, made), flush=True)
            fit = fit and made.fits
    return 0 if fit else 1


if __name__ == "__main__":
    sys.exit(main())
