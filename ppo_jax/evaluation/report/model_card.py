"""The README.md of an exported model: what it is, how to use it, what made it, what came out."""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ppo_jax.evaluation.report import plots
from ppo_jax.evaluation.report.charts import CHARTS, compared, display_name
from ppo_jax.evaluation.report.summary import Run, headlines, read_run, verdict
from ppo_jax.io.hub import HUB_ID
from ppo_jax.io.stage_folder import describe_stage, split_step
from ppo_jax.training.stages import TRAINING_STAGES, find_stage

PICTURE = "training.png"
TASKS = {"policy": "text-generation", "reward": "text-classification"}
_FIELDS = [field for stage in TRAINING_STAGES for field in stage.data_fields]
DATA = (*dict.fromkeys(_FIELDS), "reward_function")  # settings that name data, each once
OF_BASE = ("path", "scratch", "vocabulary_data")

# AutoTokenizer rebuilds what it takes for a tokenizer of Qwen2; this class reads tokenizer.json.
USE_POLICY = """\
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

path = "."  # this folder, or the place it was uploaded to
tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
model = AutoModelForCausalLM.from_pretrained(path)
inputs = tokenizer(["The film is"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
"""
USE_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

base = "{base}"  # the model that the adapter goes onto: its folder or hub id
path = "."  # this folder, or the place it was uploaded to
tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)
inputs = tokenizer(["The film is"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs)[0], skip_special_tokens=True))
"""
USE_REWARD = """\
import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

path = "."  # this folder, or the place it was uploaded to
tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
model = AutoModelForSequenceClassification.from_pretrained(path)
texts = [text + tokenizer.eos_token for text in ("The film is a delight.", "The film is dull.")]
with torch.no_grad():
    logits = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits
print(logits[:, 0] + model.config.score_bias)
"""
ABOUT_SCORES = """\
A text is prompt and response, one after the other, with the tokenizer's EOS at its end, where the
score is read. Its score is `logits + score_bias`: the score head of transformers has no bias, so
the constant that sets the zero of the scale is in `config.json`.
"""


def write_card(
    folder: Path, workdir: Path, stage: str, *, out: str, dtype: str, adapter_of: str = ""
) -> None:
    """Write README.md and, where the run has curves, its picture.

    Args:
        folder: of the exported model.
        workdir: the run's folder.
        stage: whose model it is, STAGE or STAGE@STEP.
        out: the name that the exported folder will have.
        dtype: of the exported weights.
        adapter_of: the model that an adapter goes onto; "" where the whole model is exported.
    """
    run, asked, (stage, step) = read_run(workdir), stage, split_step(stage)
    drawn = {title: draw for title, draw in pictures(run, stage).items() if draw}
    if drawn:
        plots.save_png(drawn, folder / PICTURE, columns=min(len(drawn), 2))
    about = describe_stage(workdir / stage)
    names = [stage.name for stage in TRAINING_STAGES]
    before = {name: describe_stage(workdir / name) for name in names[: names.index(stage) + 1]}
    stages = {name: entry["settings"] for name, entry in before.items() if entry}
    command = f"--workdir={public(str(workdir))} --stage={asked} --out={out} --dtype={dtype}"
    what, use = find_stage(stage).makes, USE_REWARD if about["kind"] == "reward" else USE_POLICY
    if adapter_of:
        command += f" --adapter_of={public(adapter_of)}"
        what = f"{what}: the LoRA adapter alone, for `{public(adapter_of)}`"
        use = USE_ADAPTER.format(base=public(adapter_of))
    library = "peft" if adapter_of else "transformers"
    parts = [
        front_matter(about, adapter_of or origin(stages, stage), library),
        f"# {out}\n\n{what}, made with ppo_jax.\n",
        f"![Curves of the run]({PICTURE})\n" if drawn else "",
        f"## Use\n\n```python\n{use}```\n",
        ABOUT_SCORES if about["kind"] == "reward" else "",
        results(run, stage) if step is None else results_at(run, stage, step),
        options(stages, stage),
        made_by(run.config, f"ppo-jax export {command}"),
    ]
    (folder / "README.md").write_text("\n".join(filter(None, parts)), encoding="utf-8")


def origin(stages: Mapping[str, Mapping[str, Any]], stage: str) -> str:
    """The model that a stage began with, over the stages before it; "" is random weights."""
    while (name := split_step(stages[stage].get("init_from", "base"))[0]) in stages:
        stage = name
    return stages[stage]["model"]["path"] if name == "base" else name


def front_matter(about: Mapping[str, Any], base: str, library: str) -> str:
    """What the model hub reads. The licence is for whoever publishes the model to say."""
    from_hub = "/" in base and HUB_ID.fullmatch(base) and not os.path.exists(base)
    lines = [f"library_name: {library}", f"pipeline_tag: {TASKS[about['kind']]}"]
    lines += [f"base_model: {base}"] if from_hub else []
    return "\n".join(["---", *lines, f"tags: [ppo_jax, rlhf, {about['stage']}]", "---\n"])


def pictures(run: Run, stage: str) -> dict[str, plots.Draw | None]:
    """The figures of a stage by their titles; None where the run has nothing to show."""
    if stage == "ppo":
        candidate, reference = map(display_name, compared(run.results))
        return {
            "Score against KL": plots.trajectory(run.rows("ppo")),
            f"{candidate} against {reference}, by judge": plots.win_rates(run.results),
        }
    chart = CHARTS[stage][0].charts[0]
    drawn = {chart.title: plots.curves(run.rows(stage), stage, chart)}
    if stage == "reward":
        drawn["Accuracy by gap in rating"] = plots.margins(run.results)
    return drawn


def results(run: Run, stage: str) -> str:
    """The run's figures, the judges' table, and the last values of the stage's metrics."""
    metrics = last_metrics(run.rows(stage))
    return "\n".join(
        [
            f"## Results\n\n{verdict(run)}\n",
            table(("figure", "of the run", ""), headlines(run)),
            judges_table(run.results.get("judges", [])),
            folded(f"Metrics of the {stage} stage at its end", table(("metric", "value"), metrics)),
        ]
    )


