"""Several texts in a row: nothing passes from one to another, and nothing else changes."""

import collections
import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax.algorithms.supervised import sft_loss, sft_step
from ppo_jax.config.run import from_config_dict
from ppo_jax.data.encode import TokenizedTexts, batch_indices
from ppo_jax.data.hidden_states import make_inputs
from ppo_jax.data.packing import best_fit, describe_packing, pack
from ppo_jax.io.checkpoints import load_checkpoint_item
from ppo_jax.io.stage_folder import load_model
from ppo_jax.models.build import policy_network
from ppo_jax.models.partition import split_params
from ppo_jax.pipeline import run as pipeline
from ppo_jax.training.common import init_train_state, make_optimizer
from ppo_jax.training.reward import packed_rows
from ppo_jax.training.sft import as_text_batch, sft_data
from tests.support import tiny, tiny_run

SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 3, 0, 0]], np.int32)
MASK = SEGMENTS > 0


def make_texts(lengths, prompts=1, seed=0) -> TokenizedTexts:
    """Texts of random tokens; the first `prompts` tokens of each are not learned."""
    rng = np.random.default_rng(seed)
    mask = np.arange(max(lengths)) < np.asarray(lengths)[:, None]
    tokens = np.where(mask, rng.integers(5, tiny.VOCAB, size=mask.shape), 0).astype(np.int32)
    loss_mask = mask & (np.arange(mask.shape[1]) >= prompts)
    return TokenizedTexts(tokens, mask, loss_mask, np.arange(len(lengths)))


def whole_batch(texts):
    inputs = make_inputs(texts, None, None, cache_gb=0.0)
    return as_text_batch(texts, inputs, np.arange(len(texts.tokens)))


def read_back(packed):
    """{record: (its tokens, its loss mask)} out of the rows."""
    tokens_of, records = {}, iter(packed.records.tolist())
    for tokens, loss_mask, segment_ids in zip(
        packed.tokens, packed.loss_mask, packed.segment_ids, strict=True
    ):
        for number in range(1, segment_ids.max() + 1):
            own = segment_ids == number
            tokens_of[next(records)] = (tokens[own].tolist(), loss_mask[own].tolist())
    assert next(records, None) is None
    return tokens_of


# --- the rows -------------------------------------------------------------------------------------


def test_every_text_is_in_one_row_once_and_whole():
    lengths = np.random.default_rng(1).integers(1, 24, size=50)
    texts = make_texts(lengths, prompts=3)
    packed = pack(texts, max_length=24)
    expected = {
        i: (texts.tokens[i, :n].tolist(), texts.loss_mask[i, :n].tolist())
        for i, n in enumerate(lengths)
    }
    assert read_back(packed) == expected
    assert packed.tokens.shape[1] <= 24 and len(packed.tokens) < 30
    np.testing.assert_array_equal(packed.mask, packed.segment_ids > 0)
    assert not packed.tokens[~packed.mask].any() and not packed.loss_mask[~packed.mask].any()
    # Padding is at the end alone, and each text's tokens stand together.
    assert (np.diff(packed.mask.astype(int), axis=1) <= 0).all()
    assert (np.diff(packed.segment_ids, axis=1)[packed.mask[:, 1:]] >= 0).all()


def test_no_text_is_predicted_from_the_one_before_it():
    packed = pack(make_texts([4, 3, 2, 5, 1]), max_length=8)
    first = np.diff(packed.segment_ids, axis=1, prepend=0) != 0
    assert (first & packed.mask).sum() == 5 and not (first & packed.loss_mask).any()
    np.testing.assert_array_equal(packed.loss_mask, packed.mask & ~first)


