"""Build the wheel and run the tests of agent and server against it, where the sources cannot be imported.

python scripts/test_wheel.py [PYTEST OPTIONS]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS = ("agent", "server")


def main() -> int:
    """Return pytest's exit status."""
    with tempfile.TemporaryDirectory(prefix="optwatch-wheel-") as temporary:
        folder = Path(temporary)
        # Without isolation: hatchling is in the development environment already.
        build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        environment = folder / "venv"
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        python = environment / "bin" / "python"
        wheel = next(folder.glob("*.whl"))
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
        subprocess.run(install, check=True)
        # Dependencies come from this environment by a path of their own. Python does not read the .pth files of such a
        # path, so that the editable install of the sources beside them stays out of reach.
        site = next((environment / "lib").glob("python3*")) / "site-packages"
        (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        tree = folder / "tree"
        # What some tests compare with or run, and what makes it: none of it is what is under test.
        for name in ("tests", "schemas", "docs", "scripts", "examples", "benchmarks"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if (ROOT.parent / "shared").is_dir():  # curves that the repository does not carry
            (folder / "shared").symlink_to(ROOT.parent / "shared")
        origin = "import optwatch, optwatch_server; print(optwatch.__file__, optwatch_server.__file__)"
        found = subprocess.run([str(python), "-c", origin], check=True, capture_output=True, text=True, cwd=tree)
        if any(not Path(path).is_relative_to(environment) for path in found.stdout.split()):
            raise SystemExit(f"the tests would import the sources, not the wheel: {found.stdout}")
        command = [str(python), "-m", "pytest", *(f"tests/{part}" for part in TESTS), *sys.argv[1:]]
        return subprocess.run(
            command,
            cwd=tree,
            check=False,
            env=os.environ | {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "OPTWATCH_TEST_WHEEL": "1"},
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
