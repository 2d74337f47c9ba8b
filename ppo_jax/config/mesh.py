"""Settings of the device mesh: its axes, and the rules from logical to mesh axes."""

import dataclasses

from ppo_jax.config.parsing import Check

MESH_AXES = ("data", "fsdp", "model")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxisRules:
    """The mesh axes that each logical axis is sharded over; () replicates it."""

    batch: tuple[str, ...] = ("data", "fsdp")  # rows of batches, activations and KV caches
    vocab: tuple[str, ...] = ("model",)  # of the token table, the head and the logits
    embed: tuple[str, ...] = ("fsdp",)  # of stored parameters; gathered where they are used
    heads: tuple[str, ...] = ("model",)  # query heads
    kv_heads: tuple[str, ...] = ("model",)  # key and value heads, in the KV cache as well
    mlp: tuple[str, ...] = ("model",)  # hidden units of the feed-forward layers
    expert: tuple[str, ...] = ("model",)  # experts of a mixture; may include axes of `batch`;
    # replicated where the mesh does not divide their number
    layers: tuple[str, ...] = ()  # of scanned layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutRules(AxisRules):
    """The same while responses are sampled: the decode loop reads every parameter for every token,
    so that none may have to be gathered."""

    embed: tuple[str, ...] = ()


RULES, ROLLOUT_RULES = AxisRules(), RolloutRules()


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSettings:
    """How the devices are arranged. The product of the three sizes is the number of devices."""

    data: int = -1  # number of copies of the model, with rows of their own; -1 is what is left
    fsdp: int = 1  # number of shards of every parameter, optimizer state and batch
    model: int = 1  # number of shards of heads, MLPs and vocabulary: tensor parallelism
    rules: AxisRules = RULES  # of parameters, optimizer states, experience and updates
    rollout_rules: RolloutRules = ROLLOUT_RULES  # of the policy and its KV cache while it samples

    def __post_init__(self):
        check = Check(self, "mesh")
        for axis in MESH_AXES:
            check.that(getattr(self, axis) == -1 or getattr(self, axis) >= 1, axis, "-1 or >= 1")
        open_axes = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        if len(open_axes) > 1:
            raise ValueError(f"mesh: only one size may be -1, got {open_axes}")
        for field in ("rules", "rollout_rules"):
            rules = Check(getattr(self, field), f"mesh.{field}")
            for axis in dataclasses.fields(AxisRules):
                over = getattr(rules.settings, axis.name)
                distinct = len(set(over)) == len(over) and set(over) <= set(MESH_AXES)
                rules.that(distinct, axis.name, f"different axes out of {list(MESH_AXES)}")
