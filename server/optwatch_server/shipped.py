"""Where the files that travel with the product are: alerts, runbooks, dashboards, in a clone and in a wheel alike."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

# A wheel carries them inside the package (see force-include in pyproject.toml); a clone has them at its root.
_IN_CLONE = {"alerts": "alerts", "dashboards": "dashboards/generated", "runbooks": "runbooks"}


def shipped(name: str, *, package: Path = _PACKAGE) -> Path:
    """Return the folder of shipped files called `name`: ``"alerts"``, ``"dashboards"`` or ``"runbooks"``.

    `package` is the folder of the installed package; only tests give another.

    Raises:
        ValueError: nothing of that name is shipped.
        FileNotFoundError: the folder is in neither place where it could be: the install is broken.
    """
    if name not in _IN_CLONE:
        raise ValueError(f"no folder {name!r} is shipped: ask for one of {', '.join(sorted(_IN_CLONE))}")
    in_wheel = package / "shipped" / name
    if in_wheel.is_dir():
        return in_wheel
    clone = package.parent.parent
    in_clone = clone / _IN_CLONE[name]
    # The pyproject tells our clone from whatever folder of that name happens to lie beside a site-packages.
    if (clone / "pyproject.toml").is_file() and in_clone.is_dir():
        return in_clone
    raise FileNotFoundError(
        f"the shipped {name!r} folder is neither at {in_wheel} (a wheel) nor at {in_clone} (a clone): "
        "reinstall optwatch"
    )
