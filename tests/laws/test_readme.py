"""What the README says is true."""

import contextlib
import io
import re

from tests.support.command_line import ROOT
from tests.support.documents import EVERYTHING, PAGES, README


def test_the_first_example_prints_what_its_comment_says():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    *_, said = code.strip().splitlines()[-1].partition("# ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert [round(float(x), 4) for x in printed.getvalue().split()] == [
        float(x) for x in said.split()
    ]


def test_every_file_that_the_pages_name_exists():
    names = set(re.findall(r"(?:experiments|configs|ppo_jax|tests)/[\w/]+\.(?:py|png)", EVERYTHING))
    assert len(names) > 10
    assert not [name for name in names if not (ROOT / name).exists()]


def test_every_package_is_in_the_layout():
    layout = README[README.index("## Layout") : README.index("## Limits")]
    packages = [
        path.name for path in (ROOT / "ppo_jax").iterdir() if (path / "__init__.py").exists()
    ]
    assert not [name for name in packages if f"  {name}/ " not in layout]


def test_every_metric_of_the_core_is_in_the_table():
    sources = [p.read_text() for p in (ROOT / "ppo_jax").rglob("*.py")]
    groups = "sft|reward_model|reward|kl|response|policy|value|ppo|time"
    names = {
        name for text in sources for name in re.findall(rf'"((?:{groups})/[a-z_]+)"', text)
    } - {"time/total_s", "time/prepare_s"}
    names -= {"ppo/computed", "ppo/taken"}  # of a minibatch; `ppo/updates` is what is logged
    in_results = {"policy/kl_per_response", "policy/kl_per_response_stderr"}
    in_results |= {name for name in names if name.startswith("reward_model/accuracy_")}
    missing = sorted(x for x in names - in_results if f"`{x}`" not in PAGES["metrics.md"])
    assert not missing
