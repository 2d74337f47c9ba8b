"""The documentation builds as a site without a warning, and needs nothing from elsewhere."""

import os
import re
import subprocess
import sys

import pytest

from tests.support.command_line import ROOT

for package in ("mkdocs", "material", "mkdocstrings", "latex2mathml"):
    pytest.importorskip(package, reason="pip install -e '.[docs]'")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """{page: its HTML}, of a strict build."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stderr) == (0, "")
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def test_the_readme_is_its_front_page(site):
    assert "prefer PPO to SFT" in site["index.html"]
    assert 'href="using-the-parts.html"' in site["index.html"]


def test_files_outside_of_docs_come_along(site):
    assert 'src="repository/experiments/quickstart.png"' in site["index.html"]
    assert "0.2.0" in site["repository/CHANGELOG.html"]
    assert 'href="../design.html"' in site["repository/CONTRIBUTING.html"]


def test_formulas_are_drawn_by_the_browser_itself(site):
    page = site["from-paper-to-code.html"]
    assert page.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') > 10
    assert not [name for name, text in site.items() if "arithmatex" in text]


def test_a_page_loads_nothing_from_elsewhere(site):
    loads = re.compile(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(https?:)?//')
    assert not [name for name, text in site.items() if loads.search(text)]


def test_doctests_are_code(site):
    prompts = re.findall(r"(.*)&gt;&gt;&gt; ", site["api/core.html"])
    assert len(prompts) > 10 and all(
        before.endswith(('<span class="gp">', '<span class="sd">    ')) for before in prompts
    )
