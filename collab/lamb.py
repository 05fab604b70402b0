"""LAMB, the optimizer for target batches of thousands of samples."""

from collections.abc import Iterable
from typing import Any

import torch

from collab.moments import MomentOptimizer


class Lamb(MomentOptimizer):
    """Layer-wise adaptive moments with bias correction and decoupled weight decay (You et al. 2020, Algorithm 2).

    Written here because the maintained libraries leave out the bias correction of that algorithm. Every tensor's update
    is scaled to the norm of the tensor itself: by the trust ratio min(|weights|, `max_trust_norm`) / |update|, which is
    1 if either norm is zero. In one step a tensor moves by `lr` times its norm, `lr` x `max_trust_norm` at most. The
    step holds the update of one tensor at a time beside the state.

    :param params: parameters or parameter groups; groups may set their own `weight_decay` (0 for biases and norms).
    :param lr: learning rate; a schedule may change it in `param_groups`.
    :param betas: decay of the first and the second moment.
    :param eps: added to the root of the second moment. The paper's ALBERT and BERT runs use 1e-6.
    :param weight_decay: added to the update before it is scaled, so it takes part in the trust ratio, as in the paper.
    :param max_trust_norm: upper bound of the parameter norm in the trust ratio (phi in the paper, section 3; its
      reference implementation bounds it at 10). Raise it if the norms of large tensors grow past it on purpose.
    :param eight_bit: keep the moments of large tensors in 8 bits (`collab.quantized`).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        max_trust_norm: float = 10.0,
        eight_bit: bool = False,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, max_trust_norm=max_trust_norm)
        super().__init__(params, eight_bit=eight_bit, **defaults)

    def _update(self, group: dict[str, Any], param: torch.Tensor) -> None:
        updates, weight_norms, update_norms = [], [], []
        for weights, update in self._directions(group, param):
            if group["weight_decay"] != 0:
                update.add_(weights, alpha=group["weight_decay"])
            updates.append((weights, update))
            weight_norms.append(torch.linalg.vector_norm(weights))
            update_norms.append(torch.linalg.vector_norm(update))
        weight_norm = torch.linalg.vector_norm(torch.stack(weight_norms)).clamp_(max=group["max_trust_norm"])
        update_norm = torch.linalg.vector_norm(torch.stack(update_norms))
        # A tensor of zeros (a fresh bias), or one without any update, takes the plain step.
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), weight_norm / update_norm, 1.0)
        for weights, update in updates:
            weights.add_(update.mul_(ratio), alpha=-float(group["lr"]))
