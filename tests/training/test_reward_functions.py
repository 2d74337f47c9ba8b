"""A reward function of the user's own: how it is called, and what is told where it fails."""

import decimal
import fractions
import re
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from ppo_jax import cli
from ppo_jax.config.parsing import FunctionFailed, load_function
from ppo_jax.core.types import Prompts, Rollout
from ppo_jax.data.prompts import PromptData
from ppo_jax.training.ppo import call_functions, used_columns
from ppo_jax.training.reward_functions import RewardFunction, load_reward_function, read_scores
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


def swapped(responses, prompts):
    return [float(text) for text in prompts]


def other_names(completions, prompts):
    return [0.0] * len(prompts)


async def later(prompts, responses):
    return [0.0] * len(prompts)
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
    assert scores.dtype == np.float64 and scores.tolist() == [float(x) for x in given]


@pytest.mark.parametrize(
    "name, told",
    [
        ("one", "(responses): too many positional"),
        ("other_names", "(completions, prompts): prompts and responses must be the first two"),
        ("later", "must be a plain function, got"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_when_it_is_found(mine, name, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        load_reward_function(f"{mine}:{name}")
    expected = "a function (prompts: list[str], responses: list[str]) -> one number a response, got"
    expected = "a plain function, got" if name == "later" else expected
    assert str(caught.value).startswith(f"ppo.reward_function must be {expected} {mine}:")


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
    prompts = Prompts(tokens=np.zeros((1, 1), np.int32), mask=np.ones((1, 1), bool))
    data = PromptData(texts=["Hi"], prompts=prompts, dropped={})
    chosen = np.zeros(3, int)
    scores, _ = call_functions([function], data, chosen, rollout, tokenizer, [end])
    assert scores.tolist() == [0.5, 1.5, 2.5]
    assert asked == [["Ho Hi", "<|im_start|>user", ""]]


def letters():
    """A tokenizer whose tokens are the letters from a on."""
    vocabulary = {letter: i for i, letter in enumerate("abcdefgh")}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


NOTHING = Prompts(tokens=np.zeros((2, 1), np.int32), mask=np.ones((2, 1), bool))


def asked(*functions, texts=("abc", "d"), columns=None, chosen=(0, 1), weights=(1.0, 1.0)):
    """What `call_functions` gives for the responses "bc", cut off, and "d", stopped."""
    ids, mask = [[1, 2, 4], [3, 0, 0]], [[True, True, True], [True, False, False]]
    rollout = Rollout(
        prompt_tokens=jnp.zeros((2, 1), int),
        prompt_mask=jnp.ones((2, 1), bool),
        response_tokens=jnp.array(ids),
        response_mask=jnp.array(mask),
        logprobs=jnp.zeros((2, 3)),
        has_eos=jnp.array([False, True]),
    )
    data = PromptData(texts=list(texts), prompts=NOTHING, dropped={}, columns=columns or {})
    functions = [
        RewardFunction(f"mine:{name}", function, weight=weight)
        for name, function, weight in zip("ab", functions, weights, strict=False)
    ]
    data = used_columns(data, functions, "prompts.jsonl")
    scores, each = call_functions(functions, data, np.array(chosen), rollout, letters(), ())
    return scores, {name: x.mean() for name, x in each.items()}


def test_a_function_gets_text():
    scores, means = asked(lambda p, r: [len(p[0]), len(r[1])])
    assert scores.tolist() == [3.0, 1.0] and means == {"reward/a": 2.0}
    assert scores.dtype == np.float32


def test_a_function_gets_the_columns_and_what_is_known_of_a_response_by_name():
    seen = {}

    def score(prompts, responses, answer, finished, *, response_tokens, scale=2.0):
        seen.update(vars() | {"seen": None})
        return [scale] * 2

    columns = {"answer": ["4", {"a": 1}], "id": [7, 8]}
    scores, _ = asked(score, columns=columns, chosen=(1, 0))
    assert scores.tolist() == [2.0, 2.0]
    assert seen["prompts"] == ["d", "abc"] and seen["responses"] == ["bce", "d"]
    assert seen["answer"] == [{"a": 1}, "4"] and seen["finished"] == [False, True]
    assert seen["response_tokens"] == [[1, 2, 4], [3]]
    every = {}
    asked(lambda prompts, responses, **rest: every.update(rest) or [0.0] * 2, columns=columns)
    assert every == {
        "answer": ["4", {"a": 1}],
        "id": [7, 8],
        "finished": [False, True],
        "response_tokens": [[1, 2, 4], [3]],
    }
    with_column = {"scale": [0.5, 0.25]}
    scores, _ = asked(lambda p, r, scale=1.0: scale, columns=with_column)
    assert scores.tolist() == [0.5, 0.25]


def test_texts_come_under_their_names_in_any_order(mine):
    function = load_reward_function(f"{mine}:swapped")
    assert function(["1", "2"], ["a", "b"]).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("function", "told"),
    [
        (lambda p, r, answr: [], "asks for 'answr', which .* has not: its columns are .*'answer'"),
        (
            lambda p, r, hint: [],
            "^prompts.jsonl:7: there is no 'hint', which ppo.reward_func",
        ),
        (lambda p, r, hint=None: [], r"^prompts.jsonl:7: there is no 'hint'"),
        (lambda p, r, finished: [], "the column 'finished', which .* must have another name"),
        (lambda p, answer: [], "'answer' in the place of the responses, which is a column"),
    ],
)
def test_a_keyword_that_nothing_gives_is_refused_with_what_there_is(function, told):
    data = PromptData(
        texts=["a", "b"],
        prompts=NOTHING,
        dropped={},
        columns={"prompt": ["a", "b"], "answer": ["1", "2"], "finished": [0, 1]},
        gaps={"hint": "prompts.jsonl:7"},
    )
    with pytest.raises(ValueError, match=told):
        used_columns(data, [RewardFunction("mine:score", function)], "prompts.jsonl")


def test_several_functions_are_summed_with_their_weights_and_told_apart():
    scores, means = asked(lambda p, r: [1.0, 3.0], lambda p, r: [10, 20], weights=(1.0, -0.5))
    assert scores.tolist() == [-4.0, -7.0]
    assert means == {"reward/a": 2.0, "reward/b": 15.0}


def test_a_function_may_score_tokens_beside_one_that_scores_responses():
    scores, means = asked(
        lambda p, r, response_tokens: [[0.5] * len(row) for row in response_tokens],
        lambda p, r: np.array([1.0, 2.0]),
        weights=(2.0, 3.0),
    )
    assert scores.tolist() == [[1.0, 1.0, 4.0], [7.0, 0.0, 0.0]]
    assert means == {"reward/a": 1.0, "reward/b": 1.5}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ([[1.0, 2.0], [3.0]], "2: [1.0, 2.0] for response 0, which has 3 tokens"),
        ([[1, 2, float("nan")], [3]], "nan for token 2 for response 0, which has 3 tokens"),
        ([[1, 2, 3], 4.0], "4.0 for response 1, which has 1 tokens"),
        ([[1, 2, 3]], "1: [[1, 2, 3]]"),
        (np.zeros((2, 3)), "3: array([0., 0., 0.]) for response 1, which has 1 tokens"),
    ],
)
def test_what_does_not_fit_the_tokens_is_told(given, told):
    told = f"mine:a must return 2 lists of finite numbers, one a token, got {told}"
    with pytest.raises(ValueError, match=f"^ppo.reward_function {re.escape(told)}$"):
        asked(lambda p, r: given)


def test_a_function_is_given_copies():
    def takes_all(prompts, responses, answer):
        answer[0].append(1)
        for texts in (prompts, responses, answer):
            texts.clear()
        return [0.0, 0.0]

    columns = {"answer": [[0], [1]]}
    later = lambda prompts, responses, answer: [len(prompts), len(answer[0])]  # noqa: E731
    assert asked(takes_all, later, columns=columns)[0].tolist() == [2.0, 1.0]
    assert columns == {"answer": [[0], [1]]}


# --- what is told of a user's code ----------------------------------------------------------------


class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class Lies:
    """Says that it is an array, and is none."""

    shape, ndim, dtype = (2,), 1, np.float64

    def __init__(self, given):
        self.given = given

    def __len__(self):
        return 2

    def __array__(self, *args, **kwargs):
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given


class NoText:
    def __repr__(self):
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (SystemExit(0), "raised SystemExit: 0"),
        (SystemExit(), "raised SystemExit"),
        (GeneratorExit("over"), "raised GeneratorExit: over"),
        (Unprintable(), "raised Unprintable: (its text cannot be printed)"),
        (BaseException("base"), "raised BaseException: base"),
    ],
)
@pytest.mark.parametrize("seconds", [np.inf, 60.0])
def test_whatever_a_function_raises_ends_the_run_with_its_name(error, told, seconds, capsys):
    def score(prompts, responses):
        raise error

    function = RewardFunction("mine:score", score, seconds)
    with pytest.raises(SystemExit) as ended:
        cli.call(lambda: function([""], [""]))
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f": ppo.reward_function mine:score {told}")


