"""Memory and utilisation of the device that trains, read when /metrics is scraped and never in a step."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch


class Device:
    """Reads one device. On a CPU it is the process's share of the machine; elsewhere the allocator and the driver."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._busy, self._at = time.process_time(), time.perf_counter()

    def memory(self) -> dict[str, float]:
        """Bytes by kind: allocated, reserved, free, total. Empty where the platform does not tell."""
        if self._device.type == "cuda":
            free, total = torch.cuda.mem_get_info(self._device)
            return {
                "allocated": torch.cuda.memory_allocated(self._device),
                "reserved": torch.cuda.memory_reserved(self._device),
                "free": free,
                "total": total,
            }
        if self._device.type != "cpu" or not Path("/proc/self/statm").exists():
            return {}
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
        machine = {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines}
        return {
            "allocated": resident,
            "reserved": resident,
            "free": machine["MemAvailable"],
            "total": machine["MemTotal"],
        }

    def utilization(self) -> float | None:
        """Share of time that the device was busy, since the last call on a CPU; None where nothing tells (no NVML)."""
        if self._device.type == "cuda":
            try:
                return torch.cuda.utilization(self._device) / 100
            except ModuleNotFoundError:  # NVML's bindings are not torch's own
                return None
        if self._device.type != "cpu":
            return None
        busy, now = time.process_time(), time.perf_counter()
        share = (busy - self._busy) / max(1e-9, now - self._at) / self._cores
        self._busy, self._at = busy, now
        return min(1.0, share)
