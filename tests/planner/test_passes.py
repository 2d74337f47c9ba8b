"""A pass that the update makes itself is counted there, and nowhere else."""

import pytest

from ppo_jax.planner import flops, phases, planner
from ppo_jax.planner import report as plan_report
from tests.support.tiny_plan import TARGET, settings

ONE_STEP = dict(num_epochs=1, num_minibatches=1, num_micro_batches=1)
OWN_STEPS = dict(num_minibatches=2, value_num_minibatches=1)  # of the critic, one


@pytest.mark.parametrize("ppo", [{}, OWN_STEPS], ids=["one step", "one of the critic's own"])
def test_a_plan_of_one_step_counts_a_pass_where_it_is_made(ppo):
    config = settings(ppo=ONE_STEP | dict(old_logprobs="recompute") | ppo)
    values = plan_report.figures(planner.make_plan(config, TARGET))
    for name, figures in values["phases"].items():
        assert figures["analytic_flops_ratio"] == pytest.approx(1, abs=0.15), name


SAVED = {  # what is trained: the passes that one step saves, of the critic and of the policy
    "critic": ({}, (1, 0)),
    "recomputed": (dict(old_logprobs="recompute"), (1, 1)),
    "two critics": (dict(num_critics=2), (2, 0)),
    "critic's own steps": (OWN_STEPS | dict(old_logprobs="recompute"), (1, 0)),
    "no critic": (dict(advantage="rloo", samples_per_prompt=2), (0, 0)),
}


@pytest.mark.parametrize("run", SAVED)
def test_one_step_saves_the_passes_that_it_makes_itself(run):
    changes, (of_critic, of_policy) = SAVED[run]
    one, more = (settings(ppo=ONE_STEP | changes | dict(num_micro_batches=n)).ppo for n in (1, 2))
    models = planner.read_models(settings(ppo=ONE_STEP | changes))
    found, plain = (sum(phases.analytic_flops(s, models).values()) for s in (one, more))
    sizes = dict(sequences=32, prompt_length=8, response_length=8)
    critic = flops.scoring_flops(models.policy, models.critic, None, policy_passes=0, **sizes)
    policy = flops.scoring_flops(models.policy, None, None, **sizes)
    assert plain - found == pytest.approx(of_critic * critic + of_policy * policy, rel=1e-6)


def test_a_critic_on_the_policy_is_a_head_where_logprobs_are_recomputed():
    """Of one step nothing is computed twice; of more, log-probs and values are of one pass."""
    changes = dict(shared_critic=True, num_critics=4)
    counts = {}
    for old_logprobs in ("rollout", "recompute"):
        for name, steps in (("one", ONE_STEP), ("more", {})):
            config = settings(ppo=steps | changes | dict(old_logprobs=old_logprobs))
            models = planner.read_models(config)
            counts[old_logprobs, name] = phases.analytic_flops(config.ppo, models)
    assert counts["rollout", "one"] == counts["recompute", "one"]
    pass_of_it = counts["rollout", "more"]["scoring"] - counts["rollout", "one"]["scoring"]
    logits = 32 * 8 * flops.head_flops(models.policy, "logits")
    both = counts["recompute", "more"]["scoring"] - counts["rollout", "one"]["scoring"]
    assert both - pass_of_it == pytest.approx(logits)
