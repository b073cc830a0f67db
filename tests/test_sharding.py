"""Where arrays live: the rules, their fallbacks, and what the compiled step makes of them."""

import contextlib
import functools
import re
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import NonCallableMock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from contract import BATCH, ROWS, config_of, mesh_of
from flax import linen as nn
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx import engine, sharding, views
from sslx import state as states
from sslx.chips import options
from sslx.config import Config
from sslx.data.image import Image
from sslx.data.pipeline import Pipeline
from sslx.data.uri import digits
from sslx.sharding import MIN_SIZE, Mesh, batch_sharding, check_batch, constrain, shardings, spec

ALL = (2, 2, 2)


# ---- meshes ----


@pytest.mark.parametrize(
    "mesh, shape",
    [
        (Mesh(), (1, 8, 1)),
        (Mesh(replica=2), (2, 4, 1)),
        (Mesh(fsdp=2, tensor=-1), (1, 2, 4)),
        (Mesh(replica=-1, fsdp=1), (8, 1, 1)),
        (Mesh(2, 2, 2), (2, 2, 2)),
        (Mesh(fsdp=4), (2, 4, 1)),
        (Mesh(tensor=2), (1, 4, 2)),
        (Mesh(fsdp=-1), (1, 8, 1)),
    ],
)
def test_mesh_covers_all_devices(mesh, shape):
    built = mesh.build()
    assert built.axis_names == ("replica", "fsdp", "tensor") and built.devices.shape == shape
    assert {d.id for d in built.devices.flat} == {d.id for d in jax.devices()}
    assert set(built.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    "mesh",
    [Mesh(fsdp=3), Mesh(3), Mesh(-1, -1, 1), Mesh(0), Mesh(2, 2, 4), Mesh(16), Mesh(1, -2, 1)],
)
def test_mesh_that_does_not_fit_says_so(mesh):
    reason = "must be 8; put -1 on the one axis"
    if 3 in (mesh.replica, mesh.fsdp) or mesh.replica == 16:
        reason = f"must be a multiple of {mesh.replica or mesh.fsdp}"
    with pytest.raises(ValueError, match=f"8 devices: .*{reason}"):
        mesh.build()