@pytest.mark.parametrize(
    ("code", "code_told"),
    [
        ("import sys; sys.exit(0)", "raised SystemExit: 0"),
        ("exit(0)", "raised SystemExit: 0"),
        ("1 / 0", "raised ZeroDivisionError: division by zero"),
        ("raise BaseException('base')", "raised BaseException: base"),
    ],
)
def test_a_module_that_ends_at_its_import_ends_the_run_with_its_name(
    tmp_path, monkeypatch, capsys, code, code_told
):
    name = f"ends_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(SystemExit) as ended:
        cli.call(lambda: load_reward_function(f"{name}:score"))
    assert ended.value.code == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.endswith(f"the module of ppo.reward_function {name}:score {code_told}")


def torch_with_gradient():
    torch = pytest.importorskip("torch")
    return torch.ones(2, requires_grad=True)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (torch_with_gradient, r"requires_grad=True\) \(RuntimeError: Can't call numpy\(\)"),
        (lambda: [10**400, 1], r"^.*\.\.\. \(OverflowError: int too large to convert to float\)$"),
        (lambda: [10**5000, 1], "a list that cannot be printed .*OverflowError: int too large"),
        (lambda: [NoText()] * 2, r"got a list that cannot be printed \(RuntimeError\)"),
        (lambda: Lies(np.zeros((3, 3))), "Lies object"),
        (lambda: Lies(np.zeros(3)), "got 3: <.*Lies object"),
        (lambda: Lies(RuntimeError("no")), r"Lies object at .*RuntimeError: no\)"),
        (lambda: Lies("text"), "Lies object"),
        (lambda: np.ma.masked_array([1.0, 2.0], mask=[True, False]), "got a masked array: mask"),
        (lambda: np.array(["2020-01-01", "2021-01-01"], "datetime64[D]"), r"got array\(\['2020"),
        (lambda: np.array([1, 2], "timedelta64[s]"), r"got array\(\[1, 2\], dtype='timedelta"),
        (lambda: np.array([1 + 2j, 1.0]), r"got array\(\[1\.\+2\.j"),
        (lambda: np.zeros(2, [("a", float)]), r"got array\(\[\(0"),
        (lambda: [b"1", b"2"], r"got \[b'1', b'2'\]"),
        (lambda: np.array([1.0, "2"], object), r"got array\(\[1\.0, '2'\]"),
        (lambda: {1.0, 2.0}, r"got \{1\.0, 2\.0\}"),
        (lambda: (x for x in (1.0, 2.0)), "got <generator"),
        (lambda: iter([1.0, 2.0]), "got <list_iterator"),
    ],
)
def test_odd_values_are_told_in_one_line(make, told):
    given = make()
    with pytest.raises(ValueError, match=told) as caught:
        RewardFunction("mine:score", lambda p, r: given)(["", ""], ["", ""])
    assert str(caught.value).startswith("ppo.reward_function mine:score must return 2 finite numb")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_an_exit_while_the_numbers_are_read_is_the_functions():
    with pytest.raises(FunctionFailed, match="mine:score raised SystemExit: 0"):
        RewardFunction("mine:score", lambda p, r: Lies(SystemExit(0)))(["", ""], ["", ""])


