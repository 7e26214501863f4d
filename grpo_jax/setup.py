"""What a command needs: mesh, tokenizer, model and sampler, problems, and parameters."""

import dataclasses
import functools
import logging
import pathlib
import shutil
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import checkpoint, data, models, prompts, sharding
from grpo_jax.config import check_values, defaults
from grpo_jax.models import families, folders, hf
from grpo_jax.sample import sample
from grpo_jax.tokens import eos_ids, load_tokenizer, stop_table
from grpo_jax.types import Params, Prompts, stage_order

log = logging.getLogger('grpo_jax')

# (params, prompts, *, step, sampling, group_size, weights='model') -> Rollout;
# with draw=sample.blocks its blocks
Sampler = Callable[..., Any]

# Keys of `model` that a checkpoint leaves open.
_COMPUTED = ('dtype', 'param_dtype', 'attention', 'remat', 'lora')


class Problems(NamedTuple):
    """A data set's problems, ready to be asked and judged."""

    rows: data.Rows
    table: data.PromptTable
    tokenizer: Any
    stops: tuple[str, ...]  # strings that end a completion


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a policy needs to be asked questions, checked before anything is computed."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    model: models.Transformer
    tokenizer: Any
    ends: np.ndarray  # i32[E], tokens that end a completion
    sampler: Sampler
    source: pathlib.Path | None  # folder of the pretrained checkpoint
    reward_model: models.Transformer | None = None


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Makes mesh, tokenizer, model and sampler; reads no weights.

    Raises:
      ValueError: anything in `config` that does not fit, or a checkpoint that cannot be used.
    """
    check_values(config)
    mesh = sharding.make_mesh(**config.mesh)
    source = _source(config, workdir)
    tokenizer = load_tokenizer(config.tokenizer or str(source or 'bytes'))
    model = models.Transformer(_model_config(config, source, len(tokenizer)))
    _check_platform(model.config.attention, mesh.devices.flat[0].platform)
    ends = _ends(config, tokenizer, source)
    sampler = _make_sampler(config, mesh, model, tokenizer, ends)
    judge = _reward_model(config, model, tokenizer)
    return Setup(config, workdir, mesh, model, tokenizer, ends, sampler, source, judge)


def _check_platform(attention: str, platform: str) -> None:
    needed = {'splash': 'tpu', 'cudnn': 'gpu'}.get(attention, platform)
    if platform != needed:
        raise ValueError(
            f'model.attention={attention!r} is for a {needed.upper()}, and these devices are '
            f"{platform.upper()}s: use 'auto'"
        )


def _source(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path | None:
    """Where the pretrained checkpoint's description lies: with the run, once it has begun."""
    if not config.pretrained:
        return None
    copied = workdir / 'pretrained'
    return copied if copied.is_dir() else folders.find_folder(config.pretrained)


def keep_description(setup: Setup) -> None:
    """Copies all of the pretrained checkpoint but its weights into the run's folder."""
    target = setup.workdir / 'pretrained'
    if setup.source is None or setup.source == target:
        return
    partial = setup.workdir / 'pretrained.partial'
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for path in folders.description(setup.source):
        shutil.copyfile(path, partial / path.name)
    partial.rename(target)


def _model_config(
    config: ConfigDict, source: pathlib.Path | None, tokens: int
) -> models.ModelConfig:
    options = {
        **config.model,
        'rope_scaling': dict(**config.model.rope_scaling),
        'lora': models.Lora(**config.model.lora),
    }
    if source is None:
        return models.ModelConfig(vocab_size=tokens, **options)
    usual = defaults().model.to_dict()
    for name in options:
        if name not in _COMPUTED and options[name] != usual[name]:
            raise ValueError(
                f'model.{name}={options[name]} does nothing with pretrained='
                f'{config.pretrained!r}, which says what the model is like: leave it away'
            )
    computed = {name: options[name] for name in _COMPUTED}
    made = families.model_config(folders.read_json(source / 'config.json'), **computed)
    if tokens > made.vocab_size:
        raise ValueError(
            f'the tokenizer has {tokens} tokens, but pretrained={config.pretrained!r} embeds '
            f'{made.vocab_size}: use the tokenizer of the checkpoint'
        )
    return made


