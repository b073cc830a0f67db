"""The command line. Heavy imports happen in the command that needs them."""

import argparse
import contextlib
import logging
import os
import sys
import time
import traceback
from pathlib import Path

from sslx.console import lasting_streams
from sslx.exits import FAILED, MISTAKEN, Lost, code_of
from sslx.paths import Place, Remote, place

EPILOG = """\
`sslx train` without a name lists the recipes. name=value fills an argument of the recipe's
config(), a.b.c=value replaces along a path of it; `sslx show RECIPE` prints every path."""
OPENS = ". A recipe, and so a run, is Python code that this executes: open runs that you trust."


def main(argv: list[str] | None = None) -> int:
    """Run a command; errors that a user can mend are one line, `--traceback` shows the rest."""
    with contextlib.suppress(AttributeError):  # names of files that are no text, as on stderr
        sys.stdout.reconfigure(errors="backslashreplace")
    root = parser()
    arguments, rest = root.parse_known_args(argv)  # argparse ends name=value at the first flag
    if bad := [x for x in rest if x.startswith("-") or "overrides" not in arguments]:
        hint = "; an override has no dashes, name=value" if "overrides" in arguments else ""
        root.error(f"unrecognized arguments: {' '.join(bad)}{hint}")
    arguments.began = time.perf_counter()
    arguments.overrides = [*getattr(arguments, "overrides", []), *rest]
    if arguments.run in (train, show, plan) and arguments.recipe is None:
        from sslx.recipes import shipped

        root.error(f"name a recipe, a .py file or one of these: {', '.join(shipped())}")
    with lasting_streams():
        # One line each; a library that logs first would choose another form, and say ours twice.
        logging.basicConfig(format="%(levelname)s %(message)s", stream=sys.stderr)
        try:
            return arguments.run(arguments) or 0
        except KeyboardInterrupt:
            return fail("interrupted", 130)
        except Exception as error:
            if not arguments.traceback and not mendable(error) and (place := in_recipe(error)):
                return fail(f"{place} (--traceback shows all)", MISTAKEN)
            if arguments.traceback or not mendable(error):
                traceback.print_exc()
                return code_of(error) if mendable(error) else FAILED
            hint = "" if ours(error) else " (--traceback shows where)"
            return fail(f"{error}{hint}", code_of(error))


def path(text: str) -> Place:
    """A path of the command line: `~` is the home directory in `--workdir=~/x` too."""
    try:
        return place(text)
    except ValueError as error:  # argparse would leave its text out
        raise argparse.ArgumentTypeError(str(error)) from error


