"""Training with DeepSpeed, each scenario with and without optwatch, compared with oracles that know nothing of it.

One oracle is given whole tensors, by DeepSpeed's own documented functions (``safe_get_full_fp32_param`` and its like)
where these are right and by gathering its partitions where they are not, and computes statistics in float64. Another
trains the same model in float64 in one process, without DeepSpeed.
"""

from __future__ import annotations

import copy
import logging
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad, safe_get_full_optimizer_state
from torch import Tensor, nn
from ways import STEPS, Log, Net, Oracle, Way, adamw, batch, counting

from optwatch import Settings, attach

CLIP = 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Its sums in shared memory would be compiled when first used, for minutes; gloo has them without.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed_logger.setLevel(logging.WARNING)
# It asks whether the processor has instructions for fp16; torch computes in it on every processor.
deepspeed.accelerator.get_accelerator().is_fp16_supported = lambda: True


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def configuration(stage: int, dtype: str, zero: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": CLIP,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        **({} if dtype == "fp32" else {dtype: {"enabled": True}}),
        **more,
    }


def begin(rank: int, size: int, config: dict[str, Any]) -> tuple[Any, Any, torch.optim.Optimizer, nn.Module]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    torch.manual_seed(5)
    model = Net()
    base = adamw(trained(model))
    engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=base, config=config, dist_init_required=False)
    return engine, optimizer, base, model


