"""JSON lines, gzip, Parquet and data sets of a hub hold the same rows, and name a bad one."""

import gzip
import sys

import pyarrow
import pyarrow.parquet
import pytest

from ppo_jax.data import readers
from ppo_jax.data import records as data
from ppo_jax.data.preferences import load_preferences
from ppo_jax.data.records import write_jsonl
from tests.support.chats import TOKENIZER, turns

TEXTS = [{"prompt": "p", "completion": f" é {n}\n"} for n in range(3)]


def gzipped(folder, rows):
    write_jsonl(folder / "plain.jsonl", rows)
    path = folder / "rows.jsonl.gz"
    path.write_bytes(gzip.compress((folder / "plain.jsonl").read_bytes()))
    return path


def parquet(folder, rows, name="rows.parquet"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / name, row_group_size=2)
    return folder / name


def on_hub(folder, rows, split="train"):
    """A local folder stands for a hub: `datasets` looks for one of that name first."""
    parquet(folder, rows, f"owner/name/{split}.parquet")
    return f"hub:owner/name:{split}"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, without a network and with a cache of its own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    return tmp_path


CONTAINERS = [gzipped, parquet, on_hub]


@pytest.mark.parametrize("hold", CONTAINERS)
def test_every_container_holds_the_same_records(here, hold):
    write_jsonl(here / "rows.jsonl", TEXTS)
    expected = data.load_texts(here / "rows.jsonl")
    assert data.load_texts(hold(here, TEXTS)) == expected
    assert len(expected) == 3


@pytest.mark.parametrize("hold", CONTAINERS)
def test_rows_of_sharegpt_are_those_of_messages(here, hold):
    names = {"user": "human", "assistant": "gpt"}
    chat = turns("Hi", "Yes", "Ho", "No")
    talk = [{"from": names[m["role"]], "value": m["content"]} for m in chat]
    write_jsonl(here / "messages.jsonl", [{"messages": chat}])
    expected = data.load_texts(here / "messages.jsonl", TOKENIZER)
    assert data.load_texts(hold(here, [{"conversations": talk, "id": 1}]), TOKENIZER) == expected


@pytest.mark.parametrize("hold", CONTAINERS)
def test_messages_and_rankings_come_through(here, hold):
    chats = [
        {"messages": turns("Hi", "Yes", "Ho", "No", system="Hi")},
        {"messages": turns("a", "b")},
    ]
    path = here / "rows.jsonl"
    write_jsonl(path, chats)
    expected = data.load_texts(path, TOKENIZER)
    assert data.load_texts(hold(here, chats), TOKENIZER) == expected
    rankings = [{"prompt": "p", "responses": ["a", "b", "c"], "scores": [1.0, 3.0, 2.0]}]
    write_jsonl(path, rankings)
    expected = load_preferences(path)
    other = here / "other"
    other.mkdir()
    assert load_preferences(hold(here if hold is on_hub else other, rankings)) == expected


@pytest.mark.parametrize(
    ("hold", "place"),
    [
        (gzipped, r"rows\.jsonl\.gz:3: "),
        (parquet, r"rows\.parquet: row 3: "),
        (on_hub, "hub:owner/name:train: row 3: "),
    ],
)
def test_a_bad_row_is_named_with_its_place(here, hold, place):
    rows = [{"text": "good", "rating": 1.0}, {"text": "bad", "rating": 2.0}]
    path = hold(here, [*rows, {"text": None, "rating": 3.0}])
    with pytest.raises(ValueError, match=f"^{'' if hold is on_hub else '.*'}{place}text must be a"):
        data.load_ratings(path)


