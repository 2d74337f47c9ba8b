"""The analytic counts equal what compiled programs compute."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from ppo_jax.algorithms import experience
from ppo_jax.algorithms.ppo import init_ppo, update_from_rollout
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.core.types import Optimizer
from ppo_jax.models.build import policy_network, reward_network, value_network
from ppo_jax.models.config import Experts, LayerKind
from ppo_jax.planner import flops, layers
from ppo_jax.planner.hlo.cost import cost_analysis
from ppo_jax.rollout.rollout import rollout
from tests.support import tiny

B, P, T = tiny.BATCH, tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH


def measured(function, *args, **options):
    compiled = jax.jit(function).lower(*args).compile()
    return cost_analysis(compiled, **options).flops


def test_a_forward_pass_by_hand():
    """Two layers, D = 32, H K = 32, G K = 16, F = 48, V = 50; one sequence of 3, one logit row."""
    config = tiny.model_config()
    projections = 2 * 32 * (32 + 16 + 16 + 32 + 3 * 48)
    attention = 2 * 3 * 32 + 2 * 3 * 32
    keys = 2 * 32 * (16 + 16)  # of all three; the last layer has no more of the first two
    expected = (3 + 1) * (projections + attention) + 2 * keys + 2 * 32 * 50
    assert expected == flops.forward_flops(
        config, sequences=1, positions=3, attended=3, outputs=1, head="logits"
    )


STILL = (LayerKind(), LayerKind(rotary=False))
SHAPES = {name: own for name, own in tiny.SHAPES.items() if name != "experts"} | {
    "phi": dict(rotary_dim=4, tie_embeddings=False),
    "neox": dict(residual="parallel", norm="layernorm", mlp="gelu_erf", qkv_bias=True),
    "olmo": dict(residual="post", qk_norm="whole"),
    "granite and smollm": dict(residual_scale=0.5, logits_divisor=2.0, layer_kinds=STILL),
}


@pytest.mark.parametrize("family", SHAPES)
def test_the_forward_pass_of_every_family_is_counted_exactly(family):
    config = tiny.model_config(**SHAPES[family])
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 4, 12)
    expected = flops.forward_flops(
        config, sequences=4, positions=12, attended=12, outputs=9, head="logits"
    )
    assert (
        measured(functools.partial(network.apply, first_output=3), params, tokens, mask) == expected
    )


@pytest.mark.parametrize("num_experts", [1, 2])
def test_experts_are_counted_by_the_chosen_ones(num_experts):
    """All tokens choose all experts: the rows of each are one block, of a loop that sees tokens."""
    experts = Experts(num_experts=num_experts, num_chosen=num_experts, dim=12)
    config = tiny.model_config(experts=experts, num_layers=1)
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 4, 16, least=16)
    sizes = dict(sequences=4, positions=16, attended=16, outputs=16)
    expected = flops.forward_flops(config, **sizes, head="logits")
    assert measured(network.apply, params, tokens, mask, max_trip_counts=num_experts) == expected
    many = dataclasses.replace(config, experts=Experts(num_experts=64, num_chosen=2, dim=12))
    added = layers.projection_flops(many)[0] - layers.projection_flops(config)[0]
    more = 3 * 12 * (2 - num_experts) + 64 - num_experts  # of the chosen ones, and of the router
    assert added == 2 * config.embed_dim * more


def test_a_norm_behind_the_last_product_has_it_computed_again():
    config = tiny.model_config(residual="both", remat="full")
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 4, 12)
    gradient = jax.grad(lambda p: (network.apply(p, tokens, mask, first_output=3) ** 2).sum())
    where = dict(sequences=4, positions=12, outputs=9, head="logits")
    expected = flops.training_flops(config, **where)
    assert measured(gradient, params) == pytest.approx(expected, rel=0.01)
    before = dataclasses.replace(config, residual="pre")
    assert expected > 1.03 * flops.training_flops(before, **where)


MIXED = dict(
    num_layers=3,
    layer_kinds=(LayerKind(dense=True), LayerKind(window=4), LayerKind()),
    experts=Experts(num_experts=4, num_chosen=2, dim=16),
    mlp_dim=96,
)


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("kinds", [MIXED["layer_kinds"], (LayerKind(window=4),) * 3])
def test_training_of_experts_counts_the_layers_that_there_are(remat, kinds):
    """Whole blocks of the rows of each expert, by the name scopes of their loops."""
    stacked = dict(scan_layers=True) if len(set(kinds)) == 1 else {}
    config = tiny.model_config(**MIXED | dict(layer_kinds=kinds), remat=remat, **stacked)
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 4, 16, least=16)
    gradient = jax.grad(lambda p: (network.apply(p, tokens, mask, first_output=8) ** 2).sum())
    where = dict(sequences=4, positions=16, outputs=8, head="logits")
    expected = flops.training_flops(config, **where)
    found = measured(gradient, params, max_trip_counts={"blocks": 1})
    assert found == pytest.approx(expected, rel=0.01)
    half = measured(gradient, params, max_trip_counts={"blocks": 0.5})
    assert half < found


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("make", [policy_network, reward_network])
def test_training_is_counted_exactly_with_what_is_computed_again(make, remat, scan_layers):
    config = tiny.model_config(scan_layers=scan_layers, remat=remat)
    network = make(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 4, 12)
    gradient = jax.grad(lambda p: (network.apply(p, tokens, mask, first_output=3) ** 2).sum())
    head = "logits" if make is policy_network else "scalar"
    expected = flops.training_flops(config, sequences=4, positions=12, outputs=9, head=head)
    assert measured(gradient, params) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(
    ("length", "scan_layers", "remat", "again"),
    [(200, False, "none", 0.0), (200, True, "none", 0.5), (600, False, "full", 0.5)],
)
def test_long_rows_skip_keys_and_loops_compute_scores_again(length, scan_layers, remat, again):
    """Four blocks of queries stand one by one, the ten of a longer row in loops."""
    config = tiny.model_config(remat=remat, scan_layers=scan_layers, max_length=length)
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 2, length)
    gradient = jax.grad(lambda p: (network.apply(p, tokens, mask, first_output=3) ** 2).sum())
    how = dict(sequences=2, positions=length, outputs=length - 3, head="logits")
    expected = flops.training_flops(config, **how)
    assert measured(gradient, params) == pytest.approx(expected, rel=0.01)
    assert layers.scores_again(config, None, length) == again


NEAR, FAR = LayerKind(window=24, rope_theta=100.0), LayerKind()
OF_GEMMA = dict(residual="both", mlp="gated_gelu", norm="rmsnorm_plus_one")
KINDS = {  # as Gemma 2 and 3 have them
    "alternating": dict(num_layers=4, layer_kinds=(NEAR, FAR) * 2, score_cap=2.0, **OF_GEMMA),
    "mostly near": dict(num_layers=6, layer_kinds=(*[NEAR] * 5, FAR), qk_norm="head", **OF_GEMMA),
    "near at last": dict(num_layers=3, layer_kinds=(FAR, FAR, NEAR)),
}


@pytest.mark.parametrize(
    ("kinds", "length"),
    [("alternating", 12), ("alternating", 600), ("mostly near", 200), ("near at last", 600)],
)
def test_layers_of_several_kinds_count_the_keys_that_each_reads(kinds, length):
    config = tiny.model_config(**KINDS[kinds], max_length=length)
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    tokens, mask = tiny.tokens_and_mask(0, 2, length)
    where = dict(sequences=2, positions=length, outputs=length // 2)
    rows = layers.rows_of(config, None, **where)
    apply = functools.partial(network.apply, first_output=length - length // 2)
    forward = flops.forward_flops(config, **vars(rows), head="logits")
    assert measured(apply, params, tokens, mask) == pytest.approx(forward, rel=0.001)
    gradient = jax.grad(lambda p: (network.apply(p, tokens, mask, first_output=3) ** 2).sum())
    where |= dict(outputs=length - 3)
    expected = flops.training_flops(config, **where, head="logits")
    assert measured(gradient, params) == pytest.approx(expected, rel=0.01)
    if length > 100:
        whole = dataclasses.replace(config, layer_kinds=())
        assert expected < 0.9 * flops.training_flops(whole, **where, head="logits")


@pytest.mark.parametrize("window", [4, 30])
def test_a_rollout_reads_no_more_of_a_cache_than_a_window(window):
    config = tiny.model_config(layer_kinds=(LayerKind(window=window), LayerKind()))
    network = policy_network(config)
    params = jax.eval_shape(network.init, jax.random.key(0))
    sample = functools.partial(rollout, network, sampling=tiny.sampling())
    expected = flops.rollout_flops(config, sequences=B, prompt_length=P, response_length=T)
    args = params, tiny.prompts(), jax.random.key(0)
    assert measured(sample, *args, max_trip_counts=T - 1) == expected


def test_kernels_skip_what_is_outside_of_a_window():
    config, length = tiny.model_config(layer_kinds=(NEAR, FAR), dtype="bfloat16"), 2048
    near, far = layers.rows_of(config, "tpu", sequences=1, positions=length, outputs=1).attended
    assert near * length == 512**2 * (4 + 3) and far * length == 512**2 * (4 + 3 + 2 + 1)


def test_a_rollout_is_its_prompts_and_all_tokens_that_it_may_have_but_the_last():
    setup = tiny.setup()
    config = tiny.model_config()
    sample = functools.partial(rollout, setup.networks.policy, sampling=tiny.sampling())
    args = setup.policy_params, tiny.prompts(), jax.random.key(0)
    expected = flops.rollout_flops(config, sequences=B, prompt_length=P, response_length=T)
    assert measured(sample, *args, max_trip_counts=T - 1) == expected


def fresh_experience(setup):
    """Shapes of a scored rollout."""
    texts = jax.ShapeDtypeStruct((B, P + T), jnp.int32)
    numbers = jax.ShapeDtypeStruct((B, T), jnp.float32)
    mask = jax.ShapeDtypeStruct((B, T), bool)
    return experience.Experience(
        policy_inputs=texts,
        value_inputs=texts,
        mask=jax.ShapeDtypeStruct((B, P + T), bool),
        response_tokens=jax.ShapeDtypeStruct((B, T), jnp.int32),
        response_mask=mask,
        logprobs=numbers,
        values=numbers,
        advantages=numbers,
        returns=numbers,
    )


@pytest.mark.parametrize("packing", [False, True])
def test_an_update_is_counted_whatever_it_is_cut_into(packing):
    """Epochs, minibatches and micro-batches are loops in loops; packed rows save none at worst."""
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(
        frozen=setup.frozen,
        networks=setup.networks,
        options=tiny.options(num_micro_batches=2, packing=packing),
    )
    update = functools.partial(ppo_update, **parts)
    args = setup.start(numbers), fresh_experience(setup), numbers, jax.random.key(0)
    config = tiny.model_config()
    where = dict(sequences=B, prompt_length=P, response_length=T, num_epochs=2)
    expected = flops.update_flops(config, config, **where)
    trips = 2 if packing else None
    assert measured(update, *args, max_trip_counts=trips) == pytest.approx(expected, rel=0.01)


def test_each_pass_of_the_critic_is_counted():
    numbers = tiny.hyperparameters(value_optimizer=Optimizer(learning_rate=1e-3))
    setup = tiny.setup()
    options = tiny.options(value_updates=3, value_num_minibatches=4)
    parts = dict(frozen=setup.frozen, networks=setup.networks, options=options)
    args = setup.start(numbers), fresh_experience(setup), numbers, jax.random.key(0)
    config = tiny.model_config()
    where = dict(sequences=B, prompt_length=P, response_length=T, num_epochs=2)
    expected = flops.update_flops(config, config, value_updates=3, **where)
    assert expected > 1.5 * flops.update_flops(config, config, **where)
    update = functools.partial(ppo_update, **parts)
    assert measured(update, *args) == pytest.approx(expected, rel=0.01)


def test_logits_in_chunks_are_computed_once_more():
    chunk = 3  # of 8: the last is filled up
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    config = tiny.model_config()
    policy = policy_network(config, logits_chunk=chunk)
    networks = setup.networks._replace(policy=policy)
    update = functools.partial(
        ppo_update, frozen=setup.frozen, networks=networks, options=tiny.options()
    )
    args = setup.start(numbers), fresh_experience(setup), numbers, jax.random.key(0)
    where = dict(sequences=B, prompt_length=P, response_length=T, num_epochs=2)
    expected = flops.update_flops(config, config, logits_chunk=chunk, **where)
    assert expected > 1.01 * flops.update_flops(config, config, **where)
    assert measured(update, *args) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("old_logprobs", "passes"), [("rollout", 1), ("recompute", 2)])
def test_scoring_is_the_reference_the_critic_and_the_reward_model(old_logprobs, passes):
    options = tiny.options(old_logprobs=old_logprobs)
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    state, prompts = setup.start(numbers), tiny.prompts()
    parts = dict(networks=setup.networks, frozen=setup.frozen)

    def score(responses):
        scores = experience.response_scores(responses, **parts)
        return experience.make_experience(
            responses, scores, state, numbers, options=options, **parts
        )

    shapes = jax.eval_shape(
        functools.partial(rollout, setup.networks.policy, sampling=tiny.sampling()),
        setup.policy_params,
        prompts,
        jax.random.key(0),
    )
    config = tiny.model_config()
    where = dict(sequences=B, prompt_length=P, response_length=T, policy_passes=passes)
    expected = flops.scoring_flops(config, config, config, **where)
    assert measured(score, shapes) == pytest.approx(expected, rel=0.01)
    without = flops.scoring_flops(config, config, None, **where)
    last = flops.forward_flops(
        config, sequences=B, positions=P + T, attended=P + T, outputs=1, head="scalar"
    )
    assert without == expected - last


@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
def test_an_update_of_one_step_is_all_that_policy_and_critic_compute(old_logprobs):
    """It makes the passes that scoring needs: without the reference, the count of its steps."""
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    options = tiny.options(num_epochs=1, num_minibatches=1, old_logprobs=old_logprobs)
    parts = dict(networks=setup.networks, frozen=setup.frozen, options=options)
    responses = jax.eval_shape(
        functools.partial(rollout, setup.networks.policy, sampling=tiny.sampling()),
        setup.policy_params,
        tiny.prompts(),
        jax.random.key(0),
    )
    numbers_BT = jax.ShapeDtypeStruct((B, T), jnp.float32)
    scores, state = jax.ShapeDtypeStruct((B,), jnp.float32), setup.start(numbers)

    def update(state, responses, scores, ref_logprobs):
        given = (state, numbers, responses, scores, jax.random.key(0))
        return update_from_rollout(*given, ref_logprobs=ref_logprobs, **parts)

    config = tiny.model_config()
    where = dict(sequences=B, prompt_length=P, response_length=T)
    expected = flops.update_flops(config, config, num_epochs=1, **where)
    found = measured(update, state, responses, scores, numbers_BT)
    assert found == pytest.approx(expected, rel=0.01)


SAMPLES = 4
GROUPED = tiny.sampling(samples_per_prompt=SAMPLES)


def test_a_prompt_of_several_responses_is_scored_once():
    setup, numbers = tiny.setup(), tiny.hyperparameters()
    parts = dict(networks=setup.networks, frozen=setup.frozen)
    options, state = tiny.options(sampling=GROUPED), setup.start(numbers)

    def score(responses):
        scores = experience.response_scores(responses, samples_per_prompt=SAMPLES, **parts)
        return experience.make_experience(
            responses, scores, state, numbers, options=options, **parts
        )

    shapes = jax.eval_shape(
        functools.partial(rollout, setup.networks.policy, sampling=GROUPED),
        setup.policy_params,
        tiny.prompts(batch_size=B // SAMPLES),
        jax.random.key(0),
    )
    config = tiny.model_config()
    where = dict(sequences=B, prompt_length=P, response_length=T)
    apart, expected = (
        flops.scoring_flops(config, config, config, samples=n, **where) for n in (1, SAMPLES)
    )
    assert expected < 0.8 * apart
    assert measured(score, shapes) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("scan_layers", "remat"), [(False, "none"), (True, "full")])
@pytest.mark.parametrize(("num_minibatches", "shared"), [(1, SAMPLES), (2, 1)])
def test_an_update_of_one_minibatch_has_a_prompt_once(num_minibatches, shared, scan_layers, remat):
    config = tiny.model_config(scan_layers=scan_layers, remat=remat)
    networks = experience.PPONetworks(policy=policy_network(config), value=value_network(config))
    numbers = tiny.hyperparameters()
    made = (networks.policy, networks.value)
    params = [jax.eval_shape(network.init, jax.random.key(0)) for network in made]
    state = jax.eval_shape(lambda *params: init_ppo(*params, numbers), *params)
    options = dict(num_minibatches=num_minibatches, num_micro_batches=2, sampling=GROUPED)
    parts = dict(frozen=tiny.setup().frozen, networks=networks, options=tiny.options(**options))
    update = functools.partial(ppo_update, **parts)
    where = dict(sequences=B, prompt_length=P, response_length=T, num_epochs=2)
    apart, expected = (
        flops.update_flops(config, config, samples=(n, n), **where) for n in (1, shared)
    )
    assert expected <= (0.8 if shared > 1 else 1) * apart
    args = state, fresh_experience(tiny.setup()), numbers, jax.random.key(0)
    assert measured(update, *args) == pytest.approx(expected, rel=0.01)


def test_a_critic_with_bins_has_more_outputs():
    config, where = tiny.model_config(), dict(sequences=B, prompt_length=P, response_length=T)
    more = B * T * 2 * config.embed_dim * 7  # a product with 7 more columns, at each token
    scoring = [flops.scoring_flops(config, config, None, **where, value_outputs=n) for n in (1, 8)]
    assert scoring[1] - scoring[0] == more
    update = functools.partial(flops.update_flops, config, config, num_epochs=2, **where)
    assert update(value_outputs=8) - update() == 2 * 3 * more


def test_two_critics_are_a_critic_more():
    config, where = tiny.model_config(), dict(sequences=B, prompt_length=P, response_length=T)
    scoring = functools.partial(flops.scoring_flops, config, reward=None, **where)
    a_critic = scoring(config) - scoring(None)
    assert scoring(config, num_critics=2) == scoring(config) + a_critic
    update = functools.partial(flops.update_flops, config, num_epochs=2, **where)
    assert update(config, num_critics=2) == 2 * update(config) - update(None)
