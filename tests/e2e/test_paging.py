"""From a step that fails in a real training process to a page, through real Prometheus and Alertmanager."""

from __future__ import annotations

import time
import urllib.request
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow]


def test_a_run_that_goes_nan_causes_exactly_one_page_that_says_where(product: Any) -> None:
    run_id = "run-that-goes-nan"
    trainer = product.train(run_id, "--steps", "100000", "--break-at", "30", "--batch", "4", "--accumulate", "1")
    page = product.until(lambda: product.pages(run_id), 120, "page")[0]
    paged_at = time.time()

    event = product.get(f"/api/v1/runs/{run_id}/events")["events"][0]
    print(f"\nfrom the failing step to the page: {paged_at - event['occurred_at']:.1f} s")
    assert event["kind"] == "nonfinite"
    assert event["step"] == 31  # the step at 1e20 is finite; what it did to the weights is not
    layer = event["details"]["layer"]
    assert layer in {"token", "position", "norm", "head"} or layer.startswith("blocks.")

    assert page["labels"]["alertname"] == "TrainingNonFinite"
    assert page["labels"]["run"] == "end-to-end"
    for said in (run_id, "step 31", f" {layer}"):
        assert said in page["annotations"]["description"]
    with urllib.request.urlopen(page["annotations"]["runbook_url"], timeout=10) as runbook:
        assert "Mitigation" in runbook.read().decode()
    with urllib.request.urlopen(page["annotations"]["run_url"], timeout=10) as run_page:
        assert "NaN in the loss at step 31" in run_page.read().decode()

    # It goes on computing NaN, and nobody is woken twice.
    product.until(
        lambda: product.query(f'optwatch_nonfinite_total{{run_id="{run_id}",source="loss"}} > 100'), 60, "NaN"
    )
    time.sleep(12)  # two evaluations and the wait of a group
    assert [alert["labels"]["alertname"] for alert in product.pages(run_id)] == ["TrainingNonFinite"]
    assert trainer.poll() is None  # and it has not hurt training


def test_a_run_that_is_killed_is_paged_as_lost_and_a_finished_one_is_not(product: Any) -> None:
    arguments = ("--batch", "2", "--accumulate", "1")
    finished = product.train("run-that-ends", "--steps", "20", *arguments)
    killed = product.train("run-that-is-killed", "--steps", "100000", *arguments)
    product.until(lambda: any(rank["step"] for rank in product.run("run-that-is-killed").get("ranks", [])), 60, "step")
    killed.kill()
    killed_at = time.time()
    page = product.until(lambda: product.pages("run-that-is-killed"), 120, "page")[0]
    print(f"\nfrom the kill to the page: {time.time() - killed_at:.1f} s")
    assert page["labels"]["alertname"] == "TrainingRunLost"
    assert product.run("run-that-is-killed")["status"] == "lost"
    assert finished.wait(60) == 0
    assert product.run("run-that-ends")["status"] == "succeeded"
    assert product.pages("run-that-ends") == []
