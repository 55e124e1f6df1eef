"""`optwatch plan` says what training will need, with no GPU and no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from optwatch.memory.families import FAMILIES
from optwatch.memory.plan import main, need

GIB = 2**30


def planned(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("dtype", "options", "weights", "gradients", "masters", "state"),
    [
        ("fp32", [], 4, 4, 0, 8),
        ("bf16", [], 2, 2, 4, 8),
        ("fp16", [], 2, 2, 4, 8),
        ("bf16", ["--no-masters"], 2, 2, 0, 4),
        ("bfloat16", [], 2, 2, 4, 8),
    ],
)
def test_adamw_takes_its_textbook_bytes_a_parameter(
    capsys: Any, dtype: str, options: list[str], weights: int, gradients: int, masters: int, state: int
) -> None:
    row = planned(capsys, "--params", "7e9", "--dtype", dtype, *options)["families"]["adamw"]
    parts = [row[part] / 7e9 for part in ("weights", "gradients", "masters", "state", "total")]
    assert parts == [weights, gradients, masters, state, weights + gradients + masters + state]


def test_sharding_divides_what_each_way_of_it_shards(capsys: Any) -> None:
    """ZeRO's own example: 7.5e9 parameters on 64 ranks take 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al. 2020)."""
    document = planned(capsys, "--params", "7.5B", "--dtype", "fp16", "--world", "64")
    ranks = {way: round(size / 1e9, 1) for way, size in document["families"]["adamw"]["per_rank"].items()}
    assert ranks == {"ddp": 120.0, "zero1": 31.4, "zero2": 16.6, "fsdp": 1.9}


def test_what_fits_is_told_for_each_way(capsys: Any) -> None:
    document = planned(capsys, "--params", "7e9", "--world", "8", "--memory", "80GB")
    assert document["families"]["adamw"]["fits"] == {"ddp": False, "zero1": True, "zero2": True, "fsdp": True}
    whole = document["families"]["adamw"]["per_rank"]["ddp"]
    for memory, fits in ((whole, True), (whole - 1e6, False)):
        document = planned(capsys, "--params", "7e9", "--world", "8", "--memory", str(memory))
        assert document["families"]["adamw"]["fits"]["ddp"] is fits


def test_alternatives_follow_the_optimizer_asked_for_and_need_less(capsys: Any) -> None:
    families = planned(capsys, "--params", "1e9", "--optimizer", "SOAP")["families"]
    assert next(iter(families)) == "soap"
    assert {"adamw-8bit", "adamw-8bit-paged", "adafactor", "lion"} <= set(families)
    assert all(row["state"] < families["soap"]["state"] for name, row in families.items() if name != "soap")


@pytest.mark.parametrize("family", FAMILIES)
def test_needs_grow_with_the_parameters(family: str) -> None:
    small, large = need(family, 1e9, "bf16", True), need(family, 2e9, "bf16", True)
    assert large.total == pytest.approx(2 * small.total)


def test_the_table_has_the_numbers_of_the_document(capsys: Any) -> None:
    assert main(["--params", "7e9", "--world", "8", "--memory", "80GB"]) == 0
    text = capsys.readouterr().out
    row = next(line for line in text.splitlines() if line.startswith("AdamW "))
    assert row.split() == ["AdamW", "13.04", "13.04", "26.08", "52.15", "104.31", "35.86*", "24.45*", "13.04*"]
    assert text.startswith("7e+09 parameters in bf16, with float32 masters; GiB, whole and for each of 8 ranks")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--params", "many"], "--params 'many': give a number above 0, such as 7e9 or 7B"),
        (["--params", "0"], "--params '0': give a number above 0"),
        (["--params", "1e3", "--optimizer", "adm"], "--optimizer 'adm' is not known; give one of adamw, adam, "),
        (["--params", "1e3", "--dtype", "fp8"], "--dtype 'fp8' is not known; give one of fp32, bf16, fp16"),
        (["--params", "1e3", "--world", "0"], "--world '0': give a whole number from 1"),
        (
            ["--params", "1e3", "--memory", "80 parsecs"],
            "--memory '80 parsecs': give a number above 0, such as 80GB",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_with_what_would(arguments: list[str], told: str, capsys: Any) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(f"optwatch plan: {told}")


def test_the_installed_command_plans_without_importing_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "optwatch", "plan", "--params", "7e9"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0
    assert "AdamW, 8-bit state" in done.stdout
    assert not [line for line in done.stderr.splitlines() if line.endswith(" torch")]