def local(text: str) -> Path:
    """A path of the command line that is not in a bucket."""
    if isinstance(there := path(text), Remote):
        raise argparse.ArgumentTypeError(
            f"{there} must be on this machine; copy it from or to there"
        )
    return there


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(
        "sslx", description="Self-supervised pretraining in JAX.", epilog=EPILOG
    )
    commands = root.add_subparsers(metavar="COMMAND", required=True)

    def command(run, summary: str) -> argparse.ArgumentParser:
        name = run.__name__.rstrip("_")
        opens = OPENS if run in (train, eval_, replay, export, show, plan) else ""
        added = commands.add_parser(name, help=summary, description=summary + opens, epilog=EPILOG)
        added.add_argument("--traceback", action="store_true", help="show where an error arose")
        added.set_defaults(run=run)
        return added

    def recipe(added: argparse.ArgumentParser, *flags: str, **options) -> None:
        options = options if flags else {"nargs": "?", "help": "a name or a .py file"} | options
        added.add_argument(*flags or ["recipe"], type=path, metavar="RECIPE", **options)
        added.add_argument("overrides", nargs="*", metavar="name=value")

    train_ = command(train, "start a run, or resume it where it stopped")
    recipe(train_, help="a name or a .py file, or the directory of a run to resume")
    train_.add_argument("--workdir", type=path, metavar="RUN", help="default: runs/RECIPE")
    train_.add_argument(
        "--accept-changes", action="store_true", help="resume although the recipe has changed"
    )
    train_.add_argument(
        "--force", action="store_true", help="train although another process may write to RUN"
    )
    added = command(eval_, "run every eval of the recipe, beside random init and the raw input")
    added.add_argument("workdir", type=path, metavar="RUN")
    added.add_argument("overrides", nargs="*", metavar="evals.a.b=value")
    added.add_argument("--data", nargs=2, metavar=("TRAIN", "TEST"), help="labelled URIs")
    added.add_argument("--on", metavar="NAMES", help="evals or parts, as knn,linear; default: all")
    added.add_argument("--step", type=int, help="default: the newest checkpoint")
    replay_ = command(replay, "compute a step again: gradients by layer, what is not finite, batch")
    replay_.add_argument("workdir", type=path, metavar="RUN")
    replay_.add_argument(
        "step", nargs="?", metavar="STEP", help="default: the last that is not finite"
    )
    replay_.add_argument("overrides", nargs="*", metavar="name=value")
    export_ = command(export, "write a run's weights for transformers or timm; needs no torch")
    export_.add_argument("workdir", type=path, metavar="RUN")
    export_.add_argument("out", type=local, metavar="OUT")
    export_.add_argument("--format", choices=("hf", "timm"), default="hf")
    export_.add_argument("--encoder", metavar="NAME", help="default: the objective's first")
    export_.add_argument("--step", type=int, help="default: the newest checkpoint")
    import_added = command(
        import_, "make a Hugging Face ViT-MAE, BERT or RoBERTa a run to continue or probe"
    )
    import_added.add_argument("source", type=local, metavar="DIR")
    import_added.add_argument("workdir", type=path, metavar="RUN")
    recipe(import_added, "--recipe", help="default: the model's own")
    tokenize_ = command(tokenize, "turn text into windows of tokens, once; interrupted, it goes on")
    arguments_of_tokenize(tokenize_)
    plan_ = command(
        plan, "compile a recipe for machines that are not there: memory, traffic, floors"
    )
    recipe(plan_, help="a name or a .py file, or the directory of a run")
    plan_.add_argument(
        "--topology", default="", metavar="CHIPS", help="as v5e:16x16, v5p:8x8x8 or H100:4x8"
    )
    plan_.add_argument("--slices", type=int, default=1, metavar="N", help="of TPUs so laid out")
    plan_.add_argument("--devices", type=int, default=0, metavar="N", help="of a CPU, in its place")
    plan_.add_argument("--chip", default="", help="whose bounds count, as H100, beside --devices")
    plan_.add_argument("--sweep", action="store_true", help="rank other batches, meshes and remats")
    plan_.add_argument("--json", type=local, metavar="FILE", help="write the plan there too")
    show_ = command(show, "print the config, params, shardings and FLOPs of a recipe")
    recipe(show_, help="a name or a .py file, or the directory of a run")
    return root


def arguments_of_tokenize(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "source",
        type=os.path.expanduser,
        metavar="SOURCE",
        help="a folder, file or glob of .txt, .jsonl, .json (.gz), .parquet",
    )
    added.add_argument(
        "out", type=os.path.expanduser, metavar="OUT", help="then tokens:OUT is a source"
    )
    which = added.add_mutually_exclusive_group()
    which.add_argument("--vocab", type=int, metavar="N", help="train a tokenizer of N ids")
    which.add_argument(
        "--tokenizer", type=os.path.expanduser, metavar="F", help="a tokenizer.json, or its folder"
    )
    added.add_argument("--kind", choices=("wordpiece", "bpe"), default="wordpiece")
    added.add_argument("--length", type=int, default=128, metavar="L", help="of a window")
    added.add_argument("--workers", type=int, metavar="N", help="default: one for each core")
    added.add_argument(
        "--process", default="0/1", metavar="I/N", help="of N machines that share OUT, the I-th"
    )


def mendable(error: Exception) -> bool:
    """Whether an error tells the user what to do, as opposed to a bug."""
    if isinstance(error, ValueError | OSError):
        return True
    from sslx.audit import Corrupted
    from sslx.checkpoint import CheckpointError
    from sslx.signals import Interrupted
    from sslx.watch import Diverged

    return isinstance(error, CheckpointError | Corrupted | Diverged | Interrupted | Lost)


