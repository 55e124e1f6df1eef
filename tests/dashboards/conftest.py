"""Makes `dashboards` importable: it is a folder of the repository and no part of the distribution."""

import sys
import warnings
from pathlib import Path

import pytest
import yaml

from optwatch import catalogue as agent
from optwatch_server import catalogue as server

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

with warnings.catch_warnings():
    # The SDK warns, once and when imported, of the classic schema, which this project writes on purpose.
    warnings.filterwarnings("ignore", "Prefer using dashboardv2", DeprecationWarning)
    import dashboards.generate  # noqa: F401
    from dashboards import lint, promql


@pytest.fixture(scope="session")
def labels():
    """Every series that a dashboard may ask for with its labels: what is exported, and what rules record."""
    known = lint.scraped(agent.METRICS, [*agent.COMMON_LABELS, "optimizer"]) | lint.scraped(server.METRICS, [])
    for path in sorted((ROOT / "alerts" / "rules").glob("*.yaml")):
        for group in yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]:
            for rule in group["rules"]:
                if "record" in rule:
                    found = {*rule.get("labels", ()), *promql.labels_used(rule["expr"])}
                    known[rule["record"]] = known.get(rule["record"], set()) | found
    return known
