"""An actor and a critic with an optimizer each, which learn to walk to the end of a corridor: two losses, one run."""

import torch
from torch import nn

from optwatch import attach

LENGTH = 8


def episode(actor: nn.Module, critic: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of actor and critic over one walk of at most 40 steps."""
    place, actor_loss, critic_loss = 0, torch.zeros(()), torch.zeros(())
    for _ in range(40):
        seen = nn.functional.one_hot(torch.tensor(place), LENGTH).float()
        choices = torch.distributions.Categorical(logits=actor(seen))
        action = choices.sample()
        following = max(0, min(LENGTH - 1, place + (1 if action.item() else -1)))
        done = following == LENGTH - 1
        reward = 1.0 if done else -0.05
        with torch.no_grad():
            ahead = 0.0 if done else critic(nn.functional.one_hot(torch.tensor(following), LENGTH).float())
        advantage = reward + 0.95 * ahead - critic(seen)
        actor_loss = actor_loss - choices.log_prob(action) * advantage.detach().squeeze()
        critic_loss = critic_loss + advantage.square().squeeze()
        place = following
        if done:
            break
    return actor_loss, critic_loss


torch.manual_seed(3)
actor = nn.Sequential(nn.Linear(LENGTH, 16), nn.Tanh(), nn.Linear(16, 2))
critic = nn.Sequential(nn.Linear(LENGTH, 16), nn.Tanh(), nn.Linear(16, 1))
actor_optimizer = torch.optim.Adam(actor.parameters(), lr=1e-2)
critic_optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-2)
attach(actor_optimizer, critic_optimizer)
for _ in range(30):
    actor_loss, critic_loss = episode(actor, critic)
    critic_optimizer.zero_grad()
    critic_loss.backward()
    critic_optimizer.step()
    actor_optimizer.zero_grad()
    actor_loss.backward()
    actor_optimizer.step()
    print(f"{actor_loss.item():.17g} {critic_loss.item():.17g}")
