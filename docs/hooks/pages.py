"""The site is made of the Markdown pages as they are read in the repository.

The README is its front page. A link to a file outside of docs/ brings that file along, and
formulas become MathML, which browsers draw without a script.
"""

import html
import os
import pathlib
import re

from mkdocs.structure.files import File

ROOT = pathlib.Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
HOME = ROOT / "README.md"
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def linked_files(page: pathlib.Path) -> set[pathlib.Path]:
    """The files that a page links to."""
    targets = (page.parent / link[2] for link in LINK.finditer(page.read_text()))
    return {path.resolve() for path in targets if path.exists()}


def site_path(path: pathlib.Path) -> str:
    """Where a file of the repository is in the site."""
    if path == HOME:
        return "index.md"
    if path.is_relative_to(DOCS):
        return str(path.relative_to(DOCS))
    return str("repository" / path.relative_to(ROOT))


def on_files(files, config):
    """The README and every file outside of docs/ that a page of the site links to."""
    reached, todo = set(), [HOME, *DOCS.rglob("*.md")]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += linked_files(path) if path.suffix == ".md" else []
    for path in sorted(reached):
        if not path.is_relative_to(DOCS):
            files.append(File.generated(config, site_path(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links lead to where the files are in the site."""
    source = pathlib.Path(page.file.abs_src_path)

    def moved(link):
        path = (source.parent / link[2]).resolve()
        if not path.is_file():
            return link[0]
        there = os.path.relpath(site_path(path), pathlib.PurePath(page.file.src_uri).parent)
        return link[1] + there + link[3]

    return LINK.sub(moved, markdown)


def on_page_content(content, page, config, files):
    """Formulas as MathML."""
    from latex2mathml.converter import convert

    def drawn(formula):
        display = "block" if formula[1] == "div" else "inline"
        return convert(html.unescape(formula[2]), display=display)

    return FORMULA.sub(drawn, content)