def test_rows_are_nearly_full_and_the_same_each_time():
    lengths = np.random.default_rng(2).lognormal(np.log(40), 0.7, size=3000).astype(int)
    texts = make_texts(lengths.clip(2, 256))
    packed = pack(texts, max_length=256)
    assert packed.mask.mean() > 0.97
    again = pack(texts, max_length=256)
    for name in ("tokens", "mask", "loss_mask", "segment_ids", "records"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(again, name))
    rows, share = len(packed.tokens), f"{packed.mask.mean():.0%}"
    said = f"3,000 texts in {rows} rows, {3000 / rows:.1f} a row, {share} full"
    assert describe_packing(packed) == said


def test_a_text_goes_into_the_fullest_row_that_has_room():
    # 6 and 5 open a row each; 4 fills up the first, of which 4 is left, and 3 fits the other.
    assert best_fit(np.array([3, 4, 5, 6]), max_length=10) == [[3, 1], [2, 0]]
    assert best_fit(np.array([10, 10]), max_length=10) == [[0], [1]]


def test_a_text_that_is_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="a row of 8 tokens cannot hold a text of 9"):
        pack(make_texts([9, 2]), max_length=8)


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_no_text_sees_another(shape):
    """By gradients, exactly: an output depends on its own text's inputs up to it, and on all."""
    network = policy_network(tiny.model_config(**tiny.SHAPES[shape]), start_layer=0)
    params = tiny.random_params(network)
    inputs = jnp.asarray(np.random.default_rng(4).normal(size=(1, 10, 32)), jnp.float32)

    def outputs(inputs):
        return network.apply(params, inputs, MASK, segment_ids=SEGMENTS)[0, :, 3]

    reaches = (jax.jit(jax.jacobian(outputs))(inputs)[:, 0] != 0.0).any(axis=-1)
    own = SEGMENTS[0][:, None] == SEGMENTS[0]
    real = MASK[0]
    np.testing.assert_array_equal(reaches[real], np.tril(own & real)[real])


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_another_text_in_the_row_changes_no_bit(shape):
    network = policy_network(tiny.model_config(**tiny.SHAPES[shape]))
    params = tiny.random_params(network)
    apply = jax.jit(network.apply)
    rng = np.random.default_rng(5)
    tokens, others = (rng.integers(5, tiny.VOCAB, size=(1, 10)).astype(np.int32) for _ in range(2))
    own = SEGMENTS == 2
    expected = apply(params, tokens, MASK, segment_ids=SEGMENTS)
    got = apply(params, np.where(own, tokens, others), MASK, segment_ids=SEGMENTS)
    np.testing.assert_array_equal(got[own], expected[own])
    assert (got[SEGMENTS == 1] != expected[SEGMENTS == 1]).any()
    alone = apply(params, tokens[:, 3:7], np.ones((1, 4), bool))
    np.testing.assert_allclose(got[own], alone[0], atol=1e-5, rtol=1e-5)


def test_positions_begin_anew_with_each_text():
    network = policy_network(tiny.model_config(**tiny.SHAPES["gpt2"]))
    params = tiny.random_params(network)

    def loss(params, number):
        logits = network.apply(params, jnp.full((1, 10), 7), MASK, segment_ids=SEGMENTS)
        return jnp.where(SEGMENTS[..., None] == number, jnp.sin(logits), 0.0).sum()

    gradient = jax.jit(jax.grad(loss))
    for number, length in [(1, 3), (2, 4), (3, 1)]:
        used = (gradient(params, number)["embed"]["positions"] != 0.0).any(axis=1)
        assert used.tolist() == [True] * length + [False] * (32 - length)


# --- the loss -------------------------------------------------------------------------------------


@functools.cache
def batches():
    """The same nine texts, one a row and packed."""
    texts = make_texts([5, 9, 3, 7, 1, 4, 12, 2, 6])
    packed = pack(texts, max_length=16)
    assert len(packed.tokens) == 4
    return whole_batch(texts), whole_batch(packed)


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_packed_rows_have_the_loss_and_the_gradient_of_their_texts(shape):
    network = policy_network(tiny.model_config(**tiny.SHAPES[shape]))
    params = tiny.random_params(network, std=0.1)

    @jax.jit
    def run(params, batch):
        return jax.value_and_grad(lambda p: sft_loss(network, p, batch)[0])(params)

    (expected, expected_gradient), (loss, gradient) = (run(params, batch) for batch in batches())
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    tiny.leaves_close(gradient, expected_gradient, atol=1e-5, rtol=1e-5)


