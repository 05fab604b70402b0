"""Make the pictures of the page for the README: light, dark and on a phone.

    python -m scripts.screenshots --folder docs/img

It shows a run that was made up, always the same one, in a headless Chromium; nothing is trained for it.
"""

import argparse
import math
import random
import sys
import tempfile
from pathlib import Path

from collab.background import Health
from collab.events import Event
from collab.files import write_bytes
from collab.page import render_page
from collab.view import PeerView, Round, RunView
from scripts.browser import Browser, find_chromium

NOW = 1_795_262_400.0
STEPS = 3120
SECONDS = 41.0  # a global step
NAMES = (
    "asha",
    "Nilufar",
    "porimol",
    "kaveh",
    "lab-42",
    "mita",
    "rosa",
    "Tuấn",
    "old gaming PC",
    "irena",
    "kaggle-7",
    "zoltan",
)
DEVICES = ("NVIDIA T4", "NVIDIA GeForce RTX 4070", "NVIDIA GeForce RTX 3060", "Apple M3", "CPU, 8 cores")
SCREENS = {  # name: width, height, dark, pixels for each CSS pixel
    "page-light": (940, 1500, False, 1.0),
    "page-dark": (940, 1500, True, 1.0),
    "page-phone": (360, 1100, False, 1.5),
}


def made_up_run() -> RunView:
    """A run of some days with a dozen peers, one of them slow, one alone."""
    chance = random.Random(7)
    history = []
    for step in range(1, STEPS + 1):
        loss = 1.9 + 8.5 * math.exp(-step / 260) + 1.1 * math.exp(-step / 1500) + chance.gauss(0, 0.025)
        met = 12 if chance.random() < 0.86 else chance.choice((9, 10, 11, 11))
        history.append(Round(step, NOW - (STEPS - step) * SECONDS, loss, 610 + chance.gauss(0, 18), met, 12, 12))
    peers = []
    for rank, name in enumerate(NAMES):
        device = DEVICES[min(rank // 2, 4) if rank != 3 else 3]
        speed = 96 / (1 + 0.35 * rank) + chance.random() if rank != 10 else 3.2
        peers.append(
            PeerView(
                name,
                role="client" if rank in (2, 5, 6, 10) else "trainer",
                samples_per_second=speed,
                samples=int(speed * 9000),
                last_step=STEPS - (rank == 9) * 4,
                peers_met=1 if rank == 9 else history[-1].peers_met,
                peers_expected=12,
                loss=2.07 + chance.gauss(0, 0.04),
                device=device,
                data_wait=0.19 if rank == 10 else abs(chance.gauss(0, 0.02)),
                memory=int((2.2 + 6 * chance.random()) * 2**30),
                slow=rank == 10,
            )
        )
    given = sorted(((peer.name, peer.samples * chance.randint(3, 9)) for peer in peers), key=lambda pair: -pair[1])
    told = [
        ("saved", 12, "Saved the checkpoint of step 3,100"), ("joined", 95, "mita joined"),
        ("alone", 160, "irena made step 3,116 alone"), ("left", 380, "notebook-3 left"),
        ("joined", 420, "kaggle-7 joined"), ("published", 700, "Published step 3,000"),
        ("failed", 1900, "Publishing failed, and goes on: HfHubHTTPError: 429 Too Many Requests"),
    ]  # fmt: skip
    duties = ["Welcoming newcomers", "Watching the swarm", "Keeping checkpoints", "Assisting", "Serving the page"]
    return RunView(
        run_id="bengali-albert-large",
        task="ALBERT, 17.9 M parameters; masked language modelling and sentence order; Bengali, 42 GB of text",
        started=history[0].time,
        updated=NOW,
        global_step=STEPS,
        max_steps=12_500,
        finished=False,
        history=history,
        peers=sorted(peers, key=lambda peer: -peer.samples),
        join_command="python run_trainer.py --initial_peers /ip4/203.0.113.7/tcp/31337/p2p/QmRunOrganizer",
        checkpoint="runs/bengali-albert-large/checkpoints/step-0003100",
        tracker="trackio show --project bengali-albert-large",
        can_fill_mask=True,
        samples=STEPS * 4096,
        swarm={
            "tokens": STEPS * 4096 * 183.0,
            "steps_per_hour": 3600 / SECONDS,
            "full_rounds": 0.868,
            "utilisation": 0.913,
            "peers_auxiliary": 2.0,
        },
        seconds_to_next_step=17.0,
        seconds_to_end=(12_500 - STEPS) * SECONDS,
        contributors=given,
        duties=[Health(name, 0, "", 0.4) for name in duties]
        + [Health("Publishing", 1, "HfHubHTTPError: 429 Too Many Requests", 7.0)],
        events=[Event(NOW - ago, kind, text) for kind, ago, text in told],  # type: ignore[arg-type]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/img"), help="where the PNG files go")
    folder = parser.parse_args().folder
    if (program := find_chromium()) is None:
        sys.exit("error: There is no Chromium here. Install one: apt-get install chromium")
    with tempfile.TemporaryDirectory() as scratch, Browser(program) as browser:
        file = Path(scratch, "page.html")
        file.write_text(render_page(made_up_run(), served=True), encoding="utf-8")
        for name, (width, height, dark, scale) in SCREENS.items():
            browser.screen(width, height, dark, scale)
            browser.open(file.as_uri())
            picture = browser.picture()
            write_bytes(folder / f"{name}.png", picture)
            print(f"{folder / name}.png: {len(picture) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
