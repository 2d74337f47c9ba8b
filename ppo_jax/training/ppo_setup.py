"""What a PPO run is made of: its networks, its numbers, and what of them is shared or frozen."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ppo_jax.algorithms.ensembles import RewardEnsemble, ensemble_params
from ppo_jax.algorithms.options import PPONetworks, PPOOptions, Sampler
from ppo_jax.algorithms.ppo import init_ppo
from ppo_jax.config.objectives import (
    AVERAGE,
    advantage_function,
    keeps_baseline,
    loss_function,
    needs_critic,
)
from ppo_jax.config.ppo import LEFT_OUT, PPOSettings
from ppo_jax.core.network import Network, average_params, merge_params
from ppo_jax.core.types import FrozenParams, Hyperparameters, Params, PPOState
from ppo_jax.distributed.layout import Layout, init_sharded
from ppo_jax.inference.generate import make_sampling
from ppo_jax.io.model_spec import reread_reason
from ppo_jax.io.stage_folder import Model
from ppo_jax.models.build import (
    policy_network,
    policy_value_network,
    reward_network,
    trunk_network,
    value_network,
)
from ppo_jax.models.config import ModelConfig
from ppo_jax.models.lora import merge_lora
from ppo_jax.models.partition import layer_range, split_params, start_layer
from ppo_jax.rollout.sampling import Sampling
from ppo_jax.training.common import freeze, make_optimizer, with_adapters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """All that an iteration needs besides its state."""

    networks: PPONetworks
    options: PPOOptions
    hyperparameters: Hyperparameters
    frozen: FrozenParams
    text_reward: Callable[[ModelConfig], Network] | None = None  # of a reward model that reads
    # text, whose parameters are `frozen.reward`
    value_start: int | None = None  # layers that the critic has in common with the policy's trunk


def make_hyperparameters(settings: PPOSettings) -> Hyperparameters:
    """The numbers of the settings, as float32."""
    names = {field.name for field in dataclasses.fields(Hyperparameters)}
    names -= {"optimizer", "value_optimizer"}
    numbers = {name: np.float32(getattr(settings, name)) for name in names}
    off = {name for name, value in LEFT_OUT.items() if getattr(settings, name) == value}
    if not keeps_baseline(settings.advantage):
        off.add("baseline_decay")
    numbers |= dict.fromkeys(off)
    if settings.critic_has_optimizer:
        own = settings.value_optimizer.over(settings.optimizer, settings.value_learning_rate)
        numbers["value_optimizer"] = make_optimizer(own, settings.num_iterations)
    numbers["clip_range_high"] = np.float32(settings.clip_range_high or settings.clip_range)
    optimizer = make_optimizer(settings.optimizer, settings.num_iterations)
    return Hyperparameters(optimizer=optimizer, **numbers)


def make_options(settings: PPOSettings, sampling: Sampling, eos_id: int) -> PPOOptions:
    """The choices of the settings; what shapes the program. `eos_id` is the tokenizer's."""
    names = {field.name for field in dataclasses.fields(PPOOptions)}
    names -= {"sampling", "score_eos", "advantage", "loss"}
    of_rollout = ("samples_per_prompt", "max_concurrent", "min_free_slots")
    sampling = dataclasses.replace(sampling, **{k: getattr(settings, k) for k in of_rollout})
    return PPOOptions(
        sampling=sampling,
        advantage=advantage_function(settings.advantage),
        loss=loss_function(settings.loss),
        score_eos=eos_id if settings.score_at == "eos" and sampling.other_ends(eos_id) else None,
        **{name: getattr(settings, name) for name in names},
    )


def abstract_options(settings: PPOSettings) -> PPOOptions:
    """With some stop token: which it is changes no program, and others besides it change little."""
    fields = {k: getattr(settings, k) for k in ("response_length", "top_k", "top_p", "min_p")}
    return make_options(settings, Sampling(eos_ids=(0,), **fields), eos_id=0)


