"""docs/metrics.md says what the catalogues say."""

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from optwatch.catalogue import METRICS

ROOT = Path(__file__).resolve().parents[2]


def _script():
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts" / "generate_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = _script()


def test_the_reference_page_is_what_the_catalogues_make(tmp_path):
    assert script.main([str(tmp_path / "metrics.md")]) == 0
    assert (tmp_path / "metrics.md").read_bytes() == (ROOT / "docs" / "metrics.md").read_bytes(), (
        "docs/metrics.md is out of date: run python scripts/generate_reference.py"
    )


def test_a_changed_help_text_changes_the_page():
    changed = (replace(METRICS[0], help="Something else."), *METRICS[1:])
    assert script.reference(changed) != script.reference(METRICS)


def test_every_metric_of_the_agent_has_one_row_with_its_labels_and_their_values():
    lines = script.reference(METRICS).splitlines()
    for metric in METRICS:
        rows = [line for line in lines if line.startswith(f"| `{metric.name}` |")]
        assert len(rows) == 1
        assert all(f"`{label}`" in rows[0] for label in metric.labels)
        assert all(value in rows[0] for values in metric.values for value in values)


def test_metrics_of_the_server_come_under_their_own_heading():
    health = replace(METRICS[1], name="optwatch_server_requests_total")
    page = script.reference(METRICS, [health])
    assert page.index("## The server") < page.index("`optwatch_server_requests_total`")
    assert "## The server" not in script.reference(METRICS)


def test_a_metric_that_fits_no_group_is_refused_by_name():
    with pytest.raises(ValueError, match="optwatch_new_thing belongs to no group"):
        script.reference([replace(METRICS[0], name="optwatch_new_thing")])
