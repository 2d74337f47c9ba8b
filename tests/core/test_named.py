import functools

import pytest

from ppo_jax.core.advantages import gae
from ppo_jax.core.named import call_named, function_name, parameters, unknown_parameters


def test_a_function_gets_what_it_has_parameters_for():
    def advantage(scores, *, group_size, eps=1e-6):
        return scores, group_size, eps

    offered = {"scores": 1, "group_size": 2, "values": 3}
    assert call_named(advantage, offered) == (1, 2, 1e-6)
    assert call_named(functools.partial(advantage, eps=0.5), offered) == (1, 2, 0.5)
    assert call_named(functools.partial(advantage, group_size=8), {"scores": 1}) == (1, 8, 1e-6)
    with pytest.raises(ValueError, match="advantage asks for group_size; there is scores"):
        call_named(advantage, {"scores": 1})


def test_what_must_be_given_is_known():
    assert parameters(gae)["values"] and not parameters(gae)["gamma"]
    assert unknown_parameters(gae, {"rewards", "values"}) == ["mask"]
    assert parameters(lambda *args, x, **more: x) == {"x": True}
    assert function_name(functools.partial(functools.partial(gae))) == "gae"
