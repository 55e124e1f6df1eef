"""``optwatch checkpoint verify PATH``: whether a checkpoint is whole, with no training and no trust in it."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import sidecar, stored
from .compare import compare
from .digest import Digest, Digester, digest, parts
from .findings import ADVICE
from .fingerprint import NO_HYPERPARAMETERS, STEP_KEYS, Fingerprint, OptimizerPrint, ParameterPrint
from .stored import Path_, Stored, UnusableError, named

SOUND, DAMAGED, UNUSABLE = 0, 1, 2
BLOCK = 2**22
"""Elements looked at in one go."""
NAMES_TOLD = 5


@dataclass
class Report:
    """What was found."""

    path: str
    format: str = ""
    bytes: int = 0
    tensors: int = 0
    optimizers: list[str] = field(default_factory=list)
    """A sentence each."""
    fingerprint: str = "none beside it: only what the file itself says could be checked"
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def text(self) -> str:
        """The report for a reader."""
        size = f"{self.bytes / 2**20:.1f} MiB" if self.bytes >= 2**20 else f"{self.bytes} bytes"
        lines = [f"{self.path}: {self.format}, {size}, {self.tensors} tensors"]
        lines += [f"  optimizer: {told}" for told in self.optimizers]
        lines += [f"  fingerprint: {self.fingerprint}", *(f"  note: {note}" for note in self.notes)]
        count = len(self.problems)
        lines.append(f"{count} problem{'s' if count > 1 else ''}:" if count else "sound")
        return "\n".join([*lines, *(f"  - {problem}" for problem in self.problems)])


def main(arguments: list[str]) -> int:
    """Run ``optwatch checkpoint``: 0 for a sound checkpoint, 1 for a damaged one, 2 where nothing can be said."""
    parser = argparse.ArgumentParser(prog="optwatch checkpoint", description="Look at checkpoints of training.")
    commands = parser.add_subparsers(dest="command", required=True)
    verify_parser = commands.add_parser(
        "verify",
        help="check that a checkpoint is whole",
        description="Check a file of torch.save or a folder of torch.distributed.checkpoint: readable whole, every "
        "tensor finite, state for each parameter, one step count, and as its fingerprint says where there is one. "
        "Loads tensors and plain containers only. Exit status: 0 sound, 1 damaged, 2 it cannot be told.",
    )
    verify_parser.add_argument("path", type=Path, metavar="PATH")
    verify_parser.add_argument("--json", action="store_true", help="print the report as JSON")
    given = parser.parse_args(arguments)
    try:
        report = verify(given.path)
    except UnusableError as error:
        if given.json:
            print(json.dumps({"path": str(given.path), "error": str(error)}))
        else:
            print(f"optwatch checkpoint verify: {error}", file=sys.stderr)
        return UNUSABLE
    print(json.dumps(asdict(report), indent=2) if given.json else report.text())
    return DAMAGED if report.problems else SOUND


def verify(path: Path) -> Report:
    """Check one checkpoint on the CPU. Reads all of it; a file is mapped, a folder is held in memory.

    Raises:
        UnusableError: there is no checkpoint there, or one that may not be loaded.
    """
    found = stored.read(path)
    report = Report(str(path), found.kind, found.bytes, notes=list(found.notes))
    report.problems += [f"{where}: {what}" for where, what in found.damage]
    if found.content is None:
        return report
    everything = list(stored.tensors(found.content))
    report.tensors = len(everything)
    report.problems += [f"{named(at)} {told}" for at, tensor in everything if (told := _not_finite(tensor))]
    try:
        beside = sidecar.read(path, 0)
    except (OSError, ValueError) as error:
        report.notes.append(str(error))
        beside = None
    optimizers = list(_optimizers(found.content))
    for at, state_dict in optimizers:
        _check_state(at, state_dict, report, exact=beside is not None)
    if beside is not None:
        _against(*beside, found, optimizers, report)
    return report


def _not_finite(tensor: Tensor) -> str | None:
    """What is not finite in a tensor, counted; None where all is."""
    for _, part in parts(tensor):
        if not part.is_floating_point() and not part.is_complex():
            continue
        flat = part.reshape(-1)
        nans = infinities = 0
        for start in range(0, flat.numel(), BLOCK):
            block = flat[start : start + BLOCK]
            block = block.float() if block.element_size() < 2 else block
            nans += int(block.isnan().sum())
            infinities += int(block.isinf().sum())
        if nans or infinities:
            return f"holds {nans} NaN and {infinities} Inf in {flat.numel()} elements"
    return None


def _optimizers(content: Any, at: Path_ = ()) -> Iterator[tuple[Path_, dict[str, Any]]]:
    """Every state dict of an optimizer in the checkpoint."""
    if isinstance(content, dict) and "param_groups" in content:
        yield at, content
    elif isinstance(content, (dict, list, tuple)):
        for key, value in content.items() if isinstance(content, dict) else enumerate(content):
            yield from _optimizers(value, (*at, key))


def _states(state_dict: dict[str, Any]) -> list[tuple[Any, int, dict[str, Any]]]:
    """Id, group and state of each parameter, in the order of the groups."""
    state = state_dict.get("state") or {}
    state = dict(enumerate(state)) if isinstance(state, list) else state
    return [
        (which, g, state.get(which, state.get(str(which), {})) or {})
        for g, group in enumerate(state_dict["param_groups"])
        for which in group["params"]
    ]


def _check_state(at: Path_, state_dict: dict[str, Any], report: Report, *, exact: bool) -> None:
    """State for each parameter, and step counts; ``exact`` where a fingerprint says better what there has to be."""
    states = _states(state_dict)
    keys = {key for _, _, state in states for key in state}
    steps: defaultdict[float, list[Any]] = defaultdict(list)
    for which, _, state in states:
        for key in STEP_KEYS:
            if key in state:
                steps[float(state[key])].append(which)
    told = f"{named(at) if at else 'the file itself'}: {sum(1 for *_, s in states if s)} of {len(states)} parameters"
    told += f" have state ({', '.join(sorted(map(str, keys))) or 'none'})"
    report.optimizers.append(told + (f", step {', '.join(f'{step:g}' for step in sorted(steps)[:4])}" if steps else ""))
    if exact:
        return
    groups = state_dict["param_groups"]
    stateless = all("momentum" in group and not group["momentum"] for group in groups)
    where = f"{named(at)}: " if at else ""
    if not keys and states and not stateless:
        report.problems.append(f"{where}no parameter has optimizer state")
    for key in sorted(keys, key=str):
        lacking = [which for which, _, state in states if key not in state]
        if lacking:
            report.problems.append(f"{where}{key} is missing for {_some(lacking)} of {len(states)} parameters")
    if len(steps) > 1:
        most = max(steps, key=lambda step: len(steps[step]))
        others = [which for step, ids in steps.items() if step != most for which in ids]
        counts = ", ".join(f"{step:g}" for step in sorted(steps)[:4])
        report.problems.append(f"{where}step counts differ ({counts}): {_some(others)} not at {most:g}")


def _some(which: list[Any]) -> str:
    shown = ", ".join(map(str, which[:NAMES_TOLD]))
    return f"parameters {shown}" + (f" and {len(which) - NAMES_TOLD} more" if len(which) > NAMES_TOLD else "")


def _against(
    saved: Fingerprint,
    unchanged: bool,
    found: Stored,
    optimizers: list[tuple[Path_, dict[str, Any]]],
    report: Report,
) -> None:
    """Compare the checkpoint with its fingerprint, as a resumed run would be."""
    digests = _Digests(found.content, [at for at, _ in optimizers])
    # A buffer is stored like a weight; only a forward pass could change one, and there is none here.
    saved.frozen |= saved.buffers
    stored_as = Fingerprint(saved.run_id, saved.rank, saved.world_size, saved.step, scalers=[])
    stored_as.frozen = {name: d for name, old in saved.frozen.items() if (d := digests.of(name, old)) is not None}
    lost = []
    for before in saved.optimizers:
        state_dict = next((s for _, s in optimizers if len(_states(s)) == len(before.parameters)), None)
        if state_dict is None:
            report.notes.append(f"no optimizer in it has the {len(before.parameters)} parameters of {before.name}")
            continue
        optimizers = [(at, s) for at, s in optimizers if s is not state_dict]
        now = _optimizer(before, state_dict, digests)
        lost += [p.name for p in now.parameters if not p.weight]
        for old, new in zip(before.parameters, now.parameters, strict=True):
            new.weight = new.weight or old.weight
        stored_as.optimizers.append(now)
    stored_as.schedulers = _schedulers(saved, found.content)
    outcome = compare(saved, stored_as, changed_since=not unchanged)
    when = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(saved.taken_at))
    of = f"of step {saved.step} of run {saved.run_id}, {when}"
    if outcome.unrelated:
        report.fingerprint = f"{of}, is of another version of this checkpoint: nothing was compared"
        return
    report.fingerprint = f"{of}: {outcome.compared} tensors compared"
    if not unchanged:
        report.notes.append("the checkpoint has been written to since its fingerprint was taken")
    report.notes += outcome.notes
    if lost and len(lost) < sum(len(o.parameters) for o in saved.optimizers):
        report.problems.append(f"weights are missing: {', '.join(lost[:NAMES_TOLD])}")
    elif lost:
        report.notes.append("the weights are not in this file")
    for finding in outcome.findings:
        items = "; ".join(map(str, finding.items[:NAMES_TOLD]))
        more = f"; and {len(finding.items) - NAMES_TOLD} more" if len(finding.items) > NAMES_TOLD else ""
        report.problems.append(f"{finding.fault}: {ADVICE[finding.fault].what}: {items}{more}")


class _Digests:
    """Digests of what a checkpoint holds, by the names of the model's tensors."""

    def __init__(self, content: Any, optimizers: list[Path_]) -> None:
        self._digester = Digester(torch.device("cpu"), rounding=True)
        self._named: dict[str, list[Tensor]] = defaultdict(list)
        for at, tensor in stored.tensors(content):
            if not any(at[: len(prefix)] == prefix for prefix in optimizers if prefix):
                words = ".".join(map(str, at)).split(".")
                for i in range(len(words)):
                    self._named[".".join(words[i:])].append(tensor)

    def take(self, tensor: Tensor) -> Digest:
        return digest(tensor.dtype, tuple(tensor.shape), self._digester.readings([tensor.detach()])[0].tolist())

    def of(self, name: str, old: Digest | None) -> Digest | None:
        """The digest of the model's tensor of this name: where several have it (an average of the weights beside them),
        the one that is as it was saved, if any is."""
        found = [self.take(tensor) for tensor in self._named.get(name, ())[:4]]
        return next((d for d in found if old is not None and d.contents == old.contents), found[0] if found else None)


