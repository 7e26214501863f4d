"""The parameters of a run: initial ones, and those of its newest checkpoint."""

import functools
from typing import NamedTuple

import jax

from grpo_jax import models, sharding
from grpo_jax.engine.calls import Call
from grpo_jax.models import hf
from grpo_jax.models.kernels import cpu
from grpo_jax.run import checkpoint, saved_config
from grpo_jax.run.finite import check_finite
from grpo_jax.run.intact import read_newest
from grpo_jax.run.layout import checkpoints, stage_order
from grpo_jax.run.setup import Setup, prepare_policy
from grpo_jax.run.start import Start
from grpo_jax.types import Params


def initial_params(setup: Setup) -> Params:
    """The parameters that a run begins with, on the mesh and without adapters.

    They are those of another run, those of a pretrained checkpoint, or random.
    """
    if setup.config.start:
        return _start_params(setup)
    if (random := random_params(setup)) is not None:
        params: Params = random.program(*random.arguments)
        return params
    base, kind = models.Transformer(setup.model.config.base), setup.model.config.lora.base
    folder = hf.find_folder(setup.config.pretrained)
    return hf.load(folder, base.config, _shapes(base), setup.mesh, base=kind)


def random_params(setup: Setup) -> Call | None:
    """The call that makes random initial parameters; None if the run begins with others."""
    if setup.config.start or setup.config.pretrained:
        return None
    base, kind = models.Transformer(setup.model.config.base), setup.model.config.lora.base
    key = jax.random.key(setup.config.seed)
    shapes = jax.eval_shape(functools.partial(_random_base, base, kind), key)
    where = sharding.shardings(shapes, setup.mesh)
    program = jax.jit(
        _random_base, static_argnums=(0, 1), out_shardings=where,
        compiler_options=cpu.options_of_one_run(),
    )  # fmt: skip
    return Call(program, (base, kind, key), name='random initial parameters')


def _random_base(model: models.Transformer, kind: str, key: jax.Array) -> Params:
    return models.quantize_base(models.init_params(model, key), kind)


def initial_reward_params(setup: Setup) -> Params | None:
    """The pretrained reward model's parameters on the mesh; None if there is none."""
    model = setup.reward_model
    if model is None or not setup.config.reward_model.pretrained:
        return None
    folder = hf.find_folder(setup.config.reward_model.pretrained)
    return hf.load(folder, model.config, _shapes(model), setup.mesh)


def initial_adapters(setup: Setup) -> Params:
    """Fresh adapters on the mesh."""

    def make(key: jax.Array) -> Params:
        return models.split_adapters(models.init_params(setup.model, key))[1]

    key = jax.random.key(setup.config.seed)
    where = sharding.shardings(jax.eval_shape(make, key), setup.mesh)
    return jax.jit(make, out_shardings=where)(key)


def merged(setup: Setup, base: Params, adapters: Params) -> Params:
    """The base with the adapters merged in, on the mesh and never quantized.

    The base's buffers are donated, unless it is quantized, for which none of them has the size.
    """
    merge = functools.partial(models.merge_adapters, setup.model.config)
    where = sharding.shardings(jax.eval_shape(merge, base, adapters), setup.mesh)
    donated = (0,) if setup.model.config.lora.base == 'model' else ()
    return jax.jit(merge, donate_argnums=donated, out_shardings=where)(base, adapters)


class Policy(NamedTuple):
    """The parameters of a run's newest checkpoint."""

    name: str  # stage/step
    base: Params  # all parameters, or those that the adapters are added to
    adapters: Params  # empty if all parameters are trained
    pretrained: bool  # the base is the unchanged pretrained checkpoint

    @property
    def params(self) -> Params:
        """The parameters with the adapters among them, as the model takes them."""
        return models.join_adapters(self.base, self.adapters)


