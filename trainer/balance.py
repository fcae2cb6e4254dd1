"""Whether experts are in use: a bias that evens out their loads, and a watch for those that starve."""

from __future__ import annotations

from torch import Tensor

PATIENCE = 20  # steps
STARVING = 0.1  # of an even share


def updated_bias(bias: Tensor, counts: Tensor, speed: float) -> Tensor:
    """bias (layers, E) after a step in which expert e of layer l got counts[l, e] tokens, over all ranks.

    That of an expert with more than its even share goes down by `speed`, with less up, whatever the distance. Source:
    DeepSeek-AI, "DeepSeek-V3" (2024), section 2.1.2.
    """
    missing = counts.sum(1, keepdim=True) - counts.shape[1] * counts  # exact, in whole tokens
    return bias + speed * missing.sign().to(bias.dtype)


class Watch:
    """Finds experts that starve: below a tenth of an even share for 20 steps on end. Each is named once a run, or again
    after a resume, which begins to count anew.
    """

    def __init__(self) -> None:
        self._hungry: dict[tuple[int, int], int] = {}  # (layer, expert): steps
        self._named: set[tuple[int, int]] = set()

    def step(self, loads: list[list[float]]) -> list[tuple[int, int]]:
        """The (layer, expert) that begin to starve in a step with `loads` [layer][expert], shares of its tokens."""
        for layer, shares in enumerate(loads):
            for expert, share in enumerate(shares):
                hungry = share < STARVING / len(shares)
                self._hungry[layer, expert] = self._hungry.get((layer, expert), 0) + 1 if hungry else 0
        new = sorted(key for key, steps in self._hungry.items() if steps >= PATIENCE and key not in self._named)
        self._named.update(new)
        return new
