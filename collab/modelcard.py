"""The model card: README.md of a checkpoint, readable by people and, in its head, by the Hub."""

import re
from collections.abc import Mapping, Sequence
from html import escape

import yaml

from collab.names import public_name

SHOWN_PEERS = 100


def model_card(
    *,
    title: str,
    summary: str,
    metadata: Mapping[str, object],
    run_id: str,
    step: int,
    samples: int,
    peers: Sequence[str],
    usage: str,
    settings: Mapping[str, object],
    join_command: str | None = None,
) -> str:
    """The text of README.md.

    :param title: the model's name, for people.
    :param summary: a paragraph or more of Markdown: what the model is and what it was trained on.
    :param metadata: the Hub's own keys: license, language, tags, pipeline_tag, library_name; None values are left out.
    :param step: global steps done.
    :param samples: samples that were averaged into the model.
    :param peers: public names of those who contributed; strangers chose them, so they are escaped here.
    :param usage: Python that opens the model.
    :param settings: what the run was trained with, one table row each.
    :param join_command: what a volunteer types to help; None when the run is over.
    """
    head = yaml.safe_dump({k: v for k, v in metadata.items() if v is not None}, allow_unicode=True, sort_keys=False)
    rows = "\n".join(f"| {_text(str(key))} | {_text(str(value))} |" for key, value in settings.items())
    names = sorted({public_name(name) for name in peers}, key=str.casefold)
    more = f" and {len(names) - SHOWN_PEERS:,} more" if len(names) > SHOWN_PEERS else ""
    parts = [
        f"---\n{head}---",
        f"# {_text(title)}",
        summary.strip(),
        f"Trained together by volunteers over the internet in the run **{_text(run_id)}**: "
        f"global step **{step:,}**, **{samples:,}** samples.",
        f"## Use it\n\n```python\n{usage.strip()}\n```",
    ]
    if join_command is not None:
        parts.append(f"## Help to train it\n\nThe run goes on. Any computer can join, and leave, at any time:\n\n"
                     f"```bash\n{join_command.strip()}\n```")  # fmt: skip
    parts.append(f"## Who trained it\n\n{', '.join(map(_text, names[:SHOWN_PEERS])) or 'Nobody yet'}{more}.")
    parts.append(f"## Settings\n\n| setting | value |\n| --- | --- |\n{rows}")
    return "\n\n".join(parts) + "\n"


def _text(text: str) -> str:
    """Text that Markdown and HTML show as it is: one line, no links, no emphasis, no end of a table cell."""
    return re.sub(r"([\\`*_{}\[\]()#+!|~@:])", r"\\\1", escape(" ".join(text.split()), quote=False))
