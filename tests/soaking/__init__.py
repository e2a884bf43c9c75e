"""Training through faults at random: what `tests/soak.py` is made of."""
