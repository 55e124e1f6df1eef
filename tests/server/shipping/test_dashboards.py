"""`optwatch dashboards export` changes addresses and nothing else, and writes what a plain Grafana loads."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from optwatch_server.shipped import shipped
from optwatch_server.shipping.dashboards import SCRAPE_INTERVAL, Addresses, export, main

NAMES = ["debug.json", "executive.json", "oncall.json"]


def test_every_shipped_dashboard_is_exported_with_only_the_servers_address_changed(tmp_path: Path) -> None:
    export(tmp_path, Addresses(server="https://optwatch.example.com/base/"))
    assert sorted(path.name for path in (tmp_path / "dashboards").iterdir()) == NAMES
    for name in NAMES:
        ours = (shipped("dashboards") / name).read_text(encoding="utf-8")
        theirs = (tmp_path / "dashboards" / name).read_text(encoding="utf-8")
        assert theirs == ours.replace("http://optwatch:8000", "https://optwatch.example.com/base")
        assert set(re.findall(r"https?://[^/\"]+", theirs)) == {"https://optwatch.example.com"}
        json.loads(theirs)


def test_with_the_default_addresses_the_dashboards_are_the_shipped_bytes(tmp_path: Path) -> None:
    export(tmp_path, Addresses())
    for name in NAMES:
        assert (tmp_path / "dashboards" / name).read_bytes() == (shipped("dashboards") / name).read_bytes()


def test_links_between_dashboards_need_no_address_of_grafana(tmp_path: Path) -> None:
    export(tmp_path, Addresses())
    uids = {json.loads((tmp_path / "dashboards" / name).read_text())["uid"] for name in NAMES}
    for name in NAMES:
        links = json.loads((tmp_path / "dashboards" / name).read_text())["links"]
        linked = {link["url"].removeprefix("/d/") for link in links if link["url"].startswith("/d/")}
        assert len(linked) == 2
        assert linked < uids


def test_grafana_is_told_where_the_dashboards_lie_and_that_they_are_not_edited_there(tmp_path: Path) -> None:
    export(tmp_path / "grafana", Addresses())
    document = yaml.safe_load((tmp_path / "grafana" / "provisioning" / "dashboards" / "optwatch.yaml").read_text())
    assert document["apiVersion"] == 1
    [provider] = document["providers"]
    assert provider["type"] == "file"
    assert provider["allowUiUpdates"] is False
    assert Path(provider["options"]["path"]) == (tmp_path / "grafana" / "dashboards").resolve()


def test_another_path_is_written_for_a_grafana_that_sees_other_folders(tmp_path: Path) -> None:
    export(tmp_path, Addresses(path="/etc/grafana/$team/dashboards"))
    document = yaml.safe_load((tmp_path / "provisioning" / "dashboards" / "optwatch.yaml").read_text())
    assert document["providers"][0]["options"]["path"] == "/etc/grafana/$$team/dashboards"


def test_the_data_source_is_prometheus_at_the_given_address_and_not_the_default_one(tmp_path: Path) -> None:
    export(tmp_path, Addresses(prometheus="http://127.0.0.1:9090/"))
    document = yaml.safe_load((tmp_path / "provisioning" / "datasources" / "optwatch.yaml").read_text())
    assert document["apiVersion"] == 1
    [source] = document["datasources"]
    assert (source["type"], source["access"], source["url"]) == ("prometheus", "proxy", "http://127.0.0.1:9090")
    assert "isDefault" not in source


def test_the_scrape_interval_of_the_data_source_is_that_of_the_shipped_prometheus() -> None:
    document = yaml.safe_load((shipped("alerts") / "prometheus.yaml").read_text(encoding="utf-8"))
    assert document["global"]["scrape_interval"] == SCRAPE_INTERVAL


def test_files_that_are_there_already_are_replaced_and_others_stay(tmp_path: Path) -> None:
    export(tmp_path, Addresses(server="http://old:1"))
    (tmp_path / "dashboards" / "mine.json").write_text("{}")
    export(tmp_path, Addresses())
    assert "http://old:1" not in (tmp_path / "dashboards" / "oncall.json").read_text(encoding="utf-8")
    assert (tmp_path / "dashboards" / "mine.json").exists()


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"server": "optwatch:8000"}, "server is 'optwatch:8000'; expected something like http://optwatch:8000"),
        ({"server": 'http://a/"x'}, "server is 'http://a/\"x'; expected something like http://optwatch:8000"),
        ({"server": "http://${run_id}"}, "server is 'http://${run_id}'; expected"),
        ({"server": "http://optwatch:99999"}, "Port out of range 0-65535"),
        ({"prometheus": ""}, "prometheus is ''; expected something like http://prometheus:9090"),
        ({"path": "dashboards"}, "path is 'dashboards'; expected a whole path like /var/lib/grafana/dashboards"),
    ],
)
def test_an_address_that_is_none_is_refused_by_name(given: dict[str, str], problem: str) -> None:
    with pytest.raises(ValueError, match=re.escape(problem)):
        Addresses(**given)


def test_a_dashboard_without_the_servers_address_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ValueError, match=r"a\.json has no place for the server's address: it lacks http://optwatch"):
        export(tmp_path / "out", Addresses(), source=tmp_path)


def test_a_folder_without_dashboards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no dashboard: reinstall optwatch"):
        export(tmp_path / "out", Addresses(), source=tmp_path)


def test_the_command_prints_what_it_wrote(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "optwatch", "dashboards", "export", str(tmp_path), "--server", "http://o:1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [
        *(str(tmp_path / "dashboards" / name) for name in NAMES),
        str(tmp_path / "provisioning" / "dashboards" / "optwatch.yaml"),
        str(tmp_path / "provisioning" / "datasources" / "optwatch.yaml"),
    ]


def test_a_wrong_address_ends_the_command_with_2_and_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", "out", "--prometheus", "localhost"])
    assert ended.value.code == 2
    assert "prometheus is 'localhost'; expected something like" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_ends_the_command_with_1_and_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert main(["export", str(tmp_path / "file")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("optwatch dashboards export: ")
    assert str(tmp_path / "file") in error
