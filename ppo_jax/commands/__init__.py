"""The console command `ppo-jax COMMAND --FLAG=VALUE ...`; the scripts of experiments/ do the same.

A command is a module with a function `main`, loaded when it is asked for: its flags are defined
there, its work is done by the function of the same name in `ppo_jax`. Start reading at `cli.py`,
which has what all commands share. Nothing imports from here.
"""

import difflib
import importlib
import importlib.metadata
import sys

# command -> (what it does, its module)
COMMANDS = {
    "rlhf": ("run every stage of a config: SFT, reward model, PPO, evaluation, report", "stages"),
    "sft": ("run the sft stage of a config", "stages"),
    "reward": ("run the reward stage of a config", "stages"),
    "ppo": ("run the ppo stage of a config", "stages"),
    "generate": ("responses to prompts, to a file of prompts, or in a chat", "generate"),
    "evaluate": ("policies side by side on unseen prompts, by any judges", "evaluate"),
    "frontier": ("gold and proxy score against KL, of several runs and best-of-n", "frontier"),
    "export": ("a finished stage as a Hugging Face folder", "export"),
    "sweep": ("many runs of one config, by points that change it", "sweep"),
    "plan": ("memory and least time of a PPO iteration on a TPU topology", "plan"),
}


def main():
    """The entry point of `ppo-jax`."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "-help", "--help", "--helpshort", "--helpfull"):
        print(usage())
        return
    if arguments[0] == "--version":
        print(f"ppo_jax {importlib.metadata.version('ppo_jax')}")
        return
    name = sys.argv.pop(1)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        message = f"the command must be one of {list(COMMANDS)}, got {name!r}{hint}"
        print(f"ppo-jax: {message}", file=sys.stderr)
        sys.exit(2)
    about, module_name = COMMANDS[name]
    module = importlib.import_module(f"ppo_jax.commands.{module_name}")
    # --help prints it above the flags.
    text = f"{about}\n\nppo-jax {name} --FLAG=VALUE ..."
    if module_name in ("stages", "sweep", "plan"):
        text += "\n\nEvery setting of the config is a flag: --config.SECTION.FIELD=VALUE"
    sys.modules["__main__"].__doc__ = text
    module.main(*([name] if module_name == "stages" else []))


def usage() -> str:
    """The commands, one a line."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:{width}}  {about}" for name, (about, _) in COMMANDS.items()]
    head = "usage: ppo-jax COMMAND --FLAG=VALUE ...   (ppo-jax COMMAND --help lists its flags)"
    return "\n".join([head, "", *rows])