def chip(i: int):
    """What a mesh asks of a TPU that is not there: 2 slices of 4 chips."""
    device = NonCallableMock(spec=jax.Device, platform="tpu", device_kind="TPU v4")
    device.configure_mock(id=i, slice_index=i // 4, process_index=0, core_on_chip=0)
    device.coords = (i % 2, i // 2 % 2, 0)
    return device


POD = [chip(i) for i in range(8)]


@pytest.mark.parametrize("mesh", [Mesh(1, 4, 1), Mesh(1, 2, 2), Mesh(2, 2, 1), Mesh(4, 1, 1)])
def test_slices_are_joined_by_replicas_alone(mesh, monkeypatch):
    real, here = jax.sharding.Mesh, np.array(jax.devices())
    ids = np.vectorize(lambda device: device.id)
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, *a, **k: real(here[ids(grid)], *a, **k))
    grid = ids(mesh.build(POD).devices)
    assert grid.shape == (2 * mesh.replica, mesh.fsdp, mesh.tensor)
    slices = (grid // 4).reshape(2 * mesh.replica, -1)
    assert (slices == slices[:, :1]).all()  # fsdp and tensor stay within a slice
    assert np.array_equal(np.sort(slices[:, 0]), slices[:, 0])  # whole slices, one after another


@pytest.mark.parametrize(
    "size, mesh, shape",
    [
        (1, Mesh(), (4, 1, 1)),  # an eighth of a v4's 32 GiB holds 4 GiB of it
        (4 * 2**30, Mesh(), (4, 1, 1)),
        (4 * 2**30 + 1, Mesh(), (2, 2, 1)),
        (9 * 2**30, Mesh(), (1, 4, 1)),  # three ways do not divide four chips
        (99 * 2**30, Mesh(), (1, 4, 1)),
        (5 * 2**30, Mesh(tensor=2), (2, 1, 2)),
        (9 * 2**30, Mesh(tensor=2), (1, 2, 2)),
        (1, Mesh(fsdp=-1), (1, 4, 1)),
        (1, Mesh(replica=2), (2, 2, 1)),
    ],
)
def test_a_state_is_cut_no_finer_than_memory_asks_for(size, mesh, shape, monkeypatch):
    grids, real = [], mesh_of(1, 8, 1)
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, *a, **k: grids.append(grid) or real)
    mesh.build(POD[:4], size)
    assert grids[0].shape == shape
    mesh.build(POD, size)  # and copies for each slice
    assert grids[1].shape == (2 * shape[0], *shape[1:])


def test_a_mesh_is_that_of_a_slice():
    with pytest.raises(ValueError, match=r"4 devices of each slice: replica .* must be 4"):
        Mesh(1, 8, 1).build(POD)


def test_a_mesh_that_jax_cannot_lay_is_a_value_error(monkeypatch):
    def refuse(*args, **options):
        raise NotImplementedError("no assignment")

    monkeypatch.setattr(sharding.mesh_utils, "create_device_mesh", refuse)
    with pytest.raises(ValueError, match=r"does not lie on 1 slices of 4 TPU v4 \(no assignment"):
        Mesh().build(POD[:4])


def grid_of(mesh: Mesh, devices, monkeypatch):
    """(process, id) of the devices as a mesh lays them; jax's own takes no mocks."""
    grids, real = [], mesh_of(1, 8, 1)
    monkeypatch.setattr(jax.sharding, "Mesh", lambda grid, *a, **k: grids.append(grid) or real)
    mesh.build(devices)
    return np.vectorize(lambda d: (d.process_index, d.id), otypes=[object])(grids[0])


def lite(i: int):
    """A chip of two v5e slices of 4 x 4, whose hosts have 2 x 2 each."""
    device, x, y = chip(0), i % 4, i // 4 % 4
    device.configure_mock(id=i, slice_index=i // 16, device_kind="TPU v5 lite")
    device.configure_mock(coords=(x, y, 0), process_index=i // 16 * 4 + y // 2 * 2 + x // 2)
    return device


@pytest.mark.parametrize("mesh", [Mesh(1, 8, 2), Mesh(1, 4, 4), Mesh(1, -1, 1)])
def test_two_slices_of_v5e_make_any_mesh(mesh, monkeypatch):
    """With tensor=2 jax refuses to split an axis of the torus, unless allowed to."""
    grid = grid_of(mesh, [lite(i) for i in range(32)], monkeypatch)
    assert grid.shape[:1] == (2,) and grid.size == 32
    assert [{i // 16 for _, i in half.flat} for half in grid] == [{0}, {1}]


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(2, 8, 1), Mesh(1, 2, 8), Mesh(1, 4, 4)])
def test_hosts_of_gpus_are_no_slices(mesh, monkeypatch):
    """XLA gives the GPUs of each host a slice_index of their own."""

    def gpu(i: int):
        device = NonCallableMock(spec=jax.Device, platform="gpu", device_kind="H100")
        device.configure_mock(id=i, slice_index=i // 8, process_index=i // 8)
        return device

    grid = grid_of(mesh, [gpu(i) for i in range(16)], monkeypatch)
    assert grid.size == 16
    for tensor in grid.reshape(-1, grid.shape[2]):
        assert len({host for host, _ in tensor}) == 1  # within a host


def test_rows_are_those_of_a_host_s_devices():
    """Hosts of a v5e slice hold 2 x 2 chips, of which the mesh makes no stretch of the batch."""
    mesh, pipeline = mesh_of(1, 8, 1), Pipeline(digits("train"), Image(8, channels=1), workers=0)
    index = batch_sharding(mesh).devices_indices_map((16,))
    with pipeline.batches(3, 16) as batches:
        whole = next(batches)["image"]
    seen = []
    for host in ([0, 1, 4, 5], [2, 3, 6, 7]):
        held = {device: rows for device, rows in index.items() if device.id in host}
        here = NonCallableMock(spec=NamedSharding)
        here.addressable_devices_indices_map.return_value = held
        rows = sharding.rows_here(16, here)
        assert rows == tuple(row for i in host for row in (2 * i, 2 * i + 1))
        with pipeline.batches(3, 16, 0, rows) as batches:
            assert np.array_equal(next(batches)["image"], whole[list(rows)])
        seen += rows
    assert sorted(seen) == list(range(16))


# ---- rules ----


@pytest.mark.parametrize(
    "names, shape, expected",
    [
        (("embed", "mlp"), (32, 128), P(("fsdp",), ("tensor",))),
        (("mlp", "embed"), (128, 32), P(("tensor",), ("fsdp",))),
        (("batch", None, None), (16, 5, 32), P(("replica", "fsdp"), None, None)),
        (("batch", None, "mlp"), (16, 5, 32), P(("replica", "fsdp"), None, ("tensor",))),
        (("layers", "embed", None), (4, 32, 3), P(None, ("fsdp",), None)),  # a name without a rule
        (("embed", "embed"), (32, 32), P(("fsdp",), None)),  # an axis is used once
        (("batch", "embed"), (16, 32), P(("replica", "fsdp"), None)),
        (("embed", "batch"), (32, 16), P(("fsdp",), ("replica",))),  # what is left of the two
        (("embed", "mlp"), (33, 128), P(None, ("tensor",))),  # what does not divide stays whole
        ((), (), P()),
    ],
)
def test_spec(names, shape, expected):
    assert spec(names, shape, mesh_of(*ALL)) == expected


def test_what_does_not_divide_is_said_once_or_refused(caplog):
    """6 rows over 4 devices would be computed by each; 33 heads are left to the compiler."""
    mesh = mesh_of(*ALL)
    sharding._say_whole.cache_clear()
    with pytest.raises(ValueError, match=r"\[6, 2\] has 6 examples .* replica \* fsdp = 4 devices"):
        spec(("batch", None), (6, 2), mesh)
    free = P.UNCONSTRAINED
    for _ in range(2):
        assert spec(("heads", None), (33, 64), mesh) == P(None, None)
        assert spec(("heads", None), (33, 64), mesh, free) == P(free, None)
    assert [r.getMessage()[:45] for r in caplog.records] == [
        "33 heads do not divide over tensor = 2 device"
    ]


def test_chunks_smaller_than_the_mesh_are_refused():
    """2 examples of 2 views at a time, on 8 devices, were computed 8 times over."""
    row, mesh = ROWS["SimCLR with ViT"], mesh_of(1, 8, 1)
    config = config_of(replace(row, objective=replace(row.objective, chunks=8)))
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=r"8 devices do not divide.*fewer chunks"),
    ):
        given = states.abstract_state(config, mesh), states.abstract_batch(config, mesh)
        engine.jitted_step(config, mesh).trace(*given)


def test_spec_names_every_axis():
    with pytest.raises(ValueError):
        spec(("embed",), (32, 32), mesh_of(*ALL))


def test_every_rule_names_axes_of_the_mesh():
    assert {a for axes in sharding.RULES.values() for a in axes} == set(sharding.AXES)


def test_shardings_by_name_by_size_or_whole(caplog):
    sharding._say_whole.cache_clear()
    mesh = mesh_of(1, 4, 2)
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)  # noqa: E731
    named = nn.LogicallyPartitioned(struct(4, 32, 128), ("layers", "embed", "mlp"))
    side = 2 * int(MIN_SIZE**0.5)
    tree = {
        "named": named,
        "large": struct(side // 2, side),
        "odd": struct(side, side + 1),  # only the first divides
        "prime": struct(MIN_SIZE + 1),
        "small": struct(8, 8),
        "scalar": struct(),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
    }
    found = {k: s.spec for k, s in shardings(tree, mesh).items()}
    assert found == {
        "named": P(None, ("fsdp",), ("tensor",)),
        "large": P(None, "fsdp"),
        "odd": P("fsdp"),
        "prime": P(),
        "small": P(),
        "scalar": P(),
        "key": P(),
    }
    [said] = [r.getMessage() for r in caplog.records]
    assert said.startswith("16385 rows of [16385] do not divide over fsdp = 4 devices")


def test_moments_inherit_the_axes_of_params():
    mesh = mesh_of(*ALL)
    state = states.abstract_state(config_of(ROWS["MAE"]), mesh)
    moments = state.opt_state[1]  # scale_by_adam
    for tree in (moments.mu, moments.nu):
        jax.tree.map(
            lambda m, p: pytest.fail() if m.sharding != p.sharding else 0, tree, state.params
        )
    assert moments.count.sharding.spec == P()


def test_params_of_a_vit_lie_as_the_layers_say():
    state = states.abstract_state(config_of(ROWS["MAE"]), mesh_of(1, 2, 4))
    block = state.params["encoder"]["transformer"]["blocks"]
    found = {
        "qkv": block["attention"]["qkv"]["kernel"].sharding.spec,  # layers, D, 3, heads, D / heads
        "out": block["attention"]["out"]["kernel"].sharding.spec,
        "up": block["mlp"]["up"]["kernel"].sharding.spec,
        "up/bias": block["mlp"]["up"]["bias"].sharding.spec,
        "down": block["mlp"]["down"]["kernel"].sharding.spec,
    }
    assert found == {
        "qkv": P(None, ("fsdp",), None, ("tensor",), None),
        "out": P(None, ("tensor",), None, ("fsdp",)),
        "up": P(None, ("fsdp",), ("tensor",)),
        "up/bias": P(None, ("tensor",)),
        "down": P(None, ("tensor",), ("fsdp",)),
    }


# ---- constraints ----


def test_constrain_outside_of_a_mesh_is_the_array():
    x = jnp.ones((16, 4))
    assert constrain(x, "batch", None) is x


def test_constrain_cuts_where_it_can():
    mesh = mesh_of(*ALL)
    with jax.set_mesh(mesh):
        cut = jax.jit(lambda: constrain(jnp.ones((16, 6, 32)), "batch", None, "mlp"))()
        odd = jax.jit(lambda: constrain(jnp.ones((16, 6, 33)), "batch", None, "mlp"))()
    assert cut.addressable_shards[0].data.shape == (4, 6, 16)
    assert odd.addressable_shards[0].data.shape[:2] == (4, 6)


# ---- batches ----


def test_batch_lies_over_replicas_and_fsdp():
    x = jax.device_put(np.ones((16, 3)), batch_sharding(mesh_of(*ALL)))
    assert x.addressable_shards[0].data.shape == (4, 3)
    assert NamedSharding(x.sharding.mesh, P(("replica", "fsdp"))).is_equivalent_to(x.sharding, 2)


def test_a_batch_that_cannot_be_cut_says_what_can():
    check_batch(16, mesh_of(*ALL))
    with pytest.raises(ValueError, match=r"batch_size=18 .* = 4 devices.*such as batch_size=20"):
        check_batch(18, mesh_of(*ALL))
    with pytest.raises(ValueError, match="batch_size=18"):
        states.abstract_state(config_of(ROWS["MAE"], batch_size=18), mesh_of(*ALL))


def test_micro_batches_must_be_cut_too():
    """16 examples in 4 parts are 4 at a time: on 8 devices every one would compute all 4."""
    with pytest.raises(ValueError, match="accumulate"):
        states.abstract_state(config_of(ROWS["MAE"], accumulate=4), mesh_of(1, 8, 1))


# ---- the compiled step ----

GLOBAL = 104  # examples: no other number of the program, nor a multiple of one


def pictures(accumulate: int) -> Config:
    """MAE on digits, views and all, at a batch size that can be told in the compiled text."""
    row = ROWS["MAE"]
    data = Pipeline(digits("train"), Image(8, channels=1), workers=0)
    view = views.mae(8, statistics=((0.3,), (0.37,)))
    return replace(
        config_of(row, batch_size=GLOBAL * accumulate, accumulate=accumulate),
        objective=replace(row.objective, ratio=0.6),
        data=data,
        views=view,
    )


@functools.cache
def compiled(accumulate: int, *shape: int):
    return compile_step(pictures(accumulate), mesh_of(*shape))


def compile_step(config: Config, mesh):
    with jax.set_mesh(mesh):
        given = states.abstract_state(config, mesh), engine.fed_batch(config, mesh)
        return engine.jitted_step(config, mesh).lower(*given).compile()


def whole(text: str, examples: int) -> set[str]:
    """Arrays of a compiled program with `examples` as their leading, or leading but one, axis."""
    return set(re.findall(rf"\b[a-z]+\d*\[(?:\d+,)?{examples}(?:,\d+)*\]", text))


@pytest.mark.parametrize("shape, accumulate", [((1, 8, 1), 1), ((2, 2, 2), 1), ((1, 8, 1), 3)])
def test_no_array_of_the_step_holds_the_whole_batch(shape, accumulate):
    """XLA keeps every activation cut over the batch: what a device computes is its share."""
    text = compiled(accumulate, *shape).as_text()
    assert whole(text, GLOBAL // (shape[0] * shape[1]))  # a device's share is there, as it reads
    assert whole(text, GLOBAL) | whole(text, GLOBAL * accumulate) == set()


def test_memory_falls_with_the_devices():
    one, eight = (compiled(1, 1, n, 1).memory_analysis() for n in (1, 8))
    assert eight.temp_size_in_bytes < one.temp_size_in_bytes / 3
    assert eight.argument_size_in_bytes < one.argument_size_in_bytes / 3
    # Donated: what comes out lies where what went in did, but for the metrics.
    assert eight.output_size_in_bytes - eight.alias_size_in_bytes < 1024


def test_the_step_keeps_the_shardings_of_the_state():
    program, mesh = compiled(1, *ALL), mesh_of(*ALL)
    (given, batch), _ = program.input_shardings
    made, metrics = program.output_shardings
    state = states.abstract_state(pictures(1), mesh)
    for x, before, after in zip(*map(jax.tree.leaves, (state, given, made)), strict=True):
        assert before.is_equivalent_to(x.sharding, x.ndim)
        assert after.is_equivalent_to(x.sharding, x.ndim)
    assert all(s.is_fully_replicated for s in jax.tree.leaves(metrics))
    assert batch["image"].is_equivalent_to(batch_sharding(mesh), 4)


def test_options_of_the_compiler_are_the_chip_s_and_then_the_recipe_s():
    config = replace(pictures(1), compiler={"xla_enable_async_all_gather": False, "xla_a": 1})
    given = engine.compiler_options(config, POD)
    assert given == {**options("TPU v4", 2), **config.compiler} and len(given) > 5
    assert engine.compiler_options(pictures(1), jax.devices()) == {}
    config, mesh = replace(config, compiler={"xla_no_such": True}), mesh_of(1, 1, 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option: 'xla_no_such'"):
        compile_step(config, mesh)


# ---- the loop ----


class Watching:
    """What `loop` needs of a Watch and of Scores, noting the order of dispatches and looks."""

    def __init__(self, events):
        self.events, self.clock, self.checkpoints, self.gang = events, self, self, self
        self.log = self

    def wait(self, batches, what):
        self.events.append("dispatch")
        return next(batches)

    def spending(self, *kind):
        return contextlib.nullcontext()

    stepping = together = spending

    def see(self, step, metrics, dropped):
        self.events.append(f"see {step}")
        assert np.isfinite(jax.device_get(metrics["loss"].value))  # explicit: the guard allows it

    def keep(self, step):
        pass

    def save(self, step, state):
        self.events.append(f"save {step}")

    def add(self, step, state):
        self.events.append(f"evaluate {step}")

    def restart(self):
        pass

    def newest(self):
        return 10**9


@dataclass
class Sealed:
    """What a step gives: any look at it, before the next step is dispatched, would wait for it."""

    value: Any

    def __getattr__(self, name):
        raise AssertionError(f"the loop asks for {name} of what is still being computed")


class Quiet:
    def received(self, step):
        return 0


def test_the_loop_transfers_nothing_by_itself_and_looks_one_step_late():
    config = replace(pictures(1), steps=5, save_every=3, eval_every=100)
    mesh, events = mesh_of(1, 8, 1), []
    with jax.set_mesh(mesh):
        state, step = states.fresh_state(config, mesh), engine.jitted_step(config, mesh)

        def sealed(number, state, batch):
            state, metrics = step(state.value, batch)
            return Sealed(state), {name: Sealed(x) for name, x in metrics.items()}

        try:
            jax.config.update("jax_transfer_guard", "disallow")  # in the feeding thread as well
            watching = Watching(events)
            state = engine.loop(
                config, mesh, sealed, 0, Sealed(state), watching, watching, Quiet()
            ).value
        finally:
            jax.config.update("jax_transfer_guard", "allow")
    assert int(state.step) == 5
    d = "dispatch"
    late = [d, d, "see 1", d, "see 2", "see 3", "save 3", d, d, "see 4", "see 5", "save 5"]
    assert events == [*late, "evaluate 5"]


def test_the_guard_would_have_seen_it():
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match=r"[Dd]isallowed"):
        jax.jit(lambda x: x + 1)(np.ones(3)).block_until_ready()


def test_feed_places_batches_by_the_law_and_ends():
    config = replace(
        config_of(ROWS["MAE"]), data=Pipeline(digits("train"), Image(8, channels=1), workers=0)
    )
    mesh = mesh_of(*ALL)
    with config.data.batches(config.seed, BATCH, 2) as expected, jax.set_mesh(mesh):
        with engine.feed(config, mesh, 2) as (batches, dropped):
            for _ in range(3):
                x = next(batches)["image"]
                assert x.sharding.is_equivalent_to(batch_sharding(mesh), 4)
                assert np.array_equal(x, next(expected)["image"])
        assert dropped == {}


def test_what_fails_in_the_feeding_thread_is_raised_by_the_loop(monkeypatch):
    config, mesh = pictures(1), mesh_of(1, 8, 1)

    def placed(*args):
        raise OSError("the device is gone")

    monkeypatch.setattr(engine, "placed", placed)
    with (
        jax.set_mesh(mesh),
        engine.feed(config, mesh, 0) as (batches, _),
        pytest.raises(OSError, match="the device is gone"),
    ):
        next(batches)
