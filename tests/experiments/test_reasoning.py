"""Tasks of reasoning-gym: what is written has its answer, and the scorer knows it again."""

import pytest

from ppo_jax.data.records import load_prompt_rows, load_texts

pytest.importorskip("reasoning_gym", reason="pip install 'ppo_jax[reasoning]'")


def test_the_rows_have_answers_which_the_scorer_takes_for_right(tmp_path):
    import reasoning

    reasoning.prepare(tmp_path)
    _, prompts, rows = zip(*load_prompt_rows(tmp_path / "prompts.jsonl"), strict=True)
    solved = load_texts(tmp_path / "sft.jsonl")
    assert {x.segments[0][0] for x in solved}.isdisjoint(prompts) and len(set(prompts)) > 20
    answers, metadata = ([row[key] for row in rows] for key in ("answer", "metadata"))
    right = reasoning.score(prompts, [f" {a}\n" for a in answers], answers, metadata)
    assert right == [1.0] * len(rows)
    wrong = reasoning.score(prompts, [f" {int(a) + 1}" for a in answers], answers, metadata)
    assert wrong == [0.0] * len(rows)


def test_every_answer_is_the_sum(tmp_path):
    import reasoning

    reasoning.prepare(tmp_path)
    for _, prompt, row in load_prompt_rows(tmp_path / "prompts.jsonl"):
        terms = prompt.removesuffix(" =").split(": ")[1]
        left, sign, other = terms.split()
        assert int(row["answer"]) == int(left) + int(other) * (-1 if sign == "-" else 1)
