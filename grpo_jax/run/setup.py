"""The setup that all commands share: config, mesh, tokenizer, models and sampler."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from grpo_jax import models, plugins, sharding
from grpo_jax.algorithm.checks import check_routers
from grpo_jax.algorithm.sample import sample
from grpo_jax.data import check_token_ids, get_format, load_tokenizer, stop_ids, stop_table
from grpo_jax.engine.token_sampling import check_record, without_inactive
from grpo_jax.environments import Environment, Renderer
from grpo_jax.models import hf
from grpo_jax.run.checkpoint import holds_failed_try
from grpo_jax.run.config_checks import check_values
from grpo_jax.run.defaults import defaults
from grpo_jax.run.errors import renamed
from grpo_jax.run.inputs import Inputs
from grpo_jax.run.interaction import make_environment, make_renderer
from grpo_jax.run.mesh import check_model, is_described, make_mesh, make_sampling_mesh
from grpo_jax.run.output_file import new_folder
from grpo_jax.run.start import Start
from grpo_jax.run.tokenization import bind_chat_template, end_ids, hidden_ids, vocabulary
from grpo_jax.types import Params, Prompts, Sampling

# (params, prompts, *, step, sampling, group_size, weights='model') -> Rollout;
# with draw=sample_blocks an iterator of partial rollouts.
Sampler = Callable[..., Any]

# Keys of `model` that a pretrained checkpoint does not determine.
_COMPUTED = ('dtype', 'param_dtype', 'attention', 'remat', 'lora')


@dataclasses.dataclass(frozen=True)
class Setup:
    """The objects needed to sample from a policy; their options are already checked."""

    config: ConfigDict
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    sampling_mesh: jax.sharding.Mesh  # of the same devices
    model: models.Transformer
    tokenizer: Any
    ends: np.ndarray  # i32[E], tokens that end a completion
    hidden: frozenset[int]  # ids that are not part of a completion's text
    sampler: Sampler
    source: pathlib.Path | None  # folder of the pretrained checkpoint, or of its copied description
    reward_model: models.Transformer | None = None
    inputs: Inputs | None = None  # digests of what training reads
    environment: Environment | None = None  # that replies to turns; None: completions have one
    renderer: Renderer | None = None  # of its replies


def prepare(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """Makes mesh, tokenizer, model and sampler; reads no weights.

    Args:
      config: with every key of `config.defaults()`.
      workdir: the run's folder.

    Raises:
      ValueError: a wrong value or combination of values, or a checkpoint that cannot be used.
    """
    plugins.set_folders(config.module_folders)
    check_values(config)
    mesh = make_mesh(config)
    source = _source(config, workdir)
    tokenizer = load_tokenizer(config.tokenizer or str(source or 'bytes'))
    environment = make_environment(config, tokenizer)
    config = bind_chat_template(config, tokenizer, environment.tools if environment else ())
    ends = end_ids(config, tokenizer, source)
    model = models.Transformer(_model_config(config, source, tokenizer, ends))
    _check_platform(model.config.attention, mesh.devices.flat[0].platform)
    check_model(model, mesh)
    _check_base(config)
    _check_experts(config, model.config.experts)
    check_token_ids(ends, tokenizer, model.config.vocab_size)
    hidden = hidden_ids(config, tokenizer, ends)
    renderer = make_renderer(config, tokenizer, hidden) if environment else None
    sampling_mesh = make_sampling_mesh(config, model, mesh)
    sampler = _make_sampler(config, sampling_mesh, model, tokenizer, ends, hidden)
    reward_model = _reward_model(config, model, tokenizer)
    return Setup(
        config, workdir, mesh, sampling_mesh, model, tokenizer, ends, hidden, sampler, source,
        reward_model, environment=environment, renderer=renderer,
    )  # fmt: skip


def prepare_policy(config: ConfigDict, workdir: pathlib.Path) -> Setup:
    """`prepare` without the reward model and attention kernel, which only training needs."""
    config = config.copy_and_resolve_references()
    config.reward_model.weight = 0.0
    config.model.attention = 'auto'
    return prepare(config, workdir)


def _check_platform(attention: str, platform: str) -> None:
    needed = {'splash': 'tpu', 'cudnn': 'gpu'}.get(attention, platform)
    if platform != needed:
        raise ValueError(
            f'model.attention={attention!r} is for a {needed.upper()}, and these devices are '
            f"{platform.upper()}s: use 'auto'"
        )


def _check_base(config: ConfigDict) -> None:
    """Rejects a quantized base that adapters would have to be merged into between stages."""
    base, policies = config.model.lora.base, config.grpo.iterations if config.grpo.steps else 0
    if base != 'model' and bool(config.sft.steps) + policies > 1:
        raise ValueError(
            f'model.lora.base={base!r} with sft.steps={config.sft.steps}, grpo.steps='
            f'{config.grpo.steps} and grpo.iterations={config.grpo.iterations}: before each stage '
            'the adapters of the one before are merged into the base, which would round them '
            'away. Train one stage in a run, and begin it by start from a run whose '
            "model.lora.base is 'model'"
        )


def _check_experts(config: ConfigDict, experts: int) -> None:
    """Checks options of the `grpo` section that may need a model with experts."""
    with renamed({'record': 'grpo.record'}):
        check_record(tuple(config.grpo.record), Sampling(**config.grpo.sampling), experts)
    weight = config.grpo.algorithm.router_balance
    if weight:
        check_routers(weight, experts, name='grpo.algorithm.router_balance')


def _source(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path | None:
    """Folder of the pretrained checkpoint's description: the copy in the run or its start."""
    if not config.pretrained:
        return None
    runs = [Start.parse(config.start).workdir] if config.start else []
    if not holds_failed_try(workdir, config):  # whose copy may be that of another checkpoint
        runs.insert(0, workdir)
    for copied in (run / 'pretrained' for run in runs):
        if copied.is_dir():
            return copied
    return hf.find_folder(config.pretrained, weights=not is_described())


