"""The configuration: every key with its default and meaning.

A config file holds one `get_config()` that takes `defaults()` and sets keys. The dictionary is
locked, so a key that does not exist is an error wherever it is set; only those in `FREE` are open,
since the data set, the reward functions and the kind of RoPE scaling name their own.
"""

import dataclasses
import difflib
import functools
import importlib.util
import inspect
import json
import operator
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from grpo_jax.algorithm import Algorithm
from grpo_jax.models import Lora, ModelConfig
from grpo_jax.types import Objective, Sampling

FREE = (
    'data.options',
    'grpo.rewards',
    'grpo.step_rewards',
    'model.rope_scaling',
)  # replaced as a whole, with keys of their own

_OPTIMIZER = {  # see `optimizer.adamw`
    'learning_rate': 1e-6,
    'warmup_steps': 0,
    'hold_steps': 0,
    'decay': 'constant',
    'b1': 0.9,
    'b2': 0.999,
    'eps': 1e-8,
    'weight_decay': 0.0,
    'clip_norm': 1.0,
}

_RANGES = {  # of what nothing else checks before training
    '[0, 2147483648)': ('seed',),  # an i32
    '[0, inf)': (
        'sft.steps', 'grpo.steps', 'grpo.sample_batch', 'grpo.refill', 'reward_model.steps',
        'eval.samples', 'eval.temperature', 'log.completions',
        *(f'grpo.objective.{name}' for name in Objective._fields),
        'sft.optimizer.learning_rate', 'grpo.optimizer.learning_rate',
        'critic.optimizer.learning_rate', 'reward_model.optimizer.learning_rate',
    ),
    '[1, inf)': (
        'data.completion_length', 'sft.batch_size', 'grpo.iterations',
        'grpo.batch_size', 'grpo.group_size', 'grpo.objective.importance_cap',
        'reward_model.batch_size', 'reward_model.group_size', 'eval.every', 'eval.batch_size',
        'checkpoint.every', 'checkpoint.keep',
    ),
    '(0, inf)': (
        'grpo.objective.tau_positive', 'grpo.objective.tau_negative', 'grpo.objective.max_kl',
    ),
    '[0, 1]': (
        'grpo.objective.gamma', 'grpo.objective.lam', 'grpo.objective.reference_decay',
    ),
    '(0, 1]': ('grpo.objective.top_entropy',),
    '[0, 0.5)': ('grpo.objective.label_smoothing',),  # from a half on it prefers the worse
}  # fmt: skip


def _fields(cls: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls)}


