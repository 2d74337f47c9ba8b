"""Grids, draws and lists become points; a point changes a config and names a folder."""

import math

import numpy as np
import pytest

from ppo_jax.config.points import (
    LONGEST_NAME,
    Interval,
    apply_point,
    grid_points,
    listed_points,
    parse_grid,
    point_name,
    random_points,
)
from ppo_jax.config.run import from_config_dict
from tests.support.tiny_config import whole


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("ppo.kl_coef=0,0.02", (0.0, 0.02)),
        ("seed=0:3", (0, 1, 2)),
        ("seed=0:2, 7", (0, 1, 7)),
        ("ppo.kl_coef=-0:2", (0.0, 1.0)),
        ("sft.trainable=all,1:3", ("all", 1, 2)),
        ("ppo.packing=true,F", (True, False)),
        ("ppo.stop_kl=inf,0.02", (math.inf, 0.02)),
        ("ppo.reward_function=a:f,'b,c;d'", ("a:f", "b,c;d")),
        ("ppo.reward_model=,runs/a/reward", ("", "runs/a/reward")),
        ("ppo.stop_tokens=('a','b'),('c',),()", (("a", "b"), ("c",), ())),
        ("ppo.reward_weights=(1,0.5)", ((1.0, 0.5),)),
        ("model.dtype=float32,bfloat16", ("float32", "bfloat16")),
        ("ppo.optimizer.learning_rate=log(1e-5,1e-3)", Interval(1e-5, 1e-3, log=True)),
        ("ppo.num_epochs=uniform(1, 4)", Interval(1, 4, whole=True)),
        ("ppo.slots=4,8;", (4, 8)),
    ],
)
def test_values_are_of_the_type_of_the_field(text, values):
    if "slots" in text:  # its name until 0.1
        with pytest.warns(FutureWarning, match=r"ppo\.slots is now ppo\.max_concurrent"):
            (axis,) = parse_grid(text)
        assert axis.name == "ppo.max_concurrent"
    else:
        (axis,) = parse_grid(text)
    assert axis.values == values
    if isinstance(values, tuple):
        assert [type(value) for value in axis.values] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "--grid must be 'NAME=VALUE"),
        ("seed", "--grid must be 'NAME=VALUE.*got 'seed'"),
        ("=3", "--grid must be"),
        ("seed=1; seed=2", "--grid has seed twice"),
        ("seed=1,1", "seed has 1 twice"),
        ("seed=1,0:3", "seed has 1 twice"),
        ("seed=3:3", "seed must be FIRST:END with 1 to 10,000 whole numbers.*got 3:3"),
        ("seed=0:99999999999", "seed must be FIRST:END"),
        ("ppo.kl_coeff=1", "unknown setting ppo.kl_coeff; did you mean 'ppo.kl_coef'?"),
        ("ppo=1", "ppo is a section: a point changes a field of it, ppo.prompts"),
        ("ppo.kl_coef.x=1", "ppo.kl_coef is a setting and has no fields"),
        ("ppo.kl_coef=", "ppo.kl_coef must be a number, got ''"),
        ("ppo.kl_coef=a", "ppo.kl_coef must be a number, got 'a'"),
        ("ppo.kl_coef=nan", "ppo.kl_coef must be a finite number, got nan"),
        ("ppo.num_epochs=0.5", "ppo.num_epochs must be a whole number, got '0.5'"),
        ("ppo.packing=maybe", "ppo.packing must be True or False, got 'maybe'"),
        ("ppo.kl_coef=log(0,1)", r"ppo.kl_coef must be log\(a,b\) with 0 < a < b, got \(0,1\)"),
        ("ppo.kl_coef=uniform(1,1)", r"must be uniform\(a,b\) with a < b"),
        ("ppo.kl_coef=uniform(1)", r"must be log\(a,b\) or uniform\(a,b\), got uniform\(1\)"),
        ("ppo.kl_coef=normal(0,1)", r"must be log\(a,b\) or uniform\(a,b\), got normal"),
        ("ppo.stop_kl=uniform(0,inf)", "needs two finite numbers"),
        ("ppo.stop_tokens=a", r"must be a list of texts, as \('a','b'\) for instance, got 'a'"),
        ("ppo.stop_tokens=('a',", "a quote or a bracket without its other half"),
        ("ppo.stop_tokens=(a,)", r"ppo.stop_tokens cannot be \(a,\), which is not Python"),
    ],
)
def test_a_grid_that_cannot_be_read_is_told_with_its_setting(text, told):
    with pytest.raises(ValueError, match=told):
        parse_grid(text)


