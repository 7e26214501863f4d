"""A training run: its configuration, stages, rollouts, grading, evaluation and checkpoints."""