def state_maker(settings: PPOSettings) -> Callable[..., PPOState]:
    """`init_ppo` with what these settings move besides parameters."""
    return functools.partial(init_ppo, score_normalization=settings.score_normalization)


def same(a: Params, b: Params) -> bool:
    """Whether two parameter trees hold the same numbers; compared where they lie."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x is y or bool(equal(x, y)) for x, y in pairs)


equal = jax.jit(jnp.array_equal)


def shared_layers(policy: Model, other: Model) -> int | None:
    """How many of the lowest layers two models have in common, weights and all; None if even the
    token tables differ."""
    depth = min(policy.config.num_layers, other.config.num_layers)
    shapes = (dataclasses.replace(m.config, num_layers=1, layer_kinds=()) for m in (policy, other))
    if len(set(shapes)) > 1 or not same(policy.params["embed"], other.params["embed"]):
        return None
    for layer in range(depth):
        if policy.config.kind_of(layer) != other.config.kind_of(layer):
            return layer
        mine, theirs = (
            layer_range(m.config, m.params["layers"], layer, layer + 1) for m in (policy, other)
        )
        if not same(mine, theirs):
            return layer
    return depth


def find_trunk(
    settings: PPOSettings,
    policy: Model,
    scorers: list[tuple[Model, str | int]],
    shared: Callable[[Model, Model], int | None] = shared_layers,
) -> tuple[int | None, list[int | None]]:
    """The layer at which the policy, and each scorer, starts above the trunk; None reads tokens.

    The trunk is the policy's frozen layers. A scorer starts at the lowest layer from which on
    something of it is trained or differs from the policy; one that has no frozen layers in common
    with the policy reads tokens. Scanned layers have one exit: all start at the lowest of these.

    Args:
        settings: the ppo section.
        policy: the policy at the start.
        scorers: reward model and critic, each with what is trained of it.
        shared: how many layers two models have in common.
    """
    end = start_layer(policy.config, settings.trainable)
    if end is None:
        return None, [None] * len(scorers)
    starts: list[int | None] = []
    for model, trainable in scorers:
        first, common = start_layer(model.config, trainable), shared(policy, model)
        starts.append(None if first is None or not common else min(first, common, end) or None)
    if policy.config.scan_layers:
        end = min([end, *filter(None, starts)])
        starts = [start and end for start in starts]
    return end, starts


def make_networks(
    policy: ModelConfig,
    critic: ModelConfig | None,
    reward: ModelConfig | None,
    starts: tuple[int | None, int | None, int | None],
    layouts: tuple[Layout, Layout],
    logits_chunk: int = 0,
    merge_adapters: bool = True,
    value_bins: int = 0,
    shared_critic: bool = False,
) -> PPONetworks:
    """The networks of a run.

    Args:
        policy: shape of the policy and the reference.
        critic: shape of the critic, or None without one.
        reward: shape of the reward model, or None with a reward function.
        starts: the layer at which each of the three starts above the trunk; None reads tokens.
        layouts: of the updates, and of the rollout.
        logits_chunk: see `policy_network`.
        merge_adapters: the rollout adds them to the weights, which are then its own copy.
        value_bins: see `value_network`.
        shared_critic: the critic is a head of the policy, see `policy_value_network`.
    """
    layout, of_rollout = layouts
    constrain, constrain_rollout = layout.constrain, of_rollout.constrain
    start, value_start, reward_start = starts
    exits = () if start is None else sorted({x for x in starts if x is not None})

    def trunk(constrain):
        if start is None:
            return None
        return trunk_network(policy, end_layer=start, exits=exits, constrain=constrain)

    def make(network, config, start, constrain=constrain, **more):
        if config is None:
            return None
        read = () if start is None else exits
        return network(config, start_layer=start, exits=read, constrain=constrain, **more)

    def reshard(params: Params) -> Params:
        """With the adapters in the weights, a token costs what it costs without them."""
        params = merge_lora(policy, params) if merge_adapters else params
        return of_rollout.decoding_params(params, dtype=policy.dtype)

    chunk = dict(logits_chunk=logits_chunk)
    of_value = functools.partial(value_network, num_bins=value_bins)
    if shared_critic:
        of_value = functools.partial(policy_value_network, num_bins=value_bins, **chunk)
    return PPONetworks(
        policy=make(policy_network, policy, start, **chunk),
        value=make(of_value, critic, value_start),
        reward=make(reward_network, reward, reward_start),
        trunk=trunk(constrain),
        value_on_trunk=value_start is not None,
        value_on_policy=shared_critic,
        reward_on_trunk=reward_start is not None,
        sampler=Sampler(
            policy=make(policy_network, policy, start, constrain_rollout),
            trunk=trunk(constrain_rollout),
            reshard=reshard,
        ),
    )


def with_ensemble(
    networks: PPONetworks,
    settings: PPOSettings,
    models: Sequence[ModelConfig],
    layout: Layout,
) -> PPONetworks:
    """The networks with several reward models, of these shapes, in place of the one."""
    if len(models) < 2 or settings.reward_rule == AVERAGE:
        return networks
    shapes = models[:1] if len(set(models)) == 1 else models
    made = tuple(reward_network(shape, constrain=layout.constrain) for shape in shapes)
    numbers = dict(coef=settings.reward_rule_coef, threshold=settings.reward_rule_threshold)
    return networks._replace(reward=RewardEnsemble(made, settings.reward_rule, **numbers))


def with_others(settings: PPOSettings, reward: Model) -> Params:
    """The parameters of several reward models: their mean, or those of a `RewardEnsemble`."""
    every = [reward.params, *(model.params for model in reward.others)]
    if settings.reward_rule == AVERAGE:
        return average_params(every)
    is_one_shape = {model.config for model in reward.others} == {reward.config}
    return ensemble_params(every, stacked=is_one_shape)


def network_starts(
    settings: PPOSettings,
    policy: Model,
    reward: Model | None,
    critic: Model | None,
    shared: Callable[[Model, Model], int | None] = shared_layers,
) -> tuple[int | None, int | None, int | None]:
    """The layer at which policy, critic and reward model start above the trunk; None reads tokens,
    or there is no such network.

    `shared` says how many layers two of them have in common; see `find_trunk`. Several reward
    models read tokens.
    """
    if reward is not None and reward.others:
        reward = None
    own_critic = None if settings.shared_critic else critic
    both = {"value": (own_critic, settings.value_trainable), "reward": (reward, "head")}
    scorers = {name: scorer for name, scorer in both.items() if scorer[0] is not None}
    start, others = find_trunk(settings, policy, list(scorers.values()), shared)
    starts = dict(zip(scorers, others, strict=True))
    value_start = start if settings.shared_critic else starts.get("value")
    return start, value_start, starts.get("reward")


def split_models(
    settings: PPOSettings,
    policy: Model,
    reward: Model | None,
    critic: Model | None,
    starts: tuple[int | None, int | None, int | None],
) -> tuple[FrozenParams, Params, Params | None]:
    """(what is frozen, the trained leaves of the policy as they start, those of the critic).

    Arguments as for `make_setup`; starts: see `network_starts`.
    """
    start, value_start, reward_start = starts
    parts = split_params(policy.config, policy.params, settings.trainable, start)
    value_frozen, value_trained = {}, None
    if settings.shared_critic:
        value_trained = critic.params
    elif critic is not None:
        trainable = settings.value_trainable
        value_parts = split_params(critic.config, critic.params, trainable, value_start)
        value_frozen, value_trained = value_parts.frozen, value_parts.trained
        if settings.num_critics > 1:
            value_trained = stack_critics(value_trained, settings.num_critics)
    reward_params = None
    if reward is not None and reward.others:
        reward_params = with_others(settings, reward)
    elif reward is not None:
        reward_parts = split_params(reward.config, reward.params, "head", reward_start)
        reward_params = merge_params(reward_parts.frozen, reward_parts.trained)
    frozen = FrozenParams(
        # Without its adapters the policy is the reference.
        ref_policy={} if settings.trainable == "lora" else parts.trained,
        reward=reward_params,
        trunk=None if start is None else parts.trunk,
        policy=parts.frozen,
        value=value_frozen,
    )
    return frozen, parts.trained, value_trained


def make_setup(
    settings: PPOSettings,
    policy: Model,
    reward: Model | None,
    critic: Model | None,
    layouts: tuple[Layout, Layout],
    frozen_dtype: str = "float32",
) -> tuple[Setup, Params, Params | None]:
    """Networks and parameters of a run, with all that can be shared shared.

    Args:
        settings: the ppo section.
        policy: where the policy starts, and the reference; with its adapters, if it has some.
        reward: the reward model, or None with a reward function.
        critic: where the critic starts, likewise; None without one.
        layouts: of the updates, and of the rollout.
        frozen_dtype: of the parameters that are not trained.

    Returns:
        (setup, the trained leaves of the policy as they start, those of the critic or None).
    """
    layout, starts = layouts[0], starts_of(settings, policy, reward, critic)
    frozen, trained, value_trained = split_models(settings, policy, reward, critic, starts)
    frozen = freeze(frozen, layout, frozen_dtype)
    setup = setup_of(settings, policy, reward, critic, layouts, starts=starts, frozen=frozen)
    return (
        setup,
        layout.shard_params(trained),
        None if critic is None else layout.shard_params(value_trained),
    )


def starts_of(
    settings: PPOSettings, policy: Model, reward: Model | None, critic: Model | None
) -> tuple[int | None, int | None, int | None]:
    """`network_starts`, where a reward model that reads text has none."""
    rereads = reward is not None and reread_reason(policy, reward)
    return network_starts(settings, policy, None if rereads else reward, critic)


def setup_of(
    settings: PPOSettings,
    policy: Model,
    reward: Model | None,
    critic: Model | None,
    layouts: tuple[Layout, Layout],
    *,
    starts: tuple[int | None, int | None, int | None],
    frozen: FrozenParams,
    merge_adapters: bool = True,
) -> Setup:
    """The setup of models whose parameters are split already; their shapes are read alone.

    Arguments as for `make_setup`; starts: see `starts_of`; frozen: on the mesh; merge_adapters: see
    `make_networks`.
    """
    layout, text_reward, in_program = layouts[0], None, reward
    if reward is not None and reread_reason(policy, reward):
        text_reward = functools.partial(reward_network, constrain=layout.constrain)
        in_program = None
    sampling = make_sampling(vars(settings), policy.tokenizer)
    total = settings.max_prompt_length + settings.response_length
    networks = make_networks(
        policy.config.for_rows(total),
        None if critic is None else critic.config.for_rows(total),
        None if in_program is None else in_program.config.for_rows(total),
        starts,
        layouts,
        settings.logits_chunk,
        merge_adapters,
        settings.value_bins,
        settings.shared_critic,
    )
    if in_program is not None:
        models = in_program, *in_program.others
        shapes = [model.config.for_rows(total) for model in models]
        networks = with_ensemble(networks, settings, shapes, layout)
    return Setup(
        networks=networks,
        options=make_options(settings, sampling, policy.tokenizer.eos_token_id),
        hyperparameters=layout.replicate(make_hyperparameters(settings)),
        frozen=frozen,
        text_reward=text_reward,
        value_start=starts[1],
    )


def begin_models(
    settings: PPOSettings,
    policy: Model,
    reward: Model | None,
    seed: int,
    layout: Layout,
    make: Callable[..., Any] = init_sharded,
    named: Model | None = None,
) -> tuple[Model, Model | None, Model | None]:
    """(policy, reward model, critic) as PPO begins: adapters are there, where they are trained.

    The critic is None where the advantages need none.

    Args:
        settings: the ppo section.
        policy: where the policy starts.
        reward: the reward model, or None with a reward function.
        seed: of the adapters, and of a critic from scratch.
        layout: where these are put.
        make: what makes them, see `with_adapters`.
        named: the model that `critic_init_from` names, if it does.
    """
    adapt = functools.partial(
        with_adapters, lora=settings.lora, seed=seed, layout=layout, make=make
    )
    adapted, critic = adapt(policy, settings.trainable), None
    if settings.shared_critic:
        critic = shared_critic(settings, adapted, seed)
    elif needs_critic(settings.advantage):
        critic = make_critic(settings, policy, reward, named)
        if settings.critic_init_from == "scratch":
            init = functools.partial(value_network(critic.config).init, jax.random.key(seed))
            body = make(layout, init)
            critic = dataclasses.replace(critic, params={**body, "head": critic.params["head"]})
        if settings.num_critics > 1:
            heads = random_heads(critic.config, settings.num_critics, seed)
            critic = dataclasses.replace(critic, params={**critic.params, "head": heads})
        critic = adapt(critic, settings.value_trainable)
    return adapted, reward, critic


def critic_source(settings: PPOSettings, policy: Any, reward: Any, named: Any = None) -> Any:
    """Which of some models, or of their specs, the critic starts from: the one that
    `critic_init_from` names, or the reward model if there is one that reads the policy's tokens,
    but for "policy"; "scratch" has the policy's shape."""
    if named is not None:
        return named
    of_policy = reward is None or settings.critic_init_from in ("policy", "scratch")
    return policy if of_policy or reread_reason(policy, reward) else reward