class Whole(Oracle):
    """Whole tensors as DeepSpeed gives them."""

    def __init__(self, way: Way, stage: int, optimizer: Any, base: torch.optim.Optimizer) -> None:
        super().__init__(way)
        self.stage = stage
        self.moved = False
        self.known: list[dict[str, Tensor]] = []
        """Gradients by step, where DeepSpeed's own function fails."""
        self.optimizer = optimizer
        self.base = base
        masters = [p for group in getattr(optimizer, "fp32_groups", []) for p in group]
        models = [p for group in way.optimizer.param_groups for p in group["params"]]
        self.master = dict(zip(models, masters or models, strict=True))

    def named(self, read: Any) -> dict[str, Tensor]:
        found = {name: read(p) for name, p in self.way.named.items()}
        return {name: x.detach().double().clone() for name, x in found.items() if x is not None}

    def gradients(self) -> dict[str, Tensor]:
        if self.known:
            return self.known.pop(0)
        gradients = self.named(safe_get_full_grad if self.stage else lambda p: p.grad)
        norm = math.sqrt(sum(x.square().sum().item() for x in gradients.values()))
        return {name: x / max(1.0, (norm + 1e-6) / CLIP) for name, x in gradients.items()}

    def weights(self) -> dict[str, Tensor]:
        if self.stage in (1, 2):
            return self.joined(lambda master: master.detach())
        return self.named(safe_get_full_fp32_param if self.stage else lambda p: self.master[p])

    def state(self, key: str) -> dict[str, Tensor]:
        if not any(self.base.state.values()) or (key == "exp_avg" and not self.moved):
            return {}  # without ZeRO DeepSpeed takes a step with gradients of 0 first
        if key == "step":
            step = next(iter(self.base.state.values()))["step"]
            return dict.fromkeys(self.way.named, step)
        if self.stage == 0:
            return self.named(lambda p: self.base.state[self.master[p]][key])
        if self.stage == 3:
            return self.named(lambda p: safe_get_full_optimizer_state(p, key))
        return self.joined(lambda master: self.base.state[master][key])

    def joined(self, read: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """The ranks' partitions one behind the other. DeepSpeed's own functions fail for the state of all groups but
        the first, and give some parameters others' weights under ``round_robin_gradients``."""
        found: dict[int, Tensor] = {}
        ordered = getattr(self.optimizer, "round_robin_bit16_groups", None) or self.optimizer.bf16_groups
        for group, parameters in zip(self.base.param_groups, ordered, strict=True):
            mine = read(group["params"][0])
            every = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(every, mine)
            sizes = [p.numel() for p in parameters]
            parts = torch.cat(every)[: sum(sizes)].double().split(sizes)
            found |= {id(p): part for p, part in zip(parameters, parts, strict=True)}
        return {name: found[id(p)].view(p.shape) for name, p in self.way.named.items()}


def alone(size: int, steps: int) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """The same training in float64 in this process, without DeepSpeed: statistics and gradients by step."""
    torch.manual_seed(5)
    model = Net().double()
    optimizer = adamw(trained(model))
    found, gradients = [], []
    for step in range(steps):
        losses = [model(batch(rank, step).double()).square().mean() for rank in range(size)]
        (sum(losses) / size).backward()
        nn.utils.clip_grad_norm_(trained(model), CLIP)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        series = {'optwatch_grad_norm{stage="at_step"}': [p.grad for p in trained(model)]}
        optimizer.step()
        series["optwatch_weight_norm"] = trained(model)
        series["optwatch_first_moment_norm"] = [entry["exp_avg"] for entry in optimizer.state.values()]
        found.append({name: math.sqrt(sum(x.square().sum().item() for x in xs)) for name, xs in series.items()})
        seconds = torch.cat([entry["exp_avg_sq"].flatten() for entry in optimizer.state.values()])
        found[-1] |= {"optwatch_second_moment_mean": seconds.mean().item()}
        found[-1] |= {"optwatch_second_moment_max": seconds.max().item()}
        optimizer.zero_grad()
    return found, gradients


def train(
    stage: int, dtype: str, zero: dict[str, Any] | None = None, of: str = "returned", micro: int = 1, **more: Any
) -> Any:
    """``of``: which optimizer is given to `attach`; ``micro``: backward passes to a step."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        result: dict[str, Any] = {"losses": {}, "weights": {}, "steps": [], "calls": {}, "sequence": {}}
        log = Log()
        logging.getLogger("optwatch").addHandler(log)
        config = configuration(stage, dtype, zero or {}, gradient_accumulation_steps=micro, **more)
        for watched in (False, True):
            engine, optimizer, base, model = begin(rank, size, config)
            result["class"] = type(optimizer).__name__
            original = adamw(trained(model)).param_groups
            way = Way(model, SimpleNamespace(param_groups=original), lambda step: None)  # type: ignore[arg-type]
            way.named = {name: p for name, p in way.named.items() if p.requires_grad}
            oracle = Whole(way, stage, optimizer, base)
            if (zero or {}).get("round_robin_gradients"):
                _, oracle.known = alone(size, STEPS)
            monitor = None
            if watched:
                options: dict[str, Any] = {"spool_directory": folder / f"spool{rank}", "rank_check_every": 2}
                settings = Settings(address="127.0.0.1", sample_every=1, **options)
                monitor = attach(optimizer if of == "returned" else base, port=0, settings=settings)
                assert attach(optimizer) is monitor
                result["run_id"] = monitor.run.id
            losses, counts = [], Counter[str]()
            default = dist.distributed_c10d._get_default_group()
            for step in range(STEPS):
                oracle.want = {}
                found = 0.0
                for part in range(micro):
                    before = default._get_sequence_number_for_group()
                    stop = counting(counts)
                    x = batch(rank, step * micro + part).to(DTYPES[dtype])
                    loss = engine(x).float().square().mean()
                    engine.backward(loss)
                    found += loss.item() / micro
                    if part < micro - 1:
                        engine.step()
                    calls = default._get_sequence_number_for_group() - before
                    stop()
                losses.append(found)
                oracle.before()
                before = default._get_sequence_number_for_group()
                stop = counting(counts)
                engine.step()
                stop()
                calls += default._get_sequence_number_for_group() - before
                result["sequence"].setdefault(str(watched), []).append(calls)
                oracle.moved = True
                oracle.after()
                if monitor is not None:
                    assert monitor.flush(60)
                    result["steps"].append({"want": copy.copy(oracle.want), "got": monitor.snapshot()})
            result["losses"][str(watched)] = losses
            result["calls"][str(watched)] = dict(counts)
            result["weights"][str(watched)] = [x.flatten().tolist() for x in oracle.weights().values()]
            if monitor is not None:
                result["faults"] = monitor.faults.counts
                monitor.detach()
                owned = {"step", "load_state_dict", "scale_if_loss", "backward"} & set(vars(optimizer))
                result["left"] = sorted(owned) if stage else []
            engine.destroy()
        if dtype == "fp32" and micro == 1:
            result["alone"], _ = alone(size, STEPS)
        logging.getLogger("optwatch").removeHandler(log)
        result["log"] = "\n".join(log.lines)
        dist.barrier()
        return result

    return scenario


FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
zero_0 = train(0, "fp32")
zero_0_bf16 = train(0, "bf16")
zero_1 = train(1, "fp32", of="base")
zero_1_bf16 = train(1, "bf16")
zero_1_bf16_summed_in_fp32 = train(1, "bf16", **FP32_SUMS)
zero_2 = train(2, "fp32", {"round_robin_gradients": True})
zero_2_accumulated = train(2, "fp32", micro=2)
zero_2_bf16 = train(2, "bf16")
zero_2_offloaded = train(2, "bf16", {"offload_optimizer": {"device": "cpu"}})
zero_3 = train(3, "fp32")
zero_3_offloaded = train(3, "bf16", {"offload_optimizer": {"device": "cpu"}})
zero_3_in_sub_groups = train(3, "fp32", {"sub_group_size": 40}, of="base")
zero_3_bf16 = train(3, "bf16")


def overflowing(stage: int) -> Any:
    """float16 with a dynamic scale that is too large at first: steps are left out until it fits."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        fp16 = {"enabled": True, "initial_scale_power": 24, "hysteresis": 1, "loss_scale_window": 100}
        config = configuration(stage, "fp32", {}, fp16=fp16)
        engine, optimizer, _, _ = begin(rank, size, config)
        settings = Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=1)
        monitor = attach(optimizer, port=0, settings=settings)
        steps = []
        for step in range(12):
            loss = engine(batch(rank, step).half()).float().square().mean()
            engine.backward(loss)
            engine.step()
            assert monitor.flush(60)
            norm = None if optimizer.overflow else float(engine.get_global_grad_norm())
            steps.append({"loss": loss.item(), "norm": norm, "got": monitor.snapshot()})
        result = {"scaled": steps, "skipped": engine.skipped_steps, "faults": monitor.faults.counts}
        monitor.detach()
        engine.destroy()
        dist.barrier()
        return result

    return scenario


