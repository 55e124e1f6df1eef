"""What a resumed training state has in common with the saved one, and what not. Arithmetic on fingerprints only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .digest import Digest
from .findings import Fault, Finding, Item
from .fingerprint import Fingerprint, OptimizerPrint, ParameterPrint

MOST_CHANGE = 2.0
"""Factor by which a scheduled hyper-parameter may differ from the saved one: it has gone on by one step at most, and
the first steps of a linear warm-up double the rate."""
FLOATING_BITS = {"float64": 64, "float32": 32, "bfloat16": 16, "float16": 16}
IMPLIED = ("initial_lr",)
"""Hyper-parameters that are only copies of others."""


@dataclass(slots=True)
class Comparison:
    """The outcome: faults, and what differs on purpose."""

    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Differences that are no faults, for the log."""
    compared: int = 0
    """Tensors that were compared."""
    unrelated: bool = False
    """Nothing of the one is in the other: they are different trainings, and nothing is said of them."""


class _Items:
    """Items by fault, in the order in which faults are met."""

    def __init__(self) -> None:
        self._items: defaultdict[Fault, list[Item]] = defaultdict(list)

    def add(self, fault: Fault, name: str, expected: object, found: object) -> None:
        self._items[fault].append(Item(name, str(expected), str(found)))

    def findings(self, optimizer: str) -> list[Finding]:
        return [Finding(fault, tuple(items), optimizer) for fault, items in self._items.items()]


def compare(saved: Fingerprint, found: Fingerprint, *, changed_since: bool = False) -> Comparison:
    """Compare what was saved with what is there before the first step. Optimizers are paired by name.

    ``changed_since`` says that the checkpoint is no longer the file that was fingerprinted: then a state without a
    single weight of the saved one is taken for another checkpoint of that name, and not for a fault. Generators are
    compared elsewhere (`generators.reachable`).
    """
    outcome = Comparison()
    by_name = {optimizer.name: optimizer for optimizer in saved.optimizers}
    pairs = [(by_name[now.name], now) for now in found.optimizers if now.name in by_name]
    same_shards = saved.world_size == found.world_size
    if not same_shards:
        outcome.notes.append(
            f"saved by {saved.world_size} ranks, resumed by {found.world_size}: tensors of another shape"
        )
    if not any(_common(before, now) for before, now in pairs):
        outcome.unrelated = True
        return outcome
    for before, now in pairs:
        one = _OneOptimizer(before, now, outcome)
        if changed_since and one.no_weight_is_the_same():
            outcome.unrelated = True
            return outcome
        offset = _schedulers(saved, found, before, now, outcome)
        one.weights()
        one.state()
        one.hyperparameters(saved, found, offset)
        outcome.findings += one.items.findings(now.name)
    _frozen(saved, found, outcome)
    for scale, scale_now in zip(saved.scalers, found.scalers, strict=False):
        if scale_now > scale:  # it may have halved on an overflow since
            outcome.findings.append(Finding("scaler_reset", (Item("scale", f"{scale:g}", f"{scale_now:g}"),)))
    return outcome


def _common(before: OptimizerPrint, now: OptimizerPrint) -> bool:
    """Whether two prints can be of one training: some parameter has the same name or place, and the same shape."""
    if before.named and now.named:
        shapes = {p.name: _shapes(p.weight) for p in before.parameters}
        return any(p.name in shapes and shapes[p.name] == _shapes(p.weight) for p in now.parameters)
    return any(_shapes(a.weight) == _shapes(b.weight) for a, b in zip(before.parameters, now.parameters, strict=False))


