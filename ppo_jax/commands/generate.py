"""Responses of a stage's policy, or of any model: to prompts, to a file of them, or in a chat."""

from pathlib import Path
from types import SimpleNamespace

from absl import flags, logging

from ppo_jax import cli
from ppo_jax.config.parsing import LARGEST_SEED
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.inference import terminal
from ppo_jax.inference.generate import find_sampling, run_settings
from ppo_jax.io.stage_folder import check_step, load_model, split_step, stage_folder, with_step


def define_flags() -> SimpleNamespace:
    """The flags of the command but for those of the sampling, by name."""
    text, boolean = flags.DEFINE_string, flags.DEFINE_bool
    found = SimpleNamespace(
        prompt=flags.DEFINE_multi_string(
            "prompt", None, "What to respond to; may be repeated. Printed as PROMPT|RESPONSE."
        ),
        prompts=text("prompts", None, "Instead: a JSONL of {prompt}; needs --out."),
        interactive=boolean("interactive", False, "Instead: a chat by the tokenizer's template."),
        out=text("out", None, "A new JSONL of {prompt, response}, for --prompts."),
        reward_model=text("reward_model", None, "Stage folder or classifier: --out has scores."),
        keep_best=boolean(
            "keep_best", False, "--out has the best of each prompt's responses alone, as SFT data."
        ),
        template=boolean("template", True, "False: a chat just continues each line."),
        workdir=text("workdir", None, "A run's folder; needs --stage."),
        stage=cli.stage_flag(["sft", "ppo"], "Which policy of the run"),
        model=text("model", None, "Instead: a Hugging Face folder, .gguf, hub id or stage folder."),
        num_responses=flags.DEFINE_integer(
            "num_responses", 1, "To each prompt.", lower_bound=1, upper_bound=10**6
        ),
        seed=flags.DEFINE_integer(
            "seed", 0, "Seed of the sampling.", lower_bound=-LARGEST_SEED, upper_bound=LARGEST_SEED
        ),
    )
    cli.show_in_help(*vars(found).values())
    return found


def define_sampling_flags() -> dict[str, flags.FlagHolder]:
    """The flags of the sampling, by name; by default it is that of the run's PPO stage."""
    real, whole = flags.DEFINE_float, flags.DEFINE_integer
    found = {
        "response_length": whole("response_length", None, "Tokens.", lower_bound=1),
        "temperature": real("temperature", None, "0 is greedy.", lower_bound=0.0),
        "top_k": whole("top_k", None, "0 is off.", lower_bound=0),
        "top_p": real("top_p", None, "1 is off.", lower_bound=1e-6, upper_bound=1.0),
        "min_p": real("min_p", None, "0 is off.", lower_bound=0.0, upper_bound=1.0),
    }
    cli.show_in_help(*found.values())
    return found


def main():
    """Define the flags, parse them, respond."""
    flag, sampling = define_flags(), define_sampling_flags()

    def generate():
        logging.set_verbosity(logging.WARNING)
        check(flag)
        name = flag.model.value or with_step(flag.stage.value, flag.workdir.value)
        path, step = split_step(name)
        if not flag.model.value:
            path = str(stage_folder(flag.workdir.value, path))
        if step is not None:
            check_step(Path(path), step)
        model = load_model(path, step=step)
        asked = {name: holder.value for name, holder in sampling.items()}
        how = find_sampling(path, model.tokenizer, **asked) | {"seed": flag.seed.value}
        if flag.interactive.value:
            terminal.chat_in_terminal(model, use_template=flag.template.value, **how)
        elif flag.prompts.value:
            scorer = load_model(flag.reward_model.value) if flag.reward_model.value else None
            files = {"prompts": flag.prompts.value, "out": flag.out.value}
            copies = flag.num_responses.value
            score_at = run_settings(path).get("score_at", PPOSettings.score_at)
            files |= {"copies": copies, "score_at": score_at, "keep_best": flag.keep_best.value}
            terminal.respond_to_file(model, scorer, **files, **how)
        else:
            prompts = [p for p in flag.prompt.value for _ in range(flag.num_responses.value)]
            responses, _ = terminal.respond(model, prompts, **how)
            for prompt, response in zip(prompts, responses, strict=True):
                terminal.write(f"{prompt}|{response}\n\n")

    cli.run(generate)


def check(flag: SimpleNamespace):
    """Refuse flags that do not go together.

    Raises:
        ValueError: no model or two, no prompts or two sources of them, or an empty prompt.
    """
    if bool(flag.model.value) == bool(flag.workdir.value and flag.stage.value):
        raise ValueError("give either --model, or --workdir and --stage")
    if flag.keep_best.value and not flag.reward_model.value:
        raise ValueError("--keep_best needs --reward_model, whose scores say which is the best")
    in_file = bool(flag.prompts.value or flag.out.value or flag.reward_model.value)
    num_modes = bool(flag.prompt.value) + in_file + flag.interactive.value
    if flag.prompt.value and not all(flag.prompt.value):
        raise ValueError("--prompt is empty")
    if num_modes != 1 or (in_file and not (flag.prompts.value and flag.out.value)):
        raise ValueError("give --prompt, or --prompts and --out, or --interactive")
