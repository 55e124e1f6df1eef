from pathlib import Path

import pytest

from optwatch_server.shipped import shipped


@pytest.mark.parametrize("name", ["alerts", "dashboards", "runbooks"])
def test_every_shipped_folder_is_found_in_this_install(name: str) -> None:
    assert shipped(name).is_dir()


def test_a_wheel_has_its_files_inside_the_package(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "optwatch_server"
    (package / "shipped" / "dashboards").mkdir(parents=True)
    assert shipped("dashboards", package=package) == package / "shipped" / "dashboards"


def test_a_clone_has_the_generated_dashboards(tmp_path: Path) -> None:
    package = tmp_path / "server" / "optwatch_server"
    package.mkdir(parents=True)
    (tmp_path / "dashboards" / "generated").mkdir(parents=True)
    (tmp_path / "pyproject.toml").touch()
    assert shipped("dashboards", package=package) == tmp_path / "dashboards" / "generated"


def test_a_folder_that_only_happens_to_be_two_levels_up_is_not_taken(tmp_path: Path) -> None:
    package = tmp_path / "site-packages" / "optwatch_server"
    package.mkdir(parents=True)
    (tmp_path / "runbooks").mkdir()
    with pytest.raises(FileNotFoundError, match=r"'runbooks' folder is neither at .* reinstall optwatch"):
        shipped("runbooks", package=package)


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match="no folder 'charts' is shipped: ask for one of alerts, dashboards, runbooks"):
        shipped("charts")
