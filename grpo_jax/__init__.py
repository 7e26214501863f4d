"""Group relative policy optimization in JAX: sample, score, update.

The parts are modules of pure functions: `data`, `sample`, `rewards`, `advantages`, `losses`,
`score`, `update`. The commands are `python -m grpo_jax.train` and `python -m grpo_jax.evaluate`.
"""
