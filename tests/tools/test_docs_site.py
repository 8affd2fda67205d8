"""Links of the documents lead somewhere, and the pages build into a site."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANG_SECONDS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")


def anchors(document: Path) -> set[str]:
    """As GitHub and MkDocs make them of headings."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    titles = re.findall(r"^#+ +(.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-") for title in titles}


def broken(document: Path) -> list[str]:
    """Links to files that do not exist, and to headings that a page does not have."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    found = []
    for target, anchor in LINK.findall(text):
        if target.startswith("http"):
            continue
        path = (document.parent / target).resolve() if target else document
        if not path.exists() or (anchor and anchor not in anchors(path)):
            found.append(f"{target}#{anchor}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(document: Path) -> None:
    assert broken(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title: `x`\n\n[one](#a-title-x) [two](#another) [three](none.md) [four](page.md#a-title-x)\n")
    assert broken(page) == ["#another", "none.md#"]


def test_pages_link_to_pages_only() -> None:
    """A site holds nothing else of the repository."""
    for document in (ROOT / "docs").glob("*.md"):
        assert [target for target, _ in LINK.findall(document.read_text()) if target.startswith("..")] == []


def test_the_site_builds_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install mkdocs-material 'mkdocstrings[python]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr
    pages = sorted((tmp_path / "site").glob("*.html"))
    assert {page.stem for page in pages} >= {path.stem for path in (ROOT / "docs").glob("*.md")}
    for page in pages:
        text = page.read_text()
        assert re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"?https?://", text) == [], page.name
    reference = (tmp_path / "site" / "api.html").read_text()
    assert all(f'id="sonic_ep.{name}' in reference for name in ("ExpertParallel.moe", "EPConfig", "MoE", "graphed"))
    # Arguments of a docstring are a list.
    assert "<strong>max_tokens_per_rank</strong>: C, the most tokens" in reference
