"""Each rule of the audit on a configuration that breaks it and on one that does not: real optimizers, real models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lion_pytorch
import pytest
import schedulefree
import torch
from torch import nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode

from optwatch import Settings
from optwatch.audit import AT_ATTACH, OVER_FIRST_STEPS, FirstSteps, Rule, Rules, Subject
from optwatch.audit.steps import STEPS
from optwatch.catalogue import AUDIT_RULES
from optwatch.events import Event

ROOT = Path(__file__).resolve().parents[3]
RULES: list[Rule[Any]] = [rule for rules in (*AT_ATTACH, OVER_FIRST_STEPS) for rule in rules.all]
ONCE = {rule.id: rule for rules in AT_ATTACH for rule in rules.all}
LATER = {rule.id: rule for rule in OVER_FIRST_STEPS.all}


class Net(nn.Module):
    """One of each: an embedding, a matrix, a norm, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.hidden(self.embedding(x))))

    def tie(self) -> Net:
        self.head.weight = self.embedding.weight
        return self


class Attentive(nn.Module):
    """The least model with attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Declared(Net):
    """A model that says, as Hugging Face's do, that its embedding is its head."""

    config = SimpleNamespace(tie_word_embeddings=True)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def copied_head() -> Net:
    net = Net()
    net.head.weight.data = net.embedding.weight.data
    return net


def frozen(net: Net) -> Net:
    net.embedding.requires_grad_(False)
    return net


def groups(*decays: tuple[str, float]) -> Callable[[Net], list[dict[str, Any]]]:
    """Groups of the parameters whose names begin with one of the words, each with its decay."""

    def make(net: Net) -> list[dict[str, Any]]:
        return [
            {"params": [p for n, p in net.named_parameters() if n.endswith(tuple(ends.split()))], "weight_decay": decay}
            for ends, decay in decays
        ]

    return make


def everything(net: nn.Module) -> Any:
    return net.parameters()


@dataclass
class Case:
    """What one rule should find, and what it should not."""

    breaks: Callable[[], Subject]
    keeps: Callable[[], Subject]
    says: str
    """A part of what it says."""


def subject(
    kind: Callable[..., optim.Optimizer],
    given: Callable[[Any], Any] = everything,
    model: Callable[[], nn.Module] = Net,
    *more: Callable[[Any], optim.Optimizer],
    **options: Any,
) -> Callable[[], Subject]:
    def make() -> Subject:
        net = model()
        optimizers = [kind(given(net), **options), *(each(net) for each in more)]
        named = {f"{type(each).__name__}{i or ''}": each for i, each in enumerate(optimizers)}
        return Subject(named, net, model_given=True)

    return make


def on_gpu(**options: Any) -> Callable[[], Subject]:
    """Parameters that say they are on a GPU, on a machine that has none."""

    def make() -> Subject:
        with FakeTensorMode():
            net = nn.ParameterList(nn.Parameter(torch.empty(2, device="cuda")) for _ in range(120))
            return Subject({"AdamW": optim.AdamW(net.parameters(), **options)}, net)

    return make


