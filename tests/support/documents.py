"""The README and the pages of docs/, as the tests read them."""

import re

from tests.support.command_line import ROOT

README = (ROOT / "README.md").read_text()
DOCS = ROOT / "docs"
PAGES = {str(p.relative_to(DOCS)): p.read_text() for p in sorted(DOCS.rglob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])


def python_blocks(text):
    """The code of a page, block by block."""
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def section(text, title):
    """The text under a heading, up to the next of its kind."""
    level = title.split()[0]
    return re.search(rf"(?:^|\n){re.escape(title)}\n(.*?)(?=\n{level} |\Z)", text, re.DOTALL)[1]


def table(text):
    """The rows of the first table in a text, each a list of its cells."""
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
