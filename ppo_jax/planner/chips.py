"""Published figures of TPU chips, and the roofline of a program on one."""

import dataclasses
from typing import NamedTuple

from ppo_jax.planner.hlo.cost import ProgramCost

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip. A jax device is a chip, or a part of it: `devices`."""

    name: str  # the prefix of its topologies: "v5e:4x4"
    device_kind: str  # of its jax devices
    devices: int  # jax devices per chip, which share all that follows
    flops: float  # peak of bfloat16 matrix products per second
    hbm_bytes: float  # main memory
    usable_bytes: float  # what the compiler lets a program have: the rest is the system's
    hbm_bandwidth: float  # bytes per second
    ici_dims: int  # of the torus: two links each
    ici_bandwidth: float  # bytes per second that a chip sends over all links; as many come in


# Sources: docs.cloud.google.com/tpu/docs/{v4, v5e, v5p, v6e, tpu7x}; the links of v4, 6 x 50 GB/s,
# are in https://arxiv.org/abs/2304.01433. The interconnect figures of the pages count both
# directions: half of it is what a chip sends. `usable_bytes` is the limit that the compiler of
# libtpu 0.0.42 names when a program needs more; for v5p it names a little more than the page.
CHIPS = (
    # A device of v4 is a chip with chip_config_name="megacore".
    Chip("v4", "TPU v4", 1, 275e12, 32 * GIB, 30.75 * GIB, 1200e9, 3, 300e9),
    Chip("v5e", "TPU v5 lite", 1, 197e12, 16 * GIB, 15.75 * GIB, 819e9, 2, 200e9),
    Chip("v5p", "TPU v5", 1, 459e12, 95 * GIB, 95 * GIB, 2765e9, 3, 600e9),
    Chip("v6e", "TPU v6 lite", 1, 918e12, 32 * GIB, 31.25 * GIB, 1638e9, 2, 400e9),
    # The two devices of a chip exchange over a faster path, which is not in the figure.
    Chip("tpu7x", "TPU7x", 2, 2307e12, 192 * GIB, 189.5 * GIB, 7380e9, 3, 600e9),
)


class Roofline(NamedTuple):
    """The least seconds by each of three bounds, as if nothing else took time."""

    compute: float
    hbm: float
    ici: float

    @property
    def seconds(self) -> float:
        """The longest of the three: they may all overlap."""
        return max(self)

    @property
    def bound(self) -> str:
        """Which of them it is: "compute", "hbm" or "ici"."""
        return self._fields[self.index(self.seconds)]


def find_chip(name: str) -> Chip:
    """The chip of a topology ("v5e:2x2"), or of a device by its `device_kind`.

    Raises:
        ValueError: it is not in the table.

    >>> find_chip("v5e:2x2") is find_chip("TPU v5 lite")
    True
    """
    for chip in CHIPS:
        if name.partition(":")[0] == chip.name or name == chip.device_kind:
            return chip
    raise ValueError(f"no figures of the chip {name!r}; there are {[x.name for x in CHIPS]}")


def roofline(cost: ProgramCost, chip: Chip) -> Roofline:
    """flops / peak, bytes / HBM bandwidth, bytes sent / ICI bandwidth, of one device.

    A lower bound: at the published peaks, all links of the interconnect busy at once, and no
    latency. A collective along one dimension of the torus has 2 of its links, and takes `ici_dims`
    times as long.
    """
    return Roofline(
        compute=cost.flops * chip.devices / chip.flops,
        hbm=cost.bytes_accessed * chip.devices / chip.hbm_bandwidth,
        ici=cost.collective_bytes * chip.devices / chip.ici_bandwidth,
    )


def utilisation(model_flops: float, seconds: float, chip: Chip) -> float:
    """Model-flops utilisation (MFU): the share of the peak that the model itself needs.

    Args:
        model_flops: of one device, without recomputation (see `flops`).
        seconds: that they take; those of a roofline give the upper bound.
        chip: whose peak.
    """
    return model_flops * chip.devices / (seconds * chip.flops)
