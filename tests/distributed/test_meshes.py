"""One program on many devices: the same numbers, and no parameter gathered while sampling."""

import dataclasses
import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ppo_jax.algorithms import experience, ppo
from ppo_jax.algorithms.update import experience_loss, ppo_update
from ppo_jax.config.mesh import ROLLOUT_RULES, RULES
from ppo_jax.core.advantages import gae
from ppo_jax.core.covariance import clip_cov_policy_loss, kl_cov_policy_loss
from ppo_jax.core.critic_free import remax_advantages
from ppo_jax.core.network import Network
from ppo_jax.core.off_policy_losses import decoupled_policy_loss
from ppo_jax.core.types import FrozenParams
from ppo_jax.distributed.layout import Layout, init_sharded
from ppo_jax.distributed.trees import named_leaves
from ppo_jax.models.build import (
    policy_network,
    policy_value_network,
    reward_network,
    trunk_network,
    value_network,
)
from ppo_jax.models.partition import split_params
from tests.support import tiny
from tests.support.meshes import MESHES, WIDE, mesh_of

BATCH = 32


class Run:
    """PPO with a reward model on a mesh; every number is the same for every mesh.

    `kind` is "whole", "scanned" (with remat) or "trunk": the top layer on a frozen one. The critic
    has `num_bins`, or there are two, or it is `shared`: a head on the policy. `rules` are those
    that differ from the defaults, of updates and rollouts.
    """

    def __init__(
        self,
        shape,
        kind="whole",
        config=None,
        num_bins=0,
        num_critics=1,
        shared=False,
        rules=types.MappingProxyType({}),
        **numbers,
    ):
        mesh = mesh_of(shape)
        self.layout, self.of_rollout = (
            Layout(mesh, dataclasses.replace(x, **rules)) for x in (RULES, ROLLOUT_RULES)
        )
        scanned = dict(scan_layers=True, remat="full") if kind == "scanned" else {}
        self.config = config or tiny.model_config(**WIDE, **scanned)
        self.start = 1 if kind == "trunk" else None
        c, start, constrain = self.config, self.start, self.layout.constrain
        upper = dict(start_layer=start, constrain=constrain)
        policy = functools.partial(policy_network, c, start_layer=start)

        def trunk(constrain):
            return start and trunk_network(c, end_layer=start, constrain=constrain)

        self.networks = experience.PPONetworks(
            policy=policy(constrain=constrain),
            value=(policy_value_network if shared else value_network)(
                c, **upper, num_bins=num_bins
            ),
            reward=reward_network(c, **upper),
            trunk=trunk(constrain),
            value_on_trunk=bool(start),
            value_on_policy=shared,
            reward_on_trunk=bool(start),
            sampler=experience.Sampler(
                policy=policy(constrain=self.of_rollout.constrain),
                trunk=trunk(self.of_rollout.constrain),
                reshard=functools.partial(self.of_rollout.decoding_params, dtype=c.dtype),
            ),
        )
        self.options = tiny.options(
            num_epochs=2, num_minibatches=2, num_micro_batches=2, num_critics=num_critics
        )
        self.numbers = self.layout.replicate(tiny.hyperparameters(**numbers))
        networks = [make(c) for make in MAKERS]
        networks[2] = value_network(c, num_bins=num_bins)
        params = [self.params(network, i) for i, network in enumerate(networks)]
        if num_critics > 1:
            other = self.params(networks[2], 9)
            both = jax.tree.map(lambda *x: np.stack(x), *jax.device_get((params[2], other)))
            params[2] = self.layout.shard_params(both)
        of_policy, of_reference, of_critic, of_reward = map(self.split, params)
        self.frozen = FrozenParams(
            ref_policy=of_reference.trained,
            reward=of_reward.frozen | of_reward.trained,
            trunk=of_policy.trunk if start else None,
            policy=of_policy.frozen,
            value={} if shared else of_critic.frozen,
        )
        of_value = {"value_head": of_critic.trained["head"]} if shared else of_critic.trained
        args = (of_policy.trained, of_value, self.numbers)
        self.state = init_sharded(self.layout, ppo.init_ppo, *args)

    def params(self, network, seed):
        return self.layout.shard_params(jax.tree.map(np.asarray, tiny.random_params(network, seed)))

    def split(self, params):
        return split_params(self.config, params, 1 if self.start else "all", self.start)

    def prompts(self, seed):
        prompts = tiny.prompts(seed=seed, batch_size=BATCH)
        return self.layout.shard_batch(jax.tree.map(np.asarray, prompts))

    def compile(self, function, *static, **out):
        parts = dict(networks=self.networks, options=self.options)
        return jax.jit(functools.partial(function, **parts), **out)

    def iterations(self, count):
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state), self.layout.replicated
        step = self.compile(ppo.ppo_iteration, donate_argnums=0, out_shardings=shardings)
        metrics = []
        for i in range(count):
            args = (self.numbers, self.prompts(i), self.layout.key(0, i))
            self.state, found = step(self.state, *args, frozen=self.frozen)
            metrics.append(jax.device_get(found))
        return metrics

    def rollout(self):
        sample = self.compile(experience.sample_responses)
        args = (self.state, self.numbers, self.prompts(0), self.layout.key(0, 0))
        return sample(*args, frozen=self.frozen)