def defaults() -> ConfigDict:
    """Every key there is, with the paper's values where it names them (arXiv 2402.03300)."""
    model = _fields(ModelConfig) | {
        'width': 128,
        'layers': 4,
        'heads': 4,
        'kv_heads': 2,
        'head_dim': 32,
        'mlp_width': 512,
        'rope_scaling': {},
        'lora': _fields(Lora),
    }
    del model['vocab_size']  # the tokenizer's
    del model['scalar_head']  # that of reward models and critics
    config = ConfigDict()
    config.seed = 0  # of parameters, the order of data and every sampled token
    config.tokenizer = ''  # folder, hub id or 'bytes'; empty: that of `pretrained`, else bytes
    config.pretrained = ''  # folder or hub id of a Hugging Face checkpoint; empty: random weights
    config.model = model  # see `models.ModelConfig`; with `pretrained` only how it is computed
    config.mesh = {'fsdp': 1, 'tensor': 1}  # see `sharding.make_mesh`
    config.data = {
        'name': 'arithmetic',  # see `data.load`
        'options': {},  # of that data set
        'train_split': 'train',
        'heldout_split': 'test',
        'prompt': '{question}',  # template over the columns, or a format's name, see `prompts`
        'chat': False,  # put it through the tokenizer's chat template
        'system': '',  # system message, in the place of the format's
        'stops': (),  # strings that end a completion, besides those of the format
        'demonstration': '{demonstration}',  # likewise, what SFT learns to write
        'prompt_length': 64,  # P; longer prompts are dropped and counted
        'completion_length': 64,  # T
        'cache_dir': '',  # prepared data sets; empty: <workdir>/data
    }
    config.sft = {  # stage 1; steps=0 leaves it out
        'steps': 0,
        'batch_size': 32,  # demonstrations
        'microbatch': 32,
        'optimizer': dict(_OPTIMIZER, learning_rate=1e-3),
    }
    config.grpo = {  # stage 2: GRPO, or another method by its options, see `presets`
        'steps': 100,  # of each iteration; 0 leaves the stage out
        'iterations': 1,  # each refreshes the reference, and the reward model if one is trained
        'source': 'policy',  # who samples; 'reference': the policy that the stage began with
        'batch_size': 32,  # B, prompts per step
        'group_size': 8,  # G, completions per prompt
        'sample_batch': 0,  # prompts sampled, and rewarded, at a time; 0: all at once
        'ahead': False,  # sample step k + 1 before update k; needs `algorithm.importance`
        'weights': 'model',  # that a step is sampled with; 'int8' needs `algorithm.importance`
        'refill': 0,  # most further batches per step to replace groups whose rewards are all equal
        'drop': (),  # completions not learnt from: 'wrong' (reward <= 0), 'duplicates', 'truncated'
        'algorithm': _fields(Algorithm),  # see `update.Algorithm`
        'objective': Objective(beta=0.04)._asdict(),  # see `types.Objective`
        'sampling': Sampling()._asdict(),  # see `types.Sampling`
        'rewards': {},  # function -> weight, or weight and options, see `rewards.build`
        'step_rewards': {},  # one step function, likewise; for supervision='process'
        'optimizer': dict(_OPTIMIZER),
    }
    config.critic = {'optimizer': dict(_OPTIMIZER, learning_rate=1e-5)}  # with baseline='critic'
    config.reward_model = {  # a decoder with a scalar head beside the rules
        'weight': 0.0,  # of its score in the reward; 0: there is none
        'kind': 'outcome',  # one score for each completion, or 'process': one for each step
        'pretrained': '',  # folder of a sequence classifier; empty: the policy's trunk
        'steps': 0,  # of its training on samples of the policy, before each iteration
        'loss': 'bradley_terry',  # 'bradley_terry' or 'label' (outcome), 'step' (process)
        'batch_size': 32,  # prompts
        'group_size': 8,  # completions per prompt, judged by `eval.correct` or `step_rewards`
        'microbatch': 32,
        'replay': 0.1,  # share of prompts taken from the samples of earlier iterations
        'optimizer': dict(_OPTIMIZER, learning_rate=2e-5),
    }
    config.eval = {
        'every': 50,  # GRPO steps; also before the first and after the last
        'batch_size': 64,  # prompts decoded at a time
        'correct': '',  # the reward function that is 1 where an answer is right
        'extract': '',  # function from a completion to the answer it votes for in maj@k
        'samples': 8,  # completions per problem for pass@k and maj@k; 0 leaves both out
        'k': (1, 8),  # each at most `samples`
        'temperature': 1.0,  # of those samples
    }
    config.log = {'completions': 8}  # sampled completions written per step
    config.checkpoint = {'every': 50, 'keep': 2}  # steps between saves, how many are kept
    config.lock()
    return config


def check_keys(config: Mapping[str, Any]) -> None:
    """Raises ValueError for a key that nothing reads, or one that is missing."""
    known, given = set(flat(defaults())), set(flat(config))
    for key in sorted(given - known):
        raise ValueError(f'unknown config key {key!r}: {nearest(key)}')
    for key in sorted(known - given):
        raise ValueError(f'config key {key!r} is missing: start from grpo_jax.config.defaults()')


def check_values(config: ConfigDict) -> None:
    """Raises ValueError for a number out of its range, or a run that would train nothing."""
    if not config.sft.steps and not config.grpo.steps:
        raise ValueError('sft.steps=0 and grpo.steps=0: set one of them to train anything')
    values = config.to_dict()
    for interval, paths in _RANGES.items():
        for path in paths:
            value = functools.reduce(operator.getitem, path.split('.'), values)
            if not _within(value, interval):
                raise ValueError(f'{path}={value} is out of range: it has to lie in {interval}')


def _within(value: float, interval: str) -> bool:
    """Whether it lies in '[low, high]', or without an end that has a round bracket; no NaN does."""
    low, high = map(float, interval[1:-1].split(','))
    above = low <= value if interval[0] == '[' else low < value
    return above and (value <= high if interval[-1] == ']' else value < high)


def flat(config: Mapping[str, Any], prefix: str = '', free: Sequence[str] = FREE) -> list[str]:
    """All paths of a config; a section in `free` is one, whatever its keys."""
    keys = []
    for name, value in config.items():
        path = f'{prefix}{name}'
        nested = isinstance(value, Mapping | ConfigDict) and path not in free and len(value)
        keys += flat(value, f'{path}.', free) if nested else [path]
    return keys


