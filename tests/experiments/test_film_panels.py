"""The panels of judges need the extra `quickstart`; without it a config that names them says so."""

import sys

import pytest

from ppo_jax.config.parsing import load_function


def test_a_panel_without_its_packages_names_the_extra_in_one_line(monkeypatch):
    for name in [name for name in sys.modules if name.startswith(("film_reviews", "sklearn"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ValueError, match=r"sklearn.*ppo_jax\[quickstart\]") as error:
        load_function("film_reviews:judges", "evaluate.judges")
    assert "\n" not in str(error.value)