ADAM, ADAMW, SGD = optim.Adam, optim.AdamW, optim.SGD
MATRICES, REST = "hidden.weight head.weight", "bias norm.weight embedding.weight"
CASES: dict[str, Case] = {
    "coupled-weight-decay": Case(
        subject(ADAM, weight_decay=0.01), subject(ADAMW, weight_decay=0.01), "use torch.optim.AdamW"
    ),
    "epsilon-too-small": Case(
        subject(ADAMW, model=lambda: Net().half()), subject(ADAMW, model=lambda: Net().bfloat16()), "eps=1e-08 is 0"
    ),
    "half-precision-weights": Case(
        subject(ADAMW, model=lambda: Net().bfloat16()), subject(ADAMW), "in bfloat16 without float32 masters"
    ),
    "beta1-too-large": Case(
        subject(ADAMW, betas=(0.999, 0.9)), subject(ADAMW, betas=(0.95, 0.95)), "betas=(0.999, 0.9)"
    ),
    "lion-rate": Case(subject(lion_pytorch.Lion, lr=1e-3), subject(lion_pytorch.Lion, lr=3e-4), "lr=0.001"),
    "adam-rate": Case(subject(ADAMW, lr=0.1), subject(SGD, lr=0.1), "lr=0.1"),
    "decay-too-strong": Case(
        subject(ADAMW, lr=1e-2, weight_decay=1.0), subject(ADAMW, lr=1e-3, weight_decay=1.0), "= 0.01 a step"
    ),
    "momentum-too-large": Case(subject(SGD, momentum=1.0), subject(SGD, momentum=0.99), "momentum=1"),
    "capturable-on-cpu": Case(subject(ADAMW, capturable=True), on_gpu(capturable=True), "leave it out"),
    "differentiable": Case(subject(ADAMW, differentiable=True), subject(ADAMW), "differentiable=True"),
    "slow-loop": Case(on_gpu(foreach=False), on_gpu(foreach=False, fused=True), "120 tensors on a GPU"),
    "sgd-on-attention": Case(subject(SGD, model=Attentive), subject(SGD), "SGD, momentum 0"),
    "parameter-in-no-group": Case(
        subject(ADAMW, lambda net: net.head.parameters()),
        subject(ADAMW, lambda net: net.head.parameters(), lambda: Net().requires_grad_(False)),
        "5 parameters (embedding.weight, hidden.weight, hidden.bias, ...) in no optimizer",
    ),
    "parameter-in-two-groups": Case(
        subject(ADAMW, everything, Net, lambda net: SGD(net.head.parameters())),
        subject(ADAMW, lambda net: net.hidden.parameters(), Net, lambda net: SGD(net.head.parameters())),
        "group 0 of AdamW and group 0 of SGD1: 1 parameter (head.weight) listed twice",
    ),
    "shared-storage": Case(
        subject(ADAMW, model=copied_head),
        subject(ADAMW, model=lambda: Net().tie()),
        "2 parameters (embedding.weight, head.weight) lie in the same memory",
    ),
    "tie-broken": Case(
        subject(ADAMW, model=Declared), subject(ADAMW, model=lambda: Declared().tie()), "Declared: tie_word_embeddings"
    ),
    "empty-group": Case(
        subject(ADAMW, groups((MATRICES, 0.1), ("layer_norm.weight", 0.0))),
        subject(ADAMW, groups((MATRICES, 0.1), ("norm.weight", 0.0))),
        "group 1 of AdamW: has no parameters",
    ),
    "frozen-parameters": Case(
        subject(ADAMW, model=lambda: frozen(Net())), subject(ADAMW), "1 parameter (embedding.weight) with requires_grad"
    ),
    "decay-inverted": Case(
        subject(ADAMW, groups((MATRICES, 0.0), (REST, 0.1))),
        subject(ADAMW, groups((MATRICES, 0.1), (REST, 0.0))),
        "weight decay: on",
    ),
    "decay-on-norms-and-biases": Case(
        subject(ADAMW, groups((f"{MATRICES} {REST}", 0.1))),
        subject(ADAMW, groups((MATRICES, 0.1), (REST, 0.0))),
        "3 parameters (hidden.bias, norm.weight, norm.bias)",
    ),
    "decay-on-embeddings": Case(
        subject(ADAMW), subject(ADAMW, model=lambda: Net().tie()), "weight_decay=0.01 on 1 parameter (embedding.weight)"
    ),
    "muon-on-embeddings": Case(
        subject(optim.Muon, lambda net: [p for p in net.parameters() if p.ndim == 2]),
        subject(optim.Muon, lambda net: [net.hidden.weight]),
        "has 1 parameter (embedding.weight)",
    ),
}