overflowing_1 = overflowing(1)
overflowing_3 = overflowing(3)


def watched_only(stage: int, dtype: str, early: bool) -> Any:
    """What is exported where it is not exact: attached before DeepSpeed took the optimizer over, or not known."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        log = Log()
        logging.getLogger("optwatch").addHandler(log)
        settings = Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=1)
        result: dict[str, Any] = {"state": {}}
        for watched in (False, True):
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
            torch.manual_seed(5)
            model = Net()
            base = adamw(trained(model))
            monitor = attach(base, port=0, settings=settings) if watched and early else None
            engine, optimizer, _, _ = deepspeed.initialize(
                model=model, optimizer=base, config=configuration(stage, dtype, {}), dist_init_required=False
            )
            if watched and not early:
                monitor = attach(optimizer, port=0, settings=settings)
            for step in range(3):
                loss = engine(batch(rank, step).to(DTYPES[dtype])).float().square().mean()
                engine.backward(loss)
                engine.step()
            if monitor is not None:
                assert monitor.flush(60)
                result |= {"got": monitor.snapshot(), "faults": monitor.faults.counts, "loss": loss.item()}
                monitor.detach()
            kept = [x for entry in base.state.values() for x in (entry["exp_avg"], entry["exp_avg_sq"])]
            result["state"][str(watched)] = [x.flatten().tolist() for x in kept]
            engine.destroy()
        result["log"] = "\n".join(log.lines)
        logging.getLogger("optwatch").removeHandler(log)
        dist.barrier()
        return result

    return scenario


attached_before = watched_only(1, "fp32", early=True)
attached_before_zero_3 = watched_only(3, "fp32", early=True)
without_zero_in_fp16 = watched_only(0, "fp16", early=False)


def resumed(stage: int) -> Any:
    """A checkpoint of DeepSpeed's, written within `Monitor.checkpoint` and loaded by a new engine that is watched."""

    def scenario(rank: int, size: int, folder: Path) -> dict[str, Any]:
        log = Log()
        logging.getLogger("optwatch").addHandler(log)
        result: dict[str, Any] = {}
        for part in ("saved", "loaded"):
            engine, optimizer, _, _ = begin(rank, size, configuration(stage, "fp32", {}))
            settings = Settings(address="127.0.0.1", spool_directory=folder / f"spool{rank}", sample_every=1)
            monitor = attach(optimizer, port=0, settings=settings)
            path = folder / f"checkpoint{stage}"
            if part == "loaded":
                engine.load_checkpoint(str(path))
            for step in range(2):
                engine.backward(engine(batch(rank, step)).square().mean())
                engine.step()
            if part == "saved":
                with monitor.checkpoint(path):
                    engine.save_checkpoint(str(path))
            assert monitor.flush(60)
            dist.barrier()
            count = [float(entry["step"]) for entry in optimizer.optimizer.state.values()]
            result[part] = {"got": monitor.snapshot(), "faults": monitor.faults.counts, "count": max(count)}
            result[part]["step"] = monitor._host.last_step
            monitor.detach()
            engine.destroy()
        logging.getLogger("optwatch").removeHandler(log)
        result["log"] = "\n".join(log.lines)
        dist.barrier()
        return result

    return scenario


resumed_1 = resumed(1)
resumed_3 = resumed(3)
