"""Published recipes: learning rate and target batch together, with the rule that links them."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preset:
    """A recipe. For other target batches its rate changes with the square root of their ratio.

    You et al. 2020 train BERT by this rule with batches of 512 to 32,768; for Adam see Malladi et al. 2022.
    """

    learning_rate: float
    """Peak rate for `settings["target_batch_size"]`."""
    warmup: float
    """Share of all global steps."""
    settings: Mapping[str, Any]

    def rate_for(self, target_batch_size: int) -> float:
        """The peak learning rate, to four digits."""
        ratio = target_batch_size / self.settings["target_batch_size"]
        return float(f"{self.learning_rate * math.sqrt(ratio):.4g}")


def _preset(learning_rate: float, warmup: float, **settings: Any) -> Preset:
    usual = dict(weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.999, adam_epsilon=1e-6, max_grad_norm=1.0)
    return Preset(learning_rate, warmup, MappingProxyType(usual | settings))


PRESETS = {
    # Lan et al. 2019, section 4.1; You et al. 2020 have the same rate and warm-up for this batch (BERT, untuned LAMB)
    "albert": _preset(0.00176, 1 / 40, optimizer="lamb", target_batch_size=4096),
    # Diskin et al. 2021 (DeDLOC, sahajbert/arguments.py): ALBERT's, with 5,000 of 125,000 steps of warm-up
    "sahajbert": _preset(0.00176, 1 / 25, optimizer="lamb", target_batch_size=4096),
    # Devlin et al. 2019, appendix A.2
    "bert": _preset(1e-4, 1 / 100, optimizer="adamw", target_batch_size=256),
    # Liu et al. 2019, table 9, base model
    "roberta": _preset(6e-4, 24 / 500, optimizer="adamw", target_batch_size=8192, adam_beta2=0.98, max_grad_norm=0.0),
}


def fill_in(given: Mapping[str, Any], max_global_steps: int) -> dict[str, Any]:
    """`given`, and for what it leaves open the values of the preset that it names. What was given stays as it is.

    :param given: settings, among them `preset`; `target_batch_size` at least 1.
    """
    preset = PRESETS[given["preset"]]
    filled = {**preset.settings, **given}
    filled.setdefault("warmup_steps", round(preset.warmup * max_global_steps))
    if "learning_rate" not in given:
        batch, published = filled["target_batch_size"], preset.settings["target_batch_size"]
        filled["learning_rate"] = preset.rate_for(batch)
        if batch != published:
            logger.info(
                "Peak learning rate %g for %d samples a step: preset %s has %g for %d, and the square root rules",
                filled["learning_rate"], batch, given["preset"], preset.learning_rate, published,
            )  # fmt: skip
    return filled


def follows_rule(settings: Mapping[str, Any]) -> bool:
    """Whether the learning rate is what the preset's rule makes of the target batch."""
    rate: float = settings["learning_rate"]
    return rate == PRESETS[settings["preset"]].rate_for(settings["target_batch_size"])
