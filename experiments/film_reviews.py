"""The quickstart's task: film reviews that please, with real human ratings.

10,603 sentences from film reviews, each rated by 15 to 29 people from -4 to 4 (Hutto & Gilbert,
ICWSM 2014). The policy is given the first words of a sentence and completes it; the reward model
learns from comparisons of single human ratings. It is the sentiment task of Ziegler et al. 2019.

The sentences fall into four parts by their text: `train` for fine-tuning, the reward model and
PPO's prompts; `judge` for the judges alone; `validation` for unseen pairs and prompts to choose
settings by; `test` for the figures of the chosen ones.
"""

import functools
import hashlib
import re
from pathlib import Path

import jax
import numpy as np

from ppo_jax.data.encode import encode_all
from ppo_jax.data.hidden_states import text_states
from ppo_jax.data.records import RatedText, load_ratings, split_by_text, write_jsonl
from ppo_jax.distributed.layout import one_device
from ppo_jax.evaluation.evaluate import Panel
from ppo_jax.evaluation.statistics import fit_ridge, fit_tfidf_judge, textblob_judge, vader_judge
from ppo_jax.io.hub import film_ratings
from ppo_jax.io.stage_folder import Model, load_model
from ppo_jax.models.build import trunk_network
from ppo_jax.models.partition import split_params

BASE_MODEL = "package:smollm2-135m-instruct"
OTHER_SETS = ("amazonReviewSnippets", "tweets")  # product reviews and tweets, rated alike
PARTS = {"train": 0.5, "judge": 0.3, "test": 0.1, "validation": 0.1}
SPLIT_SEED = 2014
PROMPT_WORDS = 4
WORDS = (8, 24)  # of a text to imitate: whole sentences that fit into a short response
JUDGE_LAYER = 18  # middle layers know most about sentiment
NUM_GOLD = 2500  # texts that the gold judge is fitted on
NUM_RATED = 500  # unseen texts that measure the judges
ACTING = re.compile(r"\b(acting|actors?|actress|performances?|cast)\b", re.IGNORECASE)
# Accuracy on pairs of unseen film sentences with a gap of 1 or more, on a split of its own.
REFERENCE = {"human rater": 0.943, "ridge on a frozen layer": 0.888, "TF-IDF ridge": 0.855}


def prepare(folder: Path):
    """Write the files that the configs name. Parts are disjoint by text, prompts included."""
    parts = split_by_text(film_ratings(), PARTS, seed=SPLIT_SEED)
    train = [r for r in parts["train"] if WORDS[0] <= len(r.text.split()) <= WORDS[1]]
    prompts = sorted({first_words(r) for r in train}, key=stable_order)
    write_jsonl(folder / "sft.jsonl", [{"text": r.text} for r in train])
    others = [r for name in OTHER_SETS for r in film_ratings(name)]
    texts = [{"text": r.text} for r in parts["train"] + others]
    write_jsonl(folder / "vocabulary.jsonl", texts)
    for part, records in parts.items():
        rows = [{"text": r.text, "ratings": list(r.ratings)} for r in records]
        write_jsonl(folder / f"{part}_ratings.jsonl", rows)
    write_jsonl(folder / "prompts.jsonl", [{"prompt": p} for p in prompts])
    seen = {prompt.casefold() for prompt in prompts}
    for part in ("test", "validation"):
        unseen = {first_words(r) for r in parts[part] if len(r.text.split()) >= WORDS[0]}
        unseen = sorted((p for p in unseen if p.casefold() not in seen), key=stable_order)
        write_jsonl(folder / f"{part}_prompts.jsonl", [{"prompt": p} for p in unseen])
        seen |= {prompt.casefold() for prompt in unseen}


def first_words(record: RatedText) -> str:
    return " ".join(record.text.split()[:PROMPT_WORDS])


def stable_order(text: str) -> bytes:
    """A shuffle that does not depend on what else is in the list."""
    return hashlib.sha256(text.encode()).digest()


