"""Dictionaries become dataclasses: every value of its type, every error with its field."""

import dataclasses
import math
import re
from typing import ClassVar

import pytest

from ppo_jax.config.flags import checked_flags
from ppo_jax.config.parsing import RULES, Check, Limit, build, filled_in
from ppo_jax.config.ppo import PPOSettings
from ppo_jax.config.run import from_config_dict, with_defaults
from tests.support.command_line import ROOT, run_script
from tests.support.tiny_config import whole


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wheel:
    radius: float
    spokes: int = 20
    tyre: str | int = "thin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bicycle:
    wheel: Wheel
    spare: Wheel | None = None
    load: Limit = 10.0
    rack: Limit | None = None
    bells: tuple[str, ...] = ()
    brakes: bool = True

    def __post_init__(self):
        check = Check(self, "bicycle")
        check.each("> 0", "load")
        check.choice("brakes", True)
        check.that("clown" not in self.bells, "bells", "without clowns")


def bicycle(**values):
    return build(Bicycle, {"wheel": {"radius": 0.3}} | values)


def test_what_is_given_takes_its_place_and_the_rest_its_default():
    built = bicycle(spare={"radius": 1, "tyre": "4"}, bells=["ring"], rack=math.inf)
    assert built == Bicycle(
        wheel=Wheel(radius=0.3),
        spare=Wheel(radius=1.0, tyre=4),
        bells=("ring",),
        rack=math.inf,
    )
    assert type(built.spare.radius) is float
    assert bicycle(spare=None) == bicycle()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"wheel": {}}, "wheel.radius must be given"),
        ({"wheel": 3}, "wheel must be a section of settings, got 3"),
        ({"wheel": None}, "wheel must be a section of settings, got None"),
        ({"saddle": 1}, "unknown setting saddle; known: ['bells', 'brakes', 'load',"),
        ({"spare": {"radius": 1.0, "rim": 2}}, "unknown setting spare.rim; known: ['radius',"),
        ({"wheel": {"radius": "1"}}, "wheel.radius must be a number, got '1'"),
        ({"wheel": {"radius": math.inf}}, "wheel.radius must be a finite number, got inf"),
        ({"wheel": {"radius": True}}, "wheel.radius must be a number, got True"),
        ({"wheel": {"radius": 1.0, "spokes": 2.0}}, "wheel.spokes must be a whole number, got 2.0"),
        (
            {"wheel": {"radius": 1.0, "tyre": 0.5}},
            "wheel.tyre must be a text or a whole number, got 0.5",
        ),
        ({"load": math.nan}, "load must be a finite number, got nan"),
        ({"load": -math.inf}, "load must be a finite number, got -inf"),
        ({"rack": "full"}, "rack must be a number (or inf) or None, got 'full'"),
        ({"bells": "ring"}, "bells must be a list of texts, got 'ring'"),
        ({"bells": [1]}, "bells must be a list of texts, got [1]"),
        ({"brakes": 1}, "brakes must be True or False, got 1"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_with_its_field(values, message):
    with pytest.raises(ValueError) as error:
        bicycle(**values)
    assert message in str(error.value)


def test_a_rule_that_is_broken_names_section_field_rule_and_value():
    for values, message in [
        ({"load": 0}, "bicycle.load must be > 0, got 0.0"),
        ({"brakes": False}, "bicycle.brakes must be one of [True], got False"),
        ({"bells": ["clown"]}, "bicycle.bells must be without clowns, got ('clown',)"),
    ]:
        with pytest.raises(ValueError) as error:
            bicycle(**values)
        assert str(error.value) == message
    wheel = Wheel(radius=1.0, spokes=21)
    Check(wheel, "").multiple("spokes", 7, "the days")
    with pytest.raises(ValueError, match=r"^spokes must be a multiple of pairs \(2\), got 21$"):
        Check(wheel, "").multiple("spokes", 2, "pairs")


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_means_what_it_says(rule):
    for x in (-0.5, 0, 0.5, 1, 1.5):
        meant = eval(f"x {rule}") if rule[0] == ">" else None
        if meant is None:
            left, right = rule.removeprefix("in ").split(", ")
            meant = 0 < x < 1 or (x == 0 and left == "[0") or (x == 1 and right == "1]")
        assert RULES[rule](x) == meant


def test_filling_in_gives_every_field_of_the_sections_that_are_there():
    assert filled_in(Bicycle, {"wheel": {}, "saddle": 1}) == {
        "wheel": {"spokes": 20, "tyre": "thin"},
        "spare": None,
        "load": 10.0,
        "rack": None,
        "bells": (),
        "brakes": True,
        "saddle": 1,  # nothing is checked
    }
    assert filled_in(Bicycle, {"wheel": 3, "spare": None})["wheel"] == 3


def test_filling_in_widens_whole_numbers_where_others_may_follow():
    values = {"wheel": {"radius": 1, "spokes": 3, "tyre": 4}, "load": 5, "rack": 6, "brakes": True}
    filled = filled_in(Bicycle, values)
    numbers = [*filled["wheel"].values(), filled["load"], filled["rack"], filled["brakes"]]
    assert sorted(map(repr, numbers)) == sorted(["1.0", "3", "'4'", "5.0", "6.0", "True"])
    assert build(Bicycle, filled) == build(Bicycle, values)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Basket:
    FORMERLY: ClassVar = {"depth": "height"}

    height: int = 3


def test_a_setting_is_taken_under_its_old_name_with_a_warning():
    told = "the setting basket.depth is now basket.height; the old name goes with the next release"
    with pytest.warns(FutureWarning, match=f"^{re.escape(told)}$"):
        assert build(Basket, {"depth": 4}, "basket.") == Basket(height=4)
    with pytest.warns(FutureWarning):
        assert filled_in(Basket, {"depth": 4}) == {"height": 4}
    with pytest.raises(ValueError, match=r"^basket.depth is now basket.height, got both$"):
        build(Basket, {"depth": 4, "height": 4}, "basket.")


def test_a_flag_is_taken_under_its_old_name(tmp_path):
    path = tmp_path / "config.py"
    path.write_text("")
    argv = ["script", f"--config={path}", "--config.ppo.slots=4", "--config.ppo.kl_coef", "0.1"]
    with pytest.warns(FutureWarning, match="ppo.slots is now ppo.max_concurrent"):
        got = checked_flags(argv)
    assert got == [argv[0], argv[1], "--config.ppo.max_concurrent=4", *argv[3:]]


def test_a_flag_of_an_old_name_reaches_its_setting(tmp_path):
    config = f"--config={ROOT / 'configs' / 'ppo.py'}"
    with pytest.warns(FutureWarning, match="ppo.slots is now ppo.max_concurrent"):
        ended = run_script("train_ppo", config, "--config.ppo.slots=-1", f"--workdir={tmp_path}")
    assert ended.code == 2 and "ppo.max_concurrent must be 0, or" in ended.err


def test_a_stage_can_be_left_out_and_a_number_that_is_none_be_set_by_flags(tmp_path):
    config, base = f"--config={ROOT / 'configs' / 'quickstart.py'}:tiny", f"--workdir={tmp_path}"
    sizes = "--config.model.path=nowhere", "--config.model.scratch=None"
    ended = run_script("rlhf", config, base, *sizes, "--config.evaluate=None")
    assert ended.code == 2 and "nowhere is neither" in ended.err
    ended = run_script("rlhf", config, base, "--config.sft.router_coef=-1")
    assert ended.code == 2 and "sft.router_coef must be None or a number >= 0" in ended.err
    ended = run_script("rlhf", config, base, "--config.model=None")
    assert ended.code == 2 and "model must be set field by field" in ended.err


def test_a_config_file_may_set_an_old_name_beside_the_defaults():
    config = with_defaults(whole())
    config.ppo.slots = 4
    with pytest.warns(FutureWarning, match="ppo.slots is now ppo.max_concurrent"):
        assert from_config_dict(config).ppo.max_concurrent == 4
    config.ppo.max_concurrent = 8
    with pytest.raises(ValueError, match=r"ppo.slots is now ppo.max_concurrent, got both"):
        from_config_dict(config)


def test_every_old_name_of_the_settings_leads_to_a_setting_of_today():
    fields = {field.name for field in dataclasses.fields(PPOSettings)}
    assert set(PPOSettings.FORMERLY.values()) <= fields
    assert not set(PPOSettings.FORMERLY) & fields
