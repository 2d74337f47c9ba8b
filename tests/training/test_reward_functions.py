"""A reward function of the user's own: how it is called, and what is told where it fails."""

import re
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from ppo_jax import cli
from ppo_jax.config.parsing import load_function
from ppo_jax.training.ppo import call_function
from ppo_jax.training.reward_functions import FunctionFailed, RewardFunction, load_reward_function
from tests.support.chats import ids, make_tokenizer

WRONG = [
    ([1.0], "1: [1.0]"),
    ([0.5, float("nan")], "nan for response 1"),
    ([None, 1.0], "None for response 0"),
    ([1e39, 1.0], "1e+39 for response 0"),
    (["1", "2"], "['1', '2']"),
    (None, "None"),
    ([[1.0]] * 2, "[[1.0], [1.0]]"),
    ([[1.0], [1.0, 2.0]], "[[1.0], [1.0, 2.0]]"),
    ({"score": 1.0}, "{'score': 1.0}"),
]
CODE = """
def divides(prompts, responses):
    return helper(len(prompts) - 2)


def helper(number):
    return 1 / number


def one(responses):
    return [0.0] * len(responses)


def named(prompts, responses, *, scale):
    return [0.0] * len(responses)


def with_more(prompts, responses, scale=1.0):
    return [scale] * len(responses)
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module `mine_NAME` in the current folder."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.parametrize("given, told", WRONG)
def test_only_one_finite_number_a_response_is_a_score(given, told):
    function = RewardFunction("mine:score", lambda prompts, responses: given)
    told = "mine:score must return 2 finite numbers, one a response, got " + told
    with pytest.raises(ValueError, match=f"^ppo.reward_function {re.escape(told)}$"):
        function(["", ""], ["", ""])


@pytest.mark.parametrize("given", [[1, 2.5], (True, False), np.float64([1, 2]), jnp.ones(2)])
def test_numbers_of_any_kind_are_scores(given):
    scores = RewardFunction("mine:score", lambda prompts, responses: given)(["", ""], ["", ""])
    assert scores.dtype == np.float32 and scores.tolist() == [float(x) for x in given]


@pytest.mark.parametrize(
    "name, told",
    [("one", "(responses): too many positional"), ("named", "(prompts, responses, *, scale): mis")],
)
def test_a_function_that_cannot_be_called_so_is_refused_when_it_is_found(mine, name, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_reward_function(f"{mine}:{name}")
    expected = "a function (prompts: list[str], responses: list[str]) -> one number a response"
    assert str(caught.value).startswith(f"ppo.reward_function must be {expected}, got {mine}:")


def test_a_function_with_more_parameters_that_have_defaults_will_do(mine):
    assert load_reward_function(f"{mine}:with_more")(["", ""], ["", ""]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("written", ["{}.py:divides", "{}.divides"])
def test_a_name_that_is_nearly_right_is_told_how_to_be_written(mine, written):
    hint = f"write it as module:function, e.g. {mine}:divides$"
    with pytest.raises(ValueError, match=hint):
        load_function(written.format(mine), "field")


def test_an_error_in_a_function_is_told_with_the_frames_of_its_file_alone(mine, capsys):
    function = load_reward_function(f"{mine}:divides")
    with pytest.raises(SystemExit) as ended:
        cli.call(lambda: function(["", ""], ["", ""]))
    assert ended.value.code == 1
    error = capsys.readouterr().err
    files = re.findall(r'File "(.*)", line', error)
    assert [name.rpartition("/")[2] for name in files] == [f"{mine}.py"] * 2
    last = f"ppo.reward_function {mine}:divides raised ZeroDivisionError: division by zero"
    assert error.splitlines()[-1].endswith(f": {last}")
    assert error.count("ZeroDivisionError: division by zero") == 2  # after its frames, and there


def test_a_function_that_is_not_python_has_no_frames(capsys):
    with pytest.raises(FunctionFailed, match="max raised TypeError: 'int' object is not iterable"):
        RewardFunction("builtins:max", lambda prompts, responses: max(1))([], [])
    with pytest.raises(SystemExit):
        cli.call(lambda: RewardFunction("builtins:ord", ord)([], []))
    assert "Traceback" not in capsys.readouterr().err


def test_a_function_gets_what_the_policy_wrote():
    asked = []
    tokenizer = make_tokenizer()
    end = tokenizer.eos_token_id
    tokens = jnp.array([[*ids("Ho, ,Hi"), end], [*ids("<|im_start|>,user"), 0, 0], [end, 0, 0, 0]])
    lengths = np.array([[4], [2], [1]])
    rollout = types.SimpleNamespace(
        prompt_tokens=jnp.array([ids("Hi")] * 3),
        prompt_mask=jnp.ones((3, 1), bool),
        response_tokens=tokens,
        response_mask=jnp.array(np.arange(4) < lengths),
    )
    function = RewardFunction("mine:score", lambda p, r: asked.append(r) or [0.5, 1.5, 2.5])
    scores = call_function(function, ["Hi"] * 3, rollout, tokenizer, [end])
    assert scores.tolist() == [0.5, 1.5, 2.5]
    assert asked == [["Ho Hi", "<|im_start|>user", ""]]


def test_a_call_that_takes_too_long_ends_with_its_limit():
    def slow(prompts, responses):
        time.sleep(5.0)

    began = time.monotonic()
    told = r"mine:slow took more than ppo.reward_timeout_s=0.1 for 2 responses"
    with pytest.raises(FunctionFailed, match=told):
        RewardFunction("mine:slow", slow, 0.1)(["", ""], ["", ""])
    assert time.monotonic() - began < 4
    quick = RewardFunction("mine:quick", lambda prompts, responses: [1.0], 60.0)
    assert quick([""], [""]).tolist() == [1.0]
    with pytest.raises(FunctionFailed, match="mine:fails raised ZeroDivisionError"):
        RewardFunction("mine:fails", lambda prompts, responses: 1 / 0, 60.0)([""], [""])
