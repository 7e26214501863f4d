"""The reward functions that come with the package; `rewards.registry` lists them by name."""