def last_metrics(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """The last value of each metric of some steps, for a table."""
    last = {}
    for row in rows:
        last |= {name: x for name, x in row.items() if "/" in name and isinstance(x, int | float)}
    return [(f"`{name}`", f"{x:.4g}") for name, x in last.items() if "time/" not in name]


def results_at(run: Run, stage: str, step: int) -> str:
    """The metrics of an earlier checkpoint; the verdict of the run is of its last one."""
    metrics = last_metrics(row for row in run.rows(stage) if row["step"] <= step)
    rows = table(("metric", "value"), metrics)
    return f"## Results\n\nThe checkpoint of step {step}. Metrics there:\n\n{rows}"


def judges_table(judges: Sequence[Mapping[str, Any]]) -> str:
    """What judges that had no part in the training say of the policies."""
    names = [name for name in (judges or [{}])[0] if name.startswith(("pair_", "mean_", "win_"))]
    names = [name for name in names if not name.endswith("_interval")]
    rows = [(row["judge"], *(f"{row[n]:.3f}" if n in row else "" for n in names)) for row in judges]
    heads = [name.removeprefix("win_rate_").replace("_", " ") for name in names]
    return table(("judge", *heads), rows) if rows else ""


def options(stages: Mapping[str, Mapping[str, Any]], stage: str) -> str:
    """Where the model comes from, its data, and the settings of each stage on the way to it."""
    base = origin(stages, stage)
    began = f"It began with `{public(base)}`." if base else "It began with random weights."
    data = [
        (name, field.replace("_", " "), f"`{public(settings[field])}`")
        for name, settings in stages.items()
        for field in DATA
        if settings.get(field)
    ]
    tables = [
        folded(f"Settings of the {name} stage", table(("setting", "value"), rows_of(settings)))
        for name, settings in zip(stages, map(used, stages.values()), strict=True)
    ]
    return "\n".join([f"## Recipe\n\n{began}\n", table(("stage", "data", "from"), data), *tables])


def made_by(record: Mapping[str, Any], command: str) -> str:
    """The command of the export, and what the run was made with, as its config.json has it."""
    packages = record.get("packages", {}).items()
    devices = record.get("devices", {})
    made = {
        "git commit": record.get("git_commit"),
        "packages": ", ".join(f"{name} {version}" for name, version in packages),
        "devices": devices and f"{devices['count']} x {devices['kind']}",
        "data made by": record.get("config", {}).get("prepare"),
    }
    rows = [row for row in made.items() if row[1]]
    return f"## Made by\n\n```\n{command}\n```\n\n{table(('the run', ''), rows)}"


def used(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings without those of a base model that the stage did not begin with."""
    origin, _ = split_step(settings.get("init_from", "base"))
    if origin == "base" or find_stage(origin):  # which began with it
        return settings
    model = {name: x for name, x in settings["model"].items() if name not in OF_BASE}
    return {**settings, "model": model}


def rows_of(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as rows, without empty ones and those of the table of data."""
    rows = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += rows_of(value, f"{prefix}{name}.")
        elif value not in ("", None, []) and name not in DATA:
            rows.append((f"`{prefix}{name}`", f"`{public(value)}`"))
    return rows


def public(value: Any) -> Any:
    """A setting for strangers: of a path from the root of this machine, the name alone."""
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Rows in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def folded(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{content}\n</details>\n"