def keep_description(setup: Setup) -> None:
    """Copies all of the pretrained checkpoint but its weights into the run's folder."""
    target = setup.workdir / 'pretrained'
    if setup.source is None or setup.source == target:
        return
    for left_over in setup.workdir.glob('.pretrained.*'):  # of a copy that was cut off
        shutil.rmtree(left_over)
    with new_folder(target) as partial:
        hf.copy_description(setup.source, partial)


def _model_config(
    config: ConfigDict, source: pathlib.Path | None, tokenizer: Any, ends: np.ndarray
) -> models.ModelConfig:
    with renamed({'lora target ': 'model.lora.targets: target ', 'lora ': 'model.lora.'}):
        lora = models.Lora(**config.model.lora)
    scaling = dict(**config.model.rope_scaling)
    remat = config.model.remat is not False  # None is decided for each stage
    options = {**config.model, 'rope_scaling': scaling, 'lora': lora, 'remat': remat}
    if source is None:
        with renamed({'model ': 'model.', 'lora ': 'model.lora.'}):
            return models.ModelConfig(**vocabulary(tokenizer, ends), **options)
    default_options = defaults().model.to_dict()
    for name in options:
        if name not in _COMPUTED and options[name] != default_options[name]:
            raise ValueError(
                f'model.{name}={options[name]} has no effect with pretrained='
                f'{config.pretrained!r}, which determines the model: remove it'
            )
    computed = {name: options[name] for name in _COMPUTED}
    model_config = hf.model_config(hf.read_config(source), **computed)
    ranges = vocabulary(tokenizer, ends, model_config.vocab_size)['token_ranges']
    return dataclasses.replace(model_config, token_ranges=ranges)


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
    with renamed({'pretrained=': 'reward_model.pretrained='}):
        folder = hf.find_folder(c.pretrained, weights=not is_described())
    computed = {name: getattr(model.config, name) for name in _COMPUTED if name != 'lora'}
    model_config = hf.model_config(hf.read_config(folder), **computed)
    if not model_config.scalar_head:
        raise ValueError(
            f'reward_model.pretrained={c.pretrained!r} is a language model: name the folder of a '
            'sequence classifier with one label'
        )
    if load_tokenizer(str(folder)).get_vocab() != tokenizer.get_vocab():
        raise ValueError(
            f'reward_model.pretrained={c.pretrained!r} has another tokenizer than the '
            "policy, but it scores the policy's tokens: use a model of the same family"
        )
    return models.Transformer(model_config)


def _make_sampler(
    config: ConfigDict,
    mesh: jax.sharding.Mesh,
    model: models.Transformer,
    tokenizer: Any,
    ends: np.ndarray,
    hidden: frozenset[int],
) -> Sampler:
    ends, table = stopping(config, model, tokenizer, ends, hidden)
    stops = table
    if table is not None and not is_described():
        stops = sharding.put(table, sharding.replicated(mesh))
    base = models.Transformer(model.config.base)

    def sampler(
        params: Params, prompts: Prompts, *, sampling: Sampling, draw: Any = sample, **rest: Any
    ) -> Any:
        adapted = models.split_adapters(params)[1]  # the initial policy of a stage has none
        return draw(
            model if adapted else base,
            params,
            sharding.put_groups(prompts, mesh),
            seed=config.seed,
            sampling=without_inactive(sampling),
            eos_ids=ends,
            max_tokens=config.data.completion_length,
            stops=stops,
            mesh=mesh,
            gather=config.mesh.gather,
            **rest,
        )

    return sampler


def stopping(
    config: ConfigDict,
    model: models.Transformer,
    tokenizer: Any,
    ends: np.ndarray,
    hidden: frozenset[int],
) -> tuple[np.ndarray, np.ndarray | None]:
    """What ends a completion: tokens i32[E], and the table of the stop strings if there are any."""
    strings = stop_strings(config)
    table = stop_table(tokenizer, strings, model.config.vocab_size, hidden)
    return np.union1d(ends, stop_ids(tokenizer, strings, hidden)).astype(np.int32), table


def stop_strings(config: ConfigDict) -> tuple[str, ...]:
    """The strings that end a completion: those of the prompt format and the config."""
    return tuple(dict.fromkeys((*get_format(config.data.prompt).stops, *config.data.stops)))
