"""What a recipe's step takes on machines that are not there, as their compiler says it.

The compilers of TPUs and GPUs run on any CPU. They do so in a process of its own, `python -m
sslx.plan`: the TPU's keeps one topology for the life of a process, and both must be told of their
devices before jax begins.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import jax
from jax.experimental import topologies

from sslx import hlo
from sslx.chips import CHIPS, OPTIONS, Chip
from sslx.config import Config, ConfigError, Progress, leaves, unheard
from sslx.engine import fed_batch, jitted_step, step_flops
from sslx.hlo import Collective
from sslx.models.attention import heard
from sslx.models.transformer import Remat
from sslx.ops.trees import path_of
from sslx.recipes import Recipe
from sslx.sharding import slice_of, ways
from sslx.state import abstract_state, built_mesh

LARGE = 1 << 20  # bytes of a param that should not lie whole on every device

# What XLA must know of a GPU to compile for it, as its own target configs have it (openxla/xla,
# xla/backends/gpu/target_config/specs): cores, float32 units of each, GHz, KiB of shared memory of
# a core, KiB of cache, major compute capability.
GPUS = {
    "A100": (108, 64, 1.41, 164, 40_960, 8),
    "H100": (132, 128, 1.98, 228, 51_200, 9),
    "H200": (132, 128, 1.98, 228, 51_200, 9),
    "B200": (148, 128, 1.965, 228, 129_536, 10),
}
PLACED = "after_optimizations_after_buffer_assignment.txt"  # the last text before machine code
UNTUNED = "--xla_gpu_enable_triton_gemm=false --xla_gpu_autotune_level=0"


@dataclass(frozen=True)
class Machine:
    """Devices that are not there.

    topology  a TPU slice, such as v5e:16x16, or nodes of GPUs, such as H100:4x8
    slices    how many of them, of TPUs
    devices   in place of a topology: so many CPU devices
    chip      whose bounds count, a name in CHIPS; that of the topology by default
    """

    topology: str = ""
    slices: int = 1
    devices: int = 0
    chip: str = ""

    def __post_init__(self):
        kind, _, shape = self.topology.partition(":")
        if bool(self.topology) == bool(self.devices):
            raise ConfigError("name machines, by one of --topology v5e:16x16 and --devices N.")
        if self.topology and (
            kind not in {**OPTIONS, **GPUS}
            or not re.fullmatch(r"\d+(x\d+)?" if self.gpu else r"\d+(x\d+)*", shape)
        ):
            raise ConfigError(
                f"There is no topology {self.topology!r}: it is a TPU and its chips by axis, such "
                f"as v5e:16x16 or v5p:8x8x8, or GPUs of a node, H100:8, or of several, H100:4x8; "
                f"TPUs are {', '.join(OPTIONS)}, GPUs {', '.join(GPUS)}."
            )
        if self.slices != 1 and (self.devices or self.gpu):
            raise ConfigError("--slices counts those of TPUs: nodes of GPUs are H100:4x8.")
        if self.slices < 1 or self.devices < 0:
            raise ConfigError(f"{self}: slices and devices count from 1.")
        if self.chip and self.chip not in CHIPS:
            raise ConfigError(f"There is no chip {self.chip!r}: they are {', '.join(CHIPS)}.")

    def __str__(self) -> str:
        text = self.topology or f"{self.devices} CPU devices"
        return f"{self.slices} slices of {text}" if self.slices > 1 else text

    @property
    def gpu(self) -> str:
        """The name of the GPU that it is made of; empty for a TPU or a CPU."""
        kind = self.topology.partition(":")[0]
        return kind if kind in GPUS else ""

    @property
    def bounds(self) -> Chip | None:
        """What a device can do at most; None where no chip is named."""
        return CHIPS.get(self.chip or self.topology.partition(":")[0])

    def environment(self) -> dict[str, str]:
        """What a process must find in its environment to compile for these devices."""
        own, flags = {"JAX_PLATFORMS": "cpu"}, os.environ.get("XLA_FLAGS", "")
        if self.devices:
            flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
            flags += f" --xla_force_host_platform_device_count={self.devices}"
            return own | {"XLA_FLAGS": flags}
        if self.gpu:  # without one, no kernel can be chosen by its speed
            return own | {"CUDA_VISIBLE_DEVICES": "-1", "XLA_FLAGS": f"{flags} {UNTUNED}"}
        return own | {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_ACCELERATOR_TYPE": "v5litepod-16",  # of no importance, but it must be one
            "TPU_WORKER_HOSTNAMES": "localhost",
            "TPU_WORKER_ID": "0",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        }

    def present(self) -> list:
        """The devices, in a process that has this environment. Raises ConfigError naming the libtpu
        to install, and for a topology that the compiler does not know."""
        if self.devices:
            return jax.devices()
        if self.gpu:
            return gpus(self.topology)
        check_libtpu()
        # The two cores of a v4 are one device, as they are where it is in use.
        one = {"chip_config_name": "megacore"} if self.topology.startswith("v4:") else {}
        try:
            return topologies.get_topology_desc(
                platform="tpu", topology_name=self.topology, num_slices=self.slices, **one
            ).devices
        except Exception as error:
            said = str(error).splitlines()[0]
            raise ConfigError(f"The TPU's compiler has no {self.topology}: {said}") from error


def gpus(topology: str) -> list:
    """The GPUs of a topology such as H100:4x8. Raises ConfigError naming what to install."""
    kind, _, shape = topology.partition(":")
    nodes, _, each = shape.rpartition("x")
    cores, units, clock, shared, cache, capability = GPUS[kind]
    chip = CHIPS[kind]
    target = f"""
        platform_name: "CUDA"
        device_description_str: "{chip.kind}"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        gpu_device_info {{
            cuda_compute_capability {{ major: {capability} }}
            core_count: {cores}
            fpus_per_core: {units}
            clock_rate_ghz: {clock}
            l2_cache_size: {cache << 10}
            memory_bandwidth: {chip.bandwidth:.0f}
            device_memory_size: {chip.memory:.0f}
            shared_memory_per_core: {shared << 10}
            shared_memory_per_block: {48 << 10}
            shared_memory_per_block_optin: {shared - 1 << 10}
            registers_per_core_limit: {1 << 16}
            registers_per_block_limit: {1 << 16}
            threads_per_core_limit: 2048
            threads_per_block_limit: 1024
            threads_per_warp: 32
            block_dim_limit_x: {2**31 - 1}
            block_dim_limit_y: {2**16 - 1}
            block_dim_limit_z: {2**16 - 1}
        }}
    """
    try:
        return topologies.get_topology_desc(
            platform="cuda", target_config=target, topology=f"1x{nodes or 1}x{each}"
        ).devices
    except Exception as error:
        version = importlib.metadata.version("jax")
        said = str(error).splitlines()[0]
        raise ConfigError(
            f"Compiling for GPUs needs their compiler ({said}): pip install "
            f"'jax[cuda12]=={version}', or compile for a CPU's devices with --devices N --chip "
            f"{kind}."
        ) from error


def island(device) -> int:
    """The number of a device's slice (TPU) or node (GPU), within which links join devices."""
    return slice_of(device) if device.platform == "tpu" else device.process_index


