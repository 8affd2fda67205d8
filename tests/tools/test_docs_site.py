"""Links of the documents lead somewhere, and the pages build into a site."""

import re
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from limits import HANG_SECONDS

import sonic_ep
import sonic_ep.testing

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
# [text](target#anchor "title"), and the targets of [text]: target#anchor.
LINK = re.compile(r'(?:\]\(|^\[[^\]^]+\]: +)([^)#\s]*)(?:#([^)\s]+))?(?: +"[^"]*")?(?:\)|$)', re.MULTILINE)
OTHER_HOST = re.compile(r"<(?:script|link|img)[^>]*(?:src|href)=[\"']?(?:https?:)?//|(?:url\(|@import )[\"']?https?://")


def prose(document: Path) -> str:
    """The text without blocks of code."""
    return re.sub(r"^( *)(```+|~~~+).*?^\1\2", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchor_of_github(title: str) -> str:
    return re.sub(r"[^\w\- ]", "", title.strip().lower()).replace(" ", "-")


def anchor_of_mkdocs(title: str) -> str:
    ascii_only = unicodedata.normalize("NFKD", title).encode("ascii", "ignore").decode()
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_only).strip().lower())


def anchors(document: Path) -> set[str]:
    """Those of headings that GitHub has; of a page of docs/, which is read in both places, MkDocs too."""
    marked = re.findall(r"^#+ +(.*?) *#*$", prose(document), re.MULTILINE)
    titles = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", title) for title in marked]
    in_site = document.parent.name == "docs"
    found = {anchor_of_github(title): anchor_of_mkdocs(title) for title in titles}
    return {anchor for anchor, other in found.items() if anchor == other or not in_site}


def broken(document: Path) -> list[str]:
    """Links to files that do not exist, and to headings that a page does not have."""
    found = []
    for target, anchor in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(document))):
        if re.match(r"[a-z]+:", target):
            continue
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(f"{target}#{anchor}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_broken_links_are_found(tmp_path: Path) -> None:
    page, readme = tmp_path / "docs" / "page.md", tmp_path / "README.md"
    page.parent.mkdir()
    page.write_text(
        "# A title: `x`\n\n## Space / slash\n\n```\n## In a block\n[no link](none)\n```\n`[code](none)`\n"
        "[1](#a-title-x) [2](#another) [3](none.md) [4](page.md#a-title-x) [5](#in-a-block)\n"
        '[6](none.md "title") [7](#space--slash) [8](#space-slash) [9](https://example.org/#a) [`10`](none)\n'
        "\n[eleven]: none.txt\n"
    )
    readme.write_text("[1](docs/page.md#a-title-x) [2](docs/page.md#another)\n## Space / slash\n[3](#space--slash)\n")
    missing = ["#another", "none.md#", "#in-a-block", "none.md#", "#space--slash", "#space-slash", "none#", "none.txt#"]
    assert broken(page) == missing
    assert broken(readme) == ["docs/page.md#another"]


def test_pages_link_to_pages_only() -> None:
    """A site holds nothing else of the repository."""
    for document in (ROOT / "docs").glob("*.md"):
        assert [target for target, _ in LINK.findall(document.read_text()) if target.startswith("..")] == []


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built pages."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python"):
        pytest.importorskip(package, reason=f"needs {package}: pip install mkdocs-material 'mkdocstrings[python]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    return folder


def test_the_site_has_every_page_and_asks_no_other_host(site: Path) -> None:
    pages = sorted(site.glob("*.html"))
    assert {page.stem for page in pages} >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    for path in (*pages, *site.rglob("*.css")):
        assert OTHER_HOST.findall(path.read_text()) == [], path.name


def test_the_reference_has_every_public_name(site: Path) -> None:
    reference = (site / "api.html").read_text()
    described = {name.rpartition(".")[2] for name in re.findall(r'id="(sonic_ep\.[\w.]+)"', reference)}
    public = {name for name in (*sonic_ep.__all__, *sonic_ep.testing.__all__) if not name.startswith("__")}
    # A table of values, which has no docstring of its own.
    assert public - described == {"CASES"}
    assert {"clip_grad_norm_", "ExpertParallelStyle", "state_dict_of_0_1", "moe_routed", "combine"} <= described
    # Arguments of a docstring are a list, modes have their values.
    assert "<strong>max_tokens_per_rank</strong>: C, the most tokens" in reference
    assert all(value in reference for value in ("reduce_scatter", "softmax_then_topk"))
