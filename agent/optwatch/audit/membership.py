"""Rules about which parameter is in which group."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.optim import SGD, Optimizer

from optwatch.training.layers import trained
from optwatch.training.living import living

from .rule import Rules, Said
from .subject import Group, Subject, tied

RULES: Rules[Subject] = Rules()
rule = RULES.rule


@rule("parameter-in-no-group", "warning")
def parameter_in_no_group(subject: Subject) -> Iterator[Said]:
    """A parameter of the model given to `attach` that wants a gradient and is in no optimizer: its gradient is
    computed, summed up for ever, and never applied.

    Source: torch.optim's documentation, "Constructing it" (an optimizer changes what it was given, nothing else).
    """
    if subject.model is None or not subject.model_given:
        return
    left = [p for key, (_, p) in subject.anatomy.parameters.items() if key not in subject.held and p.requires_grad]
    if left:  # perhaps in one that is not watched; to look for it costs a walk over the process's objects
        others = trained(living(Optimizer))
        left = [p for p in left if id(p) not in others]
    # An optimizer of flattened or sharded copies holds none of them.
    if left and len(left) < len(subject.anatomy.parameters):
        yield "the model", f"{subject.listed(left)} in no optimizer", "add them to a group, or requires_grad_(False)"


@rule("parameter-in-two-groups", "warning")
def parameter_in_two_groups(subject: Subject) -> Iterator[Said]:
    """A parameter that is listed twice: each step changes it twice.

    Source: torch.optim.Optimizer.add_param_group refuses it between groups of one optimizer, but not between two
    optimizers, and only warns within a group.
    """
    seen: dict[int, Group] = {}
    twice: dict[tuple[str, str], list[Tensor]] = {}
    for group in subject.groups:
        for p in group.parameters:
            if id(p) in seen:
                twice.setdefault((seen[id(p)].thing, group.thing), []).append(p)
            seen.setdefault(id(p), group)
    for things, parameters in twice.items():
        yield " and ".join(dict.fromkeys(things)), f"{subject.listed(parameters)} listed twice", "list each once"


@rule("shared-storage", "warning")
def shared_storage(subject: Subject) -> Iterator[Said]:
    """Two parameters over the same memory, as after ``head.weight.data = embedding.weight.data``: each has a gradient
    of its own, and each step changes the memory twice, where one tied parameter would have the sum of both.

    Source: Press & Wolf 2017, "Using the Output Embedding to Improve Language Models" (one matrix, one gradient);
    torch.nn.Module shares a weight by assigning the Parameter itself.
    """
    parameters = (p for group in subject.groups for p in group.parameters)
    addresses = [p.data_ptr() for p in parameters if type(p).__name__ != "DTensor" and not p.is_meta]
    if len(set(addresses)) == len(addresses):  # what follows takes five times as long
        return
    owners: dict[tuple[object, ...], Tensor] = {}
    for group in subject.groups:
        for p in group.parameters:
            if type(p).__name__ == "DTensor" or p.is_meta or not p.numel() or not p.data_ptr():
                continue
            first = owners.setdefault((p.device, p.data_ptr(), p.shape, p.stride()), p)
            if first is not p:
                yield group.thing, f"{subject.listed([first, p])} lie in the same memory", "assign the Parameter itself"


@rule("tie-broken", "warning")
def tie_broken(subject: Subject) -> Iterator[Said]:
    """A model whose configuration says that embedding and head share one weight, and whose two weights are two: an edit
    or a load has parted them.

    Source: Hugging Face transformers, `PretrainedConfig.tie_word_embeddings` and `PreTrainedModel.tie_weights`.
    """
    if subject.model is None:
        return
    for name, first, second in tied(subject):
        if first is not second and first.data_ptr() != second.data_ptr():
            yield name, f"tie_word_embeddings, but {subject.listed([first, second])} are two", "call tie_weights()"


@rule("empty-group", "info")
def empty_group(subject: Subject) -> Iterator[Said]:
    """A group without parameters: the filter that was to fill it matched nothing.

    Source: torch.optim's documentation, "Per-parameter options".
    """
    for group in subject.groups:
        if not group.parameters:
            yield group.thing, "has no parameters", "look at the filter by name or type that makes the groups"


@rule("frozen-parameters", "info")
def frozen_parameters(subject: Subject) -> Iterator[Said]:
    """Parameters that want no gradient and are in a group all the same: they are never updated, and every statistic of
    the group counts them.

    Source: torch.optim's documentation (parameters without a gradient are skipped).
    """
    for group in subject.groups:
        if group.seen.frozen:
            yield (
                group.thing,
                f"{subject.listed(group.seen.frozen)} with requires_grad=False",
                "leave them out of the optimizer",
            )


@rule("decay-inverted", "warning")
def decay_inverted(subject: Subject) -> Iterator[Said]:
    """Norms and biases decay, and matrices do not: the two groups are swapped.

    Source: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1 (decay matrices, not the rest).
    """
    decays = [group.number("weight_decay") for group in subject.groups]
    if not any(decays) or all(decays):
        return
    decayed, spared = _by_decay(subject)
    small = subject.only(decayed, "norm", "bias")
    large = [p for p in subject.only(spared, "weight") if p.ndim >= 2]
    if small and large and not any(p.ndim >= 2 for p in subject.only(decayed, "weight")):
        yield (
            "weight decay",
            f"on {subject.listed(small)}, not on {subject.listed(large)}",
            "swap their decay",
        )


@rule("decay-on-norms-and-biases", "info")
def decay_on_norms_and_biases(subject: Subject) -> Iterator[Said]:
    """Weight decay on norms or biases, beside matrices: it pulls scales to 0, which they have no reason to go to, and
    regularises nothing.

    Source: He et al. 2019, "Bag of Tricks for Image Classification", section 3.1; Brown et al. 2020 and most language
    models since leave them out.
    """
    for group in subject.groups:
        if (group.number("weight_decay") or 0) <= 0:
            continue
        small = [p for p in subject.only(group.parameters, "norm", "bias") if p.requires_grad]
        if small and len(small) < len(group.parameters):
            yield (
                group.thing,
                f"weight_decay={group.number('weight_decay'):g} on {subject.listed(small)}",
                "put norms and biases into a group with weight_decay=0",
            )


@rule("decay-on-embeddings", "info")
def decay_on_embeddings(subject: Subject) -> Iterator[Said]:
    """Decoupled weight decay on an embedding that is not the output layer as well: rows of tokens that do not occur
    shrink all the same.

    Source: Loshchilov & Hutter 2019 (decay does not depend on the gradient); minGPT and most of its kind leave
    embeddings out.
    """
    for group in subject.groups:
        if (group.number("weight_decay") or 0) <= 0 or type(group.optimizer) is SGD:
            continue
        rows = [p for p in subject.only(group.parameters, "embedding") if p.requires_grad]
        if rows:
            yield (
                group.thing,
                f"weight_decay={group.number('weight_decay'):g} on {subject.listed(rows)}",
                "put embeddings into a group with weight_decay=0",
            )


@rule("muon-on-embeddings", "warning")
def muon_on_embeddings(subject: Subject) -> Iterator[Said]:
    """Muon on an embedding: its rows are looked up and not multiplied, and an orthogonal update moves rows that did not
    occur as much as those that did.

    Source: Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks" (embeddings, heads, norms and
    biases are AdamW's).
    """
    for group in subject.groups:
        if not type(group.optimizer).__name__.endswith("Muon") or not group.settings.get("use_muon", True):
            continue
        rows = [p for p in group.parameters if "embedding" in subject.anatomy.roles.get(id(p), ())]
        if rows:
            yield group.thing, f"has {subject.listed(rows)}", "give embeddings and the head to AdamW"


def _by_decay(subject: Subject) -> tuple[list[Tensor], list[Tensor]]:
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for group in subject.groups:
        decay = group.number("weight_decay")
        if decay is not None:
            (decayed if decay > 0 else spared).extend(p for p in group.parameters if p.requires_grad)
    return decayed, spared
