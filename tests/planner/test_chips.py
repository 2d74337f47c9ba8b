"""Rooflines from the published figures of chips."""

import pytest

from ppo_jax.planner import chips
from ppo_jax.planner.hlo.cost import Memory, ProgramCost, Sent

V5E = chips.find_chip("v5e:4x4")
ONE_SECOND = dict(flops=197e12, bytes_accessed=819e9, collectives={"all-gather": Sent(1, 200e9)})


def test_a_chip_is_found_by_its_topology_and_by_its_device():
    for chip in chips.CHIPS:
        assert chips.find_chip(f"{chip.name}:2x2") is chip
        assert chips.find_chip(chip.device_kind) is chip
    with pytest.raises(ValueError, match=r"no figures of the chip 'cpu'; there are \['v4', 'v5e'"):
        chips.find_chip("cpu")


def test_the_figures_hang_together():
    for chip in chips.CHIPS:
        assert 0.9 < chip.usable_bytes / chip.hbm_bytes <= 1
        # Chips of today: what is read must be used some hundred times.
        assert 100 < chip.flops / chip.hbm_bandwidth < 600


@pytest.mark.parametrize(
    ("field", "bound"), [("flops", "compute"), ("bytes_accessed", "hbm"), ("collectives", "ici")]
)
def test_the_slowest_of_the_three_bounds(field, bound):
    twice = {"collectives": {"all-gather": Sent(2, 400e9)}}.get(field) or 2 * ONE_SECOND[field]
    line = chips.roofline(ProgramCost(**ONE_SECOND | {field: twice}), V5E)
    assert line.bound == bound
    assert line.seconds == pytest.approx(2)
    assert sorted(line) == pytest.approx([1, 1, 2])


def test_two_devices_share_a_chip():
    line = chips.roofline(ProgramCost(**ONE_SECOND), chips.find_chip("tpu7x:2x2x1"))
    assert line.compute == pytest.approx(2 * 197e12 / 2307e12)
    assert line.hbm == pytest.approx(2 * 819e9 / 7380e9)


def test_utilisation_is_of_the_model_alone():
    """Half of the flops are the model's own; the rest was computed again."""
    line = chips.roofline(ProgramCost(flops=197e12), V5E)
    assert chips.utilisation(0.5 * 197e12, line.seconds, V5E) == pytest.approx(0.5)


def test_donated_arguments_do_not_count_twice_in_the_peak():
    assert Memory(arguments=10, outputs=8, aliased=7, temporaries=5, code=1).peak == 17
