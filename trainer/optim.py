"""The optimizer: AdamW, with weight decay on weights and adapters' factors only; or RMSprop."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tokenmill.kernels.adamw import adamw_
from tokenmill.trainer.config import OptimizerSection
from tokenmill.trainer.model.rows import local_part


def build_optimizer(
    model: nn.Module, section: OptimizerSection, precision: str = "fp32", seed: int = 0
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov and Hutter 2019): PyTorch's fused one, or where `precision` is bf16 the one below; or PyTorch's
    RMSprop (Hinton, 2012), whose state is half of AdamW's.

    Norms' gains and DoRA's magnitudes are not decayed: they are lengths, with nothing to be regularised for.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lengths = {name for name in parameters if name.endswith(("norm.weight", ".magnitude"))}
    groups = [
        {"params": [p for n, p in parameters.items() if n not in lengths], "weight_decay": section.weight_decay},
        {"params": [p for n, p in parameters.items() if n in lengths], "weight_decay": 0.0},
    ]
    if section.kind == "rmsprop":
        return torch.optim.RMSprop(
            parameters.values(), lr=section.learning_rate, alpha=section.betas[1], eps=section.eps
        )
    if precision == "bf16":
        return StochasticAdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, seed=seed)
    return torch.optim.AdamW(groups, lr=section.learning_rate, betas=section.betas, eps=section.eps, fused=True)


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW without master weights: parameters in bf16 are updated with stochastic rounding, and so are the moments,
    which have the parameter's dtype. With a gradient in bf16 this is 8 bytes a parameter.

    Random bits depend on `seed` (0 <= seed < 2**63), the parameter's step and its number in the order of the groups:
    the update is the same bit by bit when repeated, resumed, and sharded over any number of ranks.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        seed: int = 0,
    ) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed = seed

    @torch.no_grad()
    def step(self) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  (no closure: AdamW evaluates once)
        """Update every parameter that has a gradient."""
        numbered = enumerate((group, parameter) for group in self.param_groups for parameter in group["params"])
        for number, (group, parameter) in numbered:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.int64)  # on the host, which never has to ask the device
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["step"] += 1
            local, first_row = local_part(parameter)
            gradient, exp_avg, exp_avg_sq = (
                local_part(t)[0] for t in (parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            )
            adamw_(
                local,
                gradient,
                exp_avg,
                exp_avg_sq,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                step=int(state["step"]),
                seed=self.seed,
                tensor_id=number,
                offset=first_row * parameter.shape[1:].numel(),
            )
