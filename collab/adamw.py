"""AdamW with its state in 8 bits."""

from collections.abc import Iterable
from typing import Any

import torch

from collab.moments import MomentOptimizer


class AdamW8bit(MomentOptimizer):
    """AdamW (Loshchilov and Hutter 2019), its moments in 8 bits (`collab.quantized`); in float32 torch's own is faster.

    :param params: parameters or parameter groups; groups may set their own `weight_decay` (0 for biases and norms).
    :param lr: learning rate; a schedule may change it in `param_groups`.
    :param betas: decay of the first and the second moment.
    :param eps: added to the root of the second moment.
    :param weight_decay: in each step weights shrink by `lr` times this share of themselves.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(params, eight_bit=True, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _update(self, group: dict[str, Any], param: torch.Tensor) -> None:
        rate = float(group["lr"])
        for weights, update in self._directions(group, param):
            weights.mul_(1 - rate * group["weight_decay"]).add_(update, alpha=-rate)