def check_libtpu() -> None:
    """Raise ConfigError unless the libtpu is there that this jax was released with."""
    needs = importlib.metadata.requires("jax") or []
    [wanted] = [re.match(r"libtpu[^;\s]*", x)[0] for x in needs if x.startswith("libtpu")][:1]
    try:
        version = importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        version = ""
    prefix = wanted.removeprefix("libtpu==").removesuffix("*")
    if not f"{version}.".startswith(prefix):
        found = f"this is {version}" if version else "it is not installed"
        raise ConfigError(
            f"Compiling for TPUs needs their compiler, and jax "
            f"{importlib.metadata.version('jax')} was released with {wanted}; {found}: pip install "
            f"'{wanted}', or compile for a CPU's devices with --devices N."
        )


# ---- a plan ----


@dataclass(frozen=True)
class Array:
    """An array of the compiled program, or of the state, as text, and where it comes from."""

    array: str
    bytes: int
    place: str


@dataclass(frozen=True)
class Plan:
    """One step of a recipe on machines that are not there; bytes, seconds and arrays of one device.

    flops, needed  of a step on all devices; with and without what is computed a second time
    arguments, outputs, aliased, temporaries  bytes of a device's memory; the state is an argument
                and an output, both at one place, which `aliased` counts
    whole       arrays that hold the whole batch where they should hold a share; None where it
                cannot be told, since an axis of the model, or two together, are as long
    replicated  large params that lie whole on every device
    attention   which forms of it the compiled step has, in words
    refused     why the compiler refused the program; empty where it did not
    """

    machine: str
    devices: int
    mesh: Mapping[str, int]
    batch_size: int
    accumulate: int
    params: int
    flops: int
    needed: int
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    collectives: tuple[Collective, ...] = ()
    largest: tuple[Array, ...] = ()
    whole: tuple[Array, ...] | None = ()
    replicated: tuple[Array, ...] = ()
    attention: tuple[str, ...] = ()
    seconds: float = 0.0
    refused: str = ""
    chip: Chip | None = None

    @property
    def memory(self) -> int:
        """Bytes of a device at the step's peak."""
        return self.arguments + self.outputs - self.aliased + self.temporaries

    @property
    def island(self) -> str:
        """What links join: a node of GPUs, or a slice of TPUs."""
        return "node" if self.machine.partition(":")[0] in GPUS else "slice"

    @property
    def each(self) -> float:
        """Examples of a device."""
        return self.batch_size / (self.mesh["replica"] * self.mesh["fsdp"])

    @property
    def sent(self) -> tuple[float, float]:
        """Bytes that a device sends within its slice or node, and to others."""
        near, far = (
            math.fsum(x.bytes for x in self.collectives if x.far == f) for f in (False, True)
        )
        return near, far

    @property
    def fits(self) -> bool:
        """Whether a device's memory holds it. A 25th is set aside: a v5e reserves .25 GB of 16, and
        executables had up to .39 GB of temporaries more than were placed."""
        return not self.refused and (self.chip is None or self.memory < self.chip.memory * 24 / 25)

    @property
    def floors(self) -> dict[str, float]:
        """{what: seconds that a step takes at least for it}: each is a bound by itself, so that the
        largest bounds the step, if all the others are hidden behind it."""
        if self.chip is None or self.refused:
            return {}
        near, far = self.sent
        return {
            "compute": self.flops / self.devices / self.chip.peak,
            "memory": (self.arguments + self.outputs) / self.chip.bandwidth,
            "links": near / self.chip.links,
            "network": far / self.chip.network,
        }

    @property
    def bound(self) -> str:
        """The name of the largest floor."""
        return max(self.floors, key=self.floors.get) if self.floors else ""

    @property
    def floor(self) -> float:
        """Seconds that a step takes at least."""
        return max(self.floors.values(), default=0.0)

    @property
    def speed(self) -> float:
        """Examples a second at most; 0 where nothing bounds them."""
        return self.batch_size / self.floor if self.floor else 0.0

    @property
    def share(self) -> float:
        """The share of the devices' peak that a step of that length makes use of."""
        return self.needed / self.devices / self.chip.peak / self.floor if self.floor else 0.0


