"""Plans of the published recipes on pods that are not there, as the table of launch/README.md.

    python tests/benchmarks/pod.py [--machines v5e:16x16 2*v5e:16x16 ...] [--recipes mae-L ...]

Needs the libtpu that jax's `tpu` extra pins, no TPU, and minutes for each line. A line is printed
when it is there.
"""

import argparse

from sslx.plan import Machine, advice, planned_elsewhere

RECIPES = {
    "mae-L": ("mae_vit_imagenet", "variant=L"),
    "mae-H": ("mae_vit_imagenet", "variant=H"),
    "simclr": ("simclr_resnet50_imagenet",),
    "byol": ("byol_resnet50_imagenet",),
    "bert-large": ("bert_base", "variant=large"),
}
MACHINES = ("v5e:16x16", "v5p:8x8x8", "2*v5e:16x16", "16*v5e:16x16")
HEAD = (
    "recipe on machine | batch, a device | memory of one: state, temporary | T FLOP a step | "
    "sent in slice, between | floors: compute, memory, links, network | peak | verdict"
)


def line(name: str, text: str) -> str:
    recipe, *overrides = RECIPES[name]
    slices, star, topology = text.rpartition("*")
    machine = Machine(topology, int(slices) if star else 1)
    made = planned_elsewhere(recipe, overrides, machine)
    near, far = made.sent
    cells = (
        f"{name} on {text}",
        f"{made.batch_size:,}, {made.each:g}",
        f"{made.arguments / 1e9:.2f}, {made.temporaries / 1e9:.2f} GB",
        f"{made.flops / 1e12:,.0f}",
        f"{near / 1e9:.2f}, {far / 1e9:.2f} GB",
        ", ".join(f"{1e3 * s:.2f}" for s in made.floors.values()) + " ms",
        f"{made.share:.0%}",
        made.refused or advice(made),
    )
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--machines", nargs="+", default=MACHINES, metavar="[N*]TOPOLOGY")
    args = parser.parse_args()
    print(f"| {HEAD} |", "|" + "---|" * (HEAD.count("|") + 1), sep="\n")
    for name in args.recipes:
        for text in args.machines:
            print(line(name, text), flush=True)


if __name__ == "__main__":
    main()
