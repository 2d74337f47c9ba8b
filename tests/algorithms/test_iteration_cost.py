"""An iteration as one program costs what its phases cost, one by one."""

import functools

import jax
import pytest

from ppo_jax.algorithms.experience import make_experience, response_scores, sample_responses
from ppo_jax.algorithms.ppo import ppo_iteration
from ppo_jax.algorithms.update import ppo_update
from ppo_jax.planner.hlo.text import parse_module
from tests.support import tiny


def score(state, numbers, responses, *, frozen, networks, options):
    parts = dict(frozen=frozen, networks=networks)
    scores = response_scores(responses, **parts)
    return make_experience(responses, scores, state, numbers, options=options, **parts)


def copied_bytes(compiled) -> float:
    """Of arrays that are moved in memory by an operation of its own."""
    computations = parse_module(compiled.as_text()).computations.values()
    copies = (i for c in computations for i in c if i.opcode == "copy")
    return sum(x.bytes for i in copies for x in i.outputs)


@pytest.fixture(scope="module")
def programs():
    """{name: compiled}, of an iteration and of its phases."""
    run = tiny.Run("whole")
    parts = dict(networks=run.parts["networks"], options=run.parts["options"])

    def compiled(function, *args, **options):
        bound = functools.partial(function, **parts)
        return jax.jit(bound, **options).lower(*args, frozen=run.parts["frozen"]).compile()

    rollout = run.rollout()
    experience = run.experience(rollout)[0]
    key, state = tiny.RUN_KEY, run.state
    donated = dict(donate_argnums=0)
    return {
        "rollout": compiled(sample_responses, state, run.numbers, tiny.prompts(), key),
        "score": compiled(score, state, run.numbers, rollout),
        "update": compiled(ppo_update, state, experience, run.numbers, key, **donated),
        "iteration": compiled(ppo_iteration, state, run.numbers, tiny.prompts(), key, **donated),
    }


def test_flops_are_those_of_the_phases(programs):
    flops = {name: program.cost_analysis()["flops"] for name, program in programs.items()}
    whole = flops.pop("iteration")
    assert whole == pytest.approx(sum(flops.values()), rel=0.02)


def test_memory_is_that_of_the_largest_phase(programs):
    sizes = {k: x.memory_analysis().temp_size_in_bytes for k, x in programs.items()}
    whole, between = sizes.pop("iteration"), 0
    for name in ("rollout", "score"):  # what one phase leaves for the next
        between += programs[name].memory_analysis().output_size_in_bytes
    assert whole <= 1.05 * (max(sizes.values()) + between)


def test_no_more_is_copied_than_in_the_phases(programs):
    sizes = {name: copied_bytes(program) for name, program in programs.items()}
    whole = sizes.pop("iteration")
    assert 0 < whole <= 1.05 * sum(sizes.values())
