"""LAMB, the optimizer for target batches of thousands of samples."""

from collections.abc import Callable, Iterable
from typing import Any

import torch


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive moments with bias correction and decoupled weight decay (You et al. 2020, Algorithm 2).

    Written here because the maintained libraries leave out the bias correction of that algorithm. Every tensor's update
    is scaled to the norm of the tensor itself, bounded by `max_trust_norm`.

    :param params: parameters or parameter groups; groups may set their own `weight_decay` (0 for biases and norms).
    :param lr: learning rate; a schedule may change it in `param_groups`.
    :param betas: decay of the first and the second moment.
    :param eps: added to the root of the second moment. The paper's ALBERT and BERT runs use 1e-6.
    :param weight_decay: added to the update before it is scaled, so it takes part in the trust ratio, as in the paper.
    :param max_trust_norm: upper bound of the parameter norm in the trust ratio (phi in the paper, section 3; its
      reference implementation bounds it at 10). Raise it if the norms of large tensors grow past it on purpose.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_trust_norm: float = 10.0,
    ) -> None:
        super().__init__(
            params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_trust_norm=max_trust_norm)
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._step_group(group, params)
        return loss

    def _step_group(self, group: dict[str, Any], params: list[torch.Tensor]) -> None:
        beta1, beta2 = group["betas"]
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(param, memory_format=torch.preserve_format)
                state["exp_avg_sq"] = torch.zeros_like(param, memory_format=torch.preserve_format)
            state["step"] += 1
        grads = [param.grad for param in params if param.grad is not None]
        means = [self.state[param]["exp_avg"] for param in params]
        squares = [self.state[param]["exp_avg_sq"] for param in params]
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, grads, grads, value=1 - beta2)

        # All tensors of a group have taken the same number of steps, except after the group was changed by hand.
        steps = [self.state[param]["step"].item() for param in params]
        updates = torch._foreach_div(squares, [1 - beta2**step for step in steps])
        torch._foreach_sqrt_(updates)
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, means)
        torch._foreach_div_(updates, [1 - beta1**step for step in steps])
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])

        weight_norms = torch.stack(torch._foreach_norm(params)).clamp_(max=group["max_trust_norm"])
        update_norms = torch.stack(torch._foreach_norm(updates))
        # A tensor of zeros (a fresh bias), or one without any update, takes the plain step.
        ratios = torch.where((weight_norms > 0) & (update_norms > 0), weight_norms / update_norms, 1.0)
        torch._foreach_mul_(updates, list(ratios.unbind()))
        torch._foreach_add_(params, updates, alpha=-float(group["lr"]))
