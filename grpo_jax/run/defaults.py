"""Every key of the configuration, with its default and meaning.

The dictionary is locked: setting a key that does not exist is an error. Only the dictionaries in
`FREE` accept any key: the data set, the reward functions, the kind of RoPE scaling or the optimizer
defines what they hold.
"""

import dataclasses
import functools
import operator
import typing
from typing import Any

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.presets import BETA
from grpo_jax.engine.compute import Compute
from grpo_jax.models import Lora, ModelConfig
from grpo_jax.run.sections import FREE, Section
from grpo_jax.types import Sampling

__all__ = ['FREE', 'algorithm_fields', 'at', 'compute_fields', 'defaults', 'optimizer_fields']


def _fields(cls: Any) -> dict[str, Any]:
    return {f.name: f.default for f in dataclasses.fields(cls)}


def algorithm_fields() -> dict[str, Any]:
    """Defaults of `grpo.algorithm`: a function of your own is a path, 'package.module:name'."""
    fields = {name: f.default for name, f in Algorithm.__dataclass_fields__.items()}
    del fields['terms']  # derived
    return fields | {'advantage_estimator': ''}


def compute_fields() -> dict[str, Any]:
    """Defaults of `grpo.compute`: all None, so chosen from shapes, platform and memory."""
    types = typing.get_type_hints(Compute)
    del types['remat']  # that of `model`, for all stages
    return {name: placeholder(typing.get_args(t)[0]) for name, t in types.items()}


def optimizer_fields(learning_rate: float = 1e-6) -> dict[str, Any]:
    """Defaults of an `optimizer` section."""
    return {
        'name': 'adamw',  # 'adamw', or the path of an optax factory such as 'optax.contrib:muon'
        'options': {},  # keyword arguments of the optax factory
        'learning_rate': learning_rate,  # the peak, after warm-up
        'warmup_steps': 0,  # updates over which the learning rate rises linearly
        'hold_steps': 0,  # updates at the peak before the decay
        'decay': 'constant',  # after warm-up and hold: 'constant', 'linear' or 'cosine'
        'b1': 0.9,  # adamw: decay of the first moment
        'b2': 0.999,  # adamw: decay of the second moment
        'eps': 1e-8,  # adamw: added to the root of the second moment
        'weight_decay': 0.0,  # adamw: decay of matrices; norm scales and biases are not decayed
        'clip_norm': 1.0,  # largest global norm of the gradient; 0: no clipping
        # Store moments in 'float32', 'bfloat16' or 'float8'; empty: in the parameters' dtype.
        'moments': '',
    }  # see `optimizer.make_optimizer`


