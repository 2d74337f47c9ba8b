"""Judges of whole texts: what a panel is, and what it says of the responses of some policies."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ppo_jax.config.parsing import failure, load_function
from ppo_jax.config.run import ModelSettings
from ppo_jax.data.readers import short_repr
from ppo_jax.distributed.processes import on_primary
from ppo_jax.evaluation.statistics import Judge, ask_judge, judge_table, rating_accuracy
from ppo_jax.inference.responses import Responses
from ppo_jax.inference.score import encode_responses, sampled_scores, score_rows
from ppo_jax.io.hub import model_folder
from ppo_jax.io.huggingface import load_classifier, read_classifier
from ppo_jax.io.model_spec import read_shape
from ppo_jax.io.stage_folder import Model, check_step, load_model, split_step
from ppo_jax.io.tokenizers import load_tokenizer

FUNCTION = re.compile(r"[\w.]+:\w+")
MODELS = ("package:", "hub:")  # of names with a colon that are no functions


@dataclasses.dataclass(frozen=True, kw_only=True)
class JudgePanel:
    """Judges of whole texts (prompt and response), and what a reader must know of them."""

    judges: Mapping[str, Judge]
    notes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rated: tuple[Sequence[str], np.ndarray] | None = None  # texts and mean ratings, unseen by all
    reference: Mapping[str, float] = dataclasses.field(default_factory=dict)  # marks for accuracy
    headline: str = ""  # the judge whose win rate is the result of the run; "" is "gold", or the
    # first judge where none has this name

    def __post_init__(self):
        if not self.judges:
            raise ValueError("judges must be one or more, got none")
        if self.headline and self.headline not in self.judges:
            raise ValueError(
                f"headline must be one of the panel's judges {list(self.judges)}, got "
                f"{self.headline!r}"
            )

    @property
    def headline_judge(self) -> str:
        """The judge that `headline` names, also of a panel that `dataclasses.replace` gave more."""
        return self.headline or ("gold" if "gold" in self.judges else next(iter(self.judges)))


def make_panel(name: str, workdir: Path, field: str = "evaluate.judges") -> JudgePanel:
    """The panel that a function "module:function" makes; every process makes it together.

    Args:
        name: of the function.
        workdir: what it is given, the run's folder.
        field: the setting that names it, for errors.

    Raises:
        ValueError: there is no such function, or what it returns is no panel.
        FunctionFailed: it raised something.
    """
    make = load_function(name, field)
    try:
        panel = make(workdir)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # SystemExit, too: the run is not done
        raise failure(f"{field} {name}", error) from error
    if not isinstance(panel, JudgePanel):
        raise ValueError(f"{field} {name} must return a JudgePanel, got {short_repr(panel)}")
    return panel


def ask_panel(panel: JudgePanel, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The judges' table and the verdict of the panel's headline judge, under gold/.

    The judges, which may be slow, paid or random, are asked by process 0 alone; they compute on its
    own devices.

    Args:
        panel: the judges.
        texts: policy -> N whole texts; the last is the candidate, the one before it its reference.
    """
    *_, reference, candidate = texts
    table = on_primary(
        judge_table,
        panel.judges,
        texts,
        candidate=candidate,
        notes=panel.notes,
        rated=panel.rated,
    )
    results = {"judges": table, "reference": dict(panel.reference)}
    for row in table:
        if row["judge"] == panel.headline_judge:
            key = f"win_rate_{candidate}_vs_{reference}"
            keys = [f"{kind}{key}" for kind in ("", "length_controlled_")]
            keys = [name for key in keys for name in (key, f"{key}_interval")]
            results |= {f"gold/{name}": row[name] for name in keys}
            results["headline_judge"] = panel.headline_judge
    return results


# --- judges by name, of an evaluation side by side ------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class NamedJudge:
    """A judge as a flag names it: a function, a panel of them, or a model."""

    name: str  # that of a panel is its function's
    kind: str  # "function", "panel" or "model"
    source: str  # "module:function", or the path of a reward model
    label: str = ""  # of a classifier with several


def parse_judges(named: Mapping[str, str]) -> list[NamedJudge]:
    """Judges from {name: "module:function" or a path}; an entry under its own text is a panel.

    PATH#LABEL is a classifier with several labels, of which this one is what is good.

    Raises:
        ValueError: an entry without a name is no function.
    """
    judges = []
    for name, source in named.items():
        function = FUNCTION.fullmatch(source) is not None and not source.startswith(MODELS)
        if name == source and not function:
            raise ValueError(
                f"--judges must be NAME=PATH, NAME=module:function, or module:function of a "
                f"JudgePanel, got {source!r}"
            )
        kind = "panel" if name == source else "function" if function else "model"
        path, _, label = source.partition("#") if kind == "model" else (source, "", "")
        judges.append(NamedJudge(name=name, kind=kind, source=path, label=label))
    return judges


