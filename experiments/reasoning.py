"""Tasks of `reasoning-gym` with answers in the rows: generated, split, scored.

106 generators of tasks, each with a scorer: https://github.com/open-thought/reasoning-gym. Here it
is sums of two digits, which a small model from scratch can learn; `TASK` names another.
"""

from pathlib import Path

from ppo_jax.data.records import split_by_text, write_jsonl

try:
    import reasoning_gym
except ImportError as error:
    raise ImportError(f"{error}; pip install 'ppo_jax[reasoning]' has it") from error

TASK = "chain_sum"  # "State the final answer to the following arithmetic problem: 4 + 3 ="
SETTINGS = dict(min_terms=2, max_terms=2, min_digits=1, max_digits=1)
SIZE, SEED = 3000, 0  # tasks to generate; few of them differ
PARTS = {"sft": 0.7, "prompts": 0.3}


def prepare(folder: Path):
    """Write the files of the config: solved tasks to imitate, and others to solve."""
    tasks = reasoning_gym.create_dataset(TASK, size=SIZE, seed=SEED, **SETTINGS)
    rows = [
        {"prompt": task["question"], "answer": task["answer"], "metadata": task["metadata"]}
        for task in tasks
    ]
    parts = split_by_text(rows, PARTS, seed=SEED, key=lambda row: row["prompt"])
    solved = [{"prompt": row["prompt"], "completion": f" {row['answer']}"} for row in parts["sft"]]
    write_jsonl(folder / "sft.jsonl", solved)
    write_jsonl(folder / "prompts.jsonl", parts["prompts"])


def score(
    prompts: list[str], responses: list[str], answer: list[str], metadata: list[dict]
) -> list[float]:
    """The task's own score of each response, from 0 to 1."""
    return [
        reasoning_gym.get_score_answer_fn(about["source_dataset"])(
            response.strip(), {"question": prompt, "answer": right, "metadata": about}
        )
        for prompt, response, right, about in zip(prompts, responses, answer, metadata, strict=True)
    ]


def short(prompts: list[str], responses: list[str], finished: list[bool]) -> list[float]:
    """1 for a response that ended with a stop token."""
    return [float(done) for done in finished]
