"""What the site has beside docs/: the README as its first page, reports of results, CONTRIBUTING.

A hook of MkDocs (mkdocs.yml). Pages link to one another as they lie in the repository, so that they
can be read there too; here links are made to fit. What the site has no page of becomes plain text.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = (
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bilora_diffusion/mini/README.md"),
    *("results/**/*.md", "results/**/*.png"),
)
FIRST = "index.md"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")
SOURCE = re.compile(r'(src=")([^"]+)(")')


def on_files(files: Files, config: Any) -> Files:
    """Add what lies beside docs/."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, uri_of(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Let a page's links lead to pages of the site."""
    here = Path(page.file.abs_src_path).parent

    def target(link: str) -> str | None:
        place, _, anchor = link.partition("#")
        if not place or "://" in place or place.startswith("mailto:"):
            return link
        path = (here / place).resolve()
        path = path / "report.md" if path.is_dir() else path
        if not path.is_relative_to(ROOT) or files.get_file_from_path(uri_of(path)) is None:
            return None
        found = os.path.relpath(uri_of(path), Path(page.file.src_uri).parent)
        return f"{found}#{anchor}" if anchor else found

    def linked(match: re.Match[str]) -> str:
        mark, text, link = match.groups()
        found = target(link)
        return text if found is None else f"{mark}[{text}]({found})"

    def shown(match: re.Match[str]) -> str:
        return f"{match[1]}{target(match[2]) or match[2]}{match[3]}"

    blocks = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    blocks[::2] = [SOURCE.sub(shown, LINK.sub(linked, text)) for text in blocks[::2]]
    return "".join(blocks)


def uri_of(path: Path) -> str:
    """Where a file of the repository is on the site."""
    place = path.relative_to(ROOT).as_posix()
    return FIRST if place == "README.md" else place.removeprefix("docs/")