def planned(config: Config, machine: Machine) -> Plan:
    """The plan of `config`, in a process with the environment of `machine`."""
    devices = machine.present()
    mesh = built_mesh(config, devices)
    state, batch = abstract_state(config, mesh), fed_batch(config, mesh)
    done, needed = step_flops(config, mesh)
    plan = Plan(
        machine=str(machine),
        devices=len(devices),
        mesh=dict(mesh.shape),
        batch_size=config.batch_size,
        accumulate=config.accumulate,
        params=sum(x.size for x in jax.tree.leaves(state.params)),
        flops=done,
        needed=needed,
        replicated=replicated(state.params, mesh),
        chip=machine.bounds,
    )
    began = time.perf_counter()
    try:
        with jax.set_mesh(mesh), heard() as choices:
            lowered = jitted_step(config, mesh).lower(state, batch)
        tpu = devices[0].platform == "tpu"
        text, memory = placed(lowered) if tpu else whole_program(lowered.compile())
    except jax.errors.JaxRuntimeError as error:
        said = " ".join(str(error).split())
        seconds = time.perf_counter() - began
        return dataclasses.replace(plan, refused=said[:400], seconds=seconds)
    if config.audit_every:  # a copy of the state (sslx.audit)
        memory["temporaries"] += memory["aliased"]
    listing, islands = hlo.instructions(text), [island(device) for device in mesh.devices.flat]
    return dataclasses.replace(
        plan,
        **memory,
        collectives=tuple(hlo.collectives(listing, islands)),
        largest=tuple(shown(x) for x in hlo.arrays(listing))[:5],
        whole=whole(listing, config, mesh, state),
        attention=tuple(choices),
        seconds=time.perf_counter() - began,
    )


