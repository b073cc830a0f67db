"""Watching a run: metrics as they arrive, alarms, and evaluations between steps."""

import contextlib
import json
import math
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path

import jax
import numpy as np

from sslx.checkpoint import Checkpoints
from sslx.config import Config, Numbers, Progress, Trained, unheard, window
from sslx.gang import Gang, Window
from sslx.goodput import Account
from sslx.log import Log, add_scores, read_scores
from sslx.paths import Place, Remote
from sslx.processes import of_first
from sslx.sharding import batch_sharding
from sslx.state import TrainState, first_state, fresh_state
from sslx.types import Metrics

# The metrics that show a step to be sound: a good loss alone does not vouch for the params it left.
FINITE = ("loss", "grad_norm", "param_norm")


class Diverged(RuntimeError):
    """The loss or a gradient is not finite."""

    code = 3


class Collapsed(Diverged):
    """The run collapsed: the embeddings of all examples are nearly equal."""


class Watch:
    """Logs metrics once they have arrived, and stops a run that diverged or collapsed.

    `fastest` is to be the steps a second at the peak of the devices, nan where that is not known.
    """

    def __init__(
        self,
        config: Config,
        log: Log,
        checkpoints: Checkpoints,
        account: Account,
        gang: Gang,
        fastest: Future[float],
    ):
        self.config, self.log, self.checkpoints, self.gang = config, log, checkpoints, gang
        self.account, self.clock, self.fastest = account, account.clock, fastest
        self.since, self.skipped, self.flat, self.named = 0, 0, 0, 0
        self.saving = self.clock.totals()["checkpoint_save"]
        self.clock.read(0)
        self.profile = Profile(log, config.profile, account.first)
        self.dropped = log.grow(log.run / "dropped" / f"{jax.process_index()}.jsonl")

    def stepping(self, step: int) -> contextlib.AbstractContextManager:
        """A context in which a step is dispatched; profilers show it by its number."""
        self.profile.begin(step)
        return jax.profiler.StepTraceAnnotation("train", step_num=step)

    def see(self, step: int, metrics: Metrics, dropped: dict[str, str]) -> None:
        """One step's metrics, fetched here, while the next step is already under way."""
        with self.clock.blocked():
            values = jax.device_get(metrics)
        count = self.drops(step, values.pop("dropped"), dropped)
        values = {name: float(x) for name, x in values.items()}
        self.skipped += (skipped := int(values.pop("skipped", 0)))
        finite = all(np.isfinite(values[name]) for name in FINITE)
        try:
            if not finite and self.config.nonfinite == "stop":
                raise Diverged(self.diagnosis(step, values))
            self.collapse(step, values)
        except Diverged:
            self.log.write(step, values)
            raise
        self.since += 1
        self.account.step = step
        rate, waited = self.clock.rates(self.since)  # since the last logged step
        speed, share = rate * self.config.batch_size, rate / self.fastest.result()
        counts = {"skipped": self.skipped, "data/dropped": count}
        counts = {name: n for name, n in counts.items() if n}
        parts = [f"loss {values['loss']:.4f}", f"{speed:,.0f} examples/s", f"waited {waited:.0%}"]
        parts += [] if math.isnan(share) else [f"{share:.0%} of peak"]
        text = "  ".join(parts + [f"{name} {n}" for name, n in counts.items()])
        row = step <= 1 or step % self.config.log_every == 0 or step == self.config.steps
        row = row or skipped > 0
        if row:
            self.gang.measured(Window(step, *self.clock.spent()))
            measured = {"examples_per_s": speed, "data/waited": waited, "share_of_peak": share}
            measured = {name: x for name, x in measured.items() if not math.isnan(x)}
            measured |= self.gang.straggler() | counts | self.spent()
            self.log.write(step, {**values, **measured})
            self.account.write()
        self.log.progress(step, text, line=row)
        if self.profile.end(step) or row:
            self.restart()

    def spent(self) -> dict[str, float]:
        """Seconds of the run by kind, and how long it stood still for saves since the last row."""
        before, self.saving = self.saving, self.clock.totals()["checkpoint_save"]
        seconds = {f"seconds/{kind}": x for kind, x in self.account.seconds().items()}
        return {"checkpoint/stalled_s": self.saving - before, **seconds}

    def restart(self) -> None:
        """Begin a new window of the speed; what was since the last one counts for none."""
        self.clock.read(0)
        self.since = 0

    def drops(self, step: int, counts: np.ndarray, names: dict[str, str]) -> int:
        """How many examples so far gave way for corrupt records, in all processes together, which
        therefore stop at one step if these are too many. What this process met is added to
        dropped/PROCESS.jsonl."""
        if new := list(names.items())[self.named :]:
            rows = "".join(json.dumps({"name": n, "reason": r}) + "\n" for n, r in new)
            with self.log.forgiving(step, "names of dropped records"):
                self.dropped.path.parent.mkdir(exist_ok=True)
                self.dropped.write(rows.encode())
            self.named += len(new)
        self.config.data.check_dropped(counts, step * self.config.batch_size, names)
        return int(counts.sum())

    def diagnosis(self, step: int, values: dict[str, float]) -> str:
        values_text = ", ".join(f"{name} {values[name]:.4g}" for name in FINITE)
        return (
            f"Step {step}: {values_text}; {self.kept(step)}. "
            f"`sslx replay {self.log.run} {step}` shows what is not finite first. Lower the "
            f"learning rate or clip gradients, or drop such steps: nonfinite=skip."
        )

    def collapse(self, step: int, values: dict[str, float]) -> None:
        """Warn, once, or stop when the embeddings of all examples have become one."""
        alarm = self.config.collapse
        self.flat = self.flat + 1 if values.get(alarm.metric, np.inf) < alarm.below else 0
        if self.flat != alarm.patience:
            return
        text = (
            f"Step {step}: {alarm.metric} {values[alarm.metric]:.2g} has been below {alarm.below} "
            f"for {alarm.patience} steps, all embeddings are nearly one: the run has collapsed; "
            f"{self.kept(step - alarm.patience)}. Look at the learning rate, the predictor and the "
            f"target's decay, the views"
        )
        if alarm.then == "stop":
            raise Collapsed(f"{text}; or go on with collapse.then=warn.")
        self.log.warn(f"{text}; collapse.then=stop would end it here.")

    def kept(self, step: int) -> str:
        good = self.newest(step)
        return f"the newest checkpoint from before is step {good}" if good else "nothing saved"

    def newest(self, before: int | None = None) -> int:
        """The newest checkpoint, once all is written, or the newest before a step; 0 for none."""
        with self.clock.spending("checkpoint_save"):
            self.checkpoints.wait()
        return max((s for s in self.checkpoints.good() if before is None or s < before), default=0)


