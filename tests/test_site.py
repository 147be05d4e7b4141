"""docs/ as a site: it builds without a warning, and loads nothing from elsewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} | {"changelog", "contributing", "security"}
    assert pages <= {page.stem for page in tmp_path.glob("*.html")}
    for page in tmp_path.glob("*.html"):
        loaded = re.findall(r"<(?:script|img|link)[^>]+?(?:src|href)=\"?(https?:[^\"> ]+)", page.read_text())
        assert not loaded, f"{page.name} loads {loaded}"
    # What the API page shows comes from docstrings.
    assert "Train a model within a memory budget" in (tmp_path / "api.html").read_text()