class _OneOptimizer:
    """The parts of the comparison that are about one optimizer."""

    def __init__(self, before: OptimizerPrint, now: OptimizerPrint, outcome: Comparison) -> None:
        self.before = before
        self.now = now
        self.outcome = outcome
        self.items = _Items()
        self._owners: defaultdict[object, list[str]] = defaultdict(list)
        """Names of the saved parameters that a weight, or a state under its key, belonged to."""
        self._groups = {p.name: p.group for p in before.parameters}
        for p in before.parameters:
            self._owners[_contents(p.weight)].append(p.name)
            for key, digest in p.state.items():
                self._owners[key, digest.contents].append(p.name)
        self._pairs = [(old, new) for i, new in enumerate(now.parameters) if (old := self._counterpart(i, new))]

    def _counterpart(self, position: int, new: ParameterPrint) -> ParameterPrint | None:
        """The saved parameter that this one is: by the model's name for it, else by its weight, else by its place."""
        by_name = {p.name: p for p in self.before.parameters}
        if self.before.named and self.now.named:
            return by_name.get(new.name)
        at = self.before.parameters[position] if position < len(self.before.parameters) else None
        owners = self._owners.get(_contents(new.weight), [])
        if len(owners) == 1 and (at is None or at.name not in owners):
            return by_name[owners[0]]
        return at

    def no_weight_is_the_same(self) -> bool:
        return not any(_contents(new.weight) in self._owners for _, new in self._pairs)

    def weights(self) -> None:
        different = [(old, new) for old, new in self._pairs if _contents(old.weight) != _contents(new.weight)]
        shapes_differ = [pair for pair in different if _shapes(pair[0].weight) != _shapes(pair[1].weight)]
        self.outcome.compared += len(self._pairs) - len(shapes_differ)
        if shapes_differ:
            names = ", ".join(new.name for _, new in shapes_differ[:3])
            self.outcome.notes.append(f"{len(shapes_differ)} weights have another shape and were not compared: {names}")
        for old, new in different:
            if (old, new) in shapes_differ:
                continue
            owners = self._owners.get(_contents(new.weight), [])
            if owners and not any(_is_trivial(d) for d in new.weight.values()):
                self._permuted([(old, new, "weight", owners)])
                continue
            for part, digest in new.weight.items():
                self._changed(f"{new.name}{part}", old.weight[part], digest, weight=True)
        if len(self._pairs) > 1 and self._all_changed(different):
            self.items = _Items()
            old, new = different[0]
            self.items.add("weights_not_loaded", new.name, _norms(old.weight), _norms(new.weight))

    def _all_changed(self, different: list[tuple[ParameterPrint, ParameterPrint]]) -> bool:
        """Whether no weight is the saved one, whatever place or dtype it has now. Constant tensors tell nothing."""
        telling = [new for old, new in self._pairs if not any(_is_trivial(d) for d in old.weight.values())]
        return (
            bool(telling)
            and len(telling) <= len(different)
            and not any(_contents(new.weight) in self._owners for new in telling)
            and not any(
                _rounded(old.weight[part], digest) or old.weight[part].dtype != digest.dtype
                for old, new in different
                for part, digest in new.weight.items()
                if part in old.weight
            )
        )

    def state(self) -> None:
        permuted: list[tuple[ParameterPrint, ParameterPrint, str, list[str]]] = []
        for old, new in self._pairs:
            for key, digest in old.state.items():
                there = new.state.get(key)
                label = f"{new.name}: {key}"
                if there is None:
                    fault: Fault = "masters_missing" if _is_master(key, digest, old) else "moments_missing"
                    self.items.add(fault, label, _described(digest), "nothing")
                elif there.shape != digest.shape:
                    continue
                else:
                    self.outcome.compared += 1
                    if there.contents == digest.contents:
                        continue
                    owners = self._owners.get((key, there.contents), [])
                    if owners and there.norm:
                        permuted.append((old, new, key, owners))
                    elif digest.norm and not there.norm:
                        self.items.add("moments_missing", label, _described(digest), "zeros")
                    else:
                        self._changed(label, digest, there, master=_is_master(key, digest, old))
            if old.step != new.step and not (new.step is None and not new.state and old.state):
                self.items.add("step_changed", f"{new.name}: step", _count(old.step), _count(new.step))
        self._permuted(permuted)

    def _permuted(self, found: list[tuple[ParameterPrint, ParameterPrint, str, list[str]]]) -> None:
        """Tensors that now belong to another parameter: of whole groups that changed places, or of single ones."""
        across = all(self._groups[owner] != old.group for old, _, _, owners in found for owner in owners)
        fault: Fault = "groups_swapped" if across and len(self.before.groups) > 1 else "parameters_reordered"
        for _, new, key, owners in found:
            self.items.add(fault, f"{new.name}: {key}", "its own", f"that of {' or '.join(owners[:3])}")

    def _changed(self, label: str, old: Digest, new: Digest, *, weight: bool = False, master: bool = False) -> None:
        """A tensor whose bits differ, in place: cast, rounded, or something else altogether."""
        before, now = FLOATING_BITS.get(old.dtype), FLOATING_BITS.get(new.dtype)
        if old.dtype != new.dtype and before and now and _close(old.norm, new.norm):
            if now > before:
                self.outcome.notes.append(f"{label} was {old.dtype} and is {new.dtype}, which loses nothing")
            else:
                self.items.add("masters_missing" if master else "dtype_cast", label, old.dtype, new.dtype)
        elif _rounded(old, new):
            fault: Fault = "masters_missing" if weight or master else "dtype_cast"
            self.items.add(fault, label, _described(old), "the same rounded to 16 bits")
        else:
            self.items.add("contents_changed", label, _described(old), _described(new))

    def hyperparameters(self, saved: Fingerprint, found: Fingerprint, offset: bool) -> None:
        groups: defaultdict[int, set[int]] = defaultdict(set)
        for old, new in self._pairs:
            groups[new.group].add(old.group)
        for at, origins in groups.items():
            if len(origins) > 1:
                self.outcome.notes.append(f"group {at} joins parameters of the saved groups {sorted(origins)}")
                continue
            origin = origins.pop()
            expected, values = self.before.groups[origin], self.now.groups[at]
            different = [
                key
                for key in expected
                if key in values
                and key not in IMPLIED
                and not self._as_expected(key, origin, expected[key], values[key])
            ]
            twin = next((i for i, other in enumerate(self.before.groups) if i != origin and _same(other, values)), None)
            if different and twin is not None:
                key = different[0]
                told = f"{key} = {_value(expected[key])}", f"{_value(values[key])}, as group {twin} had"
                self.items.add("groups_swapped", f"group {at}", *told)
                continue
            for key in different:
                if key == "lr" and (offset or self._set_by_scheduler(saved, found, at, values[key])):
                    continue
                name = f"group {at}: {key}"
                self.items.add("hyperparameters_overwritten", name, _value(expected[key]), _value(values[key]))
            self._constructed(at, expected, values)

    def _as_expected(self, key: str, group: int, before: Any, now: Any) -> bool:
        if before == now:
            return True
        if key not in self.before.scheduled[group]:
            return False
        return all(
            isinstance(a, (int, float))
            and isinstance(b, (int, float))
            and (a == 0 or a == b or 1 / MOST_CHANGE <= b / a <= MOST_CHANGE)
            for a, b in zip(_listed(before), _listed(now), strict=False)
        )

    def _set_by_scheduler(self, saved: Fingerprint, found: Fingerprint, group: int, rate: Any) -> bool:
        """Whether a scheduler that is not the saved one gives this rate: then it is meant."""
        known = [(s["kind"], s["base_lrs"]) for s in saved.schedulers if s["optimizer"] == self.now.name]
        for scheduler in found.schedulers:
            rates = scheduler["last_lrs"]
            if scheduler["optimizer"] != self.now.name or (scheduler["kind"], scheduler["base_lrs"]) in known:
                continue
            if group < len(rates) and rates[group] == rate:
                self.outcome.notes.append(f"group {group}: lr is {_value(rate)}, which a new {scheduler['kind']} sets")
                return True
        return False

    def _constructed(self, group: int, expected: Mapping[str, Any], values: Mapping[str, Any]) -> None:
        """What the optimizer was constructed with this time, and lost again to the saved value."""
        for key, made_with in self.now.defaults.items():
            before = self.before.defaults.get(key)
            own = key != "lr" and expected.get(key) != before  # the group has a value of its own
            if key not in values or before is None or made_with == before or own:
                continue
            if values[key] == expected.get(key) and values[key] != made_with:
                told = f"{_value(values[key])} (the optimizer was constructed with {_value(made_with)})"
                self.items.add("hyperparameters_overwritten", f"group {group}: {key}", _value(expected[key]), told)


