"""The README and the pages of docs/, as the tests read them."""

import re

from tests.support.command_line import ROOT

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").rglob("*.md"))}
EVERYTHING = "\n".join([README, *PAGES.values()])


def section(text, title):
    """The text under a heading, up to the next of its kind."""
    level = title.split()[0]
    return re.search(rf"(?:^|\n){re.escape(title)}\n(.*?)(?=\n{level} |\Z)", text, re.DOTALL)[1]


def table(text):
    """The rows of the first table in a text, each a list of its cells."""
    rows = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
