"""How models are run: what a computation takes before it is tried."""