MAKERS = (policy_network, policy_network, value_network, reward_network)


@functools.cache
def measured(shape, kind):
    run = Run(shape, kind)
    start = jax.device_get(run.state.policy_params)
    rollout = run.rollout()
    metrics = run.iterations(3)
    return jax.device_get((rollout, metrics, run.state)), start


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["whole", "scanned", "trunk"])
def test_three_iterations_are_those_of_one_device(kind):
    (rollout, metrics, state), _ = measured((2, 2, 2), kind)
    (one_rollout, one_metrics, one_state), start = measured((1, 1, 1), kind)
    np.testing.assert_array_equal(rollout.response_tokens, one_rollout.response_tokens)
    np.testing.assert_allclose(rollout.logprobs, one_rollout.logprobs, atol=1e-5, rtol=0)
    learning_rate = 1e-3
    for name, leaf in named_leaves(one_state).items():
        if "params" in name:
            found = named_leaves(state)[name]
            np.testing.assert_allclose(found, leaf, atol=0.1 * learning_rate, rtol=0, err_msg=name)
    for mine, one in zip(metrics, one_metrics, strict=True):
        for name in one:
            if name.endswith("loss"):
                np.testing.assert_allclose(mine[name], one[name], rtol=1e-4, atol=1e-6)
    before, after = (named_leaves(x) for x in (start, one_state.policy_params))
    moved = [np.abs(after[name] - before[name]).max() for name in before]
    assert min(moved) > learning_rate  # three iterations moved what agrees


@pytest.mark.slow
@pytest.mark.parametrize("num_critics", [1, 2])
@pytest.mark.parametrize("kind", ["trunk", "scanned"])
def test_an_iteration_with_a_critic_on_the_policy_is_that_of_one_device(kind, num_critics):
    def iteration(shape):
        run = Run(shape, kind, shared=True, num_critics=num_critics)
        start = jax.device_get((run.state.policy_params, run.state.value_params))
        (metrics,) = run.iterations(1)
        return start, jax.device_get(run.state), metrics

    (_, mine, metrics), (start, one, one_metrics) = iteration((2, 2, 2)), iteration((1, 1, 1))
    tiny.leaves_close(mine.policy_params, one.policy_params, atol=1e-4)
    tiny.leaves_close(mine.value_params, one.value_params, atol=1e-4)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)
    kernel = one.value_params["value_head"]["kernel"]
    assert kernel.shape[:-2] == (() if num_critics == 1 else (2,))
    for before, after in zip(start, (one.policy_params, one.value_params), strict=True):
        before, after = named_leaves(before), named_leaves(after)
        assert min(np.abs(after[name] - before[name]).max() for name in before) > 1e-3


def parity(params, inputs, mask, **_):
    """A reward model by which most groups of two are equal."""
    return (inputs % 2).astype(jnp.float32)


