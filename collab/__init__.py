"""How peers work together. Nothing in this package knows what is trained: that is the business of `tasks/`."""

import os

# Before the first import of hivemind: its INFO lines tell of every lookup, and would bury what a person has to see.
os.environ.setdefault("HIVEMIND_LOGLEVEL", "WARNING")
