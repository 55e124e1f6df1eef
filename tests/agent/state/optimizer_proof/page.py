"""docs/optimizers.md: what is exact and what is unavailable for each optimizer, and why."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from optwatch import state

from . import run
from .tables import NOT_RUN, TABLES

HEADER = """# Optimizers

<!-- Written by scripts/generate_optimizers.py from optwatch.state and the proofs. Change those, and run it again. -->

What optwatch reads of each optimizer's state. **exact** means: every optimizer of the table was made on a small float32
model and took real steps, and what the agent exported agreed to 1e-5 with its definition, computed in float64 from the
gradients it saw and not from its state. For a quantized moment the number is that of the package's own decoding. A dash
is unavailable, and nothing is exported: the last column says why. Gradient norm and weight norm are exact for all of
them, and so are the bytes of the state.

| column | metric |
| --- | --- |
| rate | `optwatch_learning_rate` |
| first | `optwatch_first_moment_norm`; with the cosine to the gradient unless the last column says otherwise |
| second | `optwatch_second_moment_mean`, `optwatch_second_moment_max` |
| below ε | `optwatch_epsilon_dominated_ratio` |
| effective | `optwatch_effective_learning_rate` |

Switches of an optimizer that make a signal unavailable are named in the last column too. A class that is not listed, or
that replaces `step()` of one that is, has no moments for us: nothing is guessed.
"""

SIGNALS = ("learning_rate", "first_moment", "second_moment", "epsilon_dominated_ratio", "effective_learning_rate")
TITLES = {
    "learning_rate": "rate",
    "first_moment": "first",
    "gradient_moment_cosine": "cosine",
    "second_moment": "second",
    "epsilon_dominated_ratio": "below ε",
    "effective_learning_rate": "effective",
}


def proved(package: str, folder: Path, names: set[str] | None = None) -> list[run.Subject]:
    """Build and run the cases of a package, or those of these names."""
    kinds = run.classes(package)
    chosen = {name: case for name, case in TABLES[package].items() if names is None or name in names}
    subjects = [run.build(name, kinds[name], case) for name, case in chosen.items()]
    run.prove(subjects, folder)
    return subjects


def unlisted(package: str) -> list[str]:
    """Optimizer classes of a package that have neither a case nor a reason why they are not run."""
    listed = TABLES[package].keys() | NOT_RUN.get(package, {}).keys()
    return [name for name in run.classes(package) if name not in listed]


def page(folder: Path) -> tuple[str, list[str]]:
    """The page, and what was found wrong: then there should be none."""
    parts, problems = [HEADER], []
    for package in TABLES:
        problems += [f"{package}.{name} has no case" for name in unlisted(package)]
        subjects = proved(package, folder / package)
        problems += [f"{package}.{s.name}: {problem}" for s in subjects for problem in s.problems]
        parts.append(table(package, subjects))
    return "".join(parts), problems


def table(package: str, subjects: list[run.Subject]) -> str:
    """One package's table, and its classes that are not run."""
    top = package.partition(".")[0]
    lines = ["", f"## {package} {version(top).partition('+')[0]}", ""]
    lines += ["| optimizer | rate | first | second | below ε | effective | why |", "| --- " * 7 + "|"]
    for subject in sorted(subjects, key=lambda s: s.name.lower()):
        lines.append(row(subject))
    rest = {name: reason for name, reason in NOT_RUN.get(package, {}).items() if name in run.classes(package)}
    if rest:
        lines += ["", "Not run here:", ""]
        lines += [f"- `{name}`: {reason}." for name, reason in sorted(rest.items())]
    return "\n".join(lines) + "\n"


def row(subject: run.Subject) -> str:
    """One optimizer's row."""
    reader = state.reader_for(subject.optimizer)
    missing = reader.unavailable()
    cells = [f"`{subject.name}`", *("–" if signal in missing else "exact" for signal in SIGNALS)]
    if "first_moment" not in missing and reader.averages != "gradients":
        cells[2] = f"exact, of {reader.averages}"
    reasons: dict[str, list[str]] = {}
    for signal, reason in missing.items():
        reasons.setdefault(reason, []).append(TITLES[signal])
    texts = [f"{', '.join(signals)}: {reason}" for reason, signals in reasons.items()]
    texts += [f"with `{switch}` no effective: {reason}" for switch, reason in reader.unless.items()]
    texts += [f"with `{switch}` no rate: {reason}" for switch, reason in reader.rate_unless.items()]
    return "| " + " | ".join([*cells, "; ".join(texts)]) + " |"