def _schedulers(
    saved: Fingerprint, found: Fingerprint, before: OptimizerPrint, now: OptimizerPrint, outcome: Comparison
) -> bool:
    """Compare the schedulers of one optimizer; True where one is off, which explains a rate that is."""
    items = []
    # One that is stepped before the optimizer has gone on by one since it was saved; the last step then used the rate
    # that stood there when it was saved.
    rates = [group.get("lr") for group in before.groups]
    before_step = bool(before.rates_used) and before.rates_used == rates
    theirs = [s for s in found.schedulers if s["optimizer"] == now.name]
    for scheduler in saved.schedulers:
        if scheduler["optimizer"] != before.name:
            continue
        expected = scheduler["last_epoch"]
        epochs = {s["last_epoch"] for s in theirs if s["kind"] == scheduler["kind"]}
        if not epochs and theirs:
            outcome.notes.append(f"a {scheduler['kind']} was saved, and the optimizer has a {theirs[0]['kind']} now")
        elif not epochs & ({expected, expected + 1} if before_step else {expected}):
            there = " and ".join(f"step {epoch}" for epoch in sorted(epochs)) or "no scheduler"
            items.append(Item(scheduler["kind"], f"step {expected}", there))
    if items:
        outcome.findings.append(Finding("scheduler_offset", tuple(items), now.name))
    return bool(items)