def judges(workdir: Path) -> Panel:
    """The panel of the quickstart: gold, words, and two lexicons."""
    panel = word_judges(workdir)
    texts, means = rated_texts(workdir, "judge")
    gold = gold_judge(load_model(BASE_MODEL), texts[:NUM_GOLD], means[:NUM_GOLD])
    note = (
        f"ridge regression on layer {JUDGE_LAYER} of the pretrained model, fitted on {NUM_GOLD} "
        "rated texts of its own; it shares these frozen layers with policy and reward model, and "
        "no text, rating or trained weight"
    )
    return Panel(
        judges={"gold": gold} | dict(panel.judges),
        notes=dict(panel.notes) | {"gold": note},
        rated=panel.rated,
        reference=panel.reference,
    )


def word_judges(workdir: Path) -> Panel:
    """Judges that share nothing with the policy's model."""
    texts, means = rated_texts(workdir, "judge")
    others = [r for name in OTHER_SETS for r in film_ratings(name)]
    tfidf = fit_tfidf_judge(
        texts + [r.text for r in others], np.concatenate([means, [r.mean for r in others]])
    )
    unseen, unseen_means = rated_texts(workdir, "test")
    return Panel(
        judges={"tf-idf": tfidf, "vader": vader_judge(), "textblob": textblob_judge()},
        notes={
            "tf-idf": "ridge regression on words and word pairs; film texts of its own, product "
            "reviews and tweets; shares nothing with the policy's model",
            "vader": "a lexicon; easy to please with a few strong words",
            "textblob": "a lexicon; easy to please with a few strong words",
        },
        rated=(unseen[:NUM_RATED], unseen_means[:NUM_RATED]),
        reference=REFERENCE,
    )


def words_as_gold(workdir: Path) -> Panel:
    """The panel of the tiny variant: a model from scratch has no layer that knows sentiment."""
    panel = word_judges(workdir)
    scorers, notes = dict(panel.judges), dict(panel.notes)
    scorers = {"gold": scorers.pop("tf-idf")} | scorers
    notes["gold"] = notes.pop("tf-idf")
    return Panel(judges=scorers, notes=notes, rated=panel.rated, reference=panel.reference)


def rated_texts(workdir: Path, part: str) -> tuple[list[str], np.ndarray]:
    """Texts and mean ratings of a part, shuffled: the source has the kind reviews first."""
    records = load_ratings(workdir / "data" / f"{part}_ratings.jsonl")
    records.sort(key=lambda record: stable_order(record.text))
    return [r.text for r in records], np.array([r.mean for r in records])


def gold_judge(model: Model, texts: list[str], means: np.ndarray):
    """A ridge regression on hidden states of a frozen middle layer."""
    features = functools.partial(hidden_features, model, make_trunk(model))
    predict = fit_ridge(features(texts), means)
    return lambda unseen: predict(features(unseen))


def make_trunk(model: Model):
    """tokens, mask -> hidden states of the judge's layer; compiled once for all of its texts."""
    trunk = trunk_network(model.config, end_layer=JUDGE_LAYER)
    top = model.config.num_layers - JUDGE_LAYER
    parts = split_params(model.config, model.params, top, JUDGE_LAYER)
    run, params = jax.jit(trunk.apply), one_device().put(parts.trunk)
    return lambda tokens, mask: run(params, tokens, mask)


def hidden_features(model: Model, trunk, texts: list[str]) -> np.ndarray:
    """[N, 2 D]: the mean over a text's tokens, and the state of its last token."""
    rows = encode_all(texts, model.tokenizer, max_length=model.config.max_length)
    features = np.zeros((len(texts), 2 * model.config.embed_dim), np.float32)

    def compute(chosen, width):
        return trunk(rows.tokens[chosen, :width], rows.mask[chosen, :width])

    for row, states in text_states(rows, np.arange(len(texts)), compute):
        features[row] = np.concatenate([states.mean(axis=0), states[-1]])
    return features


def mentions_acting(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for a response that speaks of the acting, else 0: the reward of configs/verifiable.py."""
    del prompts
    return [float(bool(ACTING.search(response))) for response in responses]
