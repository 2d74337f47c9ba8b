"""One program on many devices: the same numbers, nothing large copied, no gather while sampling."""

import functools
import re

import jax
import numpy as np
import pytest

from ppo_jax import experience, ppo
from ppo_jax.axes import parameter_axes
from ppo_jax.leaves import named_leaves
from ppo_jax.networks import policy_network, reward_network, trunk_network, value_network
from ppo_jax.partition import split_params
from ppo_jax.sharding import (
    ROLLOUT_RULES,
    AxisRules,
    Layout,
    MeshSettings,
    RolloutRules,
    init_in_pieces,
    make_mesh,
    mesh_shape,
    own_rows,
)
from ppo_jax.structs import Frozen
from tests import tiny

MESHES = [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)]
WIDE = dict(vocab_size=64, num_heads=8, num_kv_heads=8, embed_dim=64, mlp_dim=64)
BATCH = 32


def mesh_of(shape):
    settings = MeshSettings(**dict(zip(("data", "fsdp", "model"), shape, strict=True)))
    return make_mesh(settings, jax.devices()[: int(np.prod(shape))])


class Run:
    """PPO with a reward model on a mesh; every number is the same for every mesh.

    `kind` is "whole", "scanned" (with remat) or "trunk": the top layer on a frozen one.
    """

    def __init__(self, shape, kind="whole", config=None, **numbers):
        mesh = mesh_of(shape)
        self.layout, self.of_rollout = Layout(mesh), Layout(mesh, ROLLOUT_RULES)
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
            value=value_network(c, **upper),
            reward=reward_network(c, **upper),
            trunk=trunk(constrain),
            value_on_trunk=bool(start),
            reward_on_trunk=bool(start),
            sampler=experience.Sampler(
                policy=policy(constrain=self.of_rollout.constrain),
                trunk=trunk(self.of_rollout.constrain),
                place=functools.partial(self.of_rollout.decoding_params, dtype=c.dtype),
            ),
        )
        self.recipe = tiny.recipe(num_epochs=2, num_minibatches=2, num_micro_batches=2)
        self.numbers = self.layout.put_whole(tiny.hyperparameters(**numbers))
        params = [self.params(make(c), i) for i, make in enumerate(MAKERS)]
        of_policy, of_reference, of_critic, of_reward = map(self.split, params)
        self.frozen = Frozen(
            ref_policy=of_reference.trained,
            reward=of_reward.frozen | of_reward.trained,
            trunk=of_policy.trunk if start else None,
            policy=of_policy.frozen,
            value=of_critic.frozen,
        )
        args = (of_policy.trained, of_critic.trained, self.numbers)
        self.state = init_in_pieces(self.layout, ppo.init_ppo, *args)

    def params(self, network, seed):
        return self.layout.put(jax.tree.map(np.asarray, tiny.random_params(network, seed)))

    def split(self, params):
        return split_params(self.config, params, 1 if self.start else "all", self.start)

    def prompts(self, seed):
        prompts = tiny.prompts(seed=seed, batch_size=BATCH)
        return self.layout.put_rows(jax.tree.map(np.asarray, prompts))

    def compile(self, function, *static, **out):
        parts = dict(networks=self.networks, recipe=self.recipe)
        return jax.jit(functools.partial(function, **parts), **out)

    def iterations(self, count):
        lies = jax.tree.map(lambda leaf: leaf.sharding, self.state), self.layout.whole
        step = self.compile(ppo.ppo_iteration, donate_argnums=0, out_shardings=lies)
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
@pytest.mark.parametrize(
    ("shape", "kind"),
    [*((shape, "whole") for shape in MESHES), ((2, 2, 2), "scanned"), ((2, 2, 2), "trunk")],
)
def test_three_iterations_are_those_of_one_device(shape, kind):
    (rollout, metrics, state), _ = measured(shape, kind)
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


@pytest.mark.parametrize("shape", MESHES)
def test_one_sgd_update_on_a_fixed_experience_is_that_of_one_device(shape):
    def update(shape):
        run = Run(shape)
        fixed = jax.device_get(fixed_experience())

        def descend(params, experience):
            gradient = jax.grad(lambda p: loss(p, experience)[0])(params)
            return jax.tree.map(lambda x, g: x - 0.1 * g, params, gradient)

        loss = functools.partial(
            ppo.experience_loss,
            hyperparameters=run.numbers,
            frozen=run.frozen,
            networks=run.networks,
        )
        params = {"policy": run.state.policy_params, "value": run.state.value_params}
        return jax.device_get(jax.jit(descend)(params, run.layout.put_rows(fixed)))

    mine, one = named_leaves(update(shape)), named_leaves(update((1, 1, 1)))
    for name, leaf in one.items():
        np.testing.assert_allclose(mine[name], leaf, rtol=1e-5, atol=1e-6, err_msg=name)


@functools.cache
def fixed_experience():
    run = Run((1, 1, 1))
    scores = run.layout.put_rows(np.arange(BATCH, dtype=np.float32) % 5)
    make = run.compile(experience.make_experience)
    found, _ = make(run.rollout(), scores, run.state, run.numbers, frozen=run.frozen)
    return found