METHODS = {
    "one step": (gae, dict(num_epochs=1, num_minibatches=1, old_logprobs="recompute")),
    "two rollouts": (gae, dict(max_rollouts=2)),
    "PAR": (gae, dict(reference_responses=3)),
    "ReMax, Clip-Cov": (remax_advantages, dict(loss=clip_cov_policy_loss)),
    "decoupled, IcePop": (
        gae,
        dict(loss=decoupled_policy_loss, old_logprobs="recompute", importance="icepop"),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_an_iteration_of_another_method_is_that_of_one_device(name):
    advantage, more = METHODS[name]
    numbers = dict(covariance_fraction=0.1, covariance_low=0.0, tis_clip_low=0.5, tis_clip_high=2.0)

    def iteration(shape):
        run = Run(shape, **numbers)
        sampling = tiny.sampling(samples_per_prompt=2)
        run.options = tiny.options(sampling=sampling, advantage=advantage, **more)
        run.networks = run.networks._replace(reward=Network(None, parity))
        if advantage is remax_advantages:
            run.networks = run.networks._replace(value=None)
            args = (run.state.policy_params, None, run.numbers)
            run.state = init_sharded(run.layout, ppo.init_ppo, *args)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.replicated
        step = run.compile(ppo.ppo_iteration, out_shardings=shardings)
        prompts = tuple(run.prompts(i) for i in range(run.options.max_rollouts))
        prompts = prompts if len(prompts) > 1 else prompts[0]
        args = (run.state, run.numbers, prompts, run.layout.key(0, 0))
        return jax.device_get(step(*args, frozen=run.frozen))

    (mine, metrics), (one, one_metrics) = iteration((2, 2, 2)), iteration((1, 1, 1))
    tiny.leaves_close(mine.policy_params, one.policy_params, atol=1e-4)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-3, atol=1e-4)
    if "max_rollouts" in more:
        assert metrics["ppo/rollouts"] == 2


@pytest.mark.slow
def test_kl_cov_chooses_the_tokens_that_it_chooses_on_one_device():
    """By log-probs a little off: at a ratio of 1 the penalty has the sign of its rounding."""
    e = ragged_experience()
    noise = np.random.default_rng(0).uniform(0.05, 0.2, e.logprobs.shape).astype(np.float32)
    e = e.replace(logprobs=np.where(e.response_mask, e.logprobs + noise, 0.0))

    def update(shape):
        run = Run(shape, covariance_fraction=0.2)
        run.options = tiny.options(
            num_epochs=1, num_minibatches=1, num_micro_batches=4, loss=kl_cov_policy_loss
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.replicated
        step = run.compile(ppo_update, out_shardings=shardings)
        args = run.state, run.layout.shard_batch(e), run.numbers, run.layout.key(0, 0)
        return jax.device_get(step(*args, frozen=run.frozen))

    (mine, metrics), (one, one_metrics) = update((2, 2, 2)), update((1, 1, 1))
    moment = functools.partial(optax.tree_utils.tree_get, key="mu")
    tiny.leaves_close(moment(mine.opt_state), moment(one.opt_state), rtol=1e-4, atol=1e-7)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-4, atol=1e-6)
    share = int(0.2 * e.response_mask.sum()) / e.response_mask.sum()
    np.testing.assert_allclose(metrics["policy/penalised_fraction"], share, rtol=1e-5)


@pytest.mark.parametrize("shape", MESHES)
def test_one_sgd_update_on_a_fixed_experience_is_that_of_one_device(shape):
    def update(shape):
        run = Run(shape)
        fixed = jax.device_get(fixed_experience())

        def descend(params, experience):
            gradient = jax.grad(lambda p: loss(p, experience)[0])(params)
            return jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient)

        loss = functools.partial(
            experience_loss,
            hyperparameters=run.numbers,
            frozen=run.frozen,
            networks=run.networks,
        )
        params = {"policy": run.state.policy_params, "value": run.state.value_params}
        return jax.device_get(jax.jit(descend)(params, run.layout.shard_batch(fixed)))

    mine, one = named_leaves(update(shape)), named_leaves(update((1, 1, 1)))
    for name, leaf in one.items():
        np.testing.assert_allclose(mine[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("shape", "bins"),
    [
        ((8, 1, 1), {}),
        ((2, 2, 2), {}),
        ((2, 2, 2), dict(num_bins=8, value_range=[-3.0, 6.0])),
        ((2, 2, 2), dict(num_critics=2)),
        ((2, 2, 2), dict(shared=True)),
        ((2, 2, 2), dict(shared=True, num_critics=2)),
    ],
)
def test_an_update_of_packed_rows_is_that_of_one_device(shape, bins):
    def update(shape):
        run = Run(shape, **bins)
        run.options = tiny.options(
            num_epochs=1, num_minibatches=1, num_micro_batches=4, packing=True
        )
        shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.replicated
        step = run.compile(ppo_update, out_shardings=shardings)
        experience = ragged_experience()
        if "num_critics" in bins:
            critics = np.where(experience.response_mask, np.arange(BATCH)[:, None] % 2, 0)
            experience = experience.replace(critics=critics.astype(np.int32))
        args = run.state, run.layout.shard_batch(experience), run.numbers
        return jax.device_get(step(*args, run.layout.key(0, 0), frozen=run.frozen))

    (mine, metrics), (one, one_metrics) = update(shape), update((1, 1, 1))
    moment = functools.partial(optax.tree_utils.tree_get, key="mu")
    tiny.leaves_close(moment(mine.opt_state), moment(one.opt_state), rtol=1e-4, atol=1e-7)
    tiny.leaves_close(metrics, one_metrics, rtol=1e-4, atol=1e-6)
    real = ragged_experience().mask.sum() - BATCH  # without the last tokens
    positions = 8 * 12  # of a micro-batch: eight rows of 12
    micro_batches = real / (one_metrics["ppo/packing_efficiency"] * positions)
    np.testing.assert_allclose(micro_batches, 2, rtol=1e-5)  # of four


def ragged_experience():
    """The fixed experience, of whose responses 1, 2, 3 or all tokens are left."""
    e = jax.device_get(fixed_experience())
    left = np.array([1, 2, 3, e.response_mask.shape[1]])[np.arange(BATCH) % 4]
    kept = e.response_mask & (np.arange(e.response_mask.shape[1]) < left[:, None])
    prompts = e.mask[:, : -kept.shape[1]]
    return e.replace(response_mask=kept, mask=np.concatenate([prompts, kept], axis=1))


@functools.cache
def fixed_experience():
    run = Run((1, 1, 1))
    scores = run.layout.shard_batch(np.arange(BATCH, dtype=np.float32) % 5)
    make = run.compile(experience.make_experience)
    found, _ = make(run.rollout(), scores, run.state, run.numbers, frozen=run.frozen)
    return found


def compiled_rollout(run):
    args = (run.state, run.numbers, run.prompts(0), run.layout.key(0, 0))
    return run.compile(experience.sample_responses).lower(*args, frozen=run.frozen).compile()


def compiled_iteration(run):
    shardings = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.replicated
    step = run.compile(ppo.ppo_iteration, donate_argnums=0, out_shardings=shardings)
    args = (run.state, run.numbers, run.prompts(0), run.layout.key(0, 0))
    return step.lower(*args, frozen=run.frozen).compile()


COLLECTIVE = re.compile(r"= (.*?) (all-gather|all-to-all|collective-permute)(?:-start)?\(.*")


def gathers_in_the_decode_loop(text, smallest):
    """Shapes of the collectives inside the first-level loop of the rollout that move at least so
    many numbers: the update's and the layers' loops are named by what differentiates them."""
    found = []
    for line in text.splitlines():
        match = COLLECTIVE.search(line)
        if not match or "jvp" in line or "/while/body/" not in line or "closed_call/gather" in line:
            continue
        path = re.search(r'op_name="([^"]*)"', line)
        in_decode = path and re.match(r"jit\(\w+\)/while/body/", path[1])
        sizes = [
            np.prod([int(n) for n in shape.split(",") if n])
            for shape in re.findall(r"\[([\d,]*)\]", match[1])
        ]
        if in_decode and max(sizes, default=0) >= smallest:
            found.append(line.strip()[:200])
    return found


@pytest.mark.parametrize("kind", ["whole", "scanned"])
def test_no_parameter_is_gathered_inside_the_decode_loop(kind, capfd):
    wide = WIDE | dict(embed_dim=128, mlp_dim=256)
    config = tiny.model_config(**wide, scan_layers=kind == "scanned")
    run = Run((2, 2, 2), kind, config)
    smallest = 64 * 64 // 2  # of a parameter's shards; what is sampled from is [8, 64]
    assert not gathers_in_the_decode_loop(compiled_iteration(run).as_text(), smallest)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    # The same with the rules of the updates gathers: the test can see it.
    sampler = run.networks.sampler._replace(
        policy=run.networks.policy, reshard=lambda params: params
    )
    run.networks = run.networks._replace(sampler=sampler)
    assert gathers_in_the_decode_loop(compiled_rollout(run).as_text(), smallest)
