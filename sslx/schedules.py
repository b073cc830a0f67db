"""Numbers that change with the step: callable dataclasses, so that a config prints and compares."""

from dataclasses import dataclass

import jax.numpy as jnp

from sslx.types import Array, Schedule


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: Array | int) -> Array:
        return jnp.asarray(self.value, jnp.float32)


@dataclass(frozen=True)
class Linear:
    """A straight line from `start` to `end` in `steps` steps, then flat."""

    start: float
    end: float
    steps: int

    def __call__(self, step: Array | int) -> Array:
        return self.start + (self.end - self.start) * _share(step, self.steps)


@dataclass(frozen=True)
class Polynomial:
    """`start` to `end` in `steps` steps as the rest of them to a power, then flat; 1 is a line.

    fairseq's and Google's `polynomial_decay`.
    """

    start: float
    end: float
    steps: int
    power: float = 1.0

    def __call__(self, step: Array | int) -> Array:
        return self.end + (self.start - self.end) * (1 - _share(step, self.steps)) ** self.power


@dataclass(frozen=True)
class Cosine:
    """Half a cosine from `start` to `end` in `steps` steps, then flat (arXiv:1608.03983)."""

    start: float
    end: float
    steps: int

    def __call__(self, step: Array | int) -> Array:
        fall = (1 + jnp.cos(jnp.pi * _share(step, self.steps))) / 2
        return self.end + (self.start - self.end) * fall


@dataclass(frozen=True)
class Warmup:
    """A straight line from zero to `then`'s first value in `steps` steps, then `then` from there.

    The learning rate of step 0 is zero, as in FAIR's and Google's code.
    """

    steps: int
    then: Schedule

    def __call__(self, step: Array | int) -> Array:
        rise = self.then(0) * _share(step, self.steps)
        return jnp.where(step < self.steps, rise, self.then(jnp.maximum(step - self.steps, 0)))


@dataclass(frozen=True)
class After:
    """Zero for the first `steps` steps, then the value that `then` has at the same step."""

    steps: int
    then: Schedule

    def __call__(self, step: Array | int) -> Array:
        return jnp.where(jnp.asarray(step) < self.steps, 0.0, self.then(step))


@dataclass(frozen=True)
class Times:
    """A multiple of another schedule, such as the learning rate of a new head."""

    factor: float
    schedule: Schedule

    def __call__(self, step: Array | int) -> Array:
        return self.factor * self.schedule(step)


def _share(step: Array | int, steps: int) -> Array:
    return jnp.clip(jnp.asarray(step, jnp.float32) / max(steps, 1), 0.0, 1.0)
