"""A workdir of version 0.1 goes on with the code of today as it would have gone on then."""

import json
import tarfile

import numpy as np
import pytest

from ppo_jax.config.ppo import PPOSettings
from ppo_jax.io.metric_names import with_new_names
from ppo_jax.pipeline import run as pipeline
from tests.support import old_run


def rows(path):
    return [with_new_names(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(old_run.ARCHIVE.parent)  # its reward function is old_run:letters
    with tarfile.open(old_run.ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_an_old_workdir_resumes_with_the_same_numbers(workdir):
    before = (workdir / "metrics.jsonl").read_bytes()
    pipeline.run(old_run.settings(6, PPOSettings.FORMERLY), workdir)
    assert (workdir / "metrics.jsonl").read_bytes().startswith(before)
    got, expected = rows(workdir / "metrics.jsonl")[-3:], rows(workdir / "continued.jsonl")
    assert [row["step"] for row in got] == [4, 5, 6]
    for mine, one in zip(got, expected, strict=True):
        for name in [name for name in one if name != "stage" and not name.startswith("time/")]:
            # To the bit on one machine; another processor may round in another way.
            np.testing.assert_allclose(mine[name], one[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_other_settings_are_refused_as_ever(workdir):
    settings = old_run.settings(6, PPOSettings.FORMERLY)
    settings["ppo"]["max_concurrent"] = 8
    with pytest.raises(ValueError, match="max_concurrent: 4 -> 8"):
        pipeline.run(settings, workdir)


def test_the_names_of_the_old_config_are_taken_with_a_warning(workdir):
    with pytest.warns(FutureWarning) as caught:
        pipeline.run(old_run.settings(3, {}), workdir)  # complete: nothing to do
    told = " ".join(str(warning.message) for warning in caught)
    for old in ("slots", "refill", "importance_low", "importance_high"):
        assert f"ppo.{old} is now ppo.{PPOSettings.FORMERLY[old]}" in told