def in_recipe(error: Exception) -> str:
    """An error with the file, line and text of the recipe where it arose; empty if elsewhere."""
    frames = [
        (frame, line)
        for frame, line in traceback.walk_tb(error.__traceback__)
        if str(frame.f_globals.get("__name__")).startswith("recipe:")
    ]
    if not frames:
        return ""
    [summary] = traceback.StackSummary.extract(iter(frames[-1:]))
    text = " ".join(str(error).split())
    return (
        f"{summary.filename}:{summary.lineno}: {type(error).__name__}: {text}\n    {summary.line}"
    )


def ours(error: Exception) -> bool:
    """Whether sslx raised an error, in its own words."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parent)


def fail(text: str, code: int) -> int:
    print(f"sslx: {text}", file=sys.stderr)
    return code


# ---- commands ----


def train(arguments) -> None:
    from sslx.config import ConfigError

    path, run = arguments.recipe, arguments.workdir
    if holds_run(path):
        if run is not None:
            raise ConfigError(f"{path} is a run and resumes where it is: leave out --workdir.")
        run = path
    run = run or Path("runs") / path.stem
    recipe = named_recipe(arguments)
    recipe.load()  # an error in it needs no accelerator
    start_jax()
    from sslx.run import fit_recipe

    fit_recipe(recipe, run, arguments.accept_changes, arguments.force, arguments.began)


def eval_(arguments) -> None:
    from rich.console import Console
    from rich.table import Table

    start_jax()
    import jax

    from sslx.run import Run

    on = tuple(arguments.on.split(",")) if arguments.on else ()
    data = tuple(arguments.data) if arguments.data else None
    run = Run.open(arguments.workdir)
    with bars() as progress:
        columns = run.evaluate(on, data, arguments.step, progress, tuple(arguments.overrides))
    if jax.process_index():
        return
    if run.pictures:
        print(f"pictures are in {run.path / 'pictures'}")
    table = Table("", *columns)
    for name in dict.fromkeys(name for of in columns.values() for name in of):
        table.add_row(name, *(f"{of[name]:.4g}" if name in of else "" for of in columns.values()))
    Console().print(table)


def replay(arguments) -> None:
    from sslx.cluster import several
    from sslx.config import ConfigError
    from sslx.recipes import recipe_of
    from sslx.run import Run

    step, overrides = arguments.step, arguments.overrides
    if step and "=" in step:  # RUN name=value
        step, overrides = None, [step, *overrides]
    if step and not step.isdecimal():
        raise ConfigError(f"{step} is no step: it counts from 1, as in metrics.jsonl.")
    if several():
        on_this_host()
    else:
        start_jax()
    run = Run(arguments.workdir, recipe_of(arguments.workdir, tuple(overrides)).load())
    with bars() as progress:
        replayed = run.replay(None if step is None else int(step), progress)
    print(replayed)


def export(arguments) -> None:
    on_this_host()
    from sslx.run import Run

    run = Run.open(arguments.workdir)
    step = run.export(
        arguments.out, arguments.format, encoder=arguments.encoder, step=arguments.step
    )
    print(f"{arguments.out}: step {step} of {run.path}, for {arguments.format}")


def import_(arguments) -> None:
    on_this_host()
    from sslx.importing import import_checkpoint

    run, overrides = arguments.workdir, tuple(arguments.overrides)
    import_checkpoint(arguments.source, run, arguments.recipe, overrides)
    print(f"{run}: a run at step 0; `sslx train {run}` goes on from it")


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

    from sslx.data.text import tokenize

    index, slash, count = arguments.process.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"--process {arguments.process} is written I/N, as in 0/8")
    console = Console(stderr=True)
    columns = [TextColumn("{task.description}"), BarColumn(None), DownloadColumn()]
    columns += [TransferSpeedColumn(), TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("training a tokenizer" if not arguments.tokenizer else "planning")

        def progress(done: int, total: int) -> None:
            bar.update(task, description="tokenizing", completed=done, total=total)

        manifest = tokenize.tokenize(
            arguments.source,
            arguments.out,
            vocabulary_size=arguments.vocab,
            tokenizer=arguments.tokenizer,
            kind=arguments.kind,
            length=arguments.length,
            workers=arguments.workers,
            process=(int(index), int(count)),
            progress=progress,
        )
    if manifest is None:
        print(f"{arguments.out}: this process's part is done; other processes are not")
        return
    counts, length = manifest["counts"], manifest["length"]
    for name, reason in list(manifest["dropped"].items())[:20]:
        console.print(f"dropped {name}: {reason}", highlight=False, markup=False, soft_wrap=True)
    if counts["dropped"] > 20:
        console.print(f"dropped {counts['dropped']:,} in all: see {arguments.out}/manifest.json")
    used = (counts["tokens"] + 2 * counts["segments"]) / (counts["windows"] * length)
    print(
        f"{arguments.out}: {counts['documents']:,} documents, {counts['tokens']:,} tokens "
        f"({counts['unknown'] / max(1, counts['tokens']):.2%} unknown) in {counts['windows']:,} "
        f"windows of {length}, {used:.1%} full; vocabulary {manifest['vocabulary']['size']:,}"
    )


def plan(arguments) -> int:
    from sslx.plan import Machine, planned_elsewhere, report, sweep, table, written

    recipe = named_recipe(arguments)
    named, overrides = recipe.path, recipe.overrides
    machine = Machine(arguments.topology, arguments.slices, arguments.devices, arguments.chip)
    if arguments.sweep:
        with bars() as progress:
            plans = sweep(named, overrides, machine, progress)
        print(table(plans))
    else:
        plans = {overrides: planned_elsewhere(named, overrides, machine)}
        print(report(plans[overrides]))
    if arguments.json:
        arguments.json.write_text(written(plans))
    return 0 if any(made.fits for made in plans.values()) else MISTAKEN


def show(arguments) -> None:
    from rich.console import Console

    from sslx.cluster import several

    if several():
        on_this_host()
    from sslx.config import printed
    from sslx.run import summary

    config = named_recipe(arguments).load()
    console = Console(soft_wrap=True)
    console.print(printed(config), highlight=False, markup=False)
    console.print(summary(config), highlight=False, markup=False)


# ---- what they share ----


def named_recipe(arguments):
    """The Recipe that is named on the command line, or that a run directory was started with."""
    from sslx.recipes import Recipe, recipe_of

    path, overrides = arguments.recipe, tuple(arguments.overrides)
    return recipe_of(path, overrides) if holds_run(path) else Recipe(path, overrides)


def holds_run(path: Place) -> bool:
    """Whether a RECIPE is the directory of a run."""
    return isinstance(path, Remote) or path.is_dir()


@contextlib.contextmanager
def bars():
    """A `progress(task, done, total)` on the terminal; without one, a line for each task."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console, tasks = Console(stderr=True), {}
    columns = [TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn()]
    columns += [TimeRemainingColumn(compact=True)]
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:

        def show(task: str, done: int, total: int) -> None:
            if task not in tasks:
                tasks[task] = progress.add_task(task, total=total)
                if not console.is_terminal:
                    console.print(task, highlight=False, soft_wrap=True)
            progress.update(tasks[task], completed=done, total=total)

        yield show


