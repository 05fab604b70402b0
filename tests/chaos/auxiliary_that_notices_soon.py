"""run_aux_peer.py that takes its daemon for lost after half of the time."""

import run_aux_peer
from collab.processes import run_program

run_aux_peer.LOST_SECONDS /= 2

if __name__ == "__main__":
    run_program(run_aux_peer.main)
