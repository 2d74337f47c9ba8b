"""Random shapes of models and batches, as users have them: a function of the seed.

Widths that are no powers of two, odd numbers of heads, grouped ones, any vocabulary. Each is drawn
again until a core is done with a step of it in some seconds and holds it in some hundred megabytes,
and until it is not so small that the start of a step is most of it.
"""

import random
from collections.abc import Sequence
from typing import Any

STAGES = ("ppo", "sft", "reward")
FAMILIES = ("gpt2", "llama", "qwen2")
HEAD_DIMS = (16, 24, 32, 40, 48, 64, 80)
MOST_FLOPS = 3e11  # of an iteration or a step of the stage; a core does about 1e11 a second
LEAST = 1 / 8  # of the most
MOST_BYTES = 900e6  # of parameters, optimizer and activations, estimated

Shape = dict[str, Any]  # flag -> value


def draw_shapes(
    seed: int,
    stage: str,
    count: int,
    families: Sequence[str] = FAMILIES,
    most_flops: float = MOST_FLOPS,
) -> list[Shape]:
    """`count` shapes as flags of `benchmark.py`; the first of them do not depend on the count."""
    numbers, shapes = random.Random(f"{stage} {seed}"), []
    while len(shapes) < count:
        shape = draw_model(numbers, families) | draw_batch(numbers, stage)
        if fits(shape, stage, most_flops):
            shapes.append(shape)
    return shapes


def draw_model(numbers: random.Random, families: Sequence[str]) -> Shape:
    family, heads = numbers.choice(families), numbers.randint(2, 10)
    hidden, groups = heads * numbers.choice(HEAD_DIMS), heads
    if family != "gpt2":
        groups = numbers.choice([n for n in range(1, heads + 1) if heads % n == 0])
    mlp = round(hidden * numbers.choice((8 / 3, 3, 4)) / 8) * 8
    vocab = round(500 * 100 ** numbers.random())  # 500 to 50,000, most of them small
    sizes = dict(hidden=hidden, layers=numbers.randint(1, 8), heads=heads, mlp=mlp, vocab=vocab)
    return {"family": family, **sizes, "kv_heads": 0 if groups == heads else groups}


def draw_batch(numbers: random.Random, stage: str) -> Shape:
    if stage == "ppo":
        minibatches = numbers.choice((1, 1, 2, 4))
        return dict(
            batch=minibatches * numbers.randint(2, 24 // minibatches),
            prompt_len=numbers.randint(8, 128),
            response_len=numbers.randint(16, 192),
            num_epochs=numbers.randint(1, 4),
            num_minibatches=minibatches,
        )
    batch, longest = 2 * numbers.randint(2, 16), 8 * numbers.randint(8, 48)
    kind = numbers.choice(("fixed", "geometric", "lognormal"))
    lengths = kind if kind == "fixed" else f"{kind}:{longest // numbers.randint(3, 6)}"
    packing = kind != "fixed" and numbers.random() < 0.5
    return dict(batch=batch, texts=6 * batch, max_length=longest, lengths=lengths, packing=packing)


def fits(shape: Shape, stage: str, most_flops: float = MOST_FLOPS) -> bool:
    flops = estimate_flops(shape, stage)
    if shape["layers"] < 2:  # most of a last layer is read at few positions
        return False
    in_time = LEAST * most_flops <= flops <= most_flops
    return in_time and estimate_bytes(shape, stage) <= MOST_BYTES


def parameters(shape: Shape) -> tuple[int, int]:
    """(of all layers, of a head or a token table), without norms and biases."""
    width, groups = shape["hidden"], shape["kv_heads"] or shape["heads"]
    attention = 2 * width * width + 2 * width * width * groups // shape["heads"]
    mlp = (2 if shape["family"] == "gpt2" else 3) * width * shape["mlp"]
    return shape["layers"] * (attention + mlp), width * shape["vocab"]


def positions(shape: Shape, stage: str) -> tuple[int, int]:
    """(of a batch, those of them that have logits); at most."""
    if stage == "ppo":
        response = shape["response_len"]
        return shape["batch"] * (shape["prompt_len"] + response), shape["batch"] * response
    total = shape["batch"] * shape["max_length"]
    return total, total if stage == "sft" else 0


def estimate_flops(shape: Shape, stage: str) -> float:
    """Of the products with parameters: 2 forward and 6 with the backward pass."""
    body, head = parameters(shape)
    all_positions, outputs = positions(shape, stage)
    if stage != "ppo":
        return 6 * (all_positions * body + outputs * head)
    # A rollout, three networks that are scored; in the updates two bodies and one head.
    epochs = shape["num_epochs"]
    return 2 * (all_positions * body * (4 + 6 * epochs) + outputs * head * (2 + 3 * epochs))


def estimate_bytes(shape: Shape, stage: str) -> float:
    """Weights, their gradients and Adam's two moments; activations of a layer as 16 of its width
    and two of the MLP's, and five copies of the logits."""
    body, head = parameters(shape)
    all_positions, outputs = positions(shape, stage)
    copies, rows = (10, shape["num_minibatches"]) if stage == "ppo" else (4, 1)
    tables = 1 if shape["family"] == "gpt2" else 2
    layer = 16 * shape["hidden"] + 2 * shape["mlp"]
    activations = all_positions * shape["layers"] * layer + 5 * outputs * shape["vocab"]
    return 4 * (copies * (body + tables * head) + activations / rows)
