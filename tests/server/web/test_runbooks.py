from pathlib import Path

import pytest

from optwatch_server.web import runbooks


def test_only_pages_of_the_folder_have_names(tmp_path: Path) -> None:
    for name in ("B.md", "A.md", "notes.txt", "with space.md"):
        (tmp_path / name).touch()
    assert runbooks.names(tmp_path) == ["A", "B"]


@pytest.mark.parametrize("name", ["../secret", "A/../secret", "", "a" * 129, "A.md", "missing", "A\n"])
def test_a_name_never_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret.md").write_text("secret")
    folder = tmp_path / "runbooks"
    folder.mkdir()
    (folder / "A.md").write_text("# A")
    assert runbooks.load(folder, name) is None


def test_the_first_steps_are_the_section_mitigation_with_its_own_headings(tmp_path: Path) -> None:
    (tmp_path / "A.md").write_text(
        "# A\n\n## Mitigation\n\nStop.\n\n### If it hangs\n\nKill.\n\n## Related\n\nOther.\n"
    )
    runbook = runbooks.load(tmp_path, "A")
    assert runbook is not None
    assert runbook.first_steps == "<p>Stop.</p>\n<h3>If it hangs</h3>\n<p>Kill.</p>\n"


def test_a_runbook_without_that_section_has_no_first_steps(tmp_path: Path) -> None:
    (tmp_path / "A.md").write_text("# A\n\nText.\n")
    runbook = runbooks.load(tmp_path, "A")
    assert runbook is not None
    assert (runbook.first_steps, runbook.html) == ("", "<h1>A</h1>\n<p>Text.</p>\n")


def test_html_and_scripts_in_a_runbook_are_shown_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "A.md").write_text("<script>alert(1)</script> [x](javascript:alert(1))\n")
    runbook = runbooks.load(tmp_path, "A")
    assert runbook is not None
    assert "<script" not in runbook.html
    assert "href" not in runbook.html


def test_links_between_runbooks_lead_to_their_pages(tmp_path: Path) -> None:
    (tmp_path / "A.md").write_text("[b](B.md#mitigation) [c](./C.md) [d](https://example.org/D.md)\n")
    runbook = runbooks.load(tmp_path, "A")
    assert runbook is not None
    for address in ("/runbooks/B#mitigation", "/runbooks/C", "https://example.org/D.md"):
        assert f'href="{address}"' in runbook.html
