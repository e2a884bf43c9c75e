"""The pages of docs/: their code runs, their links lead somewhere, and the site shows all of them."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import asyncds
from asyncds import errors, testing
from asyncds.demo import bucket as demo
from asyncds.testing import S3Server

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

_BLOCK = re.compile(r"(?:^<!-- not run: (.+?) -->\n)?^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


class Block(NamedTuple):
    """Text between fences, and why it is not run, where that is said in a comment above it."""

    reason: str
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall(page.read_text())]


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"`[^`\n]*`", "", _BLOCK.sub("", page.read_text()))


def name_of(page: Path) -> str:
    return page.stem


# code

RUN = [page for page in TEXTS[1:] if any(block.language == "python" and not block.reason for block in blocks(page))]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """The buckets that pages speak of: digits in folders of their classes, and a few pictures called *.JPEG."""
    with S3Server() as server:
        digits = [*demo.digits().items()][::60]
        for place, ending in (("mnist", "png"), ("imagenet", "JPEG")):
            server.create_bucket(place)
            for part in ("train", "test"):
                pictures = {f"{part}/{key.partition('/')[2][:-3]}{ending}": body for key, body in digits}
                server.put_many(place, pictures)
        yield server


@pytest.mark.timeout(120)
@pytest.mark.parametrize("page", RUN, ids=name_of)
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than some machines have cores
@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata's loader calls it
def test_code_of_a_page_runs(page, bucket, tmp_path, monkeypatch):
    """Its blocks one after the other, as a reader would try them: what one makes, the next ones have."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and not block.reason:
            exec(compile(block.text, str(page), "exec"), names)
    for dataset in (value for value in names.values() if isinstance(value, asyncds.CachedS3MapDataset)):
        dataset.close()


def test_most_pages_have_code_that_runs():
    """And none has Python under another name, where it would not."""
    assert {"index", "s3mapdataset", "lookahead", "monitoring", "failures", "tuning", "manifest"} <= {
        *map(name_of, RUN)
    }
    assert not {block.language for page in TEXTS for block in blocks(page)} & {
        "py",
        "py3",
        "python3",
        "pycon",
        "ipython",
    }


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_shell_commands_of_a_page_exist(page):
    """`asyncds …` and `make …` of blocks for shells: commands, options and targets that there are."""
    said = "\n".join(block.text for block in blocks(page) if block.language in ("sh", "console"))
    targets = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert {*re.findall(r"^make ([a-z][\w-]*)", said, re.MULTILINE)} <= {*targets}
    for command, rest in re.findall(r"\basyncds (warm|tune|ls|stats|verify|clear|config|demo)\b([^#\n]*)", said):
        options = {*re.findall(r" (--[a-z-]+)", rest)}
        assert options <= {option for known in options_of(command) for option in known}, f"asyncds {command}{rest}"
    assert not re.findall(
        r"\basyncds (?!warm|tune|ls|stats|verify|clear|config|demo)[a-z]\w+", re.sub(r"#.*", "", said)
    )


def options_of(command: str) -> list[list[str]]:
    from asyncds.cli import _commands

    found = _commands.get_command(None, command)  # type: ignore[arg-type]
    assert found is not None
    return [parameter.opts for parameter in found.params] + [["--help"]]


# links


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = (
        re.sub(r"[`*]|\]\([^)]*\)|\[", "", heading) for heading in _HEADING.findall(_BLOCK.sub("", page.read_text()))
    )
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_of_a_page_lead_somewhere(page):
    for link in _LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


# the site


class _Loader(yaml.SafeLoader):
    """Without the tags by which MkDocs names functions."""


def configuration() -> dict[str, Any]:
    return yaml.load((ROOT / "mkdocs.yml").read_text(), _Loader)


def leaves(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    inner = nav.values() if isinstance(nav, dict) else nav
    return [leaf for item in inner for leaf in leaves(item)]


def test_every_page_is_in_the_navigation_once():
    assert sorted(leaves(configuration()["nav"])) == [page.name for page in PAGES]


def test_the_reference_has_every_name_for_users():
    said = (DOCS / "api.md").read_text()
    named = {*re.findall(r"^::: asyncds\.(\w+)$", said, re.MULTILINE)}
    assert named - {"errors", "testing"} == {*asyncds.__all__}
    listed = [name.strip() for found in re.findall(r"members: \[(.*)\]", said) for name in found.split(",")]
    assert {*errors.__all__} - {"AsyncdsError"} <= {*listed}
    assert {*testing.__all__} <= {*listed}


def test_the_reference_lists_members_that_there_are():
    for name, members in re.findall(
        r"^::: asyncds\.(\w+)\n    options:\n(?:      show.*\n)?      members: \[(.*)\]",
        (DOCS / "api.md").read_text(),
        re.MULTILINE,
    ):
        owner = {"errors": errors, "testing": testing}.get(name) or getattr(asyncds, name)
        assert [member for member in members.split(", ") if not hasattr(owner, member)] == []


@pytest.mark.thorough
@pytest.mark.timeout(180)
def test_the_site_is_built_without_a_warning(tmp_path):
    if find_spec("mkdocs") is None or find_spec("mkdocstrings") is None:
        pytest.skip("the site needs MkDocs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    own = {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    for page in PAGES:
        assert (tmp_path / ("index.html" if page.stem == "index" else f"{page.stem}/index.html")).is_file()
    reference = (tmp_path / "api" / "index.html").read_text()
    assert [name for name in asyncds.__all__ if f'id="asyncds.{name}"' not in reference] == []
    found = json.loads((tmp_path / "search" / "search_index.json").read_text())
    assert len(found["docs"]) > len(PAGES)
