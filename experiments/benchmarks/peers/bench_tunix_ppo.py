"""Iterations of Tunix's PPO learner: policy, reference and critic, each a network of its own, of
the Qwen2 shape; the score is a function. Its minibatches are rolled out one by one.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import time

import common


class NumberTokenizer:
    """'12 7 9' is [12, 7, 9]; its EOS is no token of the model, so that none stops."""

    def __init__(self, vocab_size: int):
        self.end = vocab_size + 7

    def encode(self, text, **_):
        return [int(number) for number in str(text).split()]

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)

    def bos_id(self):
        return 0

    def eos_id(self):
        return self.end

    def pad_id(self):
        return common.PAD


def make_models(args, mesh):
    """(policy, reference, critic) of Tunix, random; the critic is a second full network."""
    import jax
    from flax import nnx
    from tunix.models.qwen2.model import ModelConfig, Qwen2
    from tunix.rl import utils

    config = ModelConfig(
        num_layers=args.layers,
        vocab_size=args.vocab,
        embed_dim=args.hidden,
        hidden_dim=args.mlp or 4 * args.hidden,
        num_heads=args.heads,
        head_dim=args.hidden // args.heads,
        num_kv_heads=args.kv_heads or args.heads,
        rope_theta=10_000,
        norm_eps=1e-5,
    )
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def on_mesh(model):
        graph, state = nnx.split(model)
        return nnx.merge(graph, jax.device_put(state, replicated))

    with mesh:
        policy, reference, body = (on_mesh(Qwen2(config, rngs=nnx.Rngs(i))) for i in (0, 0, 1))
        return policy, reference, on_mesh(utils.create_critic_model(body))


def make_cluster(args, mesh):
    """Tunix's models on a mesh, with their optimizers and the sizes of an iteration."""
    import optax
    from tunix.rl import rl_cluster
    from tunix.rl.rollout import base_rollout

    policy, reference, critic = make_models(args, mesh)
    words, role = NumberTokenizer(args.vocab), rl_cluster.Role
    roles = role.ACTOR, role.CRITIC, role.REFERENCE, role.ROLLOUT, role.REWARD
    parts = "mini", "train_micro", "rollout_micro", "compute_logps_micro"
    rows = args.batch // args.num_minibatches
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.adamw(3e-6, weight_decay=0.0),
        critic_optimizer=optax.adamw(3e-6, weight_decay=0.0),
        eval_every_n_steps=10**9,
        max_steps=10**9,
        **{f"{part}_batch_size": rows for part in parts},
    )
    rollout = base_rollout.RolloutConfig(
        max_tokens_to_generate=args.response_len,
        max_prompt_length=args.prompt_len,
        kv_cache_size=args.prompt_len + args.response_len,
        temperature=0.7,
        top_p=1.0,
        top_k=None,
        eos_tokens=[words.eos_id()],
    )
    config = rl_cluster.ClusterConfig(
        role_to_mesh=dict.fromkeys(roles, mesh),
        rollout_engine="vanilla",
        offload_to_cpu=False,
        training_config=training,
        rollout_config=rollout,
    )
    return rl_cluster.RLCluster(
        actor=policy, critic=critic, reference=reference, tokenizer=words, cluster_config=config
    )


def even_tokens(prompts, completions, **_):
    """The reward: how many tokens of a response are even numbers."""
    return [float(sum(int(x) % 2 == 0 for x in text.split())) for text in completions]


def main():
    flags = common.parser(__doc__)
    common.add_numbers(flags, prompt_len=32, response_len=64, num_epochs=4, num_minibatches=1)
    flags.set_defaults(family="qwen2")
    args = flags.parse_args()
    if args.family != "qwen2":
        flags.error(f"--family must be qwen2, the one that Tunix's PPO runs, got {args.family}")
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])

    import jax
    import numpy as np
    from flax import nnx
    from tunix.rl.ppo import ppo_learner

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = make_cluster(args, mesh)
    cpu, wall = [], []

    class Learner(ppo_learner.PPOLearner):
        def _run_global_step(self, *given, **named):
            start = time.process_time(), time.perf_counter()
            result = super()._run_global_step(*given, **named)
            for trainer in (cluster.actor_trainer, cluster.critic_trainer):
                jax.block_until_ready(jax.tree.leaves(nnx.state(trainer.model, nnx.Param)))
            cpu.append(time.process_time() - start[0])
            wall.append(time.perf_counter() - start[1])
            return result

    algorithm = ppo_learner.PPOConfig(num_iterations=args.num_epochs, beta=0.05, kl_method="kl")
    learner = Learner(rl_cluster=cluster, ppo_config=algorithm, reward_fns=even_tokens)
    random = np.random.default_rng(0)

    def batches():
        for _ in range(args.warmup + args.repeats):
            ids = random.integers(2, args.vocab, (args.batch, args.prompt_len))
            yield {"prompts": np.array([" ".join(map(str, row)) for row in ids])}

    learner.train(batches())
    figures = common.call_figures(cpu[args.warmup :], wall[args.warmup :], "_per_iter")
    common.print_report("tunix_ppo", args, ["google-tunix", "jax"], figures)


if __name__ == "__main__":
    main()
