"""The swarm for those who train with something else than `run_trainer.py`."""
