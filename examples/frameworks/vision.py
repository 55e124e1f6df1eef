"""A residual network on pictures it makes itself: SGD with momentum, steps of the rate, label smoothing, bf16."""

import torch
from torch import nn
from torch.nn import functional

from optwatch import attach


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(x + self.layers(x))


torch.manual_seed(2)
model = nn.Sequential(
    nn.Conv2d(3, 8, 3, padding=1), Residual(8), nn.MaxPool2d(2), Residual(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(8, 4),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [15, 25], gamma=0.1)
attach(optimizer, model=model)
for _ in range(30):
    labels = torch.randint(4, (16,))
    pictures = torch.randn(16, 3, 12, 12) * 0.3
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[:, 6 * (label // 2) : 6 * (label // 2) + 6, 6 * (label % 2) : 6 * (label % 2) + 6] += 1.0
    with torch.autocast("cpu", torch.bfloat16):
        loss = functional.cross_entropy(model(pictures).float(), labels, label_smoothing=0.1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    schedule.step()
    print(f"{loss.item():.17g}")
