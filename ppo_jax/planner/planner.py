"""Memory and cost of one PPO iteration on a given topology, from compilation alone.

libtpu compiles for any TPU topology on any machine.
"""

import dataclasses
import importlib.util
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from ppo_jax.config.run import Config, from_config_dict
from ppo_jax.distributed import layout
from ppo_jax.distributed.layout import Layout, make_mesh
from ppo_jax.distributed.runtime import disable_compilation_cache
from ppo_jax.io.model_spec import ModelSpec
from ppo_jax.pipeline.preflight import check_batch_rows, check_part, check_policy
from ppo_jax.planner.chips import Chip, Roofline, find_chip, roofline
from ppo_jax.planner.hlo.cost import ProgramCost, cost_analysis
from ppo_jax.planner.models import Models, read_models
from ppo_jax.planner.phases import Phase, phases

# Compiles several times as fast. Flops are the same and collectives nearly; two to four times as
# many bytes are read, and peaks differ.
FAST_OPTIONS = {"exec_time_optimization_effort": -1.0}
# Without these libtpu looks for chips of this machine and logs that there are none; and only one
# process may load it.
COMPILE_ONLY_ENV = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_SKIP_MDS_QUERY": "1",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices to plan for."""

    name: str  # of the topology, or of the local devices
    devices: Sequence[jax.Device]  # may be described ones
    chip: Chip | None  # None without published figures

    @property
    def num_chips(self) -> float:
        """A device is a chip, or a part of one."""
        return len(self.devices) / (self.chip.devices if self.chip else 1)

    @property
    def memory(self) -> float:
        """Bytes that a program can use on one device."""
        if self.chip:
            return self.chip.usable_bytes / self.chip.devices
        stats = self.devices[0].memory_stats() or {}
        shared = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(self.devices)
        return stats.get("bytes_limit", shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseCost:
    """What one phase costs one device."""

    phase: Phase
    program_cost: ProgramCost | None  # None: the compiler refused, out of memory
    refusal: str = ""  # its message
    roofline: Roofline | None = None  # None without figures of the chip
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One PPO iteration of a config on a mesh."""

    config: Config
    models: Models
    target: Target
    mesh: Mapping[str, int]
    fast: bool  # compiled with `FAST_OPTIONS`
    costs: tuple[PhaseCost, ...]

    @property
    def spare(self) -> float | None:
        """Free bytes of a device at the highest peak; None where a phase was refused."""
        if any(cost.program_cost is None for cost in self.costs):
            return None
        return self.target.memory - max(cost.program_cost.memory.peak for cost in self.costs)

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.spare is not None and self.spare >= 0

    @property
    def seconds(self) -> float | None:
        """The least time of an iteration: its phases run one after the other."""
        if any(cost.roofline is None for cost in self.costs):
            return None
        return sum(cost.roofline.seconds for cost in self.costs)

    @property
    def peak_phase(self) -> PhaseCost:
        """The phase that needs the most memory."""
        refused = [cost for cost in self.costs if cost.program_cost is None]
        return refused[0] if refused else max(self.costs, key=lambda c: c.program_cost.memory.peak)


def has_libtpu() -> bool:
    """Whether the TPU compiler is installed."""
    return importlib.util.find_spec("libtpu") is not None


def find_target(topology: str | None) -> Target:
    """The devices of a topology, such as "v5e:2x2"; without one the local ones.

    Raises:
        ValueError: there is no such topology, no figures of its chip, or no libtpu.
    """
    if topology and not has_libtpu():
        raise ValueError(
            f"topology must be None without libtpu (pip install 'ppo_jax[plan]'), got {topology!r}"
        )
    if not topology:
        devices = layout.devices_of_run()
        kind = devices[0].device_kind
        try:
            chip = find_chip(kind)
        except ValueError:
            chip = None
        return Target(name=f"local {kind}", devices=devices, chip=chip)
    chip = find_chip(topology)
    jax.config.update("jax_platforms", "cpu")  # the described devices are not there
    os.environ.update(COMPILE_ONLY_ENV)
    disable_compilation_cache()
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        message = str(error).partition("\n")[0]
        raise ValueError(
            f"--topology must be one of its chip, '{chip.name}:2x2' for instance, got "
            f"{topology!r}: {message}"
        ) from error
    return Target(name=topology, devices=description.devices, chip=chip)


def prepare(config: Config, target: Target) -> tuple[Models, Mesh, list[Phase]]:
    """(models, mesh, programs) of a config, checked before anything is compiled.

    Raises:
        ValueError: see `read_models`; a model lacks what is to be trained; the mesh does not fit
            the devices or cannot shard a parameter or the batch.
    """
    models, s = read_models(config), config.ppo
    check_policy("ppo", config, ModelSpec(kind="policy", config=models.policy, tokenizer=None))
    if models.critic is not None:
        check_part("ppo.value_trainable", s.value_trainable, s.lora, models.critic)
    mesh = make_mesh(config.mesh, target.devices)
    layouts = Layout(mesh, config.mesh.rules), Layout(mesh, config.mesh.rollout_rules)
    check_batch_rows(s, layouts)
    return models, mesh, phases(config, models, layouts)


def plan(settings: Mapping[str, Any], topology: str | None = None, *, fast: bool = False) -> Plan:
    """What one PPO iteration of a config costs on some devices; nothing is run.

    With a topology this process can only compile from then on: jax sees no other devices than CPUs,
    and no compiled program is kept. A notebook had better call `ppo-jax plan`.

    Args:
        settings: the config, a ConfigDict or nested dicts, with a ppo section.
        topology: of TPUs, "v5e:2x2" for instance, which needs libtpu; None is the devices here.
        fast: compile with less effort: flops are the same, bytes and peaks differ.

    Raises:
        ValueError: a setting or the topology is not usable, or there is no libtpu.
    """
    return make_plan(from_config_dict(settings), find_target(topology), fast=fast)


def make_plan(config: Config, target: Target, *, fast: bool = False) -> Plan:
    """`plan` for a config and a target; raises what `prepare` raises."""
    return compile_plan(config, target, prepare(config, target), fast=fast)


def compile_plan(
    config: Config, target: Target, prepared: tuple[Models, Mesh, list[Phase]], *, fast: bool
) -> Plan:
    """`make_plan` of a prepared config; `fast` only has an effect on TPUs."""
    models, mesh, programs = prepared
    options = FAST_OPTIONS if fast and target.devices[0].platform == "tpu" else {}
    costs = [compile_phase(phase, target, options) for phase in programs]
    return Plan(
        config=config,
        models=models,
        target=target,
        mesh=dict(mesh.shape),
        fast=bool(options),
        costs=tuple(costs),
    )


def compile_phase(phase: Phase, target: Target, options: Mapping[str, Any]) -> PhaseCost:
    print(f"compiling the {phase.name} ...", flush=True)
    start = time.monotonic()
    try:
        compiled = phase.lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        seconds = time.monotonic() - start
        return PhaseCost(phase=phase, program_cost=None, refusal=refusal, compile_seconds=seconds)
    seconds = time.monotonic() - start
    cost = cost_analysis(compiled, max_trip_counts=phase.max_trip_counts)
    return PhaseCost(
        phase=phase,
        program_cost=cost,
        roofline=roofline(cost, target.chip) if target.chip else None,
        compile_seconds=seconds,
    )


# --- alternatives ---------------------------------------------------------------------------------

MESH = ("data", "fsdp", "model")
SECTION = dict.fromkeys(MESH, "mesh") | {"remat": "model", "num_micro_batches": "ppo"}


def alternatives(config: Config, text: str) -> list[Config]:
    """The config with other meshes or other ways to save memory.

    Args:
        config: the run.
        text: "data=1,fsdp=16;fsdp=4,model=4,remat=dots": alternatives between semicolons. Where
            one gives an axis of the mesh, the axes that it does not give are 1.

    Raises:
        ValueError: it is not of this form, or a value is not allowed.
    """
    return [override(config, settings) for settings in text.split(";")]


def override(config: Config, text: str) -> Config:
    """One of `alternatives`."""
    values: dict[str, dict[str, Any]] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        is_integer = value.removeprefix("-").isdecimal()
        if name not in SECTION or not (value if name == "remat" else is_integer):
            raise ValueError(
                f"--compare must be like data=1,fsdp=16;fsdp=4,model=4,remat=dots with the names "
                f"{list(SECTION)}, got {item.strip()!r}"
            )
        values.setdefault(SECTION[name], {})[name] = value if name == "remat" else int(value)
    if "mesh" in values:
        values["mesh"] = dict.fromkeys(MESH, 1) | values["mesh"]
    sections = {
        section: dataclasses.replace(getattr(config, section), **fields)
        for section, fields in values.items()
    }
    return dataclasses.replace(config, **sections)


def compare(configs: Sequence[Config], target: Target) -> list[Plan]:
    """Plans of several configs, the best first: what fits, then the least time or memory."""
    prepared = [prepare(config, target) for config in configs]  # refuse before compiling
    plans = [
        compile_plan(config, target, programs, fast=True)
        for config, programs in zip(configs, prepared, strict=True)
    ]
    return sorted(
        plans, key=lambda p: (not p.fits, p.spare is None, p.seconds or 0.0, -(p.spare or 0.0))
    )
