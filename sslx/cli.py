"""The command line. Heavy imports happen in the command that needs them."""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

EPILOG = """\
name=value fills an argument of the recipe's config(), a.b.c=value replaces along a path of it;
`sslx show RECIPE` prints every path."""


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are one line, `--traceback` shows the rest."""
    root = parser()
    arguments, rest = root.parse_known_args(argv)  # argparse ends name=value at the first flag
    if bad := [x for x in rest if x.startswith("-") or "overrides" not in arguments]:
        root.error(f"unrecognized arguments: {' '.join(bad)}")
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    try:
        return arguments.run(arguments) or 0
    except KeyboardInterrupt:
        return fail("interrupted", 130)
    except Exception as error:
        if arguments.traceback or not mendable(error):
            raise
        return fail(str(error), getattr(error, "code", 1))


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "sslx", description="Self-supervised pretraining in JAX.", epilog=EPILOG
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    def command(run, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(run.__name__.rstrip("_"), help=summary, description=summary)
        added.add_argument("--traceback", action="store_true", help="show where an error arose")
        added.set_defaults(run=run)
        return added

    def recipe(added: argparse.ArgumentParser, *flags: str, **options) -> None:
        added.add_argument(*flags or ["recipe"], type=Path, metavar="RECIPE", **options)
        added.add_argument("overrides", nargs="*", metavar="name=value")

    train_ = command(train, "start a run, or resume it where it stopped")
    recipe(train_, help="a recipe, or the directory of a run to resume")
    train_.add_argument("--workdir", type=Path, metavar="RUN", help="default: runs/RECIPE")
    train_.add_argument(
        "--accept-changes", action="store_true", help="resume although the recipe has changed"
    )
    eval_added = command(eval_, "probe a run's features beside random init and raw input")
    eval_added.add_argument("workdir", type=Path, metavar="RUN")
    eval_added.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="labelled URIs")
    eval_added.add_argument("--on", metavar="knn,linear,health", help="default: the recipe's")
    eval_added.add_argument("--step", type=int, help="default: the newest checkpoint")
    export_ = command(export, "write a run's weights for transformers or timm; needs no torch")
    export_.add_argument("workdir", type=Path, metavar="RUN")
    export_.add_argument("out", type=Path, metavar="OUT")
    export_.add_argument("--format", choices=("hf", "timm"), default="hf")
    export_.add_argument("--step", type=int, help="default: the newest checkpoint")
    import_added = command(
        import_, "make a Hugging Face ViT-MAE, BERT or RoBERTa a run to continue or probe"
    )
    import_added.add_argument("source", type=Path, metavar="DIR")
    import_added.add_argument("workdir", type=Path, metavar="RUN")
    recipe(import_added, "--recipe", help="default: the model's own, in configs")
    tokenize_ = command(tokenize, "turn text into windows of tokens, once; interrupted, it goes on")
    tokenize_.add_argument(
        "source", metavar="SOURCE", help="a folder, file or glob of .txt, .jsonl (.gz), .parquet"
    )
    tokenize_.add_argument("out", metavar="OUT", help="then tokens:OUT is a source")
    which = tokenize_.add_mutually_exclusive_group()
    which.add_argument("--vocab", type=int, metavar="N", help="train a tokenizer of N ids")
    which.add_argument("--tokenizer", metavar="F", help="a tokenizer.json, or its folder")
    tokenize_.add_argument("--kind", choices=("wordpiece", "bpe"), default="wordpiece")
    tokenize_.add_argument("--length", type=int, default=128, metavar="L", help="of a window")
    tokenize_.add_argument("--workers", type=int, metavar="N", help="default: one for each core")
    tokenize_.add_argument(
        "--process", default="0/1", metavar="I/N", help="of N machines that share OUT, the I-th"
    )
    show_ = command(show, "print the config, params, shardings and FLOPs of a recipe")
    recipe(show_)
    return root


def mendable(error: Exception) -> bool:
    """Errors that carry their own advice, as opposed to bugs."""
    from sslx.checkpoint import CheckpointError
    from sslx.signals import Interrupted
    from sslx.train import Diverged

    return isinstance(error, ValueError | OSError | CheckpointError | Diverged | Interrupted)


def fail(text: str, code: int) -> int:
    print(f"sslx: {text}", file=sys.stderr)
    return code


# ---- commands ----


def train(arguments) -> None:
    from sslx.config import ConfigError, Recipe, recipe_of

    path, run = arguments.recipe, arguments.workdir
    if path.is_dir():
        if run is not None:
            raise ConfigError(f"{path} is a run and resumes where it is: leave out --workdir.")
        stored = recipe_of(path)
        recipe, run = Recipe(stored.path, (*stored.overrides, *arguments.overrides)), path
    else:
        recipe = Recipe(path, tuple(arguments.overrides))
        run = run or Path("runs") / path.stem
    config = recipe.load()
    refuse_changes(config, run, arguments.accept_changes)
    start_jax()
    import jax

    from sslx import train as engine

    engine.check(config)  # what cannot work fails before it is saved
    if jax.process_index() == 0:
        recipe.save(run)
    engine.train(config, run)


def refuse_changes(config, run: Path, accepted: bool) -> None:
    """Raise ConfigError when `run` was started as another run, with the difference."""
    from sslx.config import ConfigError, difference, recipe_of

    if not (run / "overrides.json").is_file() or accepted:
        return
    changes = difference(recipe_of(run).load(), config)
    if changes:
        raise ConfigError(
            f"{run} was started with another recipe:\n  "
            + "\n  ".join(changes)
            + "\nuse another --workdir, or go on all the same with --accept-changes."
        )


def eval_(arguments) -> None:
    import json

    from rich.console import Console
    from rich.table import Table

    start_jax()
    import jax

    from sslx.evals.features import Counts, Pixels
    from sslx.models.text import TextEncoder
    from sslx.sharding import batch_sharding
    from sslx.train import fresh_state, restored

    config, mesh, step, state = restored(arguments.workdir, arguments.step)
    probes, place = probes_of(config, arguments.data, arguments.on), batch_sharding(mesh)
    with jax.set_mesh(mesh):

        def measure(of):
            return dict(probes(config.objective, of.params, of.buffers, config.views, place))

        scores = {f"step {step}": measure(state)}
        scores["random init"] = measure(fresh_state(config, mesh))
        encoder, _ = config.objective.backbone(state.params, state.buffers)
        if isinstance(encoder, TextEncoder):
            name, floor = "word counts", Counts(encoder.vocabulary.size)
        else:
            name, floor = "pixels", Pixels()
        scores[name] = dict(probes.measure(floor, {}, config.views, place))
    if jax.process_index():
        return
    table = Table("", *scores)
    for name in scores[f"step {step}"]:
        table.add_row(name, *(f"{of[name]:.4g}" if name in of else "" for of in scores.values()))
    Console().print(table)
    path = arguments.workdir / "evals.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    if arguments.data:
        scores = {f"{name} on {' '.join(arguments.data)}": of for name, of in scores.items()}
    merged = before | {name: before.get(name, {}) | of for name, of in scores.items()}
    path.write_text(json.dumps(merged, indent=1) + "\n")


def probes_of(config, data: list[str] | None, on: str | None):
    """The recipe's probes, or the default ones, on other data or only some of them."""
    from sslx.config import ConfigError, unknown
    from sslx.evals.probes import Probes

    found = [e for e in config.evals.values() if isinstance(e, Probes)]
    if not found and not data:
        raise ConfigError("The recipe names no labelled data: give --data TRAIN TEST.")
    if data:
        sets = [dataclasses.replace(config.data, source=uri, labels=True) for uri in data]
        probes = dataclasses.replace(
            found[0] if found else Probes(*sets), train=sets[0], test=sets[1]
        )
    else:
        probes = found[0]
    known = {type(probe).__name__.lower(): probe for probe in probes.on}
    names = on.split(",") if on else list(known)
    for name in names:
        if name not in known:
            raise unknown(name, known, "--on")
    return dataclasses.replace(probes, on=tuple(known[name] for name in names))


