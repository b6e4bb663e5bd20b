"""What the site has beyond docs/: the walks of examples/ as pages, and links that a site cannot follow as words.

A hook of mkdocs (mkdocs.yml).
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```(\w+)[ \w-]+$", re.MULTILINE)
OWN_URL = re.compile(r"^[a-z]+:")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """The walks in the navigation, after the start, under their own headings; then any page that it does not name."""
    walks = [{_title(path): f"examples/{path.parent.name}.md"} for path in sorted(ROOT.glob("examples/*/README.md"))]
    named = set(re.findall(r"'([\w/.-]+\.md)'", str(config.nav)))
    more = [path.name for path in sorted((ROOT / "docs").glob("*.md")) if path.name not in named]
    assert config.nav is not None
    config.nav = [config.nav[0], {"Walks": walks}, *config.nav[1:], *([{"More": more}] if more else [])]
    return config


def _title(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds examples/NAME/README.md as examples/NAME.md."""
    for readme in sorted((ROOT / "examples").glob("*/README.md")):
        name = f"examples/{readme.parent.name}.md"
        files.append(File.generated(config, name, content=_moved(readme.read_text(encoding="utf-8"), readme.parent)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Words after a fence's language (`bash run`) are for the tests; a link out of the pages becomes its text."""
    folder = (ROOT / "docs" / page.file.src_uri).parent
    text = LINK.sub(lambda match: _link(match, folder, files), markdown)
    return FENCE.sub(r"```\1", text)


def _moved(text: str, folder: Path) -> str:
    """The links of a page of examples/NAME/ as they are from docs/examples/."""

    def move(match: re.Match[str]) -> str:
        words, target, anchor = match.groups()
        path = (folder / target).resolve()
        if OWN_URL.match(target) or not path.is_relative_to(ROOT / "docs"):
            return match.group()
        return f"[{words}](../{path.relative_to(ROOT / 'docs')}{anchor or ''})"

    return LINK.sub(move, text)


def _link(match: re.Match[str], folder: Path, files: Files) -> str:
    words, target, anchor = match.groups()
    if OWN_URL.match(target):
        return match.group()
    path = (folder / target).resolve()
    walk = (
        re.fullmatch(r"examples/([\w-]+)/README\.md", str(path.relative_to(ROOT)))
        if path.is_relative_to(ROOT)
        else None
    )
    if walk:
        up = "../" * (len(folder.relative_to(ROOT / "docs").parts))
        return f"[{words}]({up}examples/{walk[1]}.md{anchor or ''})"
    inside = path.is_relative_to(ROOT / "docs") and files.get_file_from_path(str(path.relative_to(ROOT / "docs")))
    return match.group() if inside else words