def test_a_loss_has_no_gradient_in_another_text_and_padding_may_hold_nan():
    network = policy_network(tiny.model_config(), start_layer=0)
    params = tiny.random_params(network)
    hidden = np.random.default_rng(6).normal(size=(1, 10, 32)).astype(np.float32)
    tokens = np.random.default_rng(7).integers(5, tiny.VOCAB, size=(1, 10)).astype(np.int32)
    batch = whole_batch(pack(make_texts([3, 4, 1, 2]), max_length=10))
    second = (SEGMENTS == 2) & (np.diff(SEGMENTS, axis=1, prepend=0) == 0)
    batch = batch.replace(tokens=tokens, mask=MASK, segment_ids=SEGMENTS, loss_mask=second)

    @jax.jit
    def run(params, hidden):
        def loss(params, hidden):
            return sft_loss(network, params, batch.replace(inputs=hidden))[0]

        return jax.value_and_grad(loss, argnums=(0, 1))(params, hidden)

    value, (of_params, of_hidden) = run(params, hidden)
    # The last token of the text predicts nothing.
    assert (of_hidden[0] != 0.0).any(axis=-1).tolist() == [False] * 3 + [True] * 3 + [False] * 4
    dirty = np.where(MASK[..., None], hidden, np.nan)
    tiny.leaves_close(run(params, dirty), (value, (of_params, of_hidden)), rtol=0.0)


# --- a run ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Data, a base model and SFT with one text a row."""
    folder = tmp_path_factory.mktemp("run")
    pipeline.run(tiny_run.config(), folder, only=("sft",))
    return folder


def packed_run(workdir, **changes):
    sizes = {"packing": True, "batch_size": 2, "num_epochs": 2.0}
    adam = {"optimizer": tiny_run.optimizer(eps=1e-4)}
    return tiny_run.on_base(workdir, sft=sizes | adam | changes)


def metrics_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def trained_by(folder):
    return load_checkpoint_item(folder / "sft" / "checkpoints", "params")


@pytest.mark.parametrize("parts", [1, 2])
def test_a_reward_model_learns_from_packed_batches_what_it_learns_from_single_texts(
    workdir, tmp_path, parts
):
    figures = []
    for packing in (False, True):
        folder = tmp_path / str(packing)
        changes = dict(init_from="base", packing=packing, num_micro_batches=parts)
        changes |= {"max_length": 40, "optimizer": tiny_run.optimizer(eps=1e-4)}
        pipeline.run(tiny_run.on_base(workdir, reward=changes), folder)
        figures.append(
            [{k: v for k, v in row.items() if k != "step"} for row in metrics_of(folder)]
        )
    assert len(figures[0]) > 4
    for single, packed in zip(*figures, strict=True):
        assert single.keys() == packed.keys()
        for name in single.keys() - {"stage"}:
            np.testing.assert_allclose(
                packed[name], single[name], rtol=1e-3, atol=1e-5, err_msg=name
            )


@pytest.mark.parametrize("context", [64, 48])
def test_short_texts_fill_the_rows_of_a_reward_batch(context):
    """Of few shapes, and none wider than the model can read."""
    rng, shapes = np.random.default_rng(0), collections.Counter()
    lengths = np.clip(rng.normal(23, 9, size=1000), 5, 40).astype(int)
    mask = np.arange(40) < lengths[:, None]
    texts = TokenizedTexts(np.ones(mask.shape, np.int32), mask, mask, np.arange(1000))
    tokens = 0
    for _ in range(100):
        rows = rng.choice(1000, 32, replace=False)
        parts, _ = packed_rows(texts, rows, texts.tokens[rows], 1, context)
        assert parts["mask"].sum() == mask[rows].sum()
        tokens += mask[rows].sum()
        shapes[parts["mask"].shape] += 1
    assert tokens / sum(np.prod(shape) * n for shape, n in shapes.items()) > 0.85
    assert len(shapes) <= 6 and {width for _, width in shapes} == {context}


