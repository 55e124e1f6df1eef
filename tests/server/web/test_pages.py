import re
from html.parser import HTMLParser

import pytest

from optwatch_server.web.pages import ago, utc

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"
VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """The text and the elements of a page, and whether every element is closed where it should be."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.text = " ".join(f"{self.text} {data}".split())

    def links(self) -> list[str]:
        return [str(attrs["href"]) for tag, attrs in self.elements if tag == "a"]


def page(live, path: str, status: int = 200) -> Page:
    answer = live.page(path)
    assert answer.status_code == status
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    return Page(answer.text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "just now"), (0.9, "just now"), (12, "12 s ago"), (119, "119 s ago"), (120, "2 min ago"), (7200, "2 h ago")],
)
def test_a_time_is_said_in_the_largest_honest_unit(seconds: float, text: str) -> None:
    assert ago(seconds) == text


def test_a_moment_is_in_utc() -> None:
    assert utc(1_700_000_000.9) == "2023-11-14 22:13:20 UTC"


def test_the_empty_list_says_how_a_run_gets_there(small) -> None:
    assert "No run yet" in page(small, "/").text


def test_the_list_shows_what_an_on_call_engineer_looks_for(live) -> None:
    live.run(name="llama", project="pretraining", team="language")
    live.beat(step=7, values={"loss": "NaN"})
    live.beat(rank=1, step=8, values={"loss": 1.0})
    live.events(live.event(), live.event(severity="warning"))
    live.clock.now += 12
    text = page(live, "/").text
    assert "running llama run-1 pretraining language 8 NaN 12 s ago 1 critical 2 12 s ago" in text


def test_the_list_is_filtered_and_paged(small) -> None:
    for number in range(52):
        small.clock.now += 1
        small.run(f"run-{number}", project="a&b" if number else "other")
    first = page(small, "/?project=a%26b")
    assert [link for link in first.links() if link.startswith("/runs/")][0::49] == ["/runs/run-51", "/runs/run-2"]
    (older,) = [link for link in first.links() if "after=" in link]
    assert [link for link in page(small, older).links() if link.startswith("/runs/")] == ["/runs/run-1"]
    assert "No run fits" in page(small, "/?status=failed").text
    assert "status is 'gone': choose one of running, lost" in page(small, "/?status=gone", 422).text


def test_a_run_that_is_well_shows_no_incident(small) -> None:
    small.run(hyperparameters={"lr": 3e-4}, tags={"owner": "mira"}, versions={"torch": "2.13.0"}, optimizer="AdamW")
    small.beat(step=7, values={"loss": 2.5}, metrics_target="node-1:9100")
    got = page(small, "/runs/run-1")
    assert not [attrs for _, attrs in got.elements if "incident" in str(attrs.get("class"))]
    for text in (
        "running",
        "last step 7",
        "loss 2.5",
        "lr 0.0003",
        "owner mira",
        "torch 2.13.0",
        "AdamW",
        "node-1:9100",
    ):
        assert text in got.text


def test_a_lost_run_says_first_what_where_since_when_and_what_to_do(live, serving) -> None:
    live.run(world_size=2)
    live.beat(rank=0, step=9, metrics_target="node-1:9100")
    live.beat(rank=1, step=8, metrics_target="node-2:9100")
    live.advance(20)
    live.beat(rank=0, step=12, metrics_target="node-1:9100")
    live.advance(10)
    text = page(live, "/runs/run-1").text
    incident = text[text.index("Lost: no heartbeat") : text.index("Events")]
    assert "rank 1 fell silent at step 8, having promised a heartbeat every 10 s" in incident
    assert "rank 1 of 2 on node-2" in incident
    assert "2023-11-14 22:13:20 UTC (30 s ago) last heartbeat" in incident
    assert "Open the runbook TrainingRunLost" in incident


def test_the_first_steps_of_the_runbook_stand_beside_the_incident(small) -> None:
    small.run()
    small.advance(30)
    got = page(small, "/runs/run-1")
    assert "it never sent a heartbeat, though it promised one every 10 s" in got.text
    assert "Look at the node." in got.text
    assert "/runbooks/TrainingRunLost" in got.links()


def test_a_failed_run_shows_its_reason_and_the_event_that_explains_it(small) -> None:
    small.run(host="node-1", pid=77)
    small.events(
        small.event(
            summary="the gradient is NaN",
            likely="too high a rate",
            runbook="TrainingNonFinite",
            details={"layer": "h.11.mlp", "norms": [1, "Infinity"]},
        )
    )
    small.finish(status="failed", reason="RuntimeError: loss became NaN", final_step=7)
    got = page(small, "/runs/run-1")
    for text in (
        "Failed What RuntimeError: loss became NaN Where node-1 (pid 77) Since",
        "Last step 7 Likely the gradient is NaN (step 7)",
        "Critical event: nonfinite What the gradient is NaN Where layer h.11.mlp, rank 0, node-1 (pid 77)",
        "Likely too high a rate",
    ):
        assert text in got.text
    assert got.text.count("Open the runbook TrainingNonFinite") == 1


def test_a_run_that_succeeded_on_a_nan_still_says_so(small) -> None:
    small.run()
    small.events(small.event(summary="the loss is NaN"))
    small.finish()
    assert "Critical event: nonfinite What the loss is NaN" in page(small, "/runs/run-1").text


def test_a_run_that_came_back_says_since_when(small) -> None:
    small.run(started_at=small.clock.now - 3600)
    small.beat()
    assert "Running since 2023-11-14 21:13:20 UTC (60 min ago)" in page(small, "/runs/run-1").text
    small.advance(30)
    small.beat()
    assert "Running again since 2023-11-14 22:13:50 UTC (just now)" in page(small, "/runs/run-1").text


def test_a_runbook_that_is_not_shipped_is_named_without_a_dead_link(small) -> None:
    small.run()
    small.events(small.event(runbook="TrainingUnknown"))
    got = page(small, "/runs/run-1")
    assert "The runbook TrainingUnknown is not shipped with this version" in got.text
    assert "/runbooks/TrainingUnknown" not in got.links()


@pytest.mark.parametrize(
    "path", ["/", "/runs/run-1", "/?project=%3Cscript%3E", "/runs/%3Cscript%3E", "/runbooks/%3Cb%3E"]
)
def test_everything_a_user_supplies_is_escaped(small, path: str) -> None:
    text = dict.fromkeys(("name", "project", "team", "optimizer", "device", "code_version", "host"), HOSTILE)
    small.run(**text, tags={HOSTILE: HOSTILE}, hyperparameters={HOSTILE: HOSTILE}, versions={HOSTILE: HOSTILE})
    small.beat(values={HOSTILE: 1}, promise_seconds=1, promise_reason=HOSTILE)
    small.events(small.event(summary=HOSTILE, likely=HOSTILE, details={HOSTILE: HOSTILE, "layer": HOSTILE}))
    small.finish(status="failed", reason=HOSTILE)
    got = page(small, path, 404 if "%3C" in path and "project" not in path else 200)
    assert not {tag for tag, _ in got.elements} & {"script", "img", "b"}
    assert not [name for _, attrs in got.elements for name in attrs if name.startswith("on")]


def test_no_page_needs_the_internet_or_a_script(small) -> None:
    small.run()
    for path in ("/", "/runs/run-1", "/runbooks", "/runbooks/TrainingRunLost", "/nowhere"):
        answer = small.page(path)
        assert not re.search(r"""(src|href|url)\s*[=(]\s*["']?(https?:)?//""", answer.text)
        assert "script-src" not in answer.headers["content-security-policy"]
        assert answer.headers["content-security-policy"].startswith("default-src 'none'")


@pytest.mark.parametrize("path", ["/", "/runs/run-1", "/runbooks", "/runbooks/TrainingRunLost", "/nowhere"])
def test_a_page_has_a_language_a_title_one_main_heading_and_both_colour_schemes(small, path: str) -> None:
    small.run()
    answer = small.page(path)
    got = Page(answer.text)
    assert ("html", {"lang": "en"}) in got.elements
    assert [tag for tag, _ in got.elements].count("h1") == 1
    assert re.search(r"<title>[^<]+ · optwatch</title>", answer.text)
    assert "prefers-color-scheme: dark" in answer.text
    assert all("scope" in attrs for tag, attrs in got.elements if tag == "th")


def test_runbooks_are_listed_and_link_to_each_other(small) -> None:
    assert page(small, "/runbooks").links()[-2:] == ["/runbooks/TrainingNonFinite", "/runbooks/TrainingRunLost"]
    assert "/runbooks/TrainingRunLost#mitigation" in page(small, "/runbooks/TrainingNonFinite").links()


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("/runs/nobody", "no run 'nobody' is known here"),
        ("/runs/-", "no run '-' is known here"),
        ("/runbooks/Nothing", "no runbook 'Nothing' is shipped with this version: all of them are at /runbooks"),
        ("/nowhere", "GET /nowhere does not exist"),
    ],
)
def test_what_is_not_there_is_a_page_that_leads_back(small, path: str, told: str) -> None:
    got = page(small, path, 404)
    assert told in got.text
    assert "/" in got.links()
    assert small.client.get(path).headers["content-type"] == "application/problem+json"
