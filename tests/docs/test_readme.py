"""The README's code runs, its commands exist, and its links lead somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def test_its_code_runs_as_it_stands_and_exports_what_it_promises(tmp_path: Path) -> None:
    (code,) = fenced("python")
    shown = "from optwatch.monitor import attached\n(monitor,) = attached.values()\nmonitor.flush()\n"
    shown += "print(sorted(monitor.snapshot()))\n"
    script = tmp_path / "readme.py"
    script.write_text(code + shown)
    environment = os.environ | {"OPTWATCH_PORT": "0", "OPTWATCH_ADDRESS": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    for promised in ("optwatch_loss", "optwatch_layer_grad_norm", "optwatch_effective_learning_rate"):
        assert promised in done.stdout


def test_the_one_line_stands_within_the_first_twenty() -> None:
    lines = README.splitlines()
    assert "attach(optimizer)" in "\n".join(lines[:20])


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"make ([a-z]+)", README)
    assert targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


@pytest.mark.parametrize(
    "page", sorted(str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
)
def test_every_relative_link_leads_to_a_file(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?://|#|mailto:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), f"{page} links to {target}"
