"""The documentation: its code runs, its links resolve, and it names everything public."""

import pathlib
import re

import pytest

from tests.test_architecture import public

ROOT = pathlib.Path(__file__).parent.parent
GUIDES = sorted((ROOT / "docs" / "guides").glob("*.md"))
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *GUIDES, *(ROOT / "examples").glob("*.md")])
PAGES += [ROOT / "experiments" / "README.md"]
MADE = {"docs/messages.md", "docs/getting_started.ipynb"}  # by docs/conf.py
RUN = ["README.md", *(f"docs/{name}.md" for name in ("verify", "migrate", "extending"))]
RUN += [f"docs/guides/{path.name}" for path in GUIDES]


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n != "README.md")) for n in RUN])
def test_code_blocks_run(name):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    assert blocks
    namespace = {"__name__": name}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}, block {number + 1}", "exec"), namespace)


def anchors(path):
    """Return the anchors of a page's headings, as GitHub and MyST make them."""
    heads = re.findall(r"^#+ (.*)$", path.read_text(), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", head).lower()).replace(" ", "-") for head in heads
    }


DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "docs/guides/frameworks.md").read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.parametrize("diff", DIFFS, ids=["linen", "nnx", "equinox"])
def test_the_loops_of_flax_and_equinox_run_before_and_after(diff):
    setup = re.search(r"^```python\n(.*?)^```", (ROOT / "docs/guides/frameworks.md").read_text(), re.M | re.S)[1]
    lines = diff.splitlines()
    for other in "+-":
        kept = "\n".join(line[1:] for line in lines if not line.startswith(other))
        exec(compile(setup + kept, "frameworks.md", "exec"), {"__name__": "loop"})
    added = [line for line in lines if line.startswith("+") and line[1:].strip()]
    assert len(added) <= 10, "the loop of the library's own tutorial changes in ten lines at most"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if str(other.relative_to(ROOT)) in MADE:
            continue
        assert other.exists(), f"{path.name}: {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{path.name}: {target}"


def test_readme_is_short():
    assert (ROOT / "README.md").read_text().count("\n") <= 180


def test_every_public_name_has_an_entry():
    entries = {}
    for module, listed in re.findall(
        r"currentmodule:: (\S+)\n\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.S
    ):
        names = re.findall(r"^   (\w+)$", listed, re.M)
        entries[module] = entries.get(module, set()) | set(names)
    missing = []
    for name, thing in public().items():
        if isinstance(thing, type(pytest)):  # a module: its names are listed
            continue
        module, _, short = name.replace("hg.", "hypergrad.", 1).rpartition(".")
        elsewhere = any(short in names for names in entries.values())  # bijectors.constrain is hg.constrain
        if short not in entries.get(module, set()) and not elsewhere:
            missing.append(name)
    assert missing == []


def test_the_gallery_shows_every_example():
    page = (ROOT / "docs" / "gallery.md").read_text()
    for example in (ROOT / "examples").glob("0*.py"):
        assert f"## {example.name}" in page
        assert (ROOT / "docs" / "gallery" / f"{example.stem}.png").exists()


def test_pages_of_the_site_are_all_listed():
    index = (ROOT / "docs" / "index.md").read_text()
    listed = {line for block in re.findall(r"```\{toctree\}(.*?)```", index, re.S) for line in block.split("\n")}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index", "messages"}
    pages |= {f"guides/{path.stem}" for path in GUIDES}
    assert pages <= listed