def make_critic(
    settings: PPOSettings, policy: Model, reward: Model | None, named: Model | None = None
) -> Model:
    """Where the critic starts: a reward model or another critic as it is, or the body of a policy,
    or of a model with another number of outputs, with a head of zeros."""
    source, num_outputs = critic_source(settings, policy, reward, named), settings.value_bins or 1
    if source.kind == "reward" and source.params["head"]["kernel"].shape[-1] == num_outputs:
        return source
    head = zero_head(source.config, settings.value_bins)
    return dataclasses.replace(source, kind="reward", params={**source.params, "head": head})


def shared_critic(settings: PPOSettings, policy: Model, seed: int) -> Model:
    """The critic that is a head on the policy's body: that head alone, of the policy's shape."""
    head = zero_head(policy.config, settings.value_bins)
    if settings.num_critics > 1:
        head = random_heads(policy.config, settings.num_critics, seed)
    return dataclasses.replace(policy, kind="reward", params={"value_head": head})


def random_heads(config: ModelConfig, num_critics: int, seed: int) -> Params:
    """The heads of several critics, stacked: as those of new reward models, each with numbers of
    its own."""
    shape = (num_critics, config.embed_dim, 1)
    kernels = np.random.default_rng(seed).normal(size=shape) / np.sqrt(config.embed_dim + 1)
    return {"kernel": kernels.astype(np.float32), "bias": np.zeros((num_critics, 1), np.float32)}


def stack_critics(trained: Params, num_critics: int) -> Params:
    """The trained leaves of several critics that differ in their heads alone, stacked [K, ...];
    the heads are stacked already."""

    def several(x):
        return (np if isinstance(x, np.ndarray) else jnp).stack([x] * num_critics)

    body = {name: part for name, part in trained.items() if name != "head"}
    return {**jax.tree.map(several, body), "head": trained["head"]}


def zero_head(config: ModelConfig, value_bins: int) -> Params:
    """The head of a new critic."""
    num_outputs = value_bins or 1
    kernel = np.zeros((config.embed_dim, num_outputs), np.float32)
    return {"kernel": kernel, "bias": np.zeros(num_outputs, np.float32)}