def _optimizer(before: OptimizerPrint, state_dict: dict[str, Any], digests: _Digests) -> OptimizerPrint:
    """The print of an optimizer as stored; where its parameters are numbers, they have the saved names in order."""
    now = OptimizerPrint(
        name=before.name,
        kind=before.kind,
        named=before.named,
        groups=[
            {str(key): _plain(value) for key, value in group.items() if key not in NO_HYPERPARAMETERS}
            for group in state_dict["param_groups"]
        ],
        defaults=before.defaults,
        scheduled=before.scheduled,
        rates_used=before.rates_used,
        parameters=[],
    )
    names = {p.name for p in before.parameters}
    for old, (which, group, state) in zip(before.parameters, _states(state_dict), strict=True):
        name = which if which in names else old.name
        taken = ParameterPrint(name, group)
        weight = digests.of(name, old.weight.get(""))
        if weight is not None:
            taken.weight = {"": weight}
        for key, value in state.items():
            if key in STEP_KEYS:
                taken.step = float(value)
                continue
            for part, tensor in parts(value, str(key)):
                taken.state[part] = digests.take(tensor)
        now.parameters.append(taken)
    return now


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def _schedulers(saved: Fingerprint, content: Any) -> list[dict[str, Any]]:
    """The stored state of each saved scheduler, found by what it holds: files do not say of which kind one is."""
    entries = list(_with_epochs(content))
    found = []
    for scheduler in saved.schedulers:
        of_it = [e for e in entries if _plain(e.get("base_lrs", [])) == scheduler["base_lrs"]]
        entry = next((e for e in of_it if e["last_epoch"] == scheduler["last_epoch"]), None)
        if entry is None:
            entry = next(iter(of_it or entries), None)
        if entry is not None:
            entries.remove(entry)
            found.append({**scheduler, "last_epoch": entry["last_epoch"]})
    return found


def _with_epochs(content: Any) -> Iterator[dict[str, Any]]:
    if isinstance(content, dict) and "last_epoch" in content:
        yield content
    if isinstance(content, (dict, list, tuple)):
        for value in content.values() if isinstance(content, dict) else content:
            yield from _with_epochs(value)