@pytest.mark.parametrize(
    "given", [[decimal.Decimal("0.5"), 2], [fractions.Fraction(1, 2), True], np.float16([0.5, 1])]
)
def test_numbers_of_other_kinds_are_read(given):
    assert read_scores(given, 2).tolist() == [float(x) for x in given]


def test_a_tensor_without_a_gradient_is_read():
    torch = pytest.importorskip("torch")
    assert read_scores(torch.tensor([1.0, 2.0]), 2).tolist() == [1.0, 2.0]
    assert read_scores([torch.tensor(1.0), torch.tensor(2.0)], 2).tolist() == [1.0, 2.0]


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


POOL = """
import multiprocessing, os, pathlib, sys
import jax.numpy as jnp
from ppo_jax.training.ppo import PPO
from ppo_jax.training.reward_functions import RewardFunction
from ppo_jax.training.stage import StageRun


def length(text):
    return float(len(text))


def score(prompts, responses):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        return pool.map(length, responses)


(jnp.ones((64, 64)) @ jnp.ones((64, 64))).block_until_ready()  # jax has its threads
with StageRun(pathlib.Path(sys.argv[1]), PPO, num_steps=1, save_every=1):
    for seconds in (float("inf"), 60.0):
        print(RewardFunction("mine:score", score, seconds)(["", ""], ["a", "bc"]).tolist())
    sys.stdout.flush()
    os._exit(0)
"""


def test_a_function_may_have_a_pool_of_forked_processes(tmp_path):
    """Its workers end when the pool asks them to: they have not the stage's handlers of signals."""
    command = [sys.executable, "-W", "ignore", "-c", POOL, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.stdout == "[1.0, 2.0]\n" * 2, ended.stderr
    assert "stopping when" not in ended.stderr