def _reward_model(
    config: ConfigDict, model: models.Transformer, tokenizer: Any
) -> models.Transformer | None:
    c = config.reward_model
    if not c.weight:
        return None
    if not c.pretrained and not c.steps:
        raise ValueError(
            f'reward_model.weight={c.weight} of a reward model that is neither pretrained nor '
            'trained: set reward_model.pretrained or reward_model.steps'
        )
    if not c.pretrained:
        return models.Transformer(models.with_scalar_head(model.config))
    folder = folders.find_folder(c.pretrained)
    computed = {name: getattr(model.config, name) for name in _COMPUTED if name != 'lora'}
    made = families.model_config(folders.read_json(folder / 'config.json'), **computed)
    if not made.scalar_head:
        raise ValueError(
            f'reward_model.pretrained={c.pretrained!r} is a language model: name the folder of a '
            'sequence classifier with one label'
        )
    if load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f'reward_model.pretrained={c.pretrained!r} has another tokenizer than the '
            'policy, whose tokens it is to read: use one of the same family'
        )
    return models.Transformer(made)


def _ends(config: ConfigDict, tokenizer: Any, source: pathlib.Path | None) -> np.ndarray:
    path = source and source / 'generation_config.json'
    ends = eos_ids(tokenizer, folders.read_json(path) if path and path.is_file() else None)
    if config.data.chat:
        ends = np.union1d(ends, [prompts.turn_end(tokenizer)[1]]).astype(np.int32)
    return ends


def _make_sampler(config, mesh, model, tokenizer, ends: np.ndarray) -> Sampler:
    table = stop_table(tokenizer, stop_strings(config), model.config.vocab_size)
    stops = None if table is None else jax.device_put(table, sharding.replicated(mesh))
    base = models.Transformer(model.config.base)

    def sampler(params: Params, prompts: Prompts, draw: Any = sample, **rest: Any) -> Any:
        return draw(
            model if models.split(params)[1] else base,  # without adapters: what a stage began with
            params,
            sharding.put_groups(prompts, mesh),
            seed=config.seed,
            eos_ids=ends,
            max_tokens=config.data.completion_length,
            stops=stops,
            mesh=mesh,
            **rest,
        )

    return sampler


def stop_strings(config: ConfigDict) -> tuple[str, ...]:
    """Those of the prompt's format, and the config's own."""
    return tuple(dict.fromkeys((*prompts.stops(config.data.prompt), *config.data.stops)))


# Data


def load_rows(config: ConfigDict, workdir: pathlib.Path, split: str) -> data.Rows:
    """Opens one split of the config's data set."""
    cache = config.data.cache_dir or workdir / 'data'
    return data.load(config.data.name, split, cache_dir=cache, **config.data.options)


def prompting(config: ConfigDict, workdir: pathlib.Path) -> dict[str, Any]:
    """Keyword arguments of `data.tokenize_prompts` from the config's `data` section."""
    shots = prompts.shots(config.data.prompt)
    return {
        'template': config.data.prompt,
        'prompt_length': config.data.prompt_length,
        'chat': config.data.chat,
        'system': config.data.system,
        'examples': load_rows(config, workdir, config.data.train_split) if shots else (),
    }


def heldout_problems(setup: Setup) -> Problems:
    """The held-out problems; says how many prompts were too long and dropped."""
    config = setup.config
    size = config.eval.batch_size
    sharding.check_batch(size, size, setup.mesh, of='eval.batch_size')
    rows = list(load_rows(config, setup.workdir, config.data.heldout_split))
    return _problems(setup, rows, config.data.heldout_split, 0)


def training_problems(setup: Setup, heldout: Problems) -> Problems:
    """The training problems without those that are held out; says what was dropped."""
    config = setup.config
    found = list(load_rows(config, setup.workdir, config.data.train_split))  # read once
    rows, leaked = data.without_leaks(found, heldout.rows)
    return _problems(setup, rows, config.data.train_split, leaked)


