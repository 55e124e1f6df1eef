"""What a colour means, the same on every dashboard: the hue tells the subject, and its tone tells the run.

Grafana colours by a series' place or its name, from one palette for all. So each subject has four tones here, and an
override picks one by the last character of the run id. Ids that count up, and most that end in random digits, come
out apart, and a run keeps its tone in every panel. Red is only for what is bad, to be seen from afar.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from grafana_foundation_sdk.models import dashboard as model

GOOD, WARN, BAD, PLAIN = "green", "yellow", "red", "text"
"""Colours of a verdict, in thresholds."""


@dataclass(frozen=True, slots=True)
class Hue:
    """Four tones of one subject; the first stands for it where there is only one value."""

    tones: tuple[str, str, str, str]

    @property
    def main(self) -> str:
        """The tone of a lone value."""
        return self.tones[0]

    def overrides(self) -> list[tuple[str, list[model.DynamicConfigValue]]]:
        """Pairs of a regular expression for series names that begin with a run id, and the tone they get."""
        return [(pattern, [self.tone(index)]) for index, pattern in enumerate(RUN_PATTERNS)]

    def tone(self, index: int) -> model.DynamicConfigValue:
        """The override property that gives a series this tone."""
        return model.DynamicConfigValue("color", {"mode": "fixed", "fixedColor": self.tones[index]})


def _run_patterns() -> tuple[str, ...]:
    letters = string.digits + string.ascii_lowercase
    classes = ("".join(c + (c.upper() if c.isalpha() else "") for c in letters[tone::4]) for tone in range(4))
    return tuple(f"/^[^/ ]*[{characters}]([/ ]|$)/" for characters in classes)


RUN_PATTERNS = _run_patterns()
"""One regular expression a tone, over the last character of the run id; a name ends it with a slash or a space."""

LOSS = Hue(("#5794f2", "#b3d1ff", "#2fc1d6", "#3a5fd0"))
GRADIENT = Hue(("#ff9830", "#ffd49a", "#d0641a", "#e3c341"))
WEIGHT = Hue(("#73bf69", "#c4eab9", "#2f8f46", "#b3c334"))
MOMENT = Hue(("#b877d9", "#e2c8f5", "#7d4fd3", "#d874c4"))
RATE = Hue(("#3fb8af", "#a9e6df", "#27808f", "#7fbf9a"))
SPEED = Hue(("#c8a878", "#ecdcc0", "#96713d", "#b7b06a"))
NEUTRAL = Hue(("#9fa7b3", "#d9dee5", "#6c7683", "#8fb0c4"))
CAUTION = Hue(("#f2cc0c", "#fff2a1", "#c9a000", "#e8a33d"))
ALARM = Hue(("#f2495c", "#ffa6b0", "#c4162a", "#e0559a"))

STATUSES = {
    "succeeded": GOOD,
    "failed": ALARM.tones[0],
    "lost": ALARM.tones[2],
    "cancelled": NEUTRAL.tones[2],
    "running": NEUTRAL.tones[3],
}
"""Colour of each status of a run."""
CAUSES = {
    "crashed": ALARM.tones[0],
    "out_of_memory": ALARM.tones[3],
    "nonfinite": ALARM.tones[1],
    "lost": STATUSES["lost"],
    "unknown": NEUTRAL.main,
}
"""Colour of each cause of a failure."""