@pytest.mark.parametrize("hold", [parquet, on_hub])
def test_a_table_may_have_other_columns(here, hold):
    rows = [{"id": 7, "prompt": "p", "messages": turns("Hi"), "source": None}] * 2
    path = hold(here, rows)
    others = {"id": "", "prompt": "", "source": ""}
    assert readers.other_columns(path, data.PROMPT_SCHEMAS) == others
    assert data.load_prompts(path, TOKENIZER)[0].startswith("<|im_start|>user\nHi")
    assert [row for _, _, row in data.load_prompt_rows(path, TOKENIZER)] == rows
    columns = r"must include \['text'\] or .* got \['id', 'prompt', 'messages', 'source'\]"
    with pytest.raises(ValueError, match=columns):
        list(readers.read_rows(path, [("text",), ("prompt", "completion")]))


def test_json_lines_may_have_other_columns_which_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, TEXTS)
    assert readers.other_columns(path, data.DEMONSTRATION_SCHEMAS) == {}
    rows = [{"text": "a", "id": 1}, {"id": 2, "prompt": "p", "completion": "c", "text": "b"}]
    write_jsonl(path, rows)
    others = {"id": "", "text": "in 1 of 2 rows"}
    assert readers.other_columns(path, data.DEMONSTRATION_SCHEMAS) == others
    assert [x.text for x in data.load_texts(path)] == ["a", "pc"]
    read = list(readers.read_rows(path, data.DEMONSTRATION_SCHEMAS))
    assert [row for _, row in read] == [{"text": "a"}, {"prompt": "p", "completion": "c"}]


def test_damaged_and_empty_files_are_named(tmp_path):
    path = gzipped(tmp_path, [{"text": f"{n} " * 20} for n in range(2000)])
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz:\d+: the gzip file is damaged"):
        data.load_texts(path)
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl\.gz:1: the gzip file is damaged: Not a gz"):
        data.load_texts(path)
    table = tmp_path / "rows.parquet"
    with pytest.raises(ValueError, match="rows.parquet: there is no such file"):
        data.load_texts(table)
    table.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(ValueError, match="rows.parquet: not a Parquet file"):
        data.load_texts(table)
    empty = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(empty, table)
    with pytest.raises(ValueError, match="rows.parquet: the table is empty, at least one row"):
        data.load_texts(table)


NO_REPOSITORIES = ["hub:", "hub:name", "hub:owner/", "hub:a/b/c", "hub:/name:train"]
NO_REPOSITORIES += ["hub:../x", "hub:./x", "hub:a/..", "hub:a/.b:train", "hub:~/x", "hub:a/b\nc"]


@pytest.mark.parametrize("name", NO_REPOSITORIES)
def test_a_name_that_is_none_of_a_hub_is_refused(name):
    with pytest.raises(ValueError, match="must be hub:owner/name or hub:owner/name:split, got"):
        readers.check_packages(name)


def test_a_name_has_a_split():
    assert readers.hub_name("hub:owner/name") == ("owner/name", "train")
    assert readers.hub_name("hub:owner/name:test[:10%]") == ("owner/name", "test[:10%]")


def test_a_split_is_read_and_one_that_is_not_there_is_named(here):
    on_hub(here, TEXTS[:1])
    on_hub(here, TEXTS[1:], "test")
    assert len(data.load_texts("hub:owner/name")) == 1
    assert len(data.load_texts("hub:owner/name:test")) == 2
    with pytest.raises(
        ValueError, match='hub:owner/name:none: datasets could not load it: .*"none"'
    ):
        data.load_texts("hub:owner/name:none")
    with pytest.raises(ValueError, match="hub:no/where: datasets could not load it: "):
        data.load_texts("hub:no/where")


@pytest.mark.parametrize(
    ("path", "module", "package"),
    [("a.parquet", "pyarrow.parquet", "pyarrow"), ("hub:owner/name", "datasets", "datasets")],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(
    monkeypatch, path, module, package
):
    monkeypatch.setitem(sys.modules, module, None)
    for read in (readers.check_packages, data.load_prompts):
        with pytest.raises(ValueError, match=rf"{package}: pip install 'ppo_jax\[data\]'"):
            read(path)
