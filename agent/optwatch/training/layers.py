"""Names: which parameter is which, and the layers that a run is told apart by."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch import nn
from torch.optim import Optimizer

from optwatch.parallel.placement import in_model

from .living import living

_WRAPPERS = ("_orig_mod", "module", "_fsdp_wrapped_module")
"""Path components that torch.compile, DDP and FSDP put in front of the user's own names."""


def parameter_names(optimizer: Optimizer, model: nn.Module | None) -> list[str]:
    """One name for each parameter, in the order of ``param_groups``.

    Names come from `model`, else from the optimizer's own ``param_names`` (AdamW(model.named_parameters())), else from
    the module in this process that holds these parameters, else they are ``group0.parameter3``.
    """
    wanted = trained([optimizer])
    if model is None and not any("param_names" in group for group in optimizer.param_groups):
        model = find_model(wanted)
    # A weight that two modules share has the name of the first, as in a state dict without duplicates.
    known = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    names = []
    for g, group in enumerate(optimizer.param_groups):
        own = group.get("param_names", ())
        for i, p in enumerate(group["params"]):
            fallback = own[i] if i < len(own) else f"group{g}.parameter{i}"
            names.append(known.get(id(in_model(p)), fallback))
    stripped = [_strip(name) for name in names]
    # A user's own module may be called `module`: what tells two parameters apart is no wrapper.
    return stripped if len(set(stripped)) == len(set(names)) else names


def trained(optimizers: Iterable[Optimizer]) -> set[int]:
    """The model's parameters that these optimizers have, by ``id``."""
    groups = (group for optimizer in optimizers for group in optimizer.param_groups)
    return {id(in_model(p)) for group in groups for p in group["params"]}


def find_model(wanted: set[int]) -> nn.Module | None:
    """The outermost module in this process holding the most of these parameters (given as their ``id``), if any does.

    Walks the garbage collector's objects once (about 0.1 s per million of them): what lets the one line
    ``attach(optimizer)`` name layers.
    """
    best: nn.Module | None = None
    best_score = (0, 0)
    modules = living(nn.Module)
    children = {id(child) for module in modules for child in (vars(module).get("_modules") or {}).values()}
    # Whatever a module holds, the one around it holds as well: where there are such, only they are asked.
    for candidate in [module for module in modules if id(module) not in children] or modules:
        try:
            inner = list(named_modules(candidate))
            held = wanted.intersection(id(p) for _, module in inner for p in module._parameters.values())
            # Among modules that hold the same parameters the outermost has the most submodules.
            score = (len(held), len(inner))
        except Exception:  # noqa: BLE001, S112 - a half-built module of somebody else's; it is not the one
            continue
        if held and score > best_score:
            best, best_score = candidate, score
    return best


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """What ``model.named_modules()`` gives, in its order. One generator and none within others: a third of the time at
    ten thousand modules."""
    seen: set[int] = set()
    waiting = [("", model)]
    while waiting:
        name, module = waiting.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        if children := module._modules:
            prefix = f"{name}." if name else ""
            waiting += [(prefix + key, child) for key, child in reversed(children.items()) if child is not None]


def found_models(optimizers: Sequence[Optimizer], model: nn.Module | None) -> list[nn.Module]:
    """The given model, else those that hold what these optimizers train: one, unless each trains one of its own."""
    models = [] if model is None else [model]
    held = {id(p) for known in models for p in known.parameters()}
    for optimizer in optimizers:
        wanted = trained([optimizer]) - held
        if wanted and (found := find_model(wanted)) is not None:
            models.append(found)
            held.update(map(id, found.parameters()))
    return models


def _strip(name: str) -> str:
    parts = name.split(".")
    return ".".join(part for part in parts[:-1] if part not in _WRAPPERS) + ("." if len(parts) > 1 else "") + parts[-1]


def group_layers(names: Sequence[str], max_layers: int) -> list[str]:
    """The layer of each parameter, such that there are at most `max_layers` different ones.

    A layer is a module's path. Where the modules are too many, numbered siblings are joined to ranges
    (``blocks.0-3``), and where that is not enough paths are cut to the deepest level that fits.
    """
    modules = [name.rpartition(".")[0] or name for name in names]
    depth = max((module.count(".") + 1 for module in modules), default=1)
    for level in range(depth, 0, -1):
        cut = [".".join(module.split(".")[:level]) for module in modules]
        if len(set(cut)) <= max_layers:
            return cut
        for width in range(2, len(set(cut)) + 1):
            joined = _join_siblings(cut, width)
            if len(set(joined)) <= max_layers:
                return joined
    return ["all"] * len(names)


def probe_points(model: nn.Module, max_layers: int) -> Iterator[tuple[str, nn.Module]]:
    """The modules of `model` whose outputs tell its layers apart, at most `max_layers`, and what each layer is called.

    As finely as they can be: the deepest level at which all modules that hold a parameter fit, or ranges of
    siblings (``blocks.0-3``) where these are more. The output of a range is that of its last module.
    """
    names = [_strip(name) for name, _ in model.named_parameters()]
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names if "." in name))
    best: dict[str, str] = {}
    for level in range(1, max((module.count(".") + 1 for module in modules), default=0) + 1):
        cut = list(dict.fromkeys(".".join(module.split(".")[:level]) for module in modules))
        for width in (1, 2, 4, 8, 16, 32, 64, 128):
            joined = cut if width == 1 else _join_siblings(cut, width)
            points = dict(zip(joined, cut, strict=True))  # of equal labels the last module
            # Of a range within a path (blocks.0-3.attn) no one module is the last to run.
            within = any("-" in label.rpartition(".")[0] for label in points if label not in cut)
            if len(best) < len(points) <= max_layers and not within:
                best = points
    known = {_strip(f"{name}.")[:-1]: module for name, module in reversed(list(model.named_modules()))}
    for label, path in best.items():
        module = known.get(path)
        while isinstance(module, (nn.ModuleList, nn.ModuleDict)) and len(module):  # which are never called themselves
            module = list(module.children())[-1]
        if module is not None:
            yield label, module


def _join_siblings(layers: list[str], width: int) -> list[str]:
    """Layers whose first number is in the same range of `width` become one, named by that range."""
    last: dict[str, int] = {}
    split = [re.match(r"(?P<stem>(?:.*?\.)?)(?P<number>\d+)(?=\.|$)(?P<rest>.*)", layer) for layer in layers]
    for match in split:
        if match:
            last[match["stem"]] = max(last.get(match["stem"], 0), int(match["number"]))
    joined = []
    for layer, match in zip(layers, split, strict=True):
        if match is None:
            joined.append(layer)
            continue
        first = int(match["number"]) // width * width
        end = min(first + width - 1, last[match["stem"]])
        joined.append(f"{match['stem']}{first}-{end}{match['rest']}" if end > first else layer)
    return joined