def on_this_host() -> None:
    """Compute on the CPU, unless JAX_PLATFORMS says otherwise: what needs no accelerator neither
    waits for other hosts nor takes one from a run that is training."""
    import jax

    if not jax.config.jax_platforms:
        jax.config.update("jax_platforms", "cpu")


def start_jax() -> None:
    """Join the other processes, if the environment says that there are some; keep compilations."""
    import jax

    from sslx.cluster import join

    join()
    if jax.config.jax_compilation_cache_dir is None and loads_again():
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslx"
        with contextlib.suppress(OSError):
            cache.mkdir(parents=True, exist_ok=True)
        if os.access(cache, os.W_OK):  # else jax would warn at every compilation
            jax.config.update("jax_compilation_cache_dir", str(cache))


def loads_again() -> bool:
    """Whether jax can load what it compiles here from a file. (A CPU's features are in jax's key,
    so that different hosts may share a home. But it refuses, with an error for each file, where
    LLVM avoids a CPU's slow gathers and jax takes that for a feature: jax-ml/jax#38445.)"""
    import jax
    from jax.experimental.serialize_executable import serialize

    if jax.default_backend() != "cpu":
        return True
    compiled = jax.jit(lambda x: x + 1).lower(0.0).compile()
    return b"+prefer-no-" not in serialize(compiled)[0]


if __name__ == "__main__":
    sys.exit(main())
