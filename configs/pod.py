"""PPO on TPU pods: every variant fits on its topology by the planner's figures; none has been run.

    python experiments/plan.py --config=configs/pod.py:llama3_8b --topology=v5p:4x4x4

The command needs no TPU; train_ppo.py takes the same config on one. Each variant is all four models
at full size with every layer trained: policy and critic with Adam in float32, reference and reward
model in bfloat16, computed in bfloat16. `fsdp=-1` takes as many devices as there are. Three rules
made the meshes:

- `data` is 1: with copies, gradients are reduced whole over them.
- `model` is as small as the rollout allows: each device reads its part of the policy, 1 / model of
  it, for every token.
- A shard of the embedding, embed / fsdp, is at least 128 wide, the lanes of a TPU: for narrower
  ones XLA reduces whole gradients on every device, and slices them afterwards.
"""

from ml_collections import config_dict

from ppo_jax.config import with_defaults

# The topology that each is made for, and what follows from it and the model.
VARIANTS = {
    # v5e:2x2, 4 chips
    "smollm2_135m": dict(
        path="HuggingFaceTB/SmolLM2-135M-Instruct",
        remat="dots",
        mesh=dict(data=1, fsdp=-1),
        ppo=dict(rollout_batch_size=128, num_minibatches=2, num_micro_batches=2),
    ),
    # v5e:4x4, 16 chips
    "qwen3_0_6b": dict(
        path="Qwen/Qwen3-0.6B",
        remat="full",
        mesh=dict(data=1, fsdp=-1, model=2),
        ppo=dict(rollout_batch_size=256, num_minibatches=2, num_micro_batches=2),
    ),
    # v5p:4x4x4 or v6e:8x8, 64 chips
    "llama3_8b": dict(
        path="meta-llama/Llama-3.1-8B-Instruct",
        remat="full",
        mesh=dict(data=1, fsdp=-1, model=4),
        ppo=dict(rollout_batch_size=512, num_minibatches=2, num_micro_batches=2),
    ),
    # v5p:4x4x4, 64 chips; the experts are sharded over `model`
    "qwen3_30b_a3b": dict(
        path="Qwen/Qwen3-30B-A3B",
        remat="full",
        mesh=dict(data=1, fsdp=-1, model=4),
        ppo=dict(rollout_batch_size=512, num_minibatches=2, num_micro_batches=2),
    ),
    # v5p:4x4x4, 64 chips; a run needs the model of its text alone
    "gemma3_27b": dict(
        path="google/gemma-3-27b-it",
        remat="full",
        mesh=dict(data=1, fsdp=-1, model=4),
        ppo=dict(rollout_batch_size=512, num_minibatches=2, num_micro_batches=2),
    ),
    # v5p:8x8x8, 512 chips
    "llama3_70b": dict(
        path="meta-llama/Llama-3.1-70B-Instruct",
        remat="full",
        mesh=dict(data=1, fsdp=-1, model=8),
        ppo=dict(rollout_batch_size=1024, num_minibatches=2, num_micro_batches=1),
    ),
}


def get_config(variant: str = "smollm2_135m") -> config_dict.ConfigDict:
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r}; choose from {sorted(VARIANTS)}")
    chosen = VARIANTS[variant]
    return with_defaults(
        dict(
            mesh=chosen["mesh"],
            model=dict(
                path=chosen["path"],
                dtype="bfloat16",
                frozen_dtype="bfloat16",
                scan_layers=True,
                remat=chosen["remat"],
            ),
            ppo=dict(
                prompts="prompts.jsonl",
                init_from="base",
                reward_model="runs/reward/reward",  # the folder of a reward stage
                max_prompt_length=256,  # tokens
                response_length=256,  # tokens
                num_epochs=2,
                value_learning_rate=1e-5,
                optimizer=dict(learning_rate=3e-6, schedule="linear", eps=1e-5),
                **chosen["ppo"],
            ),
        )
    )