def test_a_grid_is_every_combination_and_an_interval_needs_a_draw():
    points = grid_points(parse_grid("ppo.kl_coef=0,0.1; seed=0:2"))
    assert [tuple(point.values()) for point in points] == [(0, 0), (0, 1), (0.1, 0), (0.1, 1)]
    with pytest.raises(ValueError, match=r"kl_coef is log\(...\), which --random=N or --opt"):
        grid_points(parse_grid("ppo.kl_coef=log(0.1,1)"))
    with pytest.raises(ValueError, match="at most 10,000 points, got 1,000,000"):
        grid_points(parse_grid("seed=0:1000; ppo.seed=0:1000"))


def test_a_draw_is_repeatable_even_over_logarithms_and_goes_on():
    axes = parse_grid("ppo.optimizer.learning_rate=log(1e-5,1e-1); ppo.num_epochs=1,2; seed=0:9")
    points = random_points(axes, 200, seed=3)
    assert random_points(axes, 300, seed=3)[:200] == points != random_points(axes, 200, seed=4)
    rates = [point["ppo.optimizer.learning_rate"] for point in points]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert 80 < sum(rate < 1e-3 for rate in rates) < 120  # of 200: half of the decades
    assert {point["ppo.num_epochs"] for point in points} == {1, 2}
    whole_numbers = random_points(parse_grid("ppo.num_epochs=log(1,4)"), 4, seed=0)
    assert sorted(point["ppo.num_epochs"] for point in whole_numbers) == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="at most the points of --grid, 2, got 3"):
        random_points(parse_grid("seed=0:2"), 3, seed=0)
    with pytest.raises(ValueError, match=r"--random must be in \[1, 10,000\], got 0"):
        random_points(axes, 0, seed=0)


def test_a_list_of_points_is_checked_value_by_value():
    points = listed_points(({"ppo.kl_coef": x, "seed": 1} for x in np.array([0, 0.5])), "sweep()")
    assert points == [{"ppo.kl_coef": 0.0, "seed": 1}, {"ppo.kl_coef": 0.5, "seed": 1}]
    assert type(points[0]["ppo.kl_coef"]) is float
    for given, told in (
        ({"seed": 1}, "must give points, {name: value} each"),
        (None, "must give points, {name: value} each, got None"),
        ([], "must give 1 to 10,000 points, got none"),
        ([{"seed": 1}, 3], r"sweep\(\), point 2 must be {name: value}, got 3"),
        ([{"sed": 1}], r"sweep\(\), point 1: unknown setting sed"),
        ([{"ppo.kl_coef": "0.1"}], r"point 1: ppo.kl_coef must be a number, got '0.1'"),
        ([{"ppo": {"kl_coef": 0.1}}], "point 1: ppo is a section"),
    ):
        with pytest.raises(ValueError, match=told):
            listed_points(given, "sweep()")


def test_a_point_changes_its_settings_alone():
    settings = whole()
    changed = from_config_dict(apply_point(settings, {"ppo.kl_coef": 0.5, "seed": 2}))
    assert (changed.ppo.kl_coef, changed.seed) == (0.5, 2) and settings == whole()
    with pytest.raises(ValueError, match=r"sft.lora.rank cannot be set: .* no section lora"):
        apply_point(settings, {"sft.lora.rank": 2})


def test_a_folder_is_named_by_the_point_alone():
    assert point_name({"seed": 1, "ppo.kl_coef": 0.05}) == "kl_coef=0.05,seed=1"
    assert point_name({"ppo.kl_coef": 0.05, "seed": 1}) == "kl_coef=0.05,seed=1"
    assert point_name({"ppo.seed": 1}) != point_name({"seed": 1})
    assert point_name({}) == "base"
    # What a file system may not take, or take for the same: a hash tells them apart.
    names = [point_name({"ppo.reward_function": x}) for x in ("a:f", "a/f", "a:F", "a-f")]
    assert len({name.lower() for name in names}) == 4 and names[3] == "reward_function=a-f"
    long = [point_name({"ppo.stop_tokens": ("x" * 300, x)}) for x in "ab"]
    assert long[0] != long[1] and all(len(name) <= LONGEST_NAME for name in long)
