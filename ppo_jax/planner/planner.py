"""Whether a PPO iteration fits on some devices, and what it takes there; nothing is run.

The programs of the config are compiled for the devices, which may be described ones: libtpu
compiles for any TPU topology on any machine.
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
from ppo_jax.planner.hlo.cost import ProgramCost, account
from ppo_jax.planner.phases import Models, Phase, phases, read_models

# Several times as fast. Flops are the same and collectives nearly; two to four times as much is
# read, and memory is another.
FAST = {"exec_time_optimization_effort": -1.0}
# libtpu looks for the chips of its machine and says so, unless it is told which they are; and it
# wants to be the only one, which is for those who run on chips.
ONLY_COMPILE = {
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
    chip: Chip | None  # None: no published figures, and no roofline

    @property
    def num_chips(self) -> float:
        """A device is a chip, or a part of one."""
        return len(self.devices) / (self.chip.devices if self.chip else 1)

    @property
    def memory(self) -> float:
        """Bytes that a program may have on one device."""
        if self.chip:
            return self.chip.usable_bytes / self.chip.devices
        stats = self.devices[0].memory_stats() or {}
        shared = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / len(self.devices)
        return stats.get("bytes_limit", shared)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """What one phase costs one device."""

    phase: Phase
    account: ProgramCost | None  # None: the compiler refused, for want of memory
    refusal: str = ""  # what it said
    lies: Roofline | None = None  # the least seconds; None without figures of the chip
    compile_seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """One PPO iteration of a config on a mesh."""

    config: Config
    models: Models
    target: Target
    mesh: Mapping[str, int]
    fast: bool  # compiled with `FAST`
    costs: tuple[Cost, ...]  # of the phases

    @property
    def spare(self) -> float | None:
        """Bytes that are left on a device at the highest peak; None where a phase was refused."""
        if any(cost.account is None for cost in self.costs):
            return None
        return self.target.memory - max(cost.account.memory.peak for cost in self.costs)

    @property
    def fits(self) -> bool:
        """Whether every phase does."""
        return self.spare is not None and self.spare >= 0

    @property
    def seconds(self) -> float | None:
        """The least time of an iteration: the phases follow each other."""
        if any(cost.lies is None for cost in self.costs):
            return None
        return sum(cost.lies.seconds for cost in self.costs)

    @property
    def worst(self) -> Cost:
        """The phase that needs the most memory."""
        refused = [cost for cost in self.costs if cost.account is None]
        return refused[0] if refused else max(self.costs, key=lambda c: c.account.memory.peak)


def has_libtpu() -> bool:
    """Whether there is a compiler for TPUs."""
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
    jax.config.update("jax_platforms", "cpu")  # of this process; what is described is not there
    os.environ.update(ONLY_COMPILE)
    disable_compilation_cache()
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:
        told = str(error).partition("\n")[0]
        raise ValueError(
            f"--topology must be one of its chip, '{chip.name}:2x2' for instance, got "
            f"{topology!r}: {told}"
        ) from error
    return Target(name=topology, devices=described.devices, chip=chip)


def prepare(config: Config, target: Target) -> tuple[Models, Mesh, list[Phase]]:
    """All that is checked of a config, before anything is compiled.

    Raises:
        ValueError: see `read_models`; a model lacks what is to be trained; the mesh does not fit
            the devices or cannot cut a parameter or the batch.
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
    """Compile the phases of an iteration and account for them.

    Args:
        config: of the run; its mesh is over the target's devices.
        target: the devices.
        fast: compile with less effort, see `FAST`; on TPUs alone.

    Raises:
        ValueError: see `prepare`.
    """
    return compile_plan(config, target, prepare(config, target), fast=fast)


def compile_plan(
    config: Config, target: Target, prepared: tuple[Models, Mesh, list[Phase]], *, fast: bool
) -> Plan:
    """`make_plan` of what `prepare` gave."""
    models, mesh, programs = prepared
    options = FAST if fast and target.devices[0].platform == "tpu" else {}
    costs = [cost_of(phase, target, options) for phase in programs]
    return Plan(
        config=config,
        models=models,
        target=target,
        mesh=dict(mesh.shape),
        fast=bool(options),
        costs=tuple(costs),
    )


def cost_of(phase: Phase, target: Target, options: Mapping[str, Any]) -> Cost:
    """Compile one phase."""
    print(f"compiling the {phase.name} ...", flush=True)
    began = time.monotonic()
    try:
        compiled = phase.lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        refusal = str(error).partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED: ")
        seconds = time.monotonic() - began
        return Cost(phase=phase, account=None, refusal=refusal, compile_seconds=seconds)
    seconds = time.monotonic() - began
    found = account(compiled, default_trips=phase.trips)
    lies = roofline(found, target.chip) if target.chip else None
    return Cost(phase=phase, account=found, lies=lies, compile_seconds=seconds)


# --- alternatives ---------------------------------------------------------------------------------

MESH = ("data", "fsdp", "model")
SECTION = dict.fromkeys(MESH, "mesh") | {"remat": "model", "num_micro_batches": "ppo"}


def alternatives(config: Config, text: str) -> list[Config]:
    """The config with other meshes or other ways to save memory.

    Args:
        config: of the run.
        text: "data=1,fsdp=16;fsdp=4,model=4,remat=dots": alternatives between semicolons. Where
            one gives an axis of the mesh, the axes that it does not give are 1.

    Raises:
        ValueError: it is not of this form, or a value is not allowed.
    """
    return [changed(config, piece) for piece in text.split(";")]


def changed(config: Config, text: str) -> Config:
    """One of `alternatives`."""
    values: dict[str, dict[str, Any]] = {}
    for item in text.split(","):
        name, _, value = (part.strip() for part in item.partition("="))
        whole = value.removeprefix("-").isdecimal()
        if name not in SECTION or not (value if name == "remat" else whole):
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
        compile_plan(config, target, found, fast=True)
        for config, found in zip(configs, prepared, strict=True)
    ]

    def order(plan: Plan):
        refused = plan.spare is None
        return not plan.fits, refused, plan.seconds or 0.0, -(plan.spare or 0.0)

    return sorted(plans, key=order)
