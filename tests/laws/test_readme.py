"""What the README says is true."""

import contextlib
import io
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_first_example_prints_what_its_comment_says():
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL)[1]
    *_, said = code.strip().splitlines()[-1].partition("# ")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert [round(float(x), 4) for x in printed.getvalue().split()] == [
        float(x) for x in said.split()
    ]


def test_every_file_that_the_readme_names_exists():
    names = set(re.findall(r"(?:experiments|configs|ppo_jax)/\w+\.(?:py|png)", README))
    layout = README[README.index("ppo_jax/cli.py") : README.index("Configs are `ml_coll")]
    names |= {f"ppo_jax/{name}" for name in re.findall(r"(?<![\w/*])\w+\.py", layout)}
    missing = [name for name in names if not (ROOT / name).exists()]
    assert not missing
    for path in (ROOT / "ppo_jax").glob("*.py"):
        listed = path.name in layout or path.name.startswith(("report", "__init__"))
        assert listed, f"{path.name} is not in the README's layout"


def test_every_metric_of_the_core_is_in_the_table():
    sources = [p.read_text() for p in (ROOT / "ppo_jax").rglob("*.py")]
    groups = "sft|reward_model|reward|kl|response|policy|value|ppo|time"
    names = {
        name for text in sources for name in re.findall(rf'"((?:{groups})/[a-z_]+)"', text)
    } - {"time/total_s", "time/prepare_s"}
    in_results = {"policy/kl_per_response"}  # of results.json
    in_results |= {name for name in names if name.startswith("reward_model/accuracy_")}
    table = README[README.index("### Metrics") : README.index("## Limits")]
    missing = sorted(name for name in names - in_results if f"`{name}`" not in table)
    assert not missing