class Profile:
    """A trace of some steps of a run by jax's profiler, in RUN/plugins/profile, where XProf and
    TensorBoard look for it. Only process 0 traces: all do the same."""

    def __init__(self, log: Log, steps: str | None, start: int):
        self.log, self.tracing = log, False
        self.steps = window(steps) if steps and log.speaks else range(0)
        if self.steps and self.steps[-1] <= start:
            log.say(f"no step of profile={steps} is left: the run goes on from step {start}")

    def __enter__(self) -> "Profile":
        return self

    def __exit__(self, *exception) -> None:
        if self.tracing:
            self.stop(self.newest)

    def begin(self, step: int) -> None:
        """Begin before the first of the steps, or of those that are left."""
        self.newest = step
        if step in self.steps and not self.tracing:
            self.folder = self.log.run
            if isinstance(self.folder, Remote):
                self.folder = Path(tempfile.mkdtemp(prefix="sslx-profile-"))
            jax.profiler.start_trace(str(self.folder))
            self.tracing, self.first = True, step

    def end(self, step: int) -> bool:
        """Whether the last of the steps has been computed, where the trace then ends."""
        ends = self.tracing and step >= self.steps[-1]
        if ends:
            self.stop(step)
        return ends

    def stop(self, step: int) -> None:
        self.tracing = False
        try:
            jax.profiler.stop_trace()
            if self.folder != self.log.run:
                for path in filter(Path.is_file, self.folder.rglob("*")):
                    place = self.log.run / path.relative_to(self.folder).as_posix()
                    place.write_bytes(path.read_bytes())
                shutil.rmtree(self.folder, ignore_errors=True)
        except (OSError, RuntimeError) as error:
            self.log.warn(f"the profile is lost ({error}); the run goes on")
        else:
            self.log.say(f"profile of steps {self.first} to {step}: xprof --logdir {self.log.run}")


