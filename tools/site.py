"""What mkdocs is told beside mkdocs.yml: documents and pictures that lie outside of docs/ are pages too.

Links are written as they work in the repository. On the site everything lies in one folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
# What of the repository is on the site, and where.
DOCUMENTS = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "README.md": "index.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#\s:]+)")


def _shown(path: str) -> str | None:
    """Where the site has a file of the repository; None: it has it not."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.startswith("experiments/results/"):
        return f"results/{Path(path).name}"
    return DOCUMENTS.get(path)


def on_files(files: Files, config: Any) -> Files:
    """Add what lies outside."""
    results = sorted((ROOT / "experiments" / "results").iterdir())
    outside = {path: _shown(path) for path in DOCUMENTS if path != "README.md"}
    outside |= {f"experiments/results/{path.name}": f"results/{path.name}" for path in results}
    for path, uri in outside.items():
        files.append(File.generated(config, str(uri), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are on the site: from the repository's folders to the one folder that it has."""
    folder = ROOT if page.file.generated_by else ROOT / "docs"

    def on_site(link: re.Match[str]) -> str:
        found = (folder / link[1]).resolve()
        inside = found.is_relative_to(ROOT)
        return (_shown(str(found.relative_to(ROOT))) if inside else None) or link[1]

    return _LINK.sub(on_site, markdown)
