"""Training on several ranks: what this rank holds of each parameter, and the sums over all of them.

The training thread reads local shards and nothing else. The host thread adds the ranks' sums up, on a process group of
the agent's own (`Group`) with a timeout, so that no rank can hold up another one's training, whatever it does.
"""

from .group import Group, LostError
from .placement import Part, describe, local
from .ranks import Ranks

__all__ = ["Group", "LostError", "Part", "Ranks", "describe", "local"]
