"""What a fingerprint costs beside the saving of the checkpoint: ``python benchmarks/resume.py [FILE]``.

Each size is saved and fingerprinted in turn, a few times over; the figure is the median of the ratios.
"""

from __future__ import annotations

import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from optwatch.resume import sidecar
from optwatch.resume.fingerprint import Fingerprint, Subject, Taking, discover
from optwatch.resume.generators import MOST_DRAWS, reachable, states

REPEATS = 5
SIZES = ((256, 4), (1024, 4), (1536, 8))
"""Width and depth of transformers."""


def measure(width: int, depth: int, folder: Path) -> tuple[float, int, float, float, float]:
    """Millions of parameters, tensors, and median seconds of saving, of the fingerprint and of the search."""
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
    model = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(1, 4, width)).square().mean().backward()
    optimizer.step()
    path = folder / "checkpoint.pt"
    times: list[tuple[float, float, float]] = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        with path.open("wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
            file.flush()
            os.fsync(file.fileno())
        saved = time.perf_counter()
        taken = Taking(Subject({"AdamW": optimizer}, model, []), Fingerprint("r", 0, 1, 1)).result()
        sidecar.write(path, taken)
        fingerprinted = time.perf_counter()
        discover([optimizer])
        times.append((saved - began, fingerprinted - saved, time.perf_counter() - fingerprinted))
    save, fingerprint, search = (statistics.median(column) for column in zip(*times, strict=True))
    return sum(p.numel() for p in model.parameters()) / 1e6, taken.tensors(), save, fingerprint, search


def main(arguments: list[str]) -> None:
    """Measure, and write the table to FILE or to standard output."""
    torch.manual_seed(0)
    lines = [
        "# Cost of a fingerprint",
        "",
        f"`{Path(sys.executable).name} benchmarks/resume.py` on {os.cpu_count()} CPU cores ({platform.machine()}), "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, AdamW in float32. `torch.save` with fsync to "
        f"a local disk; medians of {REPEATS}. Schedulers are searched for at the first checkpoint, and again when "
        "one is gone.",
        "",
        "| parameters | tensors | torch.save | fingerprint | ratio | search for schedulers |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    with tempfile.TemporaryDirectory() as folder:
        for width, depth in SIZES:
            millions, tensors, save, fingerprint, search = measure(width, depth, Path(folder))
            lines.append(
                f"| {millions:.1f} M | {tensors} | {save * 1e3:.0f} ms | {fingerprint * 1e3:.0f} ms | "
                f"{fingerprint / save:.2f} | {search * 1e3:.0f} ms |"
            )
    here = states()["torch"]
    torch.manual_seed(1)
    began = time.perf_counter()
    reachable(here, states()["torch"])
    lines += [
        "",
        f"Looking {MOST_DRAWS} draws ahead for a generator that was not restored: "
        f"{time.perf_counter() - began:.2f} s on a thread of its own, once.",
    ]
    text = "\n".join(lines) + "\n"
    if arguments:
        Path(arguments[0]).write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
