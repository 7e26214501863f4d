"""Direct preference optimization from pairs that the SFT model samples, right against wrong.

    python -m grpo_jax.train --config=configs/dpo.py --workdir=runs/dpo

Groups without a right and a wrong completion are replaced from one further batch per step.
"""

import pathlib

from ml_collections import ConfigDict

from grpo_jax import config as grpo_config
from grpo_jax import presets


def get_config() -> ConfigDict:
    config = grpo_config.load(pathlib.Path(__file__).with_name('arithmetic.py'))
    presets.apply(config, 'dpo')
    config.grpo.refill = 1
    return config
