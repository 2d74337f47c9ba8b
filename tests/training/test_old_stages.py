"""A stage that is older than a field goes on as it began."""

import json

import pytest

from ppo_jax.config.run import from_config_dict
from ppo_jax.inference.generate import run_settings
from ppo_jax.io.stage_folder import describe_stage
from ppo_jax.training.stage import (
    as_begun,
    check_settings,
    describe,
    without_younger_fields,
)
from tests.support.tiny_config import changed
from tests.support.tiny_stage import random_model, write_stage


def config(**ppo):
    return from_config_dict(changed({f"ppo.{name}": x for name, x in ppo.items()}))


@pytest.fixture
def old(tmp_path):
    """A PPO stage that was begun before there was `ppo.score_at`."""
    settings = dict(describe("ppo", config(), tmp_path)["settings"])
    del settings["score_at"]
    return write_stage(tmp_path, "ppo", random_model(), **json.loads(json.dumps(settings)))


def test_scores_are_read_at_the_last_token_in_a_run_that_is_older_than_the_choice(old):
    workdir = old.parent
    for _ in range(2):  # each start finds it as old as it is
        began = as_begun(config(), workdir)
        assert began.ppo.score_at == "last" and config().ppo.score_at == "eos"
        description = describe("ppo", began, workdir)
        check_settings(old, description)
        stage = describe_stage(old)
        kept = without_younger_fields("ppo", description, stage["settings"])
        assert "score_at" not in kept["settings"]
        (old / "stage.json").write_text(json.dumps(stage | json.loads(json.dumps(kept))))
    assert run_settings(str(old))["score_at"] == "last"
    with pytest.raises(ValueError, match="score_at: last -> eos"):
        check_settings(old, describe("ppo", config(), workdir))


def test_a_run_that_has_the_choice_keeps_it(tmp_path):
    settings = json.loads(json.dumps(describe("ppo", config(), tmp_path)["settings"]))
    folder = write_stage(tmp_path, "ppo", random_model(), **settings)
    assert as_begun(config(), tmp_path) == config()
    assert run_settings(str(folder))["score_at"] == "eos"
    description = describe("ppo", config(), tmp_path)
    assert without_younger_fields("ppo", description, settings) == description
    with pytest.raises(ValueError, match="score_at: eos -> last"):
        check_settings(folder, describe("ppo", config(score_at="last"), tmp_path))
