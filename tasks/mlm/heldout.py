"""Text that nobody trains on, as batches whose masks are always the same: what checkpoints are measured on."""

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from tasks.mlm.batches import Batch, joined, plan
from tasks.mlm.cleaning import make_cleaner
from tasks.mlm.encoder import Encoder
from tasks.mlm.instances import Pool, make_instances
from tasks.mlm.masking import collate
from tasks.mlm.sources import Source, documents

POSITIONS = 4096  # of a batch: 70 MB of logits with 30,000 entries and 15 % of masks
AT_ONCE = 100  # documents that are tokenized in one call
SEED = 0  # not the run's: the checkpoints of two runs on the same text can be compared


def held_out_batches(
    settings: Mapping[str, Any], encoder: Encoder, cache_dir: Path, *, most: int, parted: bool
) -> list[Batch]:
    """Batches of the held-out part of a run's sources, in the proportion of their weights.

    :param most: how many, each of about `POSITIONS` tokens; fewer if there is less text, none if there is none
    :param parted: whether instances are pairs of segments (see `make_instances`)
    :raises UserError: a source cannot be read
    """
    texts = documents(
        [Source.from_mapping(mapping) for mapping in settings["sources"]],
        seed=SEED,
        place="heldout",
        part="heldout",
        cache_dir=cache_dir,
        shuffle_buffer=1,
    )
    clean, pools, tokens = make_cleaner(settings["cleaning"]), [], 0
    try:
        while tokens < most * POSITIONS and (some := list(islice(texts, AT_ONCE))):
            pools.append(Pool.of(map(clean, some), encoder))
            tokens += len(pools[-1].ids)
    finally:
        texts.close()
    if not tokens:
        return []
    pool, rng = joined(pools), np.random.default_rng(SEED)
    instances = make_instances(pool, pool.ranges(), settings["seq_length"], rng, parted=parted)
    return [collate(pool, some, encoder, rng=rng) for some in plan(instances, POSITIONS, rng)[:most]]