def export(arguments) -> None:
    start_jax()
    import json

    import jax
    import numpy as np

    from sslx.config import ConfigError, printed
    from sslx.export import hf, timm
    from sslx.models.text import TextEncoder
    from sslx.train import restored

    run, out = arguments.workdir, arguments.out
    config, mesh, step, state = restored(run, arguments.step)
    params, buffers = jax.tree.map(np.asarray, jax.device_get((state.params, state.buffers)))
    encoder, _ = config.objective.backbone(params, buffers)
    if arguments.format == "timm":
        if isinstance(encoder, TextEncoder):
            raise ConfigError("timm has no encoders of text: use --format hf.")
        size, _ = rendering(config, mesh)
        path = out if out.suffix == ".safetensors" else out / "model.safetensors"
        timm.save(config.objective, params, path, size, buffers)
    else:
        scores = run / "evals.json"
        numbers = json.loads(scores.read_text()).get(f"step {step}", {}) if scores.exists() else {}
        card = hf.Card(step, printed(config), numbers)
        if isinstance(encoder, TextEncoder):
            hf.save_text(config.objective, params, out, card, tokenizer_of(config))
        else:
            size, statistics = rendering(config, mesh)
            hf.save(config.objective, params, out, size, statistics, card, buffers)
    print(f"{out}: step {step} of {run}, for {arguments.format}")


