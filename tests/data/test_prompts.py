import numpy as np
import pytest

from ppo_jax.data import prompts as prompt_buckets
from ppo_jax.data.encode import batch_indices, take_prompts
from ppo_jax.data.prompts import WINDOW, PromptBuckets, prompt_data
from ppo_jax.data.records import write_jsonl
from tests.support import tiny
from tests.support.chats import TOKENIZER, turns


def long_tailed(count=3, num_prompts=200, batch_size=8, seed=0) -> PromptBuckets:
    lengths = np.random.default_rng(7).geometric(0.2, size=num_prompts).clip(1, 32)
    return PromptBuckets(
        lengths=lengths, max_length=32, count=count, batch_size=batch_size, seed=seed
    )


@pytest.mark.parametrize(
    ("most", "count", "widths"),
    [(32, 1, [32]), (33, 3, [9, 17, 33]), (8, 4, [1, 2, 4, 8]), (3, 4, [1, 2, 3])],
)
def test_widths_are_halves(most, count, widths):
    lengths = np.arange(1, most + 1)
    buckets = PromptBuckets(lengths=lengths, max_length=most, count=count, batch_size=1, seed=0)
    assert buckets.widths.tolist() == widths
    assert buckets.counts.tolist() == np.diff([0, *widths]).tolist()
    assert all(str(width) in str(buckets) for width in widths)


@pytest.mark.parametrize("num_prompts", [16, 128, 384])
def test_every_prompt_comes_once_an_epoch_of_whole_windows(num_prompts):
    buckets = long_tailed(num_prompts=num_prompts)
    windows = 3 * max(1, num_prompts // (WINDOW * 8))
    rows = np.concatenate([buckets.batch(i)[0] for i in range(windows * WINDOW)])
    counts = np.bincount(rows, minlength=num_prompts)
    assert (counts == len(rows) // num_prompts).all()


def test_a_batch_is_as_wide_as_the_bucket_of_its_longest():
    buckets = long_tailed()
    widths = []
    for step in range(4 * WINDOW):
        rows, width = buckets.batch(step)
        longest = buckets.lengths[rows].max()
        assert rows.shape == (8,) and width == min(w for w in buckets.widths if w >= longest)
        widths.append(width)
    # Most prompts are short; unsorted, nearly every batch has one of more than 8 tokens.
    assert set(widths) == {8, 16, 32} and np.mean(widths) < 14
    plain = [
        buckets.lengths[batch_indices(0, i, num_examples=200, batch_size=8)].max()
        for i in range(4 * WINDOW)
    ]
    assert np.mean([min(w for w in buckets.widths if w >= n) for n in plain]) > 18
    # Wide batches do not all come last.
    assert len({tuple(widths[i * WINDOW : (i + 1) * WINDOW]) for i in range(4)}) == 4


def test_a_batch_follows_from_seed_and_step_and_one_width_changes_nothing():
    draws = {seed: long_tailed(seed=seed).batch(5)[0].tolist() for seed in (0, 1)}
    assert draws[0] == long_tailed().batch(5)[0].tolist() != draws[1]
    rows, width = long_tailed(count=1).batch(5)
    assert width == 32
    assert (rows == batch_indices(0, 5, num_examples=200, batch_size=8)).all()


@pytest.mark.parametrize("kind", ["whole", "trunk"])
def test_an_iteration_of_narrow_prompts_gives_the_numbers_of_wide_ones(kind):
    run = tiny.Run(kind)
    wide = tiny.prompts(length=10)
    wide = wide.replace(mask=wide.mask & (np.arange(10) >= 4)[None])
    narrow = take_prompts(wide, np.arange(tiny.BATCH), 6)
    assert narrow.tokens.shape == (tiny.BATCH, 6) and (narrow.mask.sum() == wide.mask.sum())
    (_, expected), (_, got) = (
        tiny.iterate(run.state, run.numbers, prompts, tiny.RUN_KEY, **run.parts)
        for prompts in (wide, narrow)
    )
    tiny.leaves_close(got, expected, rtol=1e-4, atol=1e-5)


def test_prompts_are_never_cut():
    """The arrays are as wide as the longest prompt, which may be less than is allowed."""
    prompts = tiny.prompts(length=6)
    for width in (6, 7, 9, 12, 64, None):
        chosen = take_prompts(prompts, np.array([3, 0]), width)
        assert (chosen.tokens == prompts.tokens[np.array([3, 0])]).all()
    assert take_prompts(prompts, np.array([3]), 2).tokens.shape == (1, 2)


def test_the_batches_of_a_window_are_sorted_together(monkeypatch):
    monkeypatch.setattr(prompt_buckets, "WINDOW", 2)
    lengths = np.array([8, 1, 1, 8])
    buckets = PromptBuckets(lengths=lengths, max_length=8, count=2, batch_size=2, seed=0)
    batches = sorted((sorted(rows.tolist()), width) for rows, width in map(buckets.batch, (0, 1)))
    assert batches == [([0, 3], 8), ([1, 2], 4)]


def test_prompts_with_other_answers_are_two_also_where_the_answer_is_a_last_message(tmp_path):
    path = tmp_path / "prompts.jsonl"
    write_jsonl(path, [{"messages": turns("Hi", answer)} for answer in ("Yes", "No", "Yes")])
    data = prompt_data(path, TOKENIZER, max_length=32)
    assert data.texts[0] == data.texts[1] and dict(data.dropped) == {"repeated": 1}
    assert [x[-1]["content"] for x in data.columns["messages"]] == ["Yes", "No"]
    write_jsonl(path, [{"messages": turns("Hi")}, {"messages": turns("Hi")}])
    assert dict(prompt_data(path, TOKENIZER, max_length=32).dropped) == {"repeated": 1}
