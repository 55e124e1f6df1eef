"""Every house rule is shown able to fail: it passes the real dashboard and finds each way of breaking it."""

import json
from pathlib import Path

import pytest
from dashboards import lint, promql

GENERATED = Path(__file__).resolve().parents[2] / "dashboards" / "generated"


@pytest.fixture
def document():
    return json.loads((GENERATED / "debug.json").read_text(encoding="utf-8"))


def panel(document, number):
    return next(p for p in document["panels"] if p["id"] == number)


@pytest.fixture
def known(labels):
    return lambda document: lint.known(document, labels)


def expr(text):
    return lambda d: panel(d, 201)["targets"][0].update(expr=text)


def no_title(d):
    panel(d, 201)["title"] = ""


def no_verdict(d):
    panel(d, 201)["description"] = "The loss."


def no_unit(d):
    del panel(d, 201)["fieldConfig"]["defaults"]["unit"]


def no_thresholds(d):
    panel(d, 101)["fieldConfig"]["defaults"]["thresholds"]["steps"] = []


def no_legend(d):
    panel(d, 201)["options"]["legend"]["showLegend"] = False


def no_id(d):
    del panel(d, 201)["id"]


def same_id(d):
    panel(d, 202)["id"] = 201


def row_id(d):
    panel(d, 200)["id"] = 201


def over_another(d):
    panel(d, 202)["gridPos"]["x"] -= 1


def out_of_the_grid(d):
    panel(d, 202)["gridPos"]["w"] = 13


def editable(d):
    d["editable"] = True


def no_uid(d):
    d["uid"] = None


def rate_of_an_annotation(d):
    d["annotations"]["list"][0]["expr"] = "rate(optwatch_nonfinite_total[1m])"


def no_layer_variable(d):
    d["templating"]["list"].pop()


def no_step(d):
    del d["annotations"]["list"][0]["step"]


def hidden_link(d):
    d["links"][0]["placement"] = "inControlsMenu"


def fixed_source(d):
    panel(d, 201)["datasource"]["uid"] = "abc"


def fixed_source_of_a_query(d):
    panel(d, 201)["targets"][0]["datasource"]["uid"] = "abc"


def legend_of_no_label(d):
    panel(d, 201)["targets"][0]["legendFormat"] = "{{layer}}"


def annotation_of_no_metric(d):
    d["annotations"]["list"][0]["expr"] = "optwatch_nan_total"


def variable_of_no_metric(d):
    d["templating"]["list"][1]["query"]["query"] = "label_values(optwatch_runs, project)"


def variable_of_no_label(d):
    d["templating"]["list"][1]["query"]["query"] = "label_values(optwatch_run_info, projet)"


@pytest.mark.parametrize(
    ("rule", "break_it", "problem"),
    [
        (lint.described, no_title, "panel 201 ('') has no title"),
        (lint.described, no_verdict, "panel 201 ('Loss') has a description without 'Good: ...'"),
        (lint.described, no_unit, "panel 201 ('Loss') has no unit"),
        (lint.described, no_thresholds, "panel 101 ('Status') is a stat without thresholds"),
        (lint.described, no_legend, "panel 201 ('Loss') hides its legend"),
        (lint.identified, no_id, "panel None ('Loss') has the id None"),
        (lint.identified, same_id, "has an id that another panel has"),
        (lint.identified, row_id, "has an id that another panel has"),
        (lint.placed, over_another, "lies over panel 201 ('Loss')"),
        (lint.placed, out_of_the_grid, "lies outside the 24 columns"),
        (lint.framed, editable, "the dashboard is editable"),
        (lint.framed, no_uid, "the dashboard's uid is None"),
        (lint.framed, no_layer_variable, "the variables are ['datasource', 'project', 'run_id', 'rank']"),
        (lint.framed, no_step, "annotation 'Non-finite' has no step"),
        (lint.framed, hidden_link, "'Executive' has a placement"),
        (lint.framed, fixed_source, "panel 201 ('Loss') reads from"),
        (lint.framed, fixed_source_of_a_query, "panel 201 ('Loss') reads from"),
        ("known", expr("optwatch_lost"), "panel 201 ('Loss') query A asks for optwatch_lost, which no catalogue has"),
        ("known", expr("up"), "asks for up, which no catalogue has"),
        ("known", expr('optwatch_loss{layer="a"}'), "matches optwatch_loss on layer, which it has not"),
        ("known", expr("sum by (layer) (optwatch_loss)"), "uses the label layer, which its series have not"),
        ("known", expr("sum(optwatch_loss) by (layer)"), "uses the label layer"),
        ("known", expr("rate(optwatch_step_duration_seconds[1m])"), "asks for optwatch_step_duration_seconds,"),
        ("known", expr("optwatch_loss * on (run_id) group_left (name) optwatch_run_info"), "uses the label name"),
        ("known", legend_of_no_label, "uses the label layer, which its series have not"),
        ("known", annotation_of_no_metric, "annotation 'Non-finite' asks for optwatch_nan_total"),
        ("known", variable_of_no_metric, "variable 'project' asks for optwatch_runs"),
        ("known", variable_of_no_label, "variable 'project' uses the label projet"),
        (lint.rated, expr("rate(optwatch_steps_total[5m])"), "takes a rate over [5m]: give [$__rate_interval]"),
        (lint.rated, expr("increase(optwatch_steps_total[$__interval])"), "takes a rate over [$__interval]"),
        (lint.rated, expr("increase(optwatch_steps_total[$__range])"), "takes a rate over [$__range]"),
        (lint.rated, rate_of_an_annotation, "annotation 'Non-finite' takes a rate over [1m]"),
        ("known", expr('ALERTS_FOR_STATE{alertstate="firing"}'), "matches ALERTS_FOR_STATE on alertstate"),
    ],
)
def test_the_rule_finds_what_breaks_it(document, known, rule, break_it, problem):
    rule = known if rule == "known" else rule
    assert rule(document) == []
    break_it(document)
    assert any(problem in found for found in rule(document)), rule(document)


@pytest.mark.parametrize("window", ["[1d]", "[30d]", "[$__range] @ end()", "[$__rate_interval]"])
def test_a_rate_over_whole_days_or_up_to_the_end_of_the_range_is_fine(document, window):
    expr(f"increase(optwatch_steps_total{window})")(document)
    assert lint.rated(document) == []


def test_a_rate_over_the_range_is_fine_where_one_value_is_asked_for(document):
    expr("increase(optwatch_steps_total[$__range])")(document)
    panel(document, 201)["targets"][0]["instant"] = True
    assert lint.rated(document) == []


def test_a_page_about_all_runs_ends_its_variables_after_the_project(document):
    del document["templating"]["list"][2:]
    assert lint.framed(document) == []


def test_series_are_told_from_functions_labels_strings_and_keywords():
    text = (
        'histogram_quantile(0.9, sum by (le) (rate(a_bucket{x="b{c}", y=~"$v"}[$__rate_interval])))'
        " / on (run_id) group_left (run) (d offset 5m) or avg without (rank) (e{}) > bool 1e3 unless f @ end()"
    )
    assert list(promql.selectors(text)) == [("a_bucket", {"x", "y"}), ("d", set()), ("e", set()), ("f", set())]
    assert promql.labels_used(text) == {"le", "run_id", "run", "rank"}


def test_a_character_that_promql_has_no_use_for_is_named_with_its_place():
    with pytest.raises(ValueError, match="cannot hold ';' at 1 of 'a;'"):
        promql.tokens("a;")
