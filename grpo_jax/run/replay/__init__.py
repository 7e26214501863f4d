"""Replays a step of a run: the same numbers again, and what its update did with each token."""
