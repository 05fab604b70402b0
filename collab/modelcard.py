"""The model card: README.md of a checkpoint, readable by people and, in its head, by the Hub."""

import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from collab.public_text import public_name

SHOWN_PEERS = 100
CURVE = "curve.png"  # the Hub's page shows no SVG of a card, but a PNG that lies beside it
HELD_OUT = {"held_out_loss": ("loss", "Held-out loss"), "held_out_accuracy": ("accuracy", "Masked accuracy")}


def model_card(
    *,
    about: Mapping[str, str],
    metadata: Mapping[str, object],
    settings: Mapping[str, Any],
    step: int,
    samples: int,
    tokens: int | None = None,
    held_out: Mapping[str, float] | None = None,
    curve_in_words: str | None = None,
    peers: Iterable[str],
    usage: str,
    join_command: str,
) -> str:
    """The text of README.md.

    :param about: what the model is and what it was trained on, in Markdown, by heading.
    :param metadata: the Hub's own keys: license, language, datasets, base_model, pipeline_tag, library_name; those that
        are None or empty are left out.
    :param settings: of the run, one table row each; None values are left out.
    :param step: global steps done.
    :param samples: samples that were averaged into the model.
    :param tokens: real tokens in them, if that is known.
    :param held_out: `held_out_loss` and `held_out_accuracy`, those that are known; they go into the head as well.
    :param curve_in_words: what the picture `CURVE` beside the card shows; None if there is none.
    :param peers: public names of those who contributed; strangers chose them, so they are escaped here.
    :param usage: Python that opens the model.
    :param join_command: what a volunteer types to help; a run that is over needs none.
    :raises ValueError: the Hub's client does not accept the metadata.
    """
    known = {HELD_OUT[key]: value for key, value in (held_out or {}).items() if key in HELD_OUT}
    results = [
        EvalResult(
            task_type=str(metadata.get("pipeline_tag") or "other"),
            dataset_type="held-out",
            dataset_name="Data of the run that nobody trained on",
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (kind, name), value in known.items()
    ]
    run_id, last_step = settings["run_id"], settings["max_global_steps"]
    keys = {key: value for key, value in metadata.items() if value}
    keys["tags"] = ["hivemind", "collaborative-training", settings["task"]]
    head = ModelCardData(**keys, model_name=run_id, eval_results=results or None).to_yaml()  # type: ignore[arg-type]
    rows = "\n".join(
        f"| {_text(str(key))} | {_text(str(value))} |" for key, value in settings.items() if value is not None
    )
    names = sorted({public_name(name) for name in peers}, key=str.casefold)
    more = f" and {len(names) - SHOWN_PEERS:,} more" if len(names) > SHOWN_PEERS else ""
    of_tokens = f", **{tokens:,}** tokens" if tokens not in (None, samples) else ""  # pictures have none
    parts = [
        f"---\n{head}\n---",
        f"# {_text(run_id)}",
        "\n".join(f"- {heading}: {text}" for heading, text in about.items()),
        f"Trained together by volunteers over the internet: global step **{step:,}** of {last_step:,}, **{samples:,}** "
        f"samples{of_tokens}.",
    ]
    if known:
        figures = ", ".join(f"{name.lower()} **{value:.4f}**" for (_, name), value in known.items())
        parts.append(f"On data that nobody trained on: {figures}.")
    if curve_in_words is not None:
        parts.append(f"![{_text(curve_in_words)}]({CURVE})")
    parts.append(f"## Use it\n\n```python\n{usage.strip()}\n```")
    if step < last_step:
        parts.append(f"## Help to train it\n\nThe run goes on. Any computer can join, and leave, at any time:\n\n"
                     f"```bash\n{join_command.strip()}\n```")  # fmt: skip
    parts.append(f"## Who trained it\n\n{', '.join(map(_text, names[:SHOWN_PEERS])) or 'Nobody yet'}{more}.")
    parts.append(f"## Settings\n\n| setting | value |\n| --- | --- |\n{rows}")
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Text that Markdown and HTML show as it is: one line, no links, no emphasis, no end of a table cell."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~@:])", r"\\\1", escape(" ".join(text.split()), quote=False))