@dataclass
class Training:
    """The first steps of a run. Each callable is asked once a run."""

    model: Callable[[], nn.Module] = Attentive
    optimizer: Callable[..., optim.Optimizer] = ADAMW
    options: tuple[tuple[str, Any], ...] = ()
    schedule: Callable[[int], float] | None = None
    micro_batches: int = 1
    divided: bool = False
    clipped: bool = False
    tokens: float = 0.0
    evaluating: bool = False
    resumed: bool = False

    def run(self, watch: Callable[..., Any]) -> FirstSteps:
        torch.manual_seed(0)
        model = self.model()
        model.train(not self.evaluating)
        optimizer = self.optimizer(model.parameters(), **dict(self.options))
        if callable(train := getattr(optimizer, "train", None)):
            train()
        schedule = self.schedule and optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        if self.resumed:
            step(model, optimizer)
        monitor = watch(optimizer, model=model)
        name = type(optimizer).__name__
        seen = FirstSteps(name, optimizer, Subject({name: optimizer}, model, True), losses_are_told_apart=True)
        seen.tokens = self.tokens * STEPS
        monitor.sinks.append(Recorder(seen))
        for _ in range(STEPS):
            for _ in range(self.micro_batches):
                loss = model(torch.randn(2, 3, 4)).square().mean()
                (loss / self.micro_batches if self.divided else loss).backward()
            if self.clipped:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if schedule:
                schedule.step()
        assert monitor.flush(60)
        assert seen.complete
        return seen


class Recorder:
    def __init__(self, seen: FirstSteps) -> None:
        self.record = seen.add

    def event(self, event: Event) -> None:
        """Not looked at."""