def whole_program(program) -> tuple[str, dict[str, int]]:
    """The text of a compiled program, and a device's memory by use."""
    used = program.memory_analysis()
    return program.as_text(), {
        "arguments": used.argument_size_in_bytes,
        "outputs": used.output_size_in_bytes,
        "aliased": used.alias_size_in_bytes,
        "temporaries": used.temp_size_in_bytes,
    }


def placed(lowered) -> tuple[str, dict[str, int]]:
    """The same of what the TPU's compiler writes down once each array has its place in memory.

    What it does after that, nine tenths of its time, is machine code, which a plan does not need.
    It cannot be interrupted: this process must end by os._exit.
    """
    future: Future = Future()

    def work() -> None:
        try:
            future.set_result(lowered.compile(written))
        except BaseException as error:
            future.set_exception(error)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        written = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        threading.Thread(target=work, daemon=True).start()
        while True:
            for text in Path(folder).glob(f"*.{PLACED}"):
                stem = str(text).removesuffix(PLACED)
                if Path(f"{stem}debug_options").exists():  # the file after it
                    places = Path(f"{stem}after_optimizations-buffer-assignment.txt")
                    return text.read_text(), hlo.memory(places.read_text())
            with contextlib.suppress(TimeoutError):
                return whole_program(future.result(0.2))