def tokenizer_of(config) -> str | None:
    """The folder of the tokenizer that the training windows were written with, if it is there."""
    try:
        source, _ = config.data.mixture[0]
        return os.path.expanduser(source.path)
    except (ValueError, OSError, AttributeError) as error:
        print(f"sslx: exported without a tokenizer: {error}", file=sys.stderr)
        return None


def rendering(config, mesh) -> tuple[tuple[int, int], tuple | None]:
    """What the eval view makes of a picture: its size, and the (mean, std) of Normalize if any."""
    import jax

    from sslx.train import abstract_batch, new_key
    from sslx.views import Chain, Normalize

    view = config.views.eval
    image = jax.eval_shape(view, new_key(config), abstract_batch(config, mesh))["image"]
    links = view.links if isinstance(view, Chain) else (view,)
    found = [(link.mean, link.std) for link in links if isinstance(link, Normalize)]
    return image.shape[1:3], found[0] if found else None


def import_(arguments) -> None:
    start_jax()
    import jax

    from sslx.checkpoint import CheckpointError, Checkpoints
    from sslx.config import ConfigError, Recipe
    from sslx.export import hf
    from sslx.train import abstract_state, fresh_state

    run = arguments.workdir
    if (run / "overrides.json").exists():
        raise ConfigError(f"{run} is a run already: name a new directory.")
    kind = hf.model_type(arguments.source)
    default = {"bert": "bert_base"}.get(kind, "roberta_base" if kind in hf.CLASSES else "")
    default = Path("configs") / f"{default or 'mae_vit_imagenet'}.py"
    recipe = Recipe(arguments.recipe or default, tuple(arguments.overrides))
    if kind in hf.CLASSES:
        net, params = hf.load_text(arguments.source)
        overrides = shape_of(net, recipe.load())
    else:
        fields, params = hf.load(arguments.source)
        parts = {name: fields.pop(name) for name in ("encoder", "decoder")}
        shape = {f"{part}.{name}": x for part, of in parts.items() for name, x in of.items()}
        overrides = [f"objective.{name}={value}" for name, value in (shape | fields).items()]
    recipe = Recipe(recipe.path, (*recipe.overrides, *overrides))
    config = recipe.load()
    mesh = config.mesh.build()
    with jax.set_mesh(mesh):
        where = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh).params)
        state = fresh_state(config, mesh)
        # What the checkpoint lacks stays as it starts: the head, where it is an encoder alone.
        missing = {name: x for name, x in state.params.items() if name not in params}
        params = jax.device_put(params, {name: where[name] for name in params})
        state = state.replace(params=params | missing)
    if missing:
        print(f"{arguments.source} has no {', '.join(missing)}: that starts anew", file=sys.stderr)
    recipe.save(run)
    checkpoints = Checkpoints(run / "checkpoints", config.keep)
    checkpoints.save(0, state)
    checkpoints.close()
    if not checkpoints.steps():
        raise CheckpointError(f"{run} could not be written: make room and import again.")
    print(f"{run}: a run at step 0; `sslx train {run}` goes on from it")


def shape_of(net, config) -> list[str]:
    """The overrides that give a config the net of a checkpoint, and its windows the vocabulary."""
    from sslx.config import lines
    from sslx.evals.text import Perplexity

    how = ("dtype", "remat", "form.init")  # the recipe's, as are its dropouts

    def leaves(value, path: str) -> list[str]:
        given = [line.split(" = ") for line in lines(value, path)]
        branches = {name.rpartition(".")[0] for name, _ in given}
        return [f"{name}={text}" for name, text in given if name not in branches]

    at = "objective.net"
    aside = tuple(f"{at}.encoder.{name}" for name in (*how, "form.dropout", "form.attention"))
    found = [item for item in leaves(net, at) if not item.startswith(aside)]
    held_out = (name for name, e in config.evals.items() if isinstance(e, Perplexity))
    read, words = ["data", *(f"evals.{name}.data" for name in held_out)], net.encoder.vocabulary
    return found + [x for part in read for x in leaves(words, f"{part}.decode.vocabulary")]


