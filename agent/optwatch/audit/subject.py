"""What the rules see when attaching: the optimizers, the model, and what each parameter is to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from optwatch.parallel.placement import in_model
from optwatch.training.layers import named_modules

Role = Literal["norm", "bias", "embedding", "weight"]
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, _NormBase)
_ALONE: dict[Role, frozenset[Role]] = {role: frozenset((role,)) for role in get_args(Role)}
EXAMPLES = 3
"""Names of parameters that a finding lists."""


@dataclass(frozen=True)
class Seen:
    """What one pass over the parameters of a group tells: at thousands of them passes are what an audit costs. Only
    what no kind of tensor refuses to tell."""

    dtypes: set[torch.dtype] = field(default_factory=set)
    frozen: list[Tensor] = field(default_factory=list)
    """Those that want no gradient."""


@dataclass(frozen=True)
class Group:
    """One parameter group of one optimizer."""

    optimizer: Optimizer
    optimizer_name: str
    index: int
    settings: Mapping[str, Any]

    @property
    def thing(self) -> str:
        """How a finding calls it."""
        return f"group {self.index} of {self.optimizer_name}"

    @cached_property
    def parameters(self) -> Sequence[Tensor]:
        """The model's parameters in it."""
        return [in_model(p) for p in self.settings["params"]]

    @cached_property
    def seen(self) -> Seen:
        """What its parameters are like."""
        seen = Seen()
        for p in self.parameters:
            seen.dtypes.add(p.dtype)
            if not p.requires_grad and p.is_leaf:
                seen.frozen.append(p)
        return seen

    def number(self, key: str) -> float | None:
        """A hyper-parameter as a number; None where it is absent or a tensor, which would have to be waited for."""
        value = self.settings.get(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def betas(self) -> tuple[float, float] | None:
        """β₁ and β₂; None where there are not two numbers."""
        betas = self.settings.get("betas")
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            return None
        first, second = betas
        return (first, second) if isinstance(first, float) and isinstance(second, float) else None

    @property
    def from_torch(self) -> bool:
        """Whether the optimizer's class is torch's own, so that how it computes is known."""
        return type(self.optimizer).__module__.startswith("torch.optim")


@dataclass(frozen=True)
class Anatomy:
    """What one walk over a model tells. All rules share it: at thousands of modules the walk is what an audit costs."""

    parameters: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    """Each parameter and its name, by ``id``, in the order of ``named_parameters()``."""
    roles: dict[int, frozenset[Role]] = field(default_factory=dict)
    """What each parameter is there for, by ``id``; a tied one has several."""
    kinds: set[type[nn.Module]] = field(default_factory=set)
    """Classes of its modules."""
    configured: list[tuple[str, nn.Module]] = field(default_factory=list)
    """Modules that may have a ``config``, and their names."""

    @classmethod
    def of(cls, model: nn.Module | None) -> Anatomy:
        """Walk over a model; there may be none."""
        found = cls()
        known: dict[type[nn.Module], tuple[Role | None, bool]] = {}
        for path, module in () if model is None else named_modules(model):
            kind = type(module)
            if kind not in known:
                known[kind] = _role(kind), _may_have_config(kind)
            role, configured = known[kind]
            # To ask a module for what it does not have takes as long as twenty look-ups.
            if configured or "config" in module.__dict__:
                found.configured.append((path, module))
            if own := module._parameters:
                for name, p in own.items():
                    if p is not None:
                        found._add(path, name, p, role)
        found.kinds.update(known)
        return found

    def _add(self, path: str, name: str, p: Tensor, role: Role | None) -> None:
        key = id(p)
        if role is None:
            role = "bias" if name.endswith("bias") and p.ndim == 1 else "weight"
        if key in self.parameters:
            self.roles[key] |= {role}
        else:
            self.parameters[key] = f"{path}.{name}" if path else name, p
            self.roles[key] = _ALONE[role]


@dataclass(frozen=True)
class Subject:
    """Everything a rule may look at when attaching. Nothing in it reads what a tensor holds."""

    optimizers: Mapping[str, Optimizer]
    model: nn.Module | None
    model_given: bool = False
    """Whether the model was given to `attach`, rather than found in the process."""

    @cached_property
    def groups(self) -> list[Group]:
        """All groups of all optimizers."""
        return [
            Group(optimizer, name, index, settings)
            for name, optimizer in self.optimizers.items()
            for index, settings in enumerate(optimizer.param_groups)
        ]

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        return Anatomy.of(self.model)

    @cached_property
    def held(self) -> set[int]:
        """The parameters that the optimizers have, by ``id``."""
        return {id(p) for group in self.groups for p in group.parameters}

    @property
    def has_attention(self) -> bool:
        """Whether the model has an attention layer, by its class or by its class's name."""
        return any(
            issubclass(kind, nn.MultiheadAttention) or "Attention" in kind.__name__ for kind in self.anatomy.kinds
        )

    @property
    def has_recurrence(self) -> bool:
        """Whether the model has a recurrent layer of torch's."""
        return any(issubclass(kind, nn.RNNBase) for kind in self.anatomy.kinds)

    def only(self, parameters: Iterable[Tensor], *roles: Role) -> list[Tensor]:
        """Those that are known, and are nothing but these."""
        known, wanted = self.anatomy.roles, frozenset(roles)
        fitting = {combination for combination in set(known.values()) if combination <= wanted}
        return [p for p in parameters if known.get(id(p)) in fitting]

    def listed(self, parameters: Sequence[Tensor]) -> str:
        """How many, and the names of the first."""
        known = self.anatomy.parameters
        names = [known[id(p)][0] if id(p) in known else f"one of shape {tuple(p.shape)}" for p in parameters[:EXAMPLES]]
        more = ", ..." if len(parameters) > EXAMPLES else ""
        return f"{len(parameters)} parameter{'s' if len(parameters) > 1 else ''} ({', '.join(names)}{more})"


def _role(kind: type[nn.Module]) -> Role | None:
    """What every parameter of such modules is there for; None where they differ."""
    if issubclass(kind, _NORMS) or kind.__name__.endswith(("Norm", "Norm1d", "Norm2d", "Norm3d")):
        return "norm"
    return "embedding" if issubclass(kind, (nn.Embedding, nn.EmbeddingBag)) else None


def _may_have_config(kind: type[nn.Module]) -> bool:
    """Whether such a module may have one that is not in its ``__dict__``: from its class, or from what it wraps."""
    return hasattr(kind, "config") or kind.__getattr__ is not nn.Module.__getattr__


def tied(subject: Subject) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Weights that a Hugging Face model says are one, and are two: a name, the embedding's and the head's.

    ``get_input_embeddings``, ``get_output_embeddings`` and ``config.tie_word_embeddings`` are their protocol.
    """
    for name, module in subject.anatomy.configured:
        config = getattr(module, "config", None)
        if getattr(config, "tie_word_embeddings", False) is not True:
            continue
        ends = [getattr(module, f"get_{end}_embeddings", None) for end in ("input", "output")]
        if not all(callable(end) for end in ends):
            continue
        first, second = (getattr(end(), "weight", None) for end in ends if end is not None)
        if isinstance(first, Tensor) and isinstance(second, Tensor) and first.shape == second.shape:
            yield name or type(module).__name__, first, second
