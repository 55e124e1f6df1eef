"""Sharded with FSDP2: `torchrun --nproc-per-node 2 examples/frameworks/fsdp2.py`, or on one process as it is."""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from optwatch import attach

if "RANK" in os.environ:
    dist.init_process_group("gloo")
else:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
torch.manual_seed(7)
model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 1))
mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
for layer in model:
    if isinstance(layer, nn.Linear):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
attach(optimizer)
torch.manual_seed(8 + dist.get_rank())  # each rank has data of its own
for _ in range(20):
    x = torch.randn(16, 8)
    loss = nn.functional.mse_loss(model(x), x.square().sum(1, keepdim=True))
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    print(f"{loss.item():.17g}")
dist.destroy_process_group()