class Scores:
    """The evaluations of a run, in evals.json: those of random init first."""

    def __init__(
        self, config: Config, mesh: jax.sharding.Mesh, run: Place, log: Log, account: Account
    ):
        self.config, self.mesh, self.log, self.run = config, mesh, log, run
        self.account = account
        self.known = read_scores(run)

    def begin(self, start: int, state: TrainState | None) -> TrainState:
        """The state to go on from, after the evaluations that are missing: random init, once in a
        run's life, and the step resumed from, if a stop came between its save and its evaluation.
        """
        config, names = self.config, ("random init", f"step {start}")
        missing = np.asarray([bool(config.evals) and name not in self.known for name in names])
        missing = of_first(missing)  # a shared disk may show its files unequal
        if state is None and config.start and missing[0]:
            first_state(config, self.mesh)  # refused, if it must be, before anything is evaluated
        if state is None or missing[0]:
            fresh = fresh_state(config, self.mesh)
            self.add(0, fresh, "random init")
        if state is None and not config.start:
            return fresh
        if state is None:
            del fresh  # there may be no room for two
            state = first_state(config, self.mesh)
            self.add(0, state)
            return state
        if missing[1] and (start % config.eval_every == 0 or start >= config.steps):
            self.add(start, state)
        return state

    def add(self, step: int, state: TrainState, name: str = "") -> None:
        """Run every eval, write its numbers and pictures, say them beside random init's."""
        if not self.config.evals:
            return
        title = name or f"step {step}"

        def progress(task: str, done: int, total: int) -> None:
            self.account.clock.tell(f"evaluating {title}: {task}")
            self.log.progress(step, f"evaluating: {task} {done}/{total}")

        self.log.progress(step, "evaluating")
        with self.account.clock.spending("evaluation", f"evaluating {title}"):
            values = evaluate(self.config, self.mesh, state, progress)
        if not (name and self.config.start):  # a run with a start has another step 0
            self.log.write(step, values)
            self.log.keep(step)  # before evals.json says that this is done
        scores = {k: v for k, v in values.items() if not isinstance(v, np.ndarray)}
        base = self.known.get("random init", {})
        self.known[title] = scores
        if self.log.speaks:
            with self.log.forgiving(step, "evals.json"):
                add_scores(self.run, {title: scores})
        parts = [
            f"{k} {v:.4g}" + (f" ({base[k]:.4g})" if k in base else "") for k, v in scores.items()
        ]
        self.log.say(f"{title}{' (random init)' * bool(base)}:  " + "  ".join(parts))
        self.account.write()


def evaluate(
    config: Config,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    progress: Progress = unheard,
) -> dict[str, float | np.ndarray]:
    """All numbers and pictures of all evals of `config` for a state on `mesh`."""
    trained = trained_by(config, mesh, state, progress)
    return {name: x for run in config.evals.values() for name, x in run(trained)}


def floors(
    config: Config,
    mesh: jax.sharding.Mesh,
    state: TrainState,
    progress: Progress = unheard,
) -> Numbers:
    """{baseline: {name: value}} of all evals of `config`, of what needs no training."""
    trained, columns = trained_by(config, mesh, state, progress), {}
    for run in config.evals.values():
        for name, values in run.floors(trained).items():
            columns[name] = columns.get(name, {}) | values
    return columns


def trained_by(
    config: Config, mesh: jax.sharding.Mesh, state: TrainState, progress: Progress
) -> Trained:
    """What the evals of `config` are about."""
    sharding = batch_sharding(mesh)
    return Trained(config.objective, state.params, state.buffers, config.views, sharding, progress)