def check_judge(judge: NamedJudge, run: str) -> None:
    """A judge is there, and is what it should be; nothing is asked yet.

    Raises:
        ValueError: it is not.
    """
    if judge.kind == "panel" and not run:
        raise ValueError(
            f"--judges: {judge.source} makes a panel from a run's folder: give --run; a judge of "
            f"texts has a name, NAME={judge.source}"
        )
    if judge.kind != "model":
        load_function(judge.source, "--judges")
        return
    folder, step = split_step(judge.source)
    try:
        if judge.label:
            read_classifier(model_folder(folder), judge.label)
            return
        spec = read_shape(folder, ModelSettings(path=folder))
        if step is not None:
            check_step(Path(folder), step)
    except ValueError as error:
        raise ValueError(f"--judges: {judge.name}: {error}") from error
    if spec.kind != "reward":
        raise ValueError(
            f"--judges: {judge.name}={judge.source} is a policy; a judge is a reward model or a "
            "sequence classifier"
        )


# (spec of the policy, prompts, responses) -> [N] scores
Rate = Callable[[Any, Sequence[str], Responses], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedJudge:
    """A judge that is ready to be asked."""

    name: str
    rate: Rate
    note: str = ""
    accuracy: Callable[[], float | None] = lambda: None  # on rated texts, where there are some


def load_judges(judges: Sequence[NamedJudge], run: str, score_at: str) -> list[LoadedJudge]:
    """All judges, those of a panel one by one.

    Raises:
        ValueError: two have the same name, or a panel is none.
    """
    loaded: list[LoadedJudge] = []
    for judge in judges:
        if judge.kind == "panel":
            loaded += of_panel(make_panel(judge.source, Path(run), "--judges"))
        elif judge.kind == "function":
            function = load_function(judge.source, "--judges")
            loaded.append(LoadedJudge(name=judge.name, rate=rate_texts(judge.name, function)))
        else:
            rate = rate_label(judge) if judge.label else rate_model(judge, score_at)
            loaded.append(LoadedJudge(name=judge.name, rate=rate))
    names = [judge.name for judge in loaded]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--judges has {twice[0]!r} twice: a panel has a judge of this name")
    return loaded


def of_panel(panel: JudgePanel) -> list[LoadedJudge]:
    """The judges of a panel, its headline first."""
    first = panel.headline_judge
    names = [first, *(name for name in panel.judges if name != first)]

    def accuracy(name: str) -> float | None:
        if panel.rated is None or np.ptp(panel.rated[1]) < 1:
            return None
        texts, ratings = panel.rated
        return rating_accuracy(ask_judge(name, panel.judges[name], texts), ratings, gap=1)

    return [
        LoadedJudge(
            name=name,
            rate=rate_texts(name, panel.judges[name]),
            note=panel.notes.get(name, ""),
            accuracy=functools.partial(accuracy, name),
        )
        for name in names
    ]


def rate_texts(name: str, judge: Judge) -> Rate:
    """A judge of whole texts."""

    def rate(policy: Any, prompts: Sequence[str], responses: Responses) -> np.ndarray:
        del policy
        texts = [p + r for p, r in zip(prompts, responses.texts, strict=True)]
        return ask_judge(name, judge, texts)

    return rate


def rate_model(judge: NamedJudge, score_at: str) -> Rate:
    """A reward model or classifier, loaded when it is asked first."""
    load = functools.cache(lambda: load_model(judge.source))

    def rate(policy: Any, prompts: Sequence[str], responses: Responses) -> np.ndarray:
        scores = sampled_scores(load(), policy, prompts, responses, score_at)
        if len(scores) < len(prompts):
            raise ValueError(
                f"--judges: {judge.name} cannot read {len(prompts) - len(scores)} responses: they "
                "are longer than its context; lower --response_length or --max_prompt_length"
            )
        return np.array([scores[i] for i in range(len(prompts))], np.float64)

    return rate


def rate_label(judge: NamedJudge) -> Rate:
    """A classifier with several labels: the log-odds of one, log p / (1 - p), read as text."""

    @functools.cache
    def load() -> tuple[list[Model], int]:
        config, each, number, padding = load_classifier(judge.source, judge.label)
        how = dict(kind="reward", config=config, tokenizer=load_tokenizer(judge.source))
        return [Model(**how, params=params, padding_id=padding) for params in each], number

    def rate(policy: Any, prompts: Sequence[str], responses: Responses) -> np.ndarray:
        del policy
        models, number = load()
        rows, _ = encode_responses(prompts, responses.texts, responses.ended, models[0])
        logits = np.stack([score_rows(model, rows) for model in models])  # [labels, N]
        others = np.logaddexp.reduce(np.delete(logits, number, axis=0), axis=0)
        return (logits[number] - others).astype(np.float64)

    return rate