def nearest(key: str) -> str:
    """Which key was most likely meant."""
    known = flat(defaults())
    last = key.rpartition('.')[2]
    # Of several with one name that of the `grpo` section.
    known = sorted(known, key=lambda path: path.startswith('grpo.'))
    by_name = {path.rpartition('.')[2]: path for path in known}
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.8)
    near = near or [by_name[n] for n in difflib.get_close_matches(last, by_name, n=1, cutoff=0.5)]
    return f'did you mean {near[0]!r}?' if near else 'see grpo_jax.config.defaults() for all keys'


def differing_keys(config: ConfigDict, saved: str) -> list[str]:
    """Paths whose values differ between a config and the text of a saved one (`to_json`)."""
    old, new = json.loads(saved), json.loads(to_json(config))

    def compare(a: Any, b: Any, path: str) -> list[str]:
        if isinstance(a, dict) and isinstance(b, dict):
            pairs = [(a.get(k), b.get(k), f'{path}.{k}') for k in sorted({*a, *b})]
            return [found for pair in pairs for found in compare(*pair)]
        return [] if a == b else [f'{path[1:]} (there {a!r}, here {b!r})']

    return compare(old, new, '')


def differing_defaults(
    config: ConfigDict, sections: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """(`path=value`, reason) of each key in the sections {path: reason} that is not as usual."""
    given, usual = config.to_dict(), defaults().to_dict()
    for section, reason in sections.items():
        keys = section.split('.')
        ours, theirs = (functools.reduce(operator.getitem, keys, tree) for tree in (given, usual))
        if not isinstance(ours, dict):
            section, ours, theirs = '.'.join(keys[:-1]), {keys[-1]: ours}, {keys[-1]: theirs}
        for path in flat(ours):
            found, expected = (
                functools.reduce(operator.getitem, path.split('.'), tree) for tree in (ours, theirs)
            )
            if found != expected:
                yield f'{section}.{path}={found!r}', reason


def to_json(config: ConfigDict) -> str:
    """The config as text that `from_json` reads."""
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + '\n'


def from_json(text: str) -> ConfigDict:
    """A locked config from the text that a run saved."""
    values = json.loads(text)
    check_keys(values)
    _restore_tuples(values, defaults())
    config = ConfigDict(values)
    config.lock()
    return config


def _restore_tuples(values: dict[str, Any], like: ConfigDict) -> None:
    """Makes tuples of the lists that a default has as a tuple: JSON knows lists only."""
    for name, value in values.items():
        if isinstance(like.get(name), tuple):
            values[name] = tuple(value)
        elif isinstance(value, dict) and isinstance(like.get(name), ConfigDict):
            _restore_tuples(value, like[name])


def load(path: str | os.PathLike[str]) -> ConfigDict:
    """What the `get_config()` of a config file returns; of `FILE.py:NAME`, get_config(NAME).

    Raises:
      ValueError: the file does not exist, raises or returns no ConfigDict.
    """
    if not path:
        raise ValueError('--config=FILE is missing: name a config file')
    file, colon, argument = str(path).partition('.py:')
    file += '.py' if colon else ''
    if not os.path.isfile(file):
        raise ValueError(f'--config={path}: no such file: give the path of a config file')
    spec = importlib.util.spec_from_file_location('config_file', file)
    if spec is None or spec.loader is None:
        raise ValueError(f'--config={path}: not a Python file')
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not colon and _required(module.get_config):
            raise ValueError(f'it holds several configs: name one, as in {file}:NAME')
        config = module.get_config(argument) if colon else module.get_config()
    except Exception as error:
        raise ValueError(f'--config={path}: {_reason(error)}') from error
    if not isinstance(config, ConfigDict):
        raise ValueError(f'--config={path}: get_config() returned {config!r}: return a ConfigDict')
    return config


def _reason(error: Exception) -> str:
    text = str(error)  # what a locked config says
    if unknown := re.search(r'Key "(\w+)" does not exist', text):
        return f'unknown config key {unknown[1]!r}: {nearest(unknown[1])}'
    if wrong := re.search(r"override field '(\w+)'.*?\. (.*) is of original .* type (.*)$", text):
        return f'config key {wrong[1]!r} is {wrong[2]}: give a value of type {wrong[3]}'
    if isinstance(error, ValueError):
        return text
    return f'{type(error).__name__}: {error}: mend the file (GRPO_JAX_TRACEBACK=1 shows where)'


def _required(function: Callable[..., Any]) -> bool:
    """Whether it cannot be called without arguments."""
    given = inspect.signature(function).parameters.values()
    return any(p.default is p.empty for p in given)
