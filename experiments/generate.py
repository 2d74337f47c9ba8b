"""Responses of a stage's policy, or of any model: to prompts, to a file of prompts, or in a chat.

python experiments/generate.py --workdir=runs/quickstart --stage=ppo --prompt="The film is"
python experiments/generate.py --workdir=runs/quickstart --stage=ppo --prompts=a.jsonl --out=b.jsonl
python experiments/generate.py --model=package:smollm2-135m-instruct --interactive
"""

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.inference import terminal as chat_terminal
from ppo_jax.inference.generate import find_sampling
from ppo_jax.io.stage_folder import load_model, stage_folder

PROMPT = flags.DEFINE_multi_string(
    "prompt", None, "What to respond to; may be repeated. Printed as PROMPT|RESPONSE."
)
PROMPTS = flags.DEFINE_string("prompts", None, "Instead: a JSONL of {prompt}; needs --out.")
CHAT = flags.DEFINE_bool("interactive", False, "Instead: a chat by the tokenizer's template.")
OUT = flags.DEFINE_string("out", None, "A new JSONL of {prompt, response}, for --prompts.")
REWARD = flags.DEFINE_string("reward_model", None, "A stage folder: --out then has scores.")
TEMPLATE = flags.DEFINE_bool("template", True, "False: a chat just continues each line.")
WORKDIR = flags.DEFINE_string("workdir", None, "A run's folder; needs --stage.")
STAGE = flags.DEFINE_enum("stage", None, ["sft", "ppo"], "Which policy of the run.")
MODEL = flags.DEFINE_string("model", None, "Instead: a Hugging Face folder, .gguf or hub id.")
COPIES = flags.DEFINE_integer("num_responses", 1, "To each prompt.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the sampling.")
SAMPLING = {  # by default as in the run's PPO stage
    "response_length": flags.DEFINE_integer("response_length", None, "Tokens.", lower_bound=1),
    "temperature": flags.DEFINE_float("temperature", None, "0 is greedy.", lower_bound=0.0),
    "top_k": flags.DEFINE_integer("top_k", None, "0 is off.", lower_bound=0),
    "top_p": flags.DEFINE_float("top_p", None, "1 is off.", lower_bound=1e-6, upper_bound=1.0),
    "min_p": flags.DEFINE_float("min_p", None, "0 is off.", lower_bound=0.0, upper_bound=1.0),
}


def main():
    logging.set_verbosity(logging.WARNING)
    if bool(MODEL.value) == bool(WORKDIR.value and STAGE.value):
        raise ValueError("give either --model, or --workdir and --stage")
    in_file = bool(PROMPTS.value or OUT.value or REWARD.value)
    num_modes = bool(PROMPT.value) + in_file + CHAT.value
    if PROMPT.value and not all(PROMPT.value):
        raise ValueError("--prompt is empty")
    if num_modes != 1 or (in_file and not (PROMPTS.value and OUT.value)):
        raise ValueError("give --prompt, or --prompts and --out, or --interactive")
    path = MODEL.value or str(stage_folder(WORKDIR.value, STAGE.value))
    model = load_model(path)
    asked = {name: flag.value for name, flag in SAMPLING.items()}
    how = find_sampling(path, model.tokenizer, **asked) | {"seed": SEED.value}
    if CHAT.value:
        return chat_terminal.chat_in_terminal(model, use_template=TEMPLATE.value, **how)
    if in_file:
        scorer = load_model(REWARD.value) if REWARD.value else None
        files = {"prompts": PROMPTS.value, "out": OUT.value, "copies": COPIES.value}
        return chat_terminal.respond_to_file(model, scorer, **files, **how)
    prompts = [p for p in PROMPT.value for _ in range(COPIES.value)]
    for prompt, response in zip(prompts, chat_terminal.respond(model, prompts, **how), strict=True):
        print(f"{prompt}|{response}\n")


if __name__ == "__main__":
    cli.run(main)