def compiled_iteration(run):
    lies = jax.tree.map(lambda leaf: leaf.sharding, run.state), run.layout.whole
    step = run.compile(ppo.ppo_iteration, donate_argnums=0, out_shardings=lies)
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
    smallest = 64 * 64 // 2  # of a parameter's pieces; what is sampled from is [8, 64]
    assert not gathers_in_the_decode_loop(compiled_iteration(run).as_text(), smallest)
    assert "nvoluntary full rematerialization" not in capfd.readouterr().err
    # The same with the rules of the updates gathers: the test can see it.
    sampler = run.networks.sampler._replace(policy=run.networks.policy, place=lambda params: params)
    run.networks = run.networks._replace(sampler=sampler)
    assert gathers_in_the_decode_loop(compiled_iteration(run).as_text(), smallest)


MIB = 2**20


def large_copies(tree):
    """Leaves of more than 1 MiB a device that are whole on every device of a mesh."""
    leaves = named_leaves(tree).items()
    return [n for n, leaf in leaves if leaf.sharding.is_fully_replicated and leaf.nbytes > MIB]


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2), (1, 1, 8)])
def test_nothing_large_is_copied_to_every_device(shape, scan_layers):
    layout = Layout(mesh_of(shape))
    large = dict(vocab_size=4096, embed_dim=512, num_heads=8, num_kv_heads=8, head_dim=64)
    config = tiny.model_config(**large, mlp_dim=1024, max_length=1024, scan_layers=scan_layers)
    policy = policy_network(config, constrain=layout.constrain)
    value = value_network(config, constrain=layout.constrain)

    def init(key):
        return ppo.init_ppo(policy.init(key), value.init(key), tiny.hyperparameters())

    state = init_in_pieces(layout, init, jax.random.key(0))
    assert not large_copies(state)
    kernels = [x for name, x in named_leaves(state).items() if name.endswith("up/kernel")]
    assert len(kernels) >= 6  # of policy and critic, with two moments each
    assert all(x.addressable_shards[0].data.nbytes < x.nbytes for x in kernels)
    cache = jax.jit(lambda: policy.init_cache(16, 512))()
    assert max(leaf.nbytes for leaf in jax.tree.leaves(cache)) > MIB
    assert not large_copies(cache)
    whole = jax.device_put(state.policy_params, layout.whole)
    assert large_copies(whole)  # the walk sees what is copied


@pytest.mark.parametrize("shape", sorted(tiny.SHAPES))
@pytest.mark.parametrize("make", [policy_network, value_network])
def test_every_parameter_has_its_logical_axes(shape, make):
    network = make(tiny.model_config(**tiny.SHAPES[shape]))
    known = {*vars(AxisRules()), None} - {"batch"}
    for name, leaf in named_leaves(jax.eval_shape(network.init, jax.random.key(0))).items():
        axes = parameter_axes(name.split("/"))
        assert axes is not None and len(axes) == leaf.ndim and set(axes) <= known, name


def test_the_sizes_of_a_mesh_fill_up_to_the_number_of_devices():
    assert mesh_shape(MeshSettings(), 8) == (8, 1, 1)
    assert mesh_shape(MeshSettings(data=2, fsdp=-1, model=2), 8) == (2, 2, 2)
    assert mesh_shape(MeshSettings(data=1, model=-1), 8) == (1, 1, 8)


def shardings(shape, rules, **changes):
    network = policy_network(tiny.model_config(**WIDE | changes))
    return Layout(mesh_of(shape), rules).shardings(jax.eval_shape(network.init, jax.random.key(0)))


REFUSED = {
    r"mesh \(data=3, fsdp=2, model=1\) needs 6 devices, have 8": lambda: mesh_shape(
        MeshSettings(data=3, fsdp=2), 8
    ),
    r"mesh \(data=-1, fsdp=3, model=1\) needs a multiple of 3 devices, have 8": lambda: mesh_shape(
        MeshSettings(fsdp=3), 8
    ),
    r"only one size may be -1, got \['data', 'model'\]": lambda: MeshSettings(model=-1),
    r"mesh.fsdp must be -1 or >= 1, got 0": lambda: MeshSettings(fsdp=0),
    r"mesh.rules.heads must be different axes out of .*, got \('modle',\)": lambda: MeshSettings(
        rules=AxisRules(heads=("modle",))
    ),
    r"mesh.rollout_rules.mlp must be different axes": lambda: MeshSettings(
        rollout_rules=RolloutRules(mlp=("model", "model"))
    ),
    r"output/kernel: the rules cut it twice over the mesh axis fsdp": lambda: shardings(
        (2, 2, 2), AxisRules(heads=("fsdp",))
    ),
    r"layers/0/attention/key/kernel: its kv_heads axis of 2 .* 8 equal pieces of model; choose "
    r"another mesh, or mesh.rules.kv_heads=\(\)": lambda: shardings(
        (1, 1, 8), AxisRules(), num_kv_heads=2
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_mesh_that_does_not_fit_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_rows_are_cut_filled_up_and_found_again():
    layout = Layout(mesh_of((2, 2, 2)))
    rows = layout.fill_up(np.array([5, 6, 7]))
    assert rows.tolist() == [5, 6, 7, 5] and len(layout.fill_up(rows, multiple=3)) == 12
    placed = layout.put_rows(np.arange(12.0).reshape(4, 3))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(1, 3)}
    numbers, found = own_rows(placed)
    assert numbers.tolist() == [0, 1, 2, 3]
    np.testing.assert_array_equal(found, placed)