def tokenize(arguments) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    from sslx.data import tokenize

    index, slash, count = arguments.process.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise ValueError(f"--process {arguments.process} is written I/N, as in 0/8")
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(None), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training a tokenizer" if not arguments.tokenizer else "planning")

        def said(done: int, total: int) -> None:
            bar.update(task, description="tokenizing", completed=done, total=total)

        found = tokenize.tokenize(
            arguments.source,
            arguments.out,
            vocabulary_size=arguments.vocab,
            tokenizer=arguments.tokenizer,
            kind=arguments.kind,
            length=arguments.length,
            workers=arguments.workers,
            process=(int(index), int(count)),
            said=said,
        )
    if found is None:
        print(f"{arguments.out}: this process's part is done; other processes are not")
        return
    counts, length = found["counts"], found["length"]
    for name, reason in list(found["dropped"].items())[:20]:
        console.print(f"dropped {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if counts["dropped"] > 20:
        console.print(f"dropped {counts['dropped']:,} in all: see {arguments.out}/manifest.json")
    used = (counts["tokens"] + 2 * counts["segments"]) / (counts["windows"] * length)
    print(
        f"{arguments.out}: {counts['documents']:,} documents, {counts['tokens']:,} tokens "
        f"({counts['unknown'] / max(1, counts['tokens']):.2%} unknown) in {counts['windows']:,} "
        f"windows of {length}, {used:.1%} full; vocabulary {found['vocabulary']['size']:,}"
    )


def show(arguments) -> None:
    import jax
    import numpy as np
    from rich.console import Console

    from sslx.config import Recipe, printed
    from sslx.ops.flops import flops
    from sslx.ops.trees import path_of
    from sslx.train import abstract_batch, abstract_state, train_step

    config = Recipe(arguments.recipe, tuple(arguments.overrides)).load()
    console = Console(soft_wrap=True)
    console.print(printed(config), highlight=False, markup=False)
    mesh = config.mesh.build()
    state, batch = abstract_state(config, mesh), abstract_batch(config, mesh)
    rows = [("params", "shape", "sharding", "size")]
    for keys, leaf in jax.tree_util.tree_leaves_with_path(state.params):
        cut = ", ".join("*".join(c) if isinstance(c, tuple) else str(c) for c in leaf.sharding.spec)
        rows.append((path_of(keys), str(leaf.shape), f"({cut})", f"{leaf.size:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:  # no table of rich's: it cuts paths where the terminal is narrow
        *texts, size = (text.ljust(n) for text, n in zip(row, widths, strict=True))
        console.print(*texts, size.strip().rjust(widths[-1]), sep="  ", highlight=False)
    total = sum(x.size for x in jax.tree.leaves(state.params))
    with jax.set_mesh(mesh):
        work = flops(lambda s, b: train_step(s, b, config=config), state, batch)
    console.print(f"params {total:,}, on a mesh of {dict(mesh.shape)}")
    memory = sum(np.prod(x.shape) * 4 for x in jax.tree.leaves(state)) / 2**30
    console.print(f"state {memory:.2f} GiB (params, moments, buffers), all devices together")
    each = f"{work / config.batch_size / 1e9:.4g} G"
    console.print(f"FLOPs per example, a whole step, with what it computes twice: {each}")


# ---- what they share ----


def start_jax() -> None:
    """Join the other processes, if the environment says that there are some; keep compilations."""
    import jax

    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env and "JAX_NUM_PROCESSES" in env:
        count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index)
    elif int(env.get("SLURM_NTASKS", 1)) > 1 or any(map(os.path.exists, ("/dev/accel0",))):
        jax.distributed.initialize()
    if jax.default_backend() != "cpu" and jax.config.jax_compilation_cache_dir is None:
        cache = Path(env.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sslx"
        jax.config.update("jax_compilation_cache_dir", str(cache))


if __name__ == "__main__":
    sys.exit(main())
