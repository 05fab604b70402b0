"""Masked language modelling with mixtures of experts that live on other peers, beside the model's own layers."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig

from collab.errors import UserError
from collab.experts.mixture import Experts, Mixture
from collab.experts.plan import ExpertPlan
from collab.metrics import MAX_EXPERTS
from tasks.mlm.task import MaskedLM


class MoEMaskedLM(MaskedLM):
    """The masked LM task whose feed-forward layers have experts. See `tasks.Task` for what each method is for.

    To the output of each feed-forward layer of ALBERT is added that of a mixture: the layer itself is the expert that
    every token gets (Dai et al. 2024 call it shared), and what is left of the model when no other expert answers. The
    layer and the gate are trained by the swarm's optimizer; the other experts by their servers.
    """

    def __init__(self, settings: Mapping[str, Any], folder: Path, cache_dir: Path) -> None:
        super().__init__(settings, folder, cache_dir)
        self._plan = self.expert_plan(settings, folder, swarm_id="")
        torch.manual_seed(settings["seed"])  # every peer begins with the same gates
        groups = self.model.base_model.encoder.albert_layer_groups  # type: ignore[union-attr]
        layers = [layer for group in groups for layer in group.albert_layers]  # type: ignore[union-attr]
        self._mixtures = [Mixture(self._plan, number) for number in range(len(layers))]
        for layer, mixture in zip(layers, self._mixtures, strict=True):
            torch.nn.init.normal_(mixture.gate.weight, std=self.model.config.initializer_range)  # type: ignore
            layer.mixture = mixture
            layer.ff_chunk = _both(layer.ff_chunk, mixture)

    @staticmethod
    def prepare(settings: Mapping[str, Any], cache_dir: Path) -> dict[str, bytes]:
        if "float16" in settings["precisions"]:
            raise UserError(
                "With float16 the loss is scaled, and experts on other peers would get gradients of that scale. Set "
                "precisions to [float32, bfloat16]."
            )
        files = MaskedLM.prepare(settings, cache_dir)
        with tempfile.TemporaryDirectory(prefix="samiti-") as scratch:
            Path(scratch, "config.json").write_bytes(files["config.json"])
            MoEMaskedLM.expert_plan(settings, Path(scratch), swarm_id="")
        return files

    @staticmethod
    def expert_plan(settings: Mapping[str, Any], folder: Path, swarm_id: str) -> ExpertPlan:
        """See `tasks.TaskWithExperts`."""
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder)
        if config.model_type != "albert":
            raise UserError(
                f"Only ALBERT's feed-forward layers can have experts so far, and the run's model is of the type "
                f"{config.model_type}. Set model_config to an ALBERT (tasks/mlm/models/), or task to mlm."
            )
        layers = config.num_hidden_groups * config.inner_group_num
        if layers * settings["experts"] > MAX_EXPERTS:
            raise UserError(
                f"{layers} layers with {settings['experts']} experts each are more than {MAX_EXPERTS} experts. Lower "
                f"`experts`, or num_hidden_groups in the model's config."
            )
        return ExpertPlan.of_run(settings, swarm_id, layers, config.hidden_size, config.intermediate_size)

    def use_experts(self, experts: Experts) -> None:
        """See `tasks.TaskWithExperts`."""
        for mixture in self._mixtures:
            mixture.experts = experts

    def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        for mixture in self._mixtures:
            mixture.balance.clear()
        total = super().loss(batch)
        uneven = [each for mixture in self._mixtures for each in mixture.balance]
        if not uneven:
            return total
        return total + self.settings["expert_balance"] * torch.stack(uneven).mean()

    def usage(self, name: str) -> str:
        return (
            "# This opens the common part of the model, without its experts: a model of its own, and a weaker one.\n"
            + super().usage(name)
        )

    def description(self) -> dict[str, str]:
        plan = self._plan
        each = sum(param.numel() for param in plan.make(0).parameters())
        known = super().description()
        experts = (
            f"{plan.total} experts of {each / 1e6:.2g} M parameters on other peers, {plan.per_token} for each token"
        )
        return {"Model": known.pop("Model"), "Experts": experts, **known}


def _both(
    own: Callable[[torch.Tensor], torch.Tensor], mixture: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[torch.Tensor], torch.Tensor]:
    def ff_chunk(hidden: torch.Tensor) -> torch.Tensor:
        return own(hidden) + mixture(hidden)

    return ff_chunk