def defaults() -> ConfigDict:
    """All keys with their defaults: the paper's values where it states them (arXiv 2402.03300)."""
    model = _fields(ModelConfig) | {
        'width': 128,
        'layers': 4,
        'heads': 4,
        'kv_heads': 2,
        'head_dim': 32,
        'mlp_width': 512,
        'rope_scaling': {},
        # Recompute each layer in the backward pass instead of storing it; None: where layers do not
        # fit, and on devices that do not report their memory, such as CPUs.
        'remat': placeholder(bool),
        'lora': _fields(Lora),
    }
    del model['vocab_size'], model['token_ranges']  # the tokenizer's
    del model['scalar_head']  # that of reward models and critics
    config: ConfigDict = Section()
    config.seed = 0  # seed of random parameters, the order of the data and every sampled token
    config.tokenizer = ''  # folder, hub id or 'bytes'; empty: that of `pretrained`, or 'bytes'
    config.pretrained = ''  # folder or hub id of a Hugging Face checkpoint; empty: random weights
    config.start = ''  # begin from a stage of another run: 'runs/a:sft', or 'runs/a:sft/60'
    config.module_folders = ()  # where modules of your own are; a config file sets its own folder
    config.model = model  # see `models.ModelConfig`; with `pretrained` only dtypes and the like
    config.mesh = {  # see `sharding.make_mesh`
        'fsdp': 1,  # devices over which a batch and parameters are split; -1: all remaining ones
        # Devices over which each group is split, a factor of fsdp. None: 1, or the fewest with
        # which all of fsdp is used, if `grpo.batch_size` is too small for it.
        'completions': placeholder(int),
        'tensor': 1,  # devices over which heads, MLP and vocabulary are split; -1: all remaining
        # Sample with a copy of the parameters on each device along fsdp, made once per rollout;
        # None: where it takes at most 30 % of a device's memory.
        'gather': placeholder(bool),
        # Devices that share such a copy, the `tensor` axis while sampling. None: mesh.tensor; where
        # a copy would take more than 30 % of a device's memory, as many as make it 15 %.
        'sampling_tensor': placeholder(int),
        # Keep the moments of policy and critic in the host's memory (`pinned_host`), and copy them
        # to the devices for the update of the parameters, and back.
        'offload_moments': False,
    }
    config.data = {
        'name': 'arithmetic',  # name of the data set, see `data.load`
        'options': {},  # keyword arguments of that data set
        'train_split': 'train',  # split with the training prompts and the demonstrations
        'heldout_split': 'test',  # split with the problems for evaluation; empty: no evaluation
        'prompt': '{question}',  # template over the columns, or a format's name; see `data.prompts`
        'chat': False,  # apply the tokenizer's chat template to the prompt
        'chat_template_kwargs': {},  # variables of the chat template, such as `enable_thinking`
        'date': placeholder(str),  # that the chat template writes; None: of the run's start
        'assistant_prefix': '',  # text after the prompt, with which the answer begins
        'system': '',  # system message that replaces that of the prompt format
        'reward_inputs': 'auto',  # reward functions get 'texts', 'messages', or what the data has
        'stops': (),  # strings that end a completion, in addition to those of the format
        # Special tokens in the texts that rewards get; None: the tags that the chat template or the
        # prompt uses, such as '<think>'.
        'visible_tokens': placeholder(tuple),
        'demonstration': '{demonstration}',  # template of the completions that SFT trains on
        'prompt_length': 64,  # P in tokens; longer prompts are dropped and counted
        'completion_length': 64,  # T in tokens, the end token included
        'cache_dir': '',  # folder of prepared data sets; empty: <workdir>/data
    }
    config.sft = {  # stage 1: supervised fine-tuning; steps=0 skips it
        'steps': 0,  # training steps; 0 skips the stage
        'batch_size': 32,  # demonstrations per step
        'microbatch': placeholder(int),  # demonstrations at a time; None: as many as fit
        'optimizer': optimizer_fields(learning_rate=1e-3),
    }
    grpo = {  # stage 2: GRPO, or another method by its options, see `presets`
        'steps': 100,  # training steps per iteration; 0 skips the stage
        'iterations': 1,  # each updates the reference, and trains the reward model if there is one
        'source': 'policy',  # sample from the 'policy', or the 'reference' of the stage's start
        'batch_size': 32,  # B, prompts per step
        'group_size': 8,  # G, completions per prompt
        'ahead': False,  # sample for step k + 1 before update k; needs `algorithm.importance`
        'weights': 'model',  # weights to sample with; 'int8' needs `algorithm.importance`
        # What the sampler records for the update: 'support', the tokens that the filters of
        # `sampling` kept (V / 8 bytes per token); 'routing', the experts that it used.
        'record': (),
        'refill': 0,  # maximum of extra batches per step, to replace groups with equal rewards
        'drop': (),  # do not train on: 'wrong' (reward <= 0), 'duplicates', 'truncated'
        'algorithm': algorithm_fields() | {'beta': BETA},  # see `algorithm.config.Algorithm`
        'entropy_control': {  # changes `algorithm.entropy_bonus` between steps
            'target': 0.0,  # the bonus rises while the entropy is at most this, in nats; 0: off
            'step': 0.005,  # by how much the bonus rises or falls in a step
            'least': 0.0,  # lower bound of the bonus
            'most': 1.0,  # upper bound of the bonus
        },  # see `algorithm.entropy_control.next_entropy_bonus`
        'compute': compute_fields(),  # see `engine.compute.Compute`; None: chosen automatically
        'sampling': Sampling()._asdict(),  # see `types.Sampling`
        'rewards': {},  # function -> weight, or weight and options; see `rewards.build`
        'step_rewards': {},  # the same with one step function, for supervision='process'
        'reward_calls': {  # a reward's entry `call` in `rewards` replaces these, see `CallOptions`
            'timeout': 1800.0,  # seconds until a call has failed; 0: no deadline
            'retries': 0,  # how often a call that failed is repeated
            # After them: 'stop' the run with a checkpoint, or 'none': those completions have no
            # reward and are counted in `rewards/<name>/failed`.
            'on_error': 'stop',
            'max_failed': 0.25,  # with 'none': the run stops if a larger share of a step fails
            'per': 'group',  # what fails alone: a 'group', or a 'completion' (see docs/rewards.md)
            'isolated': False,  # call functions of your own in processes, which may crash
            'memory': 8.0,  # GiB of such a process
        },
        'optimizer': optimizer_fields(),
    }
    config.grpo = grpo
    config.environment = {  # replies to the policy's turns; see docs/environments.md
        # 'calculator', 'guess', 'gym', 'python', 'search', 'tools', or the path of your own; empty:
        # a completion has one turn.
        'name': '',
        'options': {},  # its keyword arguments
        'turns': 4,  # of the policy, at most; `data.completion_length` is of all turns and replies
        'reply_tokens': 256,  # of a reply, at most; longer ones are cut and counted
        'reply_seconds': 30.0,  # in which it replies; after that the turn has failed
        'on_error': 'reply',  # after a failure: 'reply' with the error, or 'end' the episode
        # How tool calls are written: 'hermes', 'llama3', 'fenced', 'plain' or, by the chat template
        # and the tools, 'auto'.
        'format': 'auto',
        'template': '\n{reply}\n',  # of a reply without a chat template
    }
    config.critic = {'optimizer': optimizer_fields(learning_rate=1e-5)}  # with baseline='critic'
    config.reward_model = {  # a decoder with a scalar head, added to the reward functions
        'weight': 0.0,  # weight of its score in the reward; 0: no reward model
        'kind': 'outcome',  # one score for each completion, or 'process': one for each step
        'pretrained': '',  # folder of a sequence classifier; empty: starts from the policy
        'steps': 0,  # training steps on samples of the policy, before each iteration
        'loss': 'bradley_terry',  # 'bradley_terry' or 'label' (outcome), 'step' (process)
        'batch_size': 32,  # prompts per step
        'group_size': 8,  # completions per prompt, labeled by `eval.correct` or `step_rewards`
        'microbatch': placeholder(int),  # prompts at a time; None: as many as fit
        'replay': 0.1,  # share of each batch taken from the samples of earlier iterations
        'optimizer': optimizer_fields(learning_rate=2e-5),
    }
    config.eval = {
        'every': 50,  # GRPO steps between evaluations; also before the first and after the last
        'batch_size': 64,  # prompts decoded at a time
        'correct': '',  # the reward function that is 1 for a right answer; empty: mean reward
        'extract': '',  # function from a completion to its answer; empty: no maj@k
        'samples': 8,  # completions per problem for pass@k and maj@k; 0: neither
        'k': (1, 8),  # the k of pass@k and maj@k, each at most `samples`
        'temperature': 1.0,  # of the samples for pass@k and maj@k
    }
    config.log = {
        'completions': 8,  # sampled completions written to completions.jsonl per step
        'to': (),  # also log to: 'wandb', 'trackio', 'mlflow' or 'module:function'; see `loggers`
        'project': 'grpo_jax',  # project of W&B and Trackio, experiment of MLflow
        'name': '',  # name of the run there; empty: that of the workdir
    }
    config.checkpoint = {
        # Of this run alone: a folder, or 'gs://BUCKET/FOLDER' in Google Cloud Storage; empty:
        # <workdir>/checkpoints.
        'folder': '',
        'every': 50,  # steps between checkpoints
        'keep': 2,  # how many of the newest checkpoints are kept
        'keep_every': 0,  # also keep those of all multiples of this number of steps; 0: none
        # Also keep the one with the largest value of a metric, such as 'eval/accuracy', or with '-'
        # before its name the smallest; empty: none.
        'best': '',
    }
    config.health = {  # stops a run whose numbers have gone wrong, and keeps the batch
        # Stop after this many updates in a row with a gradient that is not finite; 0: never.
        'skipped_updates': 10,
        # Stop at a gradient norm this many times the median of the steps before it; 0: never.
        'grad_norm': 0.0,
        'history': 50,  # steps that the median is over
    }  # see `run.health`
    config.lock()
    for path in FREE:
        at(config, path).unlock()
    return config


def at(config: Any, path: str) -> Any:
    """The value at a dotted path."""
    return functools.reduce(operator.getitem, path.split('.'), config)