def newest_policy(setup: Setup, name: str = '') -> Policy:
    """Reads a checkpoint of a run onto the mesh; a damaged one is passed over if it is not named.

    Args:
      setup: the run.
      name: 'STAGE/STEP', STAGE or STEP, see `checkpoint.find_checkpoint`; empty: the newest.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged.
    """
    base, adapters = models.split_adapters(_shapes(setup.model))
    folder = setup.config.checkpoint.folder
    stage, name, newest = _read(setup, ('sft', 'grpo'), name, adapters or base)
    check_finite(newest, name)
    if not adapters:
        return Policy(name, newest, {}, pretrained=False)
    params = initial_params(setup)
    earlier = {
        other: steps[-1]
        for other, steps in checkpoint.steps_of_stages(setup.workdir, folder).items()
        if other.partition('-')[0] != 'reward' and stage_order(other) < stage_order(stage)
    }
    # Each stage started with the adapters of the stage before merged into its base.
    for other, step in earlier.items():
        _, _, last = _read(setup, ('sft', 'grpo'), f'{other}/{step}', adapters)
        params = merged(setup, params, last)
    unchanged = bool(setup.config.pretrained) and not setup.config.start and not earlier
    return Policy(name, params, newest, pretrained=unchanged)


def newest_reward_params(setup: Setup) -> Params | None:
    """The parameters of a run's reward model: the newest checkpoint, or the pretrained ones.

    Returns:
      The parameters on the mesh, or None for a run without a reward model.

    Raises:
      ValueError: the run trains the reward model, but has no checkpoint of it yet.
    """
    if setup.reward_model is None:
        return None
    if not setup.config.reward_model.steps:
        return initial_reward_params(setup)
    _, name, params = _read(setup, ('reward',), '', _shapes(setup.reward_model))
    check_finite(params, name)
    return params


def _read(
    setup: Setup, kinds: tuple[str, ...], name: str, shapes: Params
) -> tuple[str, str, Params]:
    """The stage, the name 'stage/step' and the parameters of a checkpoint, see `read_newest`."""
    folder = setup.config.checkpoint.folder

    def read(stage: str, step: int) -> tuple[str, str, Params]:
        with checkpoint.open_to_read(checkpoints(setup.workdir, folder) / stage) as manager:
            params = checkpoint.restore_params(manager, shapes, setup.mesh, step)
        return stage, f'{stage}/{step}', params

    return read_newest(setup.workdir, kinds, name, read, ('params',), folder)


def check_start(setup: Setup) -> None:
    """Checks that the run that `start` names has parameters and tokens of the same kind.

    Raises:
      ValueError: it has not.
    """
    if not setup.config.start:
        return
    other = _start_setup(setup)
    if other.tokenizer.get_vocab() != setup.tokenizer.get_vocab():
        raise ValueError(
            f'start={setup.config.start!r} has another tokenizer than this run: use tokenizer='
            f'{other.config.tokenizer!r} and pretrained={other.config.pretrained!r}'
        )
    theirs, ours = (s.config.model.lora.base for s in (other, setup))
    if 'model' not in (theirs, ours):
        raise ValueError(
            f'start={setup.config.start!r} trained adapters of a base in {theirs}, and merging '
            f'them into one in model.lora.base={ours!r} would round them away: use '
            "model.lora.base='model' in one of the two runs"
        )
    theirs, ours = (_leaf_shapes(models.Transformer(s.model.config.base)) for s in (other, setup))
    different = [name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name)]
    if different:
        name = min(different)
        raise ValueError(
            f'start={setup.config.start!r} has another model than this run: {name} is '
            f'{theirs.get(name, "absent")} there and {ours.get(name, "absent")} here; remove the '
            'keys of model, which are those of that run by default'
        )


def _start_setup(setup: Setup) -> Setup:
    """The setup of the run that `start` names, on the mesh of this run."""
    start = Start.parse(setup.config.start)
    config = saved_config.read(start.workdir / 'config.json')
    config.mesh = setup.config.mesh
    return prepare_policy(config, start.workdir)


def _start_params(setup: Setup) -> Params:
    other, start = _start_setup(setup), Start.parse(setup.config.start)
    policy = newest_policy(other, start.checkpoint)
    params = merged(other, policy.base, policy.adapters) if policy.adapters else policy.base
    shapes = _shapes(models.Transformer(setup.model.config.base))
    kind = setup.model.config.lora.base

    def cast(params: Params) -> Params:
        params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, shapes)
        return models.quantize_base(params, kind)

    where = sharding.shardings(jax.eval_shape(cast, params), setup.mesh)
    donated = (0,) if kind == 'model' else ()
    return jax.jit(cast, donate_argnums=donated, out_shardings=where)(params)


def _leaf_shapes(model: models.Transformer) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(_shapes(model))
    return {jax.tree_util.keystr(path): leaf.shape for path, leaf in leaves}


def _shapes(model: models.Transformer) -> Params:
    return jax.eval_shape(functools.partial(models.init_params, model), jax.random.key(0))
