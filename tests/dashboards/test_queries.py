"""The queries that decide what a woken person sees, run by promtool over series that are as real ones go wrong."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dashboards import lint

GENERATED = Path(__file__).resolve().parents[2] / "dashboards" / "generated"

FIRING = 'ALERTS{alertstate="firing", notify="page", alertname='
SINCE = 'ALERTS_FOR_STATE{notify="page", alertname='
RUN = 'run_id="a-1", run="a", project="p", team="t"'
WHOSE = 'run_id="a-1", project="p", team="t"'
OTHER = 'run_id="b-2", run="b", project="q", team="u"'
STARTED = "optwatch_fleet_run_started_timestamp_seconds"
ENDED = "optwatch_fleet_run_ended_timestamp_seconds"
BEAT = "optwatch_fleet_run_last_heartbeat_timestamp_seconds"


def expression(name, panel_id, ref="A", project=".*", time_range="1h"):
    document = json.loads((GENERATED / name).read_text(encoding="utf-8"))
    panel = next(panel for panel in lint.panels(document) if panel["id"] == panel_id)
    expr = next(target["expr"] for target in panel["targets"] if target["refId"] == ref)
    return (
        expr.replace("$project", project)
        .replace("$__range", time_range)
        .replace("$__rate_interval", "1m")
        .replace("$run_id", "a-1")
        .replace("$rank", "0")
        .replace("$layer", ".*")
    )


@pytest.fixture
def yields(tmp_path):
    """Whether an expression yields exactly these samples after ten minutes of series that each end in one value."""

    def check(expr, series, *samples):
        promtool = shutil.which("promtool")
        if promtool is None:
            pytest.fail("promtool is missing: apt-get install prometheus")
        given = [{"series": name, "values": f"{value}x40"} for name, value in series]
        asked = {
            "expr": expr,
            "eval_time": "10m",
            "exp_samples": [{"labels": f"{{{labels}}}", "value": value} for labels, value in samples],
        }
        test = {"rule_files": [], "tests": [{"interval": "15s", "input_series": given, "promql_expr_test": [asked]}]}
        path = tmp_path / "test.yaml"
        path.write_text(yaml.safe_dump(test), encoding="utf-8")
        done = subprocess.run([promtool, "test", "rules", str(path)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return True

    return check


def test_a_page_shows_since_when_it_fires_and_whose_the_run_is(yields):
    series = [(FIRING + f'"A", {RUN}}}', 1), (SINCE + f'"A", {RUN}}}', 300), (f"{STARTED}{{{RUN}}}", 5)]
    assert yields(expression("oncall.json", 110), series, (f'alertname="A", {WHOSE}', 300_000))


def test_a_page_whose_rule_names_only_the_run_gets_project_and_team_from_the_server(yields):
    bare = '"A", run_id="a-1"}'
    series = [(FIRING + bare, 1), (SINCE + bare, 300), (f"{STARTED}{{{RUN}}}", 5)]
    assert yields(expression("oncall.json", 110), series, (f'alertname="A", {WHOSE}', 300_000))
    assert yields(expression("oncall.json", 110, project="q"), series)


def test_a_page_is_shown_where_the_server_knows_nothing(yields):
    series = [(FIRING + f'"A", {RUN}}}', 1), (SINCE + f'"A", {RUN}}}', 300)]
    assert yields(expression("oncall.json", 110), series, (f'alertname="A", {WHOSE}', 300_000))
    series = [(FIRING + '"OptwatchServerDown"}', 1), (SINCE + '"OptwatchServerDown"}', 300)]
    for project in (".*", "q"):
        down = ('alertname="OptwatchServerDown"', 300_000)
        assert yields(expression("oncall.json", 110, project=project), series, down)


def test_two_pages_of_one_run_are_two_rows(yields):
    series = [(f"{STARTED}{{{RUN}}}", 5)]
    for name, since in (("A", 100), ("B", 200)):
        series += [(FIRING + f'"{name}", {RUN}}}', 1), (SINCE + f'"{name}", {RUN}}}', since)]
    rows = [(f'alertname="A", {WHOSE}', 100_000), (f'alertname="B", {WHOSE}', 200_000)]
    assert yields(expression("oncall.json", 110), series, *rows)
    assert yields(expression("oncall.json", 101), series, ("", 2))


def test_an_alert_that_is_pending_or_a_ticket_is_no_page(yields):
    series = [
        ('ALERTS{alertstate="pending", notify="page", alertname="A", run_id="a-1"}', 1),
        (SINCE + '"A", run_id="a-1"}', 300),
        ('ALERTS{alertstate="firing", notify="ticket", alertname="B", run_id="a-1"}', 1),
        ('ALERTS_FOR_STATE{notify="ticket", alertname="B", run_id="a-1"}', 300),
        ('optwatch_fleet_runs{status="running"}', 1),
    ]
    assert yields(expression("oncall.json", 110), series)
    assert yields(expression("oncall.json", 101), series, ("", 0))
    assert yields(expression("oncall.json", 102), series, ("", 1))


def test_a_tile_has_no_number_where_the_servers_metrics_are_missing(yields):
    for tile in range(101, 108):
        assert yields(expression("oncall.json", tile), [])
    assert yields(expression("oncall.json", 108), [], ("", -1))


@pytest.mark.parametrize(
    ("series", "status"),
    [
        ([(f'optwatch_fleet_run_status{{{RUN}, status="running"}}', 1)], 3),
        ([(f'optwatch_fleet_run_status{{{RUN}, status="lost"}}', 1)], 0),
        ([(f'optwatch_fleet_run_status{{{RUN}, status="failed"}}', 1)], None),
        ([(f'optwatch_fleet_run_status{{{RUN}, status="running"}}', 1), (FIRING + f'"A", {RUN}}}', 1)], 1),
        ([(f'optwatch_fleet_run_status{{{RUN}, status="running"}}', 1), (FIRING + f'"A", {OTHER}}}', 1)], 3),
        (
            [
                (f'optwatch_fleet_run_status{{{RUN}, status="running"}}', 1),
                (f"optwatch_fleet_run_promised_until_timestamp_seconds{{{RUN}}}", 601),
            ],
            2,
        ),
        (
            [
                (f'optwatch_fleet_run_status{{{RUN}, status="running"}}', 1),
                (f"optwatch_fleet_run_promised_until_timestamp_seconds{{{RUN}}}", 600),
            ],
            3,
        ),
    ],
    ids=["runs", "is lost", "has failed", "pages", "another pages", "has promised silence", "had promised silence"],
)
def test_the_status_of_a_run_that(yields, series, status):
    assert yields(
        expression("oncall.json", 111), series, *([] if status is None else [('run_id="a-1", team="t"', status)])
    )


def test_two_replicas_of_the_server_count_a_run_once(yields):
    series = [(f'optwatch_fleet_run_status{{{RUN}, status="running", instance="{name}"}}', 1) for name in ("x", "y")]
    assert yields(expression("oncall.json", 107), series, ("", 1))


@pytest.mark.parametrize(
    ("spikes", "shown"),
    [("0", False), ("0x20 1", True), ("_x25 1", True), ("1", False), ("1x20 2", True), ("3x5 0x25 1", True)],
    ids=[
        "no spike",
        "a spike within the range",
        "a spike before the first scrape",
        "a spike before the range only",
        "a spike before the range and one within",
        "a restart and a spike within the range",
    ],
)
def test_the_gradient_norm_is_shown_of_a_run_with(yields, spikes, shown):
    who = 'run_id="a-1", rank="0"'
    series = [(f"optwatch_grad_norm{{{who}}}", 7), (f'optwatch_run_info{{{who}, project="p"}}', 1)]
    series += [(f'optwatch_spikes_total{{{who}, signal="grad_norm"}}', spikes)]
    series += [(f'optwatch_spikes_total{{{who}, signal="loss"}}', "0x20 1")]
    samples = [('run_id="a-1"', 7)] if shown else []
    assert yields(expression("oncall.json", 122, time_range="5m"), series, *samples)


@pytest.mark.parametrize("name", ["oncall.json", "executive.json"])
def test_failed_and_lost_runs_are_listed_with_their_cause(yields, name):
    series = [
        (f"{ENDED}{{{RUN}}}", 400),
        (f'optwatch_fleet_run_failed{{{RUN}, cause="crashed"}}', 1),
        (f"{BEAT}{{{OTHER}}}", 500),
        (f"optwatch_fleet_run_lost{{{OTHER}}}", 1),
        (f'{ENDED}{{run_id="c-3", run="c", project="p", team="t"}}', 450),
    ]
    rows = [(f'cause="crashed", {WHOSE}', 400_000), ('cause="lost", run_id="b-2", project="q", team="u"', 500_000)]
    assert yields(expression(name, 201), series, *rows)


def test_the_longest_runs_are_those_that_ended_and_those_that_run_still(yields):
    series = [
        (f"{STARTED}{{{RUN}}}", 100),
        (f"{ENDED}{{{RUN}}}", 400),
        (f"{STARTED}{{{OTHER}}}", 200),
        (f'optwatch_fleet_run_status{{{OTHER}, status="running"}}', 1),
    ]
    rows = [(WHOSE, 300), ('run_id="b-2", project="q", team="u"', 400)]
    assert yields(expression("executive.json", 202), series, *rows)


def test_a_query_that_yields_something_else_is_found(yields):
    with pytest.raises(AssertionError, match="got:"):
        yields(expression("oncall.json", 108), [], ("", 0))


def test_a_norm_of_the_whole_model_is_rank_0_s_and_needs_no_sums(yields):
    series = [('optwatch_weight_norm{run_id="a-1", rank="0"}', 5)]
    assert yields(expression("debug.json", 205), series, ('run_id="a-1"', 5))
    # Parts that are still there from before do not count beside it.
    series += [
        (f'optwatch_shard_contribution{{run_id="a-1", rank="{r}", quantity="weight_squares"}}', 50) for r in (0, 1)
    ]
    assert yields(expression("debug.json", 205), series, ('run_id="a-1"', 5))


def part(rank, quantity, value, layer=""):
    name = "optwatch_layer_shard_contribution" if layer else "optwatch_shard_contribution"
    return f'{name}{{run_id="a-1", rank="{rank}", quantity="{quantity}"{layer}}}', value


PAIR = [(f'optwatch_run_info{{run_id="a-1", rank="{rank}", world_size="2"}}', 1) for rank in (0, 1)]


def test_where_ranks_export_their_parts_norms_and_means_are_those_of_all_ranks_whichever_are_chosen(yields):
    series = [*PAIR, part(0, "weight_squares", 9), part(1, "weight_squares", 16)]
    assert yields(expression("debug.json", 205), series, ('run_id="a-1"', 5))
    series = [*PAIR, part(0, "second_moment", 1), part(1, "second_moment", 2)]
    series += [part(0, "second_moment_entries", 4), part(1, "second_moment_entries", 8)]
    assert yields(expression("debug.json", 402), series, ('run_id="a-1"', 0.25))
    series = [*PAIR, *(part(rank, "gradient_squares", 5000) for rank in (0, 1))]
    series += [part(rank, "gradient_squares", 5000, ', layer="h.1"') for rank in (0, 1)]
    assert yields(expression("debug.json", 501), series, ('layer="h.01"', 2))


def test_the_sum_of_some_ranks_is_shown_as_nothing_and_not_as_the_model_s(yields):
    assert yields(expression("debug.json", 205), [*PAIR, part(0, "weight_squares", 9)])
    layers = [part(0, "gradient_squares", 5000), part(0, "gradient_squares", 5000, ', layer="h.1"')]
    assert yields(expression("debug.json", 501), [*PAIR, *layers])


def test_the_highest_and_lowest_loss_of_ranks_are_there_once_there_are_two(yields):
    series = [('optwatch_loss{run_id="a-1", rank="0"}', 2)]
    assert yields(expression("debug.json", 201, "B"), series)
    series += [('optwatch_loss{run_id="a-1", rank="1"}', 3)]
    assert yields(expression("debug.json", 201, "B"), series, ('run_id="a-1"', 3))
    assert yields(expression("debug.json", 201, "C"), series, ('run_id="a-1"', 2))
