"""What a plan says of machines that are not there, against counting by hand."""

import dataclasses
import importlib.metadata
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from commands import TINY
from jax.extend.core import Primitive
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sslx import hlo, plan
from sslx.chips import CHIPS, OPTIONS, chip_of, options
from sslx.cli import main
from sslx.config import ConfigError
from sslx.engine import step_flops, train_step
from sslx.ops.flops import flops
from sslx.plan import Machine, Plan
from sslx.recipes import Recipe, load
from sslx.state import abstract_batch, abstract_state

# ---- the text of a compiled program ----

GROUPS = {
    "replica_groups={{0,1},{2,3}}, to_apply=%add": [[0, 1], [2, 3]],
    "replica_groups=[2,2]<=[4], use_global_device_ids=true": [[0, 1], [2, 3]],
    "replica_groups=[4,2]<=[2,4]T(1,0)": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=[2,4]<=[2,2,2]T(1,0,2)": [[0, 1, 4, 5], [2, 3, 6, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'b'}, x": [[0, 1, 2, 3], [4, 5, 6, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'a'}, x": [[0, 4], [1, 5], [2, 6], [3, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'a','b'}": [[0, 1, 2, 3, 4, 5, 6, 7]],
    "replica_groups=mesh['a'=1,'b'=4,'c'=2], device_ids=([2,4]T(1,0)) {'b'}, x": [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
    ],
    "replica_groups=mesh['a'=1,'b'=2,'c'=2], device_ids=(0,2,1,3) {'b'}": [[0, 1], [2, 3]],
    "replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}": [[0, 2], [1, 3], [4, 6], [5, 7]],
    "replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "source_target_pairs={{0,1},{1,0}}": [[0, 1], [1, 0]],
    "replica_groups={}, channel_id=1": [],
}


@pytest.mark.parametrize("text", GROUPS)
def test_groups_of_a_collective(text):
    assert hlo.groups(text) == GROUPS[text]


def test_groups_of_another_form_are_no_guess():
    with pytest.raises(ValueError, match="replica_groups=circle"):
        hlo.groups("replica_groups=circle(4), to_apply=%add")


def ring(kind, n, result):
    """Bytes that device 0 of a ring sends, one message after another, for `result` bytes."""
    messages = {
        "all-gather": [result / n] * (n - 1),  # each share goes all the way round but one
        "reduce-scatter": [result] * (n - 1),  # what is kept at the end is one share
        "all-reduce": [result / n] * (n - 1) * 2,  # one after the other
        "all-to-all": [result / n] * (n - 1),
        "collective-permute": [result],
    }
    return sum(messages[kind])


@pytest.mark.parametrize("kind", hlo.KINDS)
def test_bytes_sent_are_those_of_a_ring(kind):
    for n in (2, 8, 256):
        assert hlo.sent(kind, 4096, n) == pytest.approx(ring(kind, n, 4096))


@pytest.mark.parametrize(
    "shapes, size",
    [
        ("f32[3,4]{1,0}", 48),
        ("(bf16[2,8], s32[])", 36),
        ("pred[7]", 7),
        ("f8e4m3fn[16]", 16),
        ("s4[16]", 8),
        ("token[]", 0),
    ],
)
def test_sizes_of_arrays(shapes, size):
    assert hlo.size(shapes) == size


def compiled(function, *args):
    return hlo.instructions(jax.jit(function).lower(*args).compile().as_text())


def over(*axes):
    mesh = jax.make_mesh((2, 4), ("far", "near"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    return NamedSharding(mesh, P(*axes))


def sharded(shape, *axes):
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=over(*axes))


def test_collectives_are_counted_as_often_as_they_run():
    """Seven layers [64, 32], each gathered in a scan from four devices: 3/4 of 8 KiB, seven times;
    a sum over all eight of 4 bytes in the end."""

    def network(weights, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, over())
            return jnp.tanh(x @ w @ w.T), None

        x, _ = jax.lax.scan(layer, x, weights)
        return x.sum()

    listing = compiled(network, sharded((7, 64, 32), None, "near"), sharded((16, 64), "far"))
    islands = [0, 0, 0, 0, 1, 1, 1, 1]
    found = {(x.kind, x.far): x.bytes for x in hlo.collectives(listing, islands)}
    assert found["all-gather", False] == 7 * 3 / 4 * 64 * 32 * 4
    assert found["all-reduce", True] <= 2 * 7 / 8 * 4
    assert ("all-gather", True) not in found


@pytest.mark.parametrize("kind", ["all-gather", "all-reduce", "reduce-scatter", "all-to-all"])
def test_what_crosses_islands_is_a_devices_own_part(kind):
    """Three islands of four devices: messages counted one by one. Between islands each device has
    only to do with its like in the others; what it sends there is a quarter of what its island
    has."""
    S, far, near = 4096, 3, 4  # bytes of the result on a device
    messages = {
        "all-gather": ([S / 12] * 2, [S / 4] * 3),  # own share to two; then a quarter to three
        "all-reduce": ([S / 12] * 4, [S / 4] * 6),  # of a quarter, in thirds; of all, in quarters
        "reduce-scatter": ([S] * 2, [3 * S] * 3),  # 12 S in all, a quarter of it remains
        "all-to-all": ([S / 12] * 8, [S / 12] * 3),
    }
    between, within = (sum(x) for x in messages[kind])
    assert hlo.legs(kind, S, near, far) == pytest.approx((within, between))
    assert hlo.legs(kind, S, 12, 1) == pytest.approx((hlo.sent(kind, S, 12), 0))


STARTED = """
ENTRY %main (x: f32[]) -> f32[] {
  %all-reduce-start = (f32[64]{0}, f32[32]{0}) all-reduce-start(%a, %b), channel_id=1, \
replica_groups=[1,8]<=[8]
  %all-gather-start = ((f32[8]{0}, bf16[2]{0}), (f32[64]{0}, bf16[16]{0})) all-gather-start(%a, \
%b), channel_id=2, replica_groups=[1,8]<=[8]
  %collective-permute-start = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), \
channel_id=3, source_target_pairs={{0,1},{1,0}}
}
"""


def test_a_start_is_counted_by_its_result():
    """Of tuples as a GPU's compiler writes them: an all-reduce has results alone, the others
    operands before them."""
    listing = hlo.instructions(STARTED)
    near = {x.kind: x.bytes for x in hlo.collectives(listing, [0] * 8)}
    assert near == {
        "all-reduce": 7 / 4 * 96 * 4,
        "all-gather": 7 / 8 * (64 * 4 + 16 * 2),
        "collective-permute": 16.0,
    }
    nodes = {(x.kind, x.far): x.bytes for x in hlo.collectives(listing, [0] * 4 + [1] * 4)}
    assert nodes["all-reduce", True] == 96 and nodes["all-reduce", False] == 6 / 4 * 96 * 4
    assert ("collective-permute", True) not in nodes


BETWEEN_SLICES = """
ENTRY %main (x: f32[]) -> f32[] {
  %send.1 = (bf16[144,8,128]{2,1,0}, u32[], token[]) send(%bitcast.60, %after-all.27), \
channel_id=47, is_host_transfer=true, frontend_attributes={\
_xla_host_transfer_rendezvous="all-reduce.143_0",_xla_megascale_reduce_operation="SUM",\
_xla_megascale_target="{1,2}x{0:15}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv.1 = (bf16[144,8,128]{2,1,0}, u32[], token[]) recv(%after-all.27), channel_id=46, \
is_host_transfer=true, frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}
}
"""


def test_what_hosts_carry_between_slices_counts():
    listing = hlo.instructions(BETWEEN_SLICES)
    [found] = hlo.collectives(listing, [0] * 16 + [1] * 16)
    assert found == hlo.Collective("all-reduce", True, 1, 144 * 8 * 128 * 2.0)
    [found] = hlo.collectives(listing, [i // 16 for i in range(64)])
    assert found.bytes == 1.5 * 144 * 8 * 128 * 2


def test_arrays_are_listed_largest_first_with_their_place():
    listing = compiled(lambda x: jnp.sin(x @ x.T).sum(), jax.ShapeDtypeStruct((96, 8), np.float32))
    (size, kind, shape, place), *_ = hlo.arrays(listing)
    assert (size, kind, shape) == (96 * 96 * 4, "f32", (96, 96)) and "dot_general" in place


PLACES = """BufferAssignment:
allocation 0: size 512, thread-local:
 value: <28 select.52 @0> (size=512,offset=0): pred[]{:T(512)}
allocation 1: size 4096, parameter 27, shape |f32[4,64,3]| at ShapeIndex {}, maybe-live-out:
 value: <8086 param.29 @0> (size=4096,offset=0): f32[4,64,3]{2,1,0:T(8,128)}
allocation 2: size 1024, parameter 3, shape |f32[256]| at ShapeIndex {}:
allocation 3: size 256, maybe-live-out:
allocation 4: size 128, output shape is |(f32[], f32[4])|, maybe-live-out:
allocation 5: size 65536, color 1, preallocated-temp:
allocation 6: size 8192, preallocated-temp:
allocation 7: size 64, constant:
"""


def test_memory_is_what_was_given_a_place():
    """Color 1 is another memory, beside the cores."""
    assert hlo.memory(PLACES) == {
        "arguments": 4096 + 1024,
        "outputs": 4096 + 256 + 128,
        "aliased": 4096,
        "temporaries": 8192,
    }


# ---- machines ----


@pytest.mark.parametrize(
    "given, message",
    [
        ({"topology": "v9:2x2"}, "There is no topology 'v9:2x2'.*v3, v4, v5e, v5p, v6e, tpu7x"),
        ({"topology": "v5e"}, "v5e:16x16"),
        ({"topology": "v5e:4by4"}, "v5e:16x16"),
        ({}, "one of --topology v5e:16x16 and --devices N"),
        ({"topology": "v5e:4x4", "devices": 4}, "and --devices"),
        ({"topology": "v5e:4x4", "slices": 0}, "count from 1"),
        ({"devices": 4, "slices": 2}, "--slices counts those of TPUs"),
        ({"topology": "H100:8", "slices": 2}, "nodes of GPUs are H100:4x8"),
        ({"topology": "H100:2x2x2"}, "GPUs of a node, H100:8.*GPUs A100, H100, H200, B200"),
        ({"devices": 4, "chip": "H1000"}, "no chip 'H1000'.*H100"),
    ],
)
def test_machines_that_cannot_be(given, message):
    with pytest.raises(ConfigError, match=message):
        Machine(**given)


@pytest.mark.parametrize("version", ["", "0.0.1", "0.0.50.2"])
def test_another_libtpu_is_told_which_to_install(version, monkeypatch):
    def found(name):
        if name != "libtpu":
            return "0.10.1"
        if not version:
            raise importlib.metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(importlib.metadata, "version", found)
    wants = ["numpy", 'libtpu==0.0.41.*; extra == "tpu"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: wants)
    with pytest.raises(ConfigError, match=r"pip install 'libtpu==0\.0\.41\.\*'.*--devices N"):
        plan.check_libtpu()
    version = "0.0.41"
    plan.check_libtpu()


def test_gpus_that_are_not_there_have_nodes():
    """Of the compiler that jax's extra `cuda12` brings; without it, what to install is said."""
    machine, version = Machine("H100:2x4"), importlib.metadata.version("jax")
    assert machine.environment()["CUDA_VISIBLE_DEVICES"] == "-1" and machine.bounds == CHIPS["H100"]
    try:
        devices = machine.present()
    except ConfigError as error:
        assert f"pip install 'jax[cuda12]=={version}'" in str(error)
    else:
        assert [plan.island(x) for x in devices] == [0] * 4 + [1] * 4
        assert {chip_of(x.device_kind) for x in devices} == {"H100"}


KINDS = {
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU7x": "tpu7x",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "cpu": "",
    "NVIDIA GeForce RTX 3090": "",
}


@pytest.mark.parametrize("kind", KINDS)
def test_chips_are_told_by_what_jax_calls_them(kind):
    assert chip_of(kind) == KINDS[kind]


def test_options_never_break_the_law():
    assert options("cpu") == {} and set(OPTIONS) <= set(CHIPS)
    for kind in KINDS:
        for slices in (1, 2):
            assert not [name for name in options(kind, slices) if "rng_bit_generator" in name]
    assert options("TPU v5 lite", 2).items() > options("TPU v5 lite").items()


# ---- plans ----


@pytest.fixture(scope="module")
def tiny():
    config = load(TINY, "batch_size=24")  # a length that no axis of the model has
    return plan.planned(config, Machine(devices=8, chip="v5e"))


def test_a_plan_counts_what_the_state_says(tiny):
    config = load(TINY, "batch_size=24")
    mesh = config.mesh.build()
    state = abstract_state(config, mesh)
    assert tiny.devices == 8 and tiny.mesh == {"replica": 1, "fsdp": 8, "tensor": 1}
    assert tiny.params == sum(x.size for x in jax.tree.leaves(state.params))
    with jax.set_mesh(mesh):
        batch = abstract_batch(config, mesh)
        work = flops(lambda s, b: train_step(s, b, config=config), state, batch)
    assert tiny.flops == tiny.needed == work
    held = sum(
        np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(state)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )
    assert held <= tiny.arguments < held + 4096  # and the batch, and the key
    assert tiny.fits and tiny.whole == () == tiny.replicated
    assert {"compute", "memory", "links", "network"} == set(tiny.floors)
    assert tiny.floors["compute"] == work / 8 / 197e12 and 0 < tiny.share < 1


@pytest.mark.parametrize(
    "shapes, found",
    [
        ("f32[3,4]", ()),
        ("f32[24]", ()),  # a number for each example
        ("f32[48,4]", ("f32[48, 4]",)),
        ("f32[24,4]", ("f32[24, 4]",)),  # a whole micro-batch
        ("f32[24,4]{1,0}, f32[3,8,4]", None),  # 3 of a device, 8 after them: [24, 4] too
    ],
)
def test_arrays_of_a_whole_batch_are_found(shapes, found):
    config = load(TINY, "batch_size=48", "accumulate=2")
    mesh = config.mesh.build()
    listing = hlo.instructions(f"ENTRY %main () -> f32[] {{\n  %x.1 = ({shapes}) fusion(%a)\n}}")
    made = plan.whole(listing, config, mesh, abstract_state(config, mesh))
    assert made == found if made is None else tuple(x.array for x in made) == found


def test_what_is_computed_twice_is_not_needed():
    """In the backward pass, the products of the encoder's block: those of its forward pass."""
    kept, twice = (load(TINY, "mae=True", f"objective.encoder.remat={x}") for x in ("none", "full"))
    mesh = kept.mesh.build()
    needed = step_flops(kept, mesh)
    assert needed[0] == needed[1] == step_flops(twice, mesh)[1]
    tokens, D = 5, 16  # a quarter of 16 patches, and the class token
    block = 2 * tokens * 12 * D**2 + 4 * tokens**2 * D
    assert step_flops(twice, mesh)[0] == needed[0] + 16 * (block - 2 * tokens * 4 * D**2)


@pytest.mark.parametrize("way, products", [("fwd", 2), ("bwd", 4)])
def test_attention_of_a_gpus_library_is_counted(way, products):
    """A primitive by the name of cuDNN's, which is traced only where cuDNN is: what it computes
    are the products of softmax attention."""
    primitive = Primitive(f"dot_product_attention_{way}_wrapper")
    primitive.def_abstract_eval(lambda q, k, v: q)
    q, k = jnp.zeros((2, 6, 4, 8)), jnp.zeros((2, 10, 4, 8))
    product = flops(lambda q, k: jnp.einsum("bnhd,bmhd->bhnm", q, k), q, k)
    assert flops(primitive.bind, q, k, k) == products * product


GIVEN = Plan(
    machine="v5e:4x4",
    devices=16,
    mesh={"replica": 1, "fsdp": 16, "tensor": 1},
    batch_size=1024,
    accumulate=1,
    params=10,
    flops=16 * 197 * 10**12,
    needed=16 * 197 * 10**12,
    arguments=2 * 10**9,
    outputs=2 * 10**9,
    aliased=2 * 10**9,
    temporaries=10**9,
    chip=CHIPS["v5e"],
)
SENT = hlo.Collective("all-gather", False, 3, 400e9)
FAR = hlo.Collective("all-reduce", True, 1, 6.25e9)


@pytest.mark.parametrize(
    "changed, bound, seconds, advice",
    [
        ({}, "compute", 1.0, "^fits$"),
        ({"collectives": (SENT,)}, "links", 2.0, "larger batch"),
        ({"collectives": (SENT, FAR)}, "links", 2.0, "larger batch"),
        ({"collectives": (FAR,)}, "network", 2.0, "network bounds it"),
        ({"collectives": (SENT,), "arguments": 10**8}, "links", 2.0, "mesh.fsdp=1 mesh.replica=-1"),
        ({"needed": 12 * 197 * 10**12}, "compute", 1.0, "remat=dots"),
        ({"temporaries": 15 * 10**9}, "compute", 1.0, "does not fit: take a smaller batch"),
        ({"arguments": 16 * 10**9}, "compute", 1.0, "does not fit: the state is largest"),
        ({"whole": (plan.Array("f32[1024]", 4096, "x"),)}, "compute", 1.0, "constrain"),
    ],
)
def test_the_largest_floor_bounds_a_step(changed, bound, seconds, advice):
    made = dataclasses.replace(GIVEN, **changed)
    assert (made.bound, made.floor) == (bound, pytest.approx(seconds))
    assert re.search(advice, plan.advice(made))
    text = plan.report(made)
    assert text.endswith(plan.advice(made)) and "whole batch  cannot be told" not in text
    assert "whole batch  cannot be told" in plan.report(dataclasses.replace(made, whole=None))
    assert plan.loaded(json.loads(json.dumps(dataclasses.asdict(made)))) == made


# ---- the command ----


def test_the_command_prints_and_writes_a_plan(tmp_path, capfd):
    file, run = tmp_path / "plan.json", tmp_path / "run"
    run.mkdir()
    Recipe(TINY, ("batch_size=24",)).save(run)  # a run says what it was started with
    asked = ("--devices", "4", "--chip", "H100", "--json", str(file))
    assert main(["plan", str(run), *asked]) == 0
    said = capfd.readouterr().out
    for word in ("4 CPU devices", "fsdp 4", "6 on a device", "G an example", "of peak", "fits"):
        assert word in said
    [made] = json.loads(file.read_text())
    assert made["devices"] == 4 and made["batch_size"] == 24 and made["fits"]
    assert f"params       {made['params']:,}" in said


def test_what_cannot_be_planned_is_one_line(capfd):
    assert main(["plan", str(TINY), "mesh.fsdp=3", "--devices", "4"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("sslx: Mesh(") and "does not cover 4 devices" in said
    assert main(["plan", str(TINY), "--topology", "v9:2x2"]) == 2
    assert "There is no topology 'v9:2x2'" in capfd.readouterr().err


def test_what_fits_nowhere_will_not_fit_the_next_time(monkeypatch, capsys):
    made = dataclasses.replace(GIVEN, temporaries=10**12)
    monkeypatch.setattr(plan, "planned_elsewhere", lambda *_: made)
    assert main(["plan", str(TINY), "--topology", "v5e:4x4"]) == 2
    assert "does not fit" in capsys.readouterr().out


def test_a_sweep_ranks_what_fits(monkeypatch):
    """Remat of both networks, three meshes, and then two batches; no choice ends it."""
    asked = []

    def here(recipe, overrides, machine):
        asked.append(overrides)
        if "mesh.tensor=2" in overrides:
            raise ConfigError("heads")
        batch = 48 if "batch_size=48" in overrides else 24
        slower = 2 if any("remat=full" in x for x in overrides) else 1
        return dataclasses.replace(GIVEN, batch_size=batch, flops=slower * GIVEN.flops)

    monkeypatch.setattr(plan, "planned_elsewhere", here)
    found = plan.sweep(TINY, ("mae=True", "batch_size=24"), Machine(devices=8))
    kinds = {x for choice in found for x in choice if "remat" in x}
    assert {x.partition("=")[2] for x in kinds} == {"none", "dots", "full"}
    assert len(found) == len(asked) == 1 + 3 * 3 + 2
    (best, made), *_ = found.items()
    assert best[-1] == "batch_size=48" and made.batch_size == 48
    *_, (worst, refused) = found.items()
    assert "mesh.tensor=2" in worst and refused.refused == "heads" and not refused.fits
    lines = plan.table(found).splitlines()
    assert lines[1].startswith("yes") and lines[-1].startswith("no")
    assert lines[1].endswith(" ".join(best))