def train_on_single_texts(workdir, settings):
    """The oracle: each step on the texts of its rows, one a row, with the whole network."""
    config = from_config_dict(settings)
    model = load_model(workdir / "base")
    packed, _ = sft_data(config.sft, config.seed, model.tokenizer)
    single = dataclasses.replace(config.sft, packing=False)
    texts, _ = sft_data(single, config.seed, model.tokenizer)
    ends = np.cumsum(packed.segment_ids.max(axis=1))
    of_row = np.split(packed.records, ends[:-1])
    num_rows = num_steps = len(of_row)  # two epochs, two rows a step
    parts = split_params(model.config, model.params, config.sft.trainable, None)
    optimizer = make_optimizer(config.sft.optimizer, num_steps)
    state = init_train_state(parts.trained, optimizer)
    step = jax.jit(functools.partial(sft_step, network=policy_network(model.config)))
    inputs = make_inputs(texts, None, None, cache_gb=0.0)
    for i in range(num_steps):
        rows = batch_indices(config.seed, i, num_examples=num_rows, batch_size=2)
        chosen = np.concatenate([of_row[row] for row in rows])
        state, _ = step(state, as_text_batch(texts, inputs, chosen), optimizer, frozen=parts.frozen)
    return num_steps, state.params


@pytest.mark.parametrize(("trainable", "gigabytes"), [("all", 4.0), ("1", 4.0), ("1", 0.0)])
def test_a_packed_run_learns_what_single_texts_teach_and_resumes_bit_for_bit(
    workdir, tmp_path, capsys, trainable, gigabytes
):
    settings = packed_run(workdir, trainable=trainable, hidden_cache_gb=gigabytes)
    folder, killed = tmp_path / "run", tmp_path / "killed"
    pipeline.run(settings, folder)
    printed = capsys.readouterr().out
    assert "sft: packed 48 texts in " in printed and "2 rows of texts, at most 96 " in printed
    num_steps, expected = train_on_single_texts(workdir, settings)
    assert num_steps > 6 and metrics_of(folder)[-1]["step"] == num_steps
    tiny.leaves_close(trained_by(folder), expected, atol=1e-5, rtol=1e-5)

    single = metrics_of(workdir)[0]["sft/validation_loss"]  # of the same base model
    np.testing.assert_allclose(metrics_of(folder)[0]["sft/validation_loss"], single, rtol=1e-6)

    shutil.copytree(folder, killed)
    shutil.rmtree(killed / "sft" / "checkpoints" / str(num_steps))
    pipeline.run(settings, killed)
    assert "sft: resuming after step 6" in capsys.readouterr().out
    assert metrics_of(killed) == metrics_of(folder)
    tiny.leaves_close(trained_by(killed), trained_by(folder), rtol=0.0)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"max_length": 96}, "at most 48 .*got 96: a packed row has 9[0-6] tokens"),
        ({"batch_size": 40}, "sft.batch_size must be at most .*, the packed rows to train on"),
    ],
)
def test_rows_beyond_the_context_and_batches_beyond_the_rows_are_refused(
    workdir, tmp_path, changes, match
):
    with pytest.raises(ValueError, match=match):
        pipeline.run(packed_run(workdir, **changes), tmp_path)


def test_packing_cannot_change_on_resume(workdir):
    settings = tiny_run.config()
    settings["sft"]["packing"] = True
    with pytest.raises(ValueError, match="packing: False -> True"):
        pipeline.run(settings, workdir, only=("sft",))