def replicated(params, mesh) -> tuple[Array, ...]:
    """Large params that lie whole on each of several devices that could share them."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return ()
    found = []
    for keys, x in jax.tree_util.tree_leaves_with_path(params):
        size = x.size * x.dtype.itemsize
        if size >= LARGE and x.sharding.is_fully_replicated:
            found.append(Array(f"{x.dtype}{list(x.shape)}", size, path_of(keys)))
    return tuple(sorted(found, key=lambda x: -x.bytes))


def whole(listing, config: Config, mesh, state) -> tuple[Array, ...] | None:
    """Arrays with an axis as long as the whole batch, on a device that should hold a share of it,
    but for a number for each example; None where an axis of the state is as long, or a device's
    examples times an axis that follows them (16 of 256 patches, on 256 devices)."""
    lengths = {config.batch_size, config.batch_size // config.accumulate}
    parts = ways(mesh)
    if parts == 1:
        return ()
    if any(lengths & set(x.shape) for x in jax.tree.leaves(state)):
        return None
    arrays = list(hlo.arrays(listing))
    found = tuple(shown(x) for x in arrays if len(x[2]) > 1 and lengths & set(x[2]))
    shares = {(length // parts, parts) for length in lengths}
    if found and any(shares & {*itertools.pairwise(shape)} for _, _, shape, _ in arrays):
        return None
    return found


def shown(array) -> Array:
    size, kind, shape, place = array
    return Array(f"{kind}{list(shape)}", size, place)


# ---- in processes of their own ----


def planned_elsewhere(recipe, overrides: Sequence[str], machine: Machine) -> Plan:
    """The plan of a recipe, a name or a file, made in a process of its own.

    Raises ConfigError for what cannot be compiled at all.
    """
    asked = {"recipe": str(recipe), "overrides": [*overrides]} | dataclasses.asdict(machine)
    process = subprocess.run(
        [sys.executable, "-m", "sslx.plan"],
        input=json.dumps(asked),
        env=os.environ | machine.environment(),
        capture_output=True,
        text=True,
    )
    if process.returncode:
        *_, last = process.stderr.splitlines() or [f"it ended with code {process.returncode}"]
        if last.startswith("sslx: "):
            raise ConfigError(last.removeprefix("sslx: "))
        raise RuntimeError(f"compiling for {machine} failed:\n{process.stderr}")
    return loaded(json.loads(process.stdout.splitlines()[-1]))


def loaded(fields: dict) -> Plan:
    """A plan from its JSON form."""
    arrays = {
        name: tuple(Array(**x) for x in fields[name])
        for name in ("largest", "whole", "replicated")
        if fields[name] is not None
    }
    collectives = tuple(Collective(**x) for x in fields["collectives"])
    chip = Chip(**fields["chip"]) if fields["chip"] else None
    others = {"collectives": collectives, "chip": chip, "attention": tuple(fields["attention"])}
    return Plan(**fields | arrays | others)


def sweep(recipe, overrides: Sequence[str], machine: Machine, progress: Progress = unheard):
    """{overrides: Plan} of a recipe as it is and otherwise executed, the fastest that fits first:
    other remats and meshes, and then half and twice the batch of the best of them."""
    config = Recipe(recipe, tuple(overrides)).load()
    remats = [p for p, _ in leaves(config.objective, "objective") if p.endswith(".remat")]
    kinds = [tuple(f"{path}={kind}" for path in remats) for kind in get_args(Remat)]
    meshes = [(), ("mesh.replica=-1", "mesh.fsdp=1"), ("mesh.tensor=2",)]
    others = [(*kind, *mesh) for kind in (kinds if remats else [()]) for mesh in meshes]
    others = [choice for choice in others if choice]
    first = planned_elsewhere(recipe, overrides, machine)
    plans, total = {(): first}, len(others) + 3
    progress("compiling", 1, total)

    def planned_otherwise(choice: tuple[str, ...]) -> Plan:
        try:
            return planned_elsewhere(recipe, (*overrides, *choice), machine)
        except ConfigError as error:
            return dataclasses.replace(first, refused=str(error))

    def add(choices: list[tuple[str, ...]]) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for choice, made in zip(choices, pool.map(planned_otherwise, choices), strict=True):
                plans[choice] = made
                progress("compiling", len(plans), total)

    add(others)
    best = ranked(plans)[0]
    add([(*best, f"batch_size={n}") for n in (config.batch_size // 2, config.batch_size * 2)])
    return {choice: plans[choice] for choice in ranked(plans)}


def ranked(plans: Mapping[tuple[str, ...], Plan]) -> list[tuple[str, ...]]:
    """Those that fit first, by the examples that a second has room for; then by memory."""
    key = lambda x: (not plans[x].fits, -plans[x].speed, plans[x].memory)  # noqa: E731
    return sorted(plans, key=key)


def main() -> int:
    """Read what to plan from stdin, print the plan in the last line of stdout."""
    asked = json.load(sys.stdin)
    recipe = Recipe(asked.pop("recipe"), tuple(asked.pop("overrides")))
    try:
        made = planned(recipe.load(), Machine(**asked))
    except ValueError as error:
        print(f"sslx: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(json.dumps(dataclasses.asdict(made)), flush=True)
    os._exit(0)  # the TPU's compiler may still be at work


# ---- in words ----


def report(plan: Plan) -> str:
    """A plan as text: what was compiled, what it takes, what bounds it, what would help."""
    gb = lambda x: f"{x / 1e9:,.2f} GB"  # noqa: E731
    mesh = " x ".join(f"{axis} {n}" for axis, n in plan.mesh.items())
    done, needed = (f"{x / plan.batch_size / 1e9:,.1f} G" for x in (plan.flops, plan.needed))
    parts = f", in {plan.accumulate} parts" if plan.accumulate > 1 else ""
    lines = [
        f"{plan.machine}: {plan.devices:,} devices, mesh {mesh}, compiled in {plan.seconds:.0f} s",
        f"batch        {plan.batch_size:,}, {plan.each:g} on a device{parts}",
        f"params       {plan.params:,}",
        f"FLOPs        {done} an example, {plan.flops / 1e12:,.1f} T a step; {needed} an example "
        "without what is computed a second time",
    ]
    if plan.refused:
        return "\n".join([*lines, f"does not compile: {plan.refused}", advice(plan)])
    limit = ""
    if plan.chip:
        limit = f" of {gb(plan.chip.memory)}, {gb(plan.chip.memory - plan.memory)} left"
    lines.append(
        f"memory       {gb(plan.memory)}{limit}: {gb(plan.arguments)} of state and batch, "
        f"{gb(plan.temporaries)} temporary"
    )
    for x in plan.collectives:
        way = f"between {plan.island}s" if x.far else f"within a {plan.island}"
        lines.append(f"sent         {gb(x.bytes)} {way}, {x.count} {x.kind}")
    if plan.floors:
        floors = ", ".join(f"{name} {1e3 * s:,.2f} ms" for name, s in plan.floors.items())
        lines += [
            f"floors       {floors}",
            f"bound        {plan.bound}: {1e3 * plan.floor:,.2f} ms a step at least, "
            f"{plan.speed:,.0f} examples/s at most, {plan.share:.0%} of peak",
        ]
    lines += [f"large        {gb(x.bytes)} {x.array} {x.place}" for x in plan.largest]
    if plan.whole is None:
        lines.append(
            "whole batch  cannot be told: an axis, or a product of two, is as long as the batch"
        )
    for x in plan.whole or ():
        lines.append(f"whole batch  {gb(x.bytes)} {x.array} {x.place}")
    lines += [f"replicated   {gb(x.bytes)} {x.array} {x.place}" for x in plan.replicated]
    lines += plan.attention
    return "\n".join([*lines, advice(plan)])


def advice(plan: Plan) -> str:
    """The verdict, and the one change that would help most."""
    if not plan.fits:
        state = plan.arguments > plan.temporaries and not plan.refused
        if state and plan.mesh["replica"] > 1:
            return "does not fit: the state is largest, fewer mesh.replica share it over more fsdp"
        if state:
            return (
                "does not fit: the state is largest, share it by mesh.tensor or take more devices"
            )
        return (
            "does not fit: take a smaller batch for each device, rematerialize more (remat=full),"
            " or make the step of micro-batches, accumulate=2"
        )
    if plan.whole:
        return "fits, but arrays hold the whole batch: constrain them in the objective"
    if plan.bound == "network":
        return "fits; the network bounds it: a larger batch for each device sends no more"
    if plan.bound == "links":
        room = plan.chip.memory - plan.memory
        state = plan.arguments * plan.mesh["fsdp"]
        if state < room and plan.mesh["fsdp"] > 1:
            return (
                "fits; links bound it, and there is room for all params on each device: "
                "mesh.fsdp=1 mesh.replica=-1 sends gradients alone"
            )
        return "fits; links bound it: a larger batch for each device sends little more"
    if plan.chip and plan.flops > 1.05 * plan.needed and plan.memory < plan.chip.memory / 3:
        return "fits with much room: remat=dots, or remat=none, computes less a second time"
    return "fits"


def table(plans: Mapping[tuple[str, ...], Plan]) -> str:
    """A line for each of several plans."""
    rows = [("fits", "examples/s", "of peak", "bound", "memory", "what is other")]
    for choice, x in plans.items():
        speed = f"{x.speed:,.0f}" if x.floor else ""
        share = f"{x.share:.0%}" if x.floor else ""
        memory = "" if x.refused else f"{x.memory / 1e9:.2f} GB"
        row = ("yes" if x.fits else "no", speed, share, x.bound, memory)
        rows.append((*row, " ".join(choice) or "nothing"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def written(plans: Mapping[tuple[str, ...], Plan]) -> str:
    """Plans as JSON: a list of their fields, with `floors`, `bound`, `share`, `fits`."""
    names = ("memory", "floors", "floor", "bound", "share", "fits")
    listed = [
        {"overrides": choice, **dataclasses.asdict(x), **{n: getattr(x, n) for n in names}}
        for choice, x in plans.items()
    ]
    return json.dumps(listed, indent=1) + "\n"


if __name__ == "__main__":
    sys.exit(main())