def step(model: nn.Module, optimizer: optim.Optimizer) -> None:
    model(torch.randn(2, 3, 4)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


class Severed(nn.Module):
    """A branch that detach() cuts off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).detach())


def frozen_branch() -> nn.Module:
    model = Severed()
    model.first.requires_grad_(False)
    return model


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1))


def falling(at: int) -> float:
    return 1 - at / 1000


def warming(at: int) -> float:
    return min(1.0, (at + 1) / 20)


FREE = schedulefree.AdamWScheduleFree
TRAININGS: dict[str, tuple[Training, Training, str]] = {
    "learning-rate-zero": (
        Training(options=(("lr", 0.0),)),
        Training(schedule=lambda at: at / 20),  # a warm-up from 0
        "group 0 of AdamW: lr=0 at each of 100 steps",
    ),
    "no-warm-up": (Training(), Training(schedule=warming), "AdamW: lr=0.001 at each"),
    "peak-rate-from-step-1": (Training(schedule=falling), Training(schedule=falling, resumed=True), "lr falls from"),
    "clipping-absent": (Training(), Training(clipped=True), "no clip_grad_norm_ in 100 steps"),
    "accumulation-undivided": (
        Training(optimizer=SGD, micro_batches=4),
        Training(optimizer=SGD, micro_batches=4, divided=True),
        "4 backward() to a step, no loss divided by 4",
    ),
    "second-moment-memory": (
        Training(tokens=4e6),
        Training(tokens=4e6, options=(("betas", (0.9, 0.95)),)),
        "beta2=0.999 at 4e+06 tokens a step",
    ),
    "model-in-evaluation-mode": (
        Training(dropping, evaluating=True),
        Training(dropping),
        "training=False, and it has Dropout",
    ),
    "layer-without-gradient": (Training(Severed), Training(frozen_branch), "no gradient in 100 steps: first"),
    "schedule-free-with-scheduler": (
        Training(optimizer=FREE, schedule=falling),
        Training(optimizer=FREE, options=(("warmup_steps", 20),)),
        "its rate is scheduled",
    ),
}


def findings(rule: Rule[Any], seen: object) -> list[str]:
    return [str(finding) for finding in rule.findings(seen)]


def test_every_rule_has_an_id_of_the_catalogue_a_text_a_source_and_cases() -> None:
    assert [rule.id for rule in RULES] == list(AUDIT_RULES)
    assert len(RULES) >= 20
    assert {rule.id for rule in RULES} == set(CASES) | set(TRAININGS)
    assert all(rule.text.endswith(".") and rule.source.endswith((".", ")")) for rule in RULES)


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_finds_what_breaks_it(rule: str) -> None:
    found = findings(ONCE[rule], CASES[rule].breaks())
    assert len(found) == 1
    assert CASES[rule].says in found[0]
    assert found[0].startswith(f"{rule}: ")


@pytest.mark.parametrize("rule", CASES)
def test_a_rule_is_silent_about_what_keeps_it(rule: str) -> None:
    assert findings(ONCE[rule], CASES[rule].keeps()) == []


@pytest.mark.parametrize(
    "model",
    [Net, Attentive, lambda: nn.LSTM(4, 4), lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))],
    ids=["net", "attention", "recurrence", "convolution"],
)
def test_a_usual_configuration_has_no_warning(model: Callable[[], nn.Module]) -> None:
    for kind, options in ((ADAMW, {}), (ADAM, {}), (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4})):
        seen = subject(kind, model=model, **options)()
        found = [f for rules in AT_ATTACH for f in rules.findings(seen, frozenset(), pytest.fail)]
        assert [f for f in found if f.severity == "warning"] == []


def test_rules_see_the_parameters_that_torch_lists_under_its_names() -> None:
    net = Net().tie()
    net.again = net.hidden
    seen = Subject({}, net)
    assert list(seen.anatomy.parameters.values()) == list(net.named_parameters())
    assert set(seen.anatomy.roles) == set(seen.anatomy.parameters)


def test_an_audit_at_attach_makes_at_most_forty_calls_for_each_parameter() -> None:
    """Whatever the clock says: a walk over the model for each rule made eighty."""
    net = nn.Sequential(*(nn.TransformerEncoderLayer(8, 1, 8) for _ in range(100)))
    seen = subject(ADAMW, model=lambda: net)()
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        found = [f for rules in AT_ATTACH for f in rules.findings(seen, frozenset(), pytest.fail)]
    finally:
        sys.setprofile(None)
    assert found
    assert calls < 40 * len(list(net.parameters()))


@pytest.mark.parametrize("rule", TRAININGS)
def test_a_rule_finds_first_steps_that_break_it(rule: str, watch: Callable[..., Any]) -> None:
    breaks, _, says = TRAININGS[rule]
    found = findings(LATER[rule], breaks.run(watch))
    assert len(found) == 1
    assert says in found[0]


@pytest.mark.parametrize("rule", TRAININGS)
def test_a_rule_is_silent_about_first_steps_that_keep_it(rule: str, watch: Callable[..., Any]) -> None:
    _, keeps, _ = TRAININGS[rule]
    assert findings(LATER[rule], keeps.run(watch)) == []


def test_all_findings_of_an_attach_are_one_event_and_each_is_counted_by_its_rule(
    watch: Callable[..., Any], stand_in: Callable[[], Any], eventually: Callable[..., Any]
) -> None:
    net, server = Net(), stand_in()
    optimizer = ADAM(net.parameters(), weight_decay=0.1, betas=(0.999, 0.9))
    monitor = watch(optimizer, model=net, server=server.url)
    (event,) = eventually(server.events)
    assert (event["kind"], event["severity"], event["runbook"]) == ("audit_finding", "warning", "TrainingAuditFinding")
    found = {each["rule"]: each for each in event["details"]["findings"]}
    assert set(found) == {
        "coupled-weight-decay",
        "beta1-too-large",
        "decay-on-norms-and-biases",
        "decay-on-embeddings",
    }
    assert found["beta1-too-large"]["value"] == "betas=(0.999, 0.9)"
    assert "use torch.optim.AdamW" in event["likely"]
    counted = {k: v for k, v in monitor.snapshot().items() if k.startswith("optwatch_audit_findings")}
    assert counted == {f'optwatch_audit_findings{{rule="{rule}"}}': 1 for rule in found}


def test_the_one_line_alone_audits_the_model_that_it_finds(watch: Callable[..., Any]) -> None:
    net = Net()
    monitor = watch(ADAMW(net.parameters()))
    assert monitor.snapshot()['optwatch_audit_findings{rule="decay-on-embeddings"}'] == 1


def test_first_steps_are_judged_after_a_hundred_of_them_and_once(watch: Callable[..., Any]) -> None:
    model = Attentive()
    optimizer = SGD(model.parameters(), lr=0.0)
    monitor = watch(optimizer, model=model)
    judged = 'optwatch_audit_findings{rule="learning-rate-zero"}'
    counted = 'optwatch_events_total{kind="audit_finding",severity="warning"}'
    for _ in range(STEPS - 1):
        step(model, optimizer)
    assert monitor.flush(60)
    assert (judged in monitor.snapshot(), monitor.snapshot()[counted]) == (False, 0)
    for _ in range(STEPS + 1):
        step(model, optimizer)
    assert monitor.flush(60)
    assert (monitor.snapshot()[judged], monitor.snapshot()[counted]) == (1, 1)


def test_a_rule_is_silenced_by_its_id_and_all_by_all(watch: Callable[..., Any]) -> None:
    def found(silenced: str) -> set[str]:
        net = Net()
        monitor = watch(ADAM(net.parameters(), weight_decay=0.1), model=net, audit_silenced=silenced)
        return {k for k in monitor.snapshot() if k.startswith("optwatch_audit_findings")}

    everything = found("")
    assert found("coupled-weight-decay, empty-group") == everything - {
        'optwatch_audit_findings{rule="coupled-weight-decay"}'
    }
    assert len(everything) > 1
    assert found("all") == set()


def test_an_id_that_no_rule_has_is_refused() -> None:
    with pytest.raises(ValueError, match=r"audit_silenced='coupled': give ids of rules|Settings\(audit_silenced"):
        Settings(audit_silenced="coupled")


def test_a_rank_beyond_the_first_leaves_the_audit_to_it(
    watch: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("OPTWATCH_RUN_ID", "ranks")
    net = Net()
    monitor = watch(ADAM(net.parameters(), weight_decay=0.1), model=net)
    assert not [k for k in monitor.snapshot() if k.startswith("optwatch_audit_findings")]


def test_a_rule_that_raises_costs_only_its_own_findings() -> None:
    rules: Rules[None] = Rules()
    rules.rule("broken", "warning")(lambda seen: 1 / 0)  # type: ignore[arg-type, return-value]
    rules.rule("whole", "info")(lambda seen: [("thing", "value", "fix")])
    faults: list[Exception] = []
    assert [str(f) for f in rules.findings(None, frozenset(), faults.append)] == ["whole: thing: value; fix"]
    assert [type(fault) for fault in faults] == [ZeroDivisionError]


def test_the_page_of_rules_is_what_the_rules_make(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("generate_audit", ROOT / "scripts" / "generate_audit.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main([str(tmp_path / "audit.md")]) == 0
    assert (tmp_path / "audit.md").read_bytes() == (ROOT / "docs" / "audit.md").read_bytes(), (
        "docs/audit.md is out of date: run python scripts/generate_audit.py"
    )


def test_an_epsilon_that_the_audit_warns_of_is_the_nan_that_it_says() -> None:
    net = Net().half()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    ADAMW(net.parameters()).step()
    assert bool(net.head.weight.isnan().all())


def test_capturable_on_a_cpu_raises_as_the_audit_says() -> None:
    net = Net()
    net.head.weight.grad = torch.ones_like(net.head.weight)
    with pytest.raises(AssertionError, match="capturable"):
        ADAMW(net.parameters(), capturable=True).step()