def _problems(setup: Setup, rows: data.Rows, split: str, leaked: int) -> Problems:
    table = data.tokenize_prompts(rows, setup.tokenizer, **prompting(setup.config, setup.workdir))
    if table.dropped or leaked:
        log.warning('%s: %s', split, table.summary(leaked))
    return Problems(rows, table, setup.tokenizer, stop_strings(setup.config))


# Parameters


def initial_params(setup: Setup) -> Params:
    """Pretrained or random parameters on the mesh, without adapters."""
    base = models.Transformer(setup.model.config.base)
    if not setup.config.pretrained:
        key = jax.random.key(setup.config.seed)
        params = jax.jit(models.init, static_argnums=0)(base, key)
        return jax.device_put(params, sharding.shardings(params, setup.mesh))
    folder = folders.find_folder(setup.config.pretrained)
    return hf.load(folder, base.config, _shapes(base), setup.mesh)


def initial_reward_params(setup: Setup) -> Params | None:
    """Those of the pretrained reward model on the mesh; None where it grows out of the policy."""
    model = setup.reward_model
    if model is None or not setup.config.reward_model.pretrained:
        return None
    folder = folders.find_folder(setup.config.reward_model.pretrained)
    return hf.load(folder, model.config, _shapes(model), setup.mesh)


def initial_adapters(setup: Setup) -> Params:
    """Fresh adapters on the mesh."""
    make = jax.jit(lambda key: models.split(models.init(setup.model, key))[1])
    adapters = make(jax.random.key(setup.config.seed))
    return jax.device_put(adapters, sharding.shardings(adapters, setup.mesh))


def merged(setup: Setup, base: Params, adapters: Params) -> Params:
    """The base with the adapters folded in, on the mesh; its memory is taken over."""
    merge = functools.partial(models.merge, setup.model.config)
    where = sharding.shardings(base, setup.mesh)
    return jax.jit(merge, donate_argnums=0, out_shardings=where)(base, adapters)


class Policy(NamedTuple):
    """The parameters of a run's newest checkpoint."""

    name: str  # stage/step
    base: Params  # all parameters, or with adapters those that they belong to
    adapters: Params  # empty without
    pretrained: bool  # the base is the pretrained checkpoint itself

    @property
    def params(self) -> Params:
        """What the model with its adapters takes."""
        return models.join(self.base, self.adapters)


def newest_policy(setup: Setup) -> Policy:
    """Reads the newest checkpoint of a run onto the mesh.

    Raises:
      ValueError: there is none.
    """
    manager = checkpoint.newest_manager(setup.workdir, ('sft', 'grpo'))
    stage = manager.directory.name
    name = f'{stage}/{manager.latest_step()}'
    base, adapters = models.split(_shapes(setup.model))
    if not adapters:
        return Policy(name, checkpoint.restore_params(manager, base, setup.mesh), {}, False)
    params = initial_params(setup)
    before = [
        folder
        for folder in (setup.workdir / 'checkpoints').glob('*')
        if folder.name.partition('-')[0] != 'reward'
        and stage_order(folder.name) < stage_order(stage)
    ]
    for folder in sorted(before, key=lambda path: stage_order(path.name)):
        earlier = checkpoint.open_manager(folder, keep=1)  # each began with the last one's merged
        params = merged(setup, params, checkpoint.restore_params(earlier, adapters, setup.mesh))
    newest = checkpoint.restore_params(manager, adapters, setup.mesh)
    return Policy(name, params, newest, pretrained=bool(setup.config.pretrained) and not before)


def newest_reward_params(setup: Setup) -> Params | None:
    """Those of a run's reward model: its newest checkpoint, or as pretrained; None without one.

    Raises:
      ValueError: there is no checkpoint of it yet.
    """
    if setup.reward_model is None:
        return None
    if not setup.config.reward_model.steps:
        return initial_reward_params(setup)
    manager = checkpoint.newest_manager(setup.workdir, ('reward',))
    return checkpoint.restore_params(manager, _shapes(setup.reward_model), setup.mesh)


def _shapes(model: models.Transformer) -> Params:
    return jax.eval_shape(functools.partial(models.init, model), jax.random.key(0))
