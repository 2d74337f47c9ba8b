"""Every public function of the core, the algorithms and the rollout has its edges."""

import importlib
import types

import pytest

from tests.algorithms.test_checks import EDGES as ALGORITHMS
from tests.core.test_advantage_checks import EDGES as ADVANTAGES
from tests.core.test_checks import EDGES as CORE
from tests.core.test_loss_checks import EDGES as LOSSES
from tests.rollout.test_checks import EDGES as ROLLOUT

CHECKED = {function for function, *_ in CORE + ADVANTAGES + LOSSES + ROLLOUT + ALGORITHMS}


@pytest.mark.parametrize("package", ["core", "algorithms", "rollout"])
def test_every_public_function_has_its_edges(package):
    module = importlib.import_module(f"ppo_jax.{package}")
    public = [getattr(module, name) for name in module.__all__]
    functions = {x for x in public if isinstance(x, types.FunctionType)}
    assert functions
    assert not {f.__name__ for f in functions - CHECKED}
