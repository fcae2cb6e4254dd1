"""The learning rate as a pure function of the step."""

from __future__ import annotations

from math import cos, pi

from tokenmill.trainer.config import ScheduleSection


def learning_rate(step: int, steps: int, peak: float, schedule: ScheduleSection) -> float:
    """The rate for optimizer step `step` (from 0) of `steps`.

    A linear warm-up, then: `cosine` down to `final * peak` (Loshchilov and Hutter, 2017), `wsd` (warm-up, stable,
    decay: Hu et al., 2024) flat and then straight down to it over the last `decay` of the run, or `constant`.
    """
    warmup = round(schedule.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule.kind == "constant":
        return peak
    if schedule.kind == "cosine":
        progress = (step - warmup) / max(1, steps - warmup)
        return peak * (schedule.final + (1 - schedule.final) * 0.5 * (1 + cos(pi * min(1.0, progress))))
    decay = max(1, round(schedule.decay * steps))
    progress = max(0.0, (step - (steps - decay)) / decay)
    return peak * (1 - (1 - schedule.final) * min(1.0, progress))
