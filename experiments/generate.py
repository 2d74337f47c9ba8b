"""Responses of a stage's policy, or of any model, to a prompt, each after its prompt and a bar.

python experiments/generate.py --workdir=runs/quickstart --stage=ppo --prompt="The film is"
python experiments/generate.py --model=package:smollm2-135m-instruct --prompt="Paris is"
"""

import pathlib

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.generation import generate, stop_ids
from ppo_jax.models import load_model
from ppo_jax.rollout import Sampling

PROMPTS = flags.DEFINE_multi_string("prompt", None, "What to respond to; may be repeated.")
WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder; needs --stage.")
STAGE = flags.DEFINE_enum("stage", None, ["sft", "ppo"], "Which policy of the run.")
MODEL = flags.DEFINE_string("model", None, "Instead: a Hugging Face folder, .gguf or hub id.")
NUM_RESPONSES = flags.DEFINE_integer("num_responses", 1, "To each prompt.", lower_bound=1)
LENGTH = flags.DEFINE_integer("response_length", 32, "Tokens at most.", lower_bound=1)
TEMPERATURE = flags.DEFINE_float("temperature", 1.0, "0 is greedy.", lower_bound=0.0)
TOP_K = flags.DEFINE_integer("top_k", 0, "0 is off.", lower_bound=0)
TOP_P = flags.DEFINE_float("top_p", 1.0, "1 is off.", lower_bound=1e-6, upper_bound=1.0)
MIN_P = flags.DEFINE_float("min_p", 0.0, "0 is off.", lower_bound=0.0, upper_bound=1.0)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")


def policy_path() -> str:
    if bool(MODEL.value) == bool(WORKDIR.value and STAGE.value):
        raise ValueError("give either --model, or --workdir and --stage")
    return MODEL.value or str(pathlib.Path(WORKDIR.value) / STAGE.value)


def main():
    logging.set_verbosity(logging.WARNING)
    model = load_model(policy_path())
    prompts = [p for p in PROMPTS.value for _ in range(NUM_RESPONSES.value)]
    sampling = Sampling(
        response_length=LENGTH.value,
        eos_ids=stop_ids(model.tokenizer),
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
    )
    responses, _ = generate(
        model,
        prompts,
        sampling=sampling,
        temperature=TEMPERATURE.value,
        seed=SEED.value,
        batch_size=min(len(prompts), 64),
        max_prompt_length=model.config.max_length - LENGTH.value,
    )
    for prompt, response in zip(prompts, responses, strict=True):
        print(f"{prompt}|{response}\n")


if __name__ == "__main__":
    flags.mark_flag_as_required("prompt")
    cli.run(main)
