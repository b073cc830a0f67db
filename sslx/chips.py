"""What each accelerator can do at most, and the options that its compiler is given."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

Options = Mapping[str, bool | int | str]


@dataclass(frozen=True)
class Chip:
    """The bounds of one jax device, as its vendor gives them: no program is faster.

    kind       a pattern of `device.device_kind`
    peak       floating-point operations a second, of matrix products in bfloat16
    memory     bytes
    bandwidth  bytes a second, to and from that memory
    links      bytes a second that it sends to devices of its slice or node, over all links
    network    bytes a second that it sends to other slices or nodes
    """

    kind: str
    peak: float
    memory: float
    bandwidth: float
    links: float
    network: float


GIB = 2.0**30
# TPU: docs.cloud.google.com/tpu/docs/{v3,v4,v5e,v5p,v6e,tpu7x}, whose figures for links count both
# directions; a chip of v3 or tpu7x is two devices. v3 has no published figure for links, v3 and v4
# none for the network: those are of arXiv:2304.01433, table 4 (4 x 70 and 6 x 50 GB/s), and of v5p.
# GPU: NVIDIA's datasheets, without sparsity; NVLink counts both directions, and the network is one
# port a GPU, of 400 Gb/s, or 200 in a DGX A100.
CHIPS: dict[str, Chip] = {
    "v3": Chip("TPU v3", 61.5e12, 16 * GIB, 450e9, 70e9, 6.25e9),
    "v4": Chip("TPU v4", 275e12, 32 * GIB, 1200e9, 150e9, 6.25e9),
    "v5e": Chip("TPU v5 lite|TPU v5e", 197e12, 16 * GIB, 819e9, 200e9, 3.125e9),
    "v5p": Chip("TPU v5p?$", 459e12, 95 * GIB, 2765e9, 600e9, 6.25e9),
    "v6e": Chip("TPU v6 lite|TPU v6e", 918e12, 32 * GIB, 1640e9, 400e9, 12.5e9),
    "tpu7x": Chip("TPU7x", 1153.5e12, 96 * GIB, 3690e9, 300e9, 6.25e9),
    "A100": Chip("NVIDIA A100", 312e12, 80e9, 2039e9, 300e9, 25e9),
    "H100": Chip("NVIDIA H100", 989e12, 80e9, 3350e9, 450e9, 50e9),
    "H200": Chip("NVIDIA H200", 989e12, 141e9, 4800e9, 450e9, 50e9),
    "B200": Chip("NVIDIA B200", 2250e12, 180e9, 8000e9, 900e9, 50e9),
}


def chip_of(kind: str) -> str:
    """The name in CHIPS of devices whose `device_kind` this is; empty for any other."""
    return next((name for name, chip in CHIPS.items() if re.match(chip.kind, kind)), "")


# Options of the TPU's compiler, each from axlearn (common/compiler_options.py, 34aed43) or MaxText
# (benchmarks/xla_flags_library.py, e591f30), where they train on these chips every day. Never
# xla_tpu_spmd_rng_bit_generator_unsafe: with rbg keys, random numbers would be those of a sharding.
ANY_TPU: Options = {
    "xla_tpu_enable_latency_hiding_scheduler": True,
    "xla_tpu_perform_spmd_cse_prevention": False,
}
ASYNC: Options = {
    "xla_enable_async_all_gather": True,
    "xla_enable_async_collective_permute": True,
}
OPTIONS: dict[str, Options] = {
    "v3": ANY_TPU,
    "v4": ANY_TPU | ASYNC,
    "v5e": ANY_TPU,
    "v5p": ANY_TPU
    | ASYNC
    | {
        "xla_tpu_scoped_vmem_limit_kib": 65472,
        "xla_tpu_use_tc_device_shape_on_sc": True,
        "xla_sc_enable_instruction_fusion": False,
        "xla_sc_disable_megacore_partitioning": True,
    },
    "v6e": ANY_TPU
    | {
        "xla_tpu_scoped_vmem_limit_kib": 98304,
        "xla_tpu_enable_async_collective_fusion": True,
        "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,
        "xla_tpu_enable_async_collective_fusion_multiple_steps": True,
        "xla_tpu_overlap_compute_collective_tc": True,
        "xla_enable_async_all_gather": True,
        "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
        "xla_latency_hiding_scheduler_rerun": 2,
    },
    "tpu7x": ANY_TPU
    | {
        "xla_tpu_scoped_vmem_limit_kib": 65536,
        "xla_tpu_prefer_async_allgather_to_allreduce": True,
    },
}
SLICES: Options = {  # for several
    "xla_tpu_enable_data_parallel_all_reduce_opt": True,
    "xla_tpu_data_parallel_opt_different_sized_ops": True,
    "xla_tpu_enable_megascale_barrier": True,
}


def options(kind: str, slices: int = 1) -> Options:
    """What the compiler is given for devices of this `device_kind`, on so many slices."""
    own = OPTIONS.get(chip_of(kind), {})
    return own | SLICES if own and slices > 1 else own
