"""Ours beside what people use instead: the same weights, the same work, in one run."""
