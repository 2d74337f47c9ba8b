"""TPU chips by their published figures, and the least time that a program takes on one."""

import dataclasses
from typing import NamedTuple

from ppo_jax.planner.hlo.cost import ProgramCost

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip. A jax device is a chip, or a part of it: `devices`."""

    name: str  # as topologies begin: "v5e:4x4"
    device_kind: str  # what jax calls it
    devices: int = 1  # jax devices a chip, which share all that follows
    flops: float  # peak of bfloat16 matrix products, a second
    hbm_bytes: float  # of main memory
    usable_bytes: float  # what the compiler lets a program have: the rest is the system's
    hbm_bandwidth: float  # bytes a second
    ici_links: int  # to neighbouring chips
    ici_dims: int  # of the torus: two links each
    ici_bandwidth: float  # bytes a second that a chip sends over all links; as many come in


# Sources: the chip's page of the Cloud TPU documentation, and what it does not say from where the
# comment says. Its interconnect figures count both directions: half of it is what a chip sends.
# `usable_bytes` is the limit that the compiler of libtpu 0.0.42 names when a program needs more.
CHIPS = (
    # https://docs.cloud.google.com/tpu/docs/v4; its links, 6 x 50 GB/s, in
    # https://arxiv.org/abs/2304.01433. A device is a chip with chip_config_name="megacore".
    Chip(
        name="v4",
        device_kind="TPU v4",
        flops=275e12,
        hbm_bytes=32 * GIB,
        usable_bytes=30.75 * GIB,
        hbm_bandwidth=1200e9,
        ici_links=6,
        ici_dims=3,
        ici_bandwidth=300e9,
    ),
    # https://docs.cloud.google.com/tpu/docs/v5e: 197 TFLOPs, 16 GB, 819 GB/s, 4 ports, 400 GB/s
    Chip(
        name="v5e",
        device_kind="TPU v5 lite",
        flops=197e12,
        hbm_bytes=16 * GIB,
        usable_bytes=15.75 * GIB,
        hbm_bandwidth=819e9,
        ici_links=4,
        ici_dims=2,
        ici_bandwidth=200e9,
    ),
    # https://docs.cloud.google.com/tpu/docs/v5p: 459 TFLOPs, 95 GiB, 2765 GB/s, 1200 GB/s; the
    # compiler gives a little more than the 95 GiB of the page.
    Chip(
        name="v5p",
        device_kind="TPU v5",
        flops=459e12,
        hbm_bytes=95 * GIB,
        usable_bytes=95 * GIB,
        hbm_bandwidth=2765e9,
        ici_links=6,
        ici_dims=3,
        ici_bandwidth=600e9,
    ),
    # https://docs.cloud.google.com/tpu/docs/v6e: 918 TFLOPs, 32 GB, 1638 GB/s, 4 ports, 800 GB/s
    Chip(
        name="v6e",
        device_kind="TPU v6 lite",
        flops=918e12,
        hbm_bytes=32 * GIB,
        usable_bytes=31.25 * GIB,
        hbm_bandwidth=1638e9,
        ici_links=4,
        ici_dims=2,
        ici_bandwidth=400e9,
    ),
    # https://docs.cloud.google.com/tpu/docs/tpu7x: 2307 TFLOPs, 192 GiB, 7380 GB/s, 1200 GB/s.
    # The two devices of a chip exchange over a faster path, which is not in the figure.
    Chip(
        name="tpu7x",
        device_kind="TPU7x",
        devices=2,
        flops=2307e12,
        hbm_bytes=192 * GIB,
        usable_bytes=189.5 * GIB,
        hbm_bandwidth=7380e9,
        ici_links=6,
        ici_dims=3,
        ici_bandwidth=600e9,
    ),
)


class Roofline(NamedTuple):
    """The least seconds for each of three things, as if nothing else took time."""

    compute: float
    hbm: float
    ici: float

    @property
    def seconds(self) -> float:
        """The longest of the three: they may all go on at once."""
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


def roofline(account: ProgramCost, chip: Chip) -> Roofline:
    """flops / peak, bytes / HBM bandwidth, bytes sent / ICI bandwidth, of one device.

    A bound from below: at the published peaks, all links of the interconnect busy at once, and no
    latency. A collective along one dimension of the torus has 2 of `ici_links` links, and takes
    `ici_dims` times as long.
    """
    return Roofline(
        compute=account.flops * chip.devices / chip.flops,
        hbm=account.bytes_accessed * chip.devices / chip.hbm_bandwidth,
        ici=account.collective_bytes * chip.devices / chip.ici_bandwidth,
    )


def utilisation(model_flops: float, seconds: float, chip: Chip) -> float:
    """Model-flops utilisation: the share of the peak that the model itself needs.

    Args:
        model_flops: of one device, without what is computed again (see `flops`).
        seconds: that it takes; of a roofline, this is the most that can be had.
        chip: the chip.
    """
    return model_flops * chip.devices / (seconds * chip.flops)


def spare_bytes(account: ProgramCost, chip: Chip) -> float:
    """What of a device's main memory a program leaves; negative where it does not fit."""
    return chip.usable_bytes / chip.devices - account.memory.peak
