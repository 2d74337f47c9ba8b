"""The table of docs/how-to/model-families.md: a row a family, and the test of each cell."""

import re

import pytest

from ppo_jax.io.gguf.architectures import ARCHITECTURES, VARIANTS
from ppo_jax.models.families import FAMILIES
from tests.support.documents import PAGES
from tests.support.gguf_files import ARCHITECTURES as OTHER_NAMES
from tests.support.gguf_files import MODELS
from tests.support.tiny_hf import TINY_MODELS

PAGE = PAGES["how-to/model-families.md"]
ROWS = {
    match[1]: [cell.strip() for cell in match[0].strip("|").split("|")]
    for match in re.finditer(r"^\| `(\w+)` \|.*\|$", PAGE, re.MULTILINE)
}
COLUMNS = ("parity", "decode", "export", "lora", "mesh", "gguf", "plan")


def test_the_table_has_a_row_for_each_family_in_their_order():
    assert list(ROWS) == [family.name for family in FAMILIES]


@pytest.mark.parametrize("family", ROWS)
def test_each_cell_leads_to_its_column_and_each_family_is_a_case_of_its_tests(family):
    cells = ROWS[family][2:]
    linked = [re.search(r"\]\(#([\w-]+)\)", cell)[1] for cell in cells]
    assert tuple(linked) == COLUMNS
    assert all(f"\n### {name}\n".lower() in PAGE.lower() for name in linked)
    assert family in {name for name, _ in TINY_MODELS.values()}
    assert family in {name for name, _ in MODELS.values()}
    assert f"`{OTHER_NAMES.get(family, family)}`" in cells[COLUMNS.index("gguf")]


def test_every_architecture_of_files_is_in_the_table():
    read = {x.family for x in (*ARCHITECTURES.values(), *(x for _, x in VARIANTS.values()))}
    assert read | {"mistral"} == ROWS.keys()
