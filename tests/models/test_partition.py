import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.core.network import merge_params
from ppo_jax.models.build import policy_network, reward_network, trunk_network
from ppo_jax.models.partition import split_params, stack_layers, start_layer, unstack_layers
from tests.support import tiny

LAYOUTS = {
    "unrolled": dict(num_layers=3),
    "scanned": dict(num_layers=3, scan_layers=True),
    "learned positions": dict(num_layers=3, positions="learned", num_kv_heads=4),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("trainable", "start"),
    [
        ("all", None),
        ("head", None),
        ("head", 3),
        ("head", 1),  # the upper network starts below the first trained layer
        (1, None),
        (1, 2),
        (1, 1),
        (2, 1),
        (2, 0),
        (3, 0),
    ],
)
def test_the_parts_merge_to_the_whole(layout, trainable, start):
    config = tiny.model_config(**LAYOUTS[layout])
    params = jax.tree.map(np.asarray, tiny.random_params(reward_network(config)))
    parts = split_params(config, params, trainable, start)
    tiny.leaves_close(merge_params(*parts), params, rtol=0.0)
    # What is trained is nowhere else, or training would not reach the merged network.
    trained = sum(leaf.size for leaf in jax.tree.leaves(parts.trained))
    others = sum(leaf.size for leaf in jax.tree.leaves((parts.trunk, parts.frozen)))
    assert trained + others == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_a_tied_token_table_is_in_the_trunk_and_above_it():
    config = tiny.model_config(num_layers=3)
    params = tiny.random_params(policy_network(config))
    trunk, frozen, trained = split_params(config, params, 1, 2)
    assert trunk.keys() == {"embed", "layers"} and trunk["layers"].keys() == {"0", "1"}
    assert frozen.keys() == {"embed"} and frozen["embed"]["tokens"] is trunk["embed"]["tokens"]
    assert trained.keys() == {"layers", "final_norm"} and trained["layers"].keys() == {"2"}
    tiny.leaves_close(merge_params(trunk, frozen, trained), params, rtol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("trainable", "start"), [("head", 3), (2, 1), (1, 1), (3, 0)])
def test_the_upper_network_on_the_trunk_is_the_whole_network(layout, trainable, start):
    config = tiny.model_config(**LAYOUTS[layout], tie_embeddings=False)
    params = tiny.random_params(policy_network(config))
    tokens, mask = tiny.tokens_and_mask(0, 2, 7)

    @jax.jit
    def both(params):
        trunk, frozen, trained = split_params(config, params, trainable, start)
        hidden = trunk_network(config, end_layer=start).apply(trunk, tokens, mask)
        upper = policy_network(config, start_layer=start)
        got = upper.apply(merge_params(frozen, trained), hidden, mask)
        return got, policy_network(config).apply(params, tokens, mask)

    got, expected = map(np.asarray, both(params))
    np.testing.assert_allclose(got[mask], expected[mask], atol=1e-5)


def test_networks_that_start_at_different_layers_share_a_trunk():
    config = tiny.model_config(num_layers=3, tie_embeddings=False)
    params = tiny.random_params(policy_network(config))
    tokens, mask = tiny.tokens_and_mask(0, 2, 7)
    exits = (1, 2)
    trunk = trunk_network(config, end_layer=2, exits=exits)

    def outputs(params):
        states = trunk.apply(split_params(config, params, 1, 2).trunk, tokens, mask)
        assert states.shape == (2, 7, 2 * config.embed_dim)
        for start in exits:
            _, frozen, trained = split_params(config, params, 1, start)
            upper = policy_network(config, start_layer=start, exits=exits)
            shapes = jax.eval_shape(upper.init, jax.random.key(0))
            assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(
                jnp.shape, merge_params(frozen, trained)
            )
            yield upper.apply(merge_params(frozen, trained), states, mask)
        yield policy_network(config).apply(params, tokens, mask)

    *got, expected = jax.jit(lambda params: list(outputs(params)))(params)
    for logits in got:
        np.testing.assert_allclose(logits[mask], expected[mask], atol=1e-5)


@pytest.mark.parametrize(("exits", "scan_layers"), [((1,), False), ((1, 3), False), ((1, 2), True)])
def test_exits_that_a_trunk_cannot_have_are_refused(exits, scan_layers):
    config = tiny.model_config(num_layers=3, scan_layers=scan_layers)
    with pytest.raises(ValueError, match="exits must hold layer 2"):
        trunk_network(config, end_layer=2, exits=exits)
    with pytest.raises(ValueError, match="exits must hold layer 3, be ascending"):
        policy_network(config, start_layer=3, exits=(1, 2))


def test_the_upper_network_has_the_parameters_that_the_split_gives_it():
    for layout in LAYOUTS.values():
        for trainable, start in [("head", 3), (2, 1), (1, 0)]:
            config = tiny.model_config(**layout)
            params = tiny.random_params(reward_network(config))
            _, frozen, trained = split_params(config, params, trainable, start)
            upper = reward_network(config, start_layer=start)
            expected = jax.eval_shape(upper.init, jax.random.key(0))
            got = jax.eval_shape(merge_params, frozen, trained)
            assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, expected)


@pytest.mark.parametrize(
    ("trainable", "expected"), [("all", None), ("head", 3), (1, 2), (2, 1), (3, 0)]
)
def test_the_first_trained_layer(trainable, expected):
    assert start_layer(tiny.model_config(num_layers=3), trainable) == expected


@pytest.mark.parametrize("trainable", ["top", 0, 4, -1, 1.5, None])
def test_a_part_that_cannot_be_trained_is_refused(trainable):
    with pytest.raises(ValueError) as error:
        start_layer(tiny.model_config(num_layers=3), trainable)
    assert str(error.value) == (
        "trainable must be 'all', 'head', 'lora' or a number of top layers in 1..3, "
        f"got {trainable!r}"
    )


def test_a_trained_layer_below_the_start_is_refused():
    config = tiny.model_config(num_layers=3)
    params = tiny.random_params(policy_network(config))
    for trainable, start in [("all", 0), (3, 1), (2, 2)]:
        with pytest.raises(ValueError, match=f"{trainable!r} is not above layer {start}"):
            split_params(config, params, trainable, start)


def test_a_tied_head_alone_cannot_be_trained():
    config = tiny.model_config()
    params = tiny.random_params(policy_network(config))
    for start in (None, 2):
        with pytest.raises(ValueError, match="needs a head of its own"):
            split_params(config, params, "head", start)


def test_stacking_and_unstacking_are_inverse():
    params = tiny.random_params(policy_network(tiny.model_config(num_layers=3)))
    stacked = stack_layers(params)
    assert stacked["layers"]["stack"]["mlp"]["up"]["kernel"].shape == (3, 32, 48)
    tiny.leaves_close(unstack_layers(stacked), params, rtol=0.0)
    tiny.leaves_close(stack_layers(unstack_layers(stacked)), stacked, rtol=0.0)


def test_of_equal_leaves_the_last_wins_and_inputs_are_left_alone():
    a = {"x": {"p": 1, "q": 2}}
    assert merge_params(a, {"x": {"q": 3}, "y": 4}) == {"x": {"p": 1, "q": 3}, "y": 4}
    assert a == {"x": {"p": 1, "q": 2}}
    assert merge_params() == {}
