"""What LAMB and AdamW share: two exponential averages of the gradient, in float32 or in 8 bits, updated in place."""

from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch

from collab.quantized import BLOCK, NEAREST, decode, dither, empty_codes, encode

EIGHT_BIT_FROM_VALUES = 4096
"""Smaller tensors (biases, normalisation layers) would gain little and hold what is most sensitive."""
CPU_PIECE, ACCELERATOR_PIECE = 2**17, 2**20  # whole periods of the dither


class MomentOptimizer(torch.optim.Optimizer):
    """Adaptive moments with bias correction; a subclass says in `_update` what becomes of them.

    Tensors are worked through in pieces that fit into a core's cache, so that every value is fetched from memory once
    for all operations. The temporary tensors of a piece take 7 MB for each thread on a CPU, and 55 MB elsewhere.

    The state of a parameter is `step`, and `exp_avg` and `exp_avg_sq` like the parameter. With `eight_bit`, tensors of
    4,096 values and more have the codes of `collab.quantized` in their place, 2.02 bytes a value (if they are
    contiguous and in float32).

    :param params: parameters or parameter groups; groups may set their own `weight_decay` (0 for biases and norms).
    """

    def __init__(self, params: Iterable[Any], *, eight_bit: bool, **defaults: Any) -> None:
        self._eight_bit = eight_bit
        self._numbers: dict[tuple[torch.device, int], torch.Tensor] = {}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step for all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(group, param)
        self._numbers.clear()
        return loss

    def _update(self, group: dict[str, Any], param: torch.Tensor) -> None:
        """Move `param`, going through `_directions` once."""
        raise NotImplementedError

    def _directions(self, group: dict[str, Any], param: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Update the moments, piece by piece.

        :returns: for each piece its weights, to be changed in place, and the corrected m / (sqrt(v) + eps), to scratch.
        """
        assert param.grad is not None
        state = self._state_of(param)
        state["step"] += 1
        step, (beta1, beta2) = int(state["step"].item()), group["betas"]
        # m / c1 / (sqrt(v / c2) + eps) with the corrections c1 and c2 brought to one place
        scale, eps = (1 - beta1**step) / (1 - beta2**step) ** 0.5, group["eps"] * (1 - beta1**step)
        places = _piece_size(param)
        if param.is_contiguous():
            weights, gradients = param.view(-1), param.grad.reshape(-1)
            pieces = [slice(start, start + places) for start in range(0, max(1, len(weights)), places)]
        else:
            weights, gradients, pieces = param, param.grad, [slice(None)]
        for piece in pieces:
            gradient = gradients[piece]
            if "exp_avg" in state:
                means, squares = (state[name].view_as(weights)[piece] for name in ("exp_avg", "exp_avg_sq"))
            else:
                blocks = slice(piece.start // BLOCK, piece.stop // BLOCK)
                coded = {name: codes[blocks] for name, codes in state.items() if name != "step"}
                decoded = decode(coded)
                means, squares = (moments.view(-1)[: len(gradient)] for moments in decoded)
            means.lerp_(gradient, 1 - beta1)
            squares.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            direction = squares.sqrt().mul_(scale).add_(eps)
            torch.div(means, direction, out=direction)
            if "exp_avg" not in state:
                encode(coded, *decoded, self._numbers_of(param.device, step, places)[:, : len(decoded[0])])
            yield weights[piece], direction

    def _numbers_of(self, device: torch.device, step: int, places: int) -> torch.Tensor:
        if (device, step) not in self._numbers:
            self._numbers[device, step] = dither(places, step, device)
        return self._numbers[device, step]

    def _state_of(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[param]
        if not state:
            state.update(self._empty_state(param))
        return state

    def _empty_state(self, param: torch.Tensor) -> dict[str, torch.Tensor]:
        state = {"step": torch.zeros((), dtype=torch.float32)}
        codable = param.is_contiguous() and param.dtype == torch.float32
        if self._eight_bit and codable and param.numel() >= EIGHT_BIT_FROM_VALUES:
            return state | empty_codes(param.numel(), param.device)
        return state | {
            name: torch.zeros_like(param, memory_format=torch.preserve_format) for name in ("exp_avg", "exp_avg_sq")
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state, whole or not at all, into the tensors that are there.

        torch's own turns codes into floats, and replaces tensors that lie in shared memory. A state that was written
        in float32 is coded if this optimizer's is in 8 bits, and the reverse.

        :raises ValueError: it is the state of other parameters.
        """
        names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = [param for group in self.param_groups for param in group["params"]]
        loaded = {}
        for name, param in zip(names, params, strict=True):
            if name in state_dict["state"]:
                own, given = self.state.get(param) or self._empty_state(param), state_dict["state"][name]
                given = _as_in(own, given, param)
                if {key: value.shape for key, value in given.items()} != {key: own[key].shape for key in own}:
                    raise ValueError("the optimizer state is one of other parameters")
                loaded[param] = own, given
        super().load_state_dict({**state_dict, "state": {}})
        with torch.no_grad():
            for param, (own, given) in loaded.items():
                for key, value in given.items():
                    own[key].copy_(value)
                self.state[param] = own


def float32_state(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The same state with moments in float32: a hook before `load_state_dict` of torch's optimizers."""
    names = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
    params = (param for group in optimizer.param_groups for param in group["params"])
    state = dict(state_dict["state"])
    for name, param in zip(names, params, strict=True):
        if name in state:
            state[name] = _in_float32(state[name], param)
    return {**state_dict, "state": state}


def _in_float32(given: dict[str, torch.Tensor], param: torch.Tensor) -> dict[str, torch.Tensor]:
    if "mean_codes" not in given:
        return given
    means, squares = (moments.view(-1)[: param.numel()].view(param.shape) for moments in decode(given))
    return {"step": given["step"], "exp_avg": means, "exp_avg_sq": squares}


def _as_in(own: dict[str, torch.Tensor], given: dict[str, torch.Tensor], param: torch.Tensor) -> dict[str, Any]:
    """`given` in the form of `own`."""
    if "mean_codes" not in own:
        return _in_float32(given, param)
    if "mean_codes" in given:
        return given
    coded = empty_codes(param.numel(), given["exp_avg"].device)
    padding = (0, coded["mean_codes"].numel() - param.numel())
    means, squares = (
        torch.nn.functional.pad(given[name].reshape(-1), padding).view(-1, BLOCK) for name in ("exp_avg", "exp_avg_sq")
    )
    encode(coded, means, squares, (NEAREST, NEAREST))
    return {"step": given["step"], **coded}


def _piece_size(param: torch.Tensor) -> int:
    """Values in a piece: what keeps each core in its cache, or an accelerator busy."""
    return CPU_PIECE * torch.get_num_threads() if param.device.type == "cpu" else ACCELERATOR_PIECE