def _frozen(saved: Fingerprint, found: Fingerprint, outcome: Comparison) -> None:
    items = _Items()
    common = [
        (name, saved.frozen[name], now)
        for name, now in found.frozen.items()
        if name in saved.frozen and saved.frozen[name].shape == now.shape and saved.frozen[name].dtype == now.dtype
    ]
    outcome.compared += len(common)
    for name, before, now in common:
        if before.contents != now.contents:
            items.add("contents_changed", f"{name} (frozen)", _described(before), _described(now))
    outcome.findings += items.findings("")


def _contents(weight: Mapping[str, Digest]) -> tuple[object, ...]:
    return tuple((part, digest.contents) for part, digest in sorted(weight.items()))


def _shapes(weight: Mapping[str, Digest]) -> dict[str, tuple[int, ...]]:
    return {part: digest.shape for part, digest in weight.items()}


def _is_trivial(digest: Digest) -> bool:
    """Whether many tensors look like this one: all zeros, or a single element."""
    return digest.total == digest.weighted == 0 or digest.shape in ((), (1,))


def _is_master(key: str, digest: Digest, parameter: ParameterPrint) -> bool:
    """Whether a state tensor is a wider copy of its 16-bit parameter."""
    weight = parameter.weight.get("")
    wider = weight is not None and FLOATING_BITS.get(digest.dtype, 0) > FLOATING_BITS.get(weight.dtype, 64)
    return "master" in key or (wider and weight is not None and bool(weight.norm) and _close(weight.norm, digest.norm))


def _rounded(old: Digest, new: Digest) -> bool:
    return new.rounded and old.dtype == new.dtype and old.shape == new.shape and _close(old.norm, new.norm)


def _close(a: float, b: float) -> bool:
    """Whether two norms differ by no more than rounding to 16 bits makes: 2^-8 an element, and some underflow."""
    return abs(a - b) <= 0.01 * max(abs(a), abs(b))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return all(one.get(key) == value for key, value in other.items() if key not in IMPLIED)


def _described(digest: Digest) -> str:
    return f"{digest.dtype} {list(digest.shape)} of norm {digest.norm:.6g}"


def _norms(weight: Mapping[str, Digest]) -> str:
    return ", ".join(_described(digest) for digest in weight.values())


def _count(step: float | None) -> str:
    return "none" if step is None else f"{step:g}"


def _value(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _listed(value: Any) -> Iterable[Any]:
    return value if isinstance(value, (list, tuple)) else [value]
