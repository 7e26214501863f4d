"""Loss, parameters and metrics after two off-policy SGD steps, against TRL's own GRPOTrainer.

Both train the same small checkpoint on the same completions, sampler's log-probs, rewards and
reference. TRL's trainer runs as it is, except that its generation returns fixed completions. The
second step is off-policy: the completions and the old log-probs are those of the first one.

Runs where TRL (1.16 or newer) is installed: `pip install trl`, then
`pytest -n0 tests/test_trl_parity.py`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

trl = pytest.importorskip('trl', minversion='1.16', reason='TRL is what is compared with')

import checkpoints  # noqa: E402
import datasets  # noqa: E402
import torch  # noqa: E402

from grpo_jax.algorithm.config import Algorithm  # noqa: E402
from grpo_jax.algorithm.logprobs import completion_logprobs  # noqa: E402
from grpo_jax.algorithm.presets import PRESETS  # noqa: E402
from grpo_jax.algorithm.program import init_state  # noqa: E402
from grpo_jax.algorithm.update import train_step  # noqa: E402
from grpo_jax.data import byte_tokenizer  # noqa: E402
from grpo_jax.engine.compute import Compute  # noqa: E402
from grpo_jax.run.rollouts import count_tokens  # noqa: E402
from grpo_jax.types import FunctionRewards, Prompts, Rollout, Sampling  # noqa: E402

B, G, T = 4, 4, 6
LENGTHS = (3, 5, 2, 4)  # of the prompts
EOS = 257
TEMPERATURE = 0.9
RATE = 0.02  # large: the second update has to leave the clip range
WEIGHTS = (1.0, 0.5)  # of the two reward functions
NONE = float('nan')  # a reward function that does not apply
OPTIMIZER = optax.sgd(RATE)

# What both have by default here: TRL's 'grpo' loss without a KL term.
OURS = {'clip_low': 0.1, 'clip_high': 0.15, 'kl': 'none', 'entropy': True}
THEIRS = {'loss_type': 'grpo', 'epsilon': 0.1, 'epsilon_high': 0.15}
KL = {'kl': 'k3', 'beta': 0.3}
SAMPLER = {'sampler': True}  # TRL corrects for the sampler's log-probs

# name -> (options of `Algorithm`, arguments of `GRPOConfig`)
CASES = {
    'defaults': (
        PRESETS['trl_defaults'] | {'clip_low': 0.2, 'clip_high': 0.2},
        {'loss_type': 'dapo', 'epsilon': 0.2, 'epsilon_high': None, **SAMPLER},
    ),
    'grpo': ({}, {}),
    'bnpo': ({'aggregation': 'microbatch_token_mean'}, {'loss_type': 'bnpo'}),
    'dr_grpo': ({'aggregation': 'constant', 'scale': 'none'},
                {'loss_type': 'dr_grpo', 'scale_rewards': 'none'}),
    'dapo': ({'aggregation': 'token_mean'}, {'loss_type': 'dapo'}),
    'cispo': ({'loss': 'cispo', 'clip_low': 1.0, 'clip_high': 0.1, 'aggregation': 'token_mean'},
              {'loss_type': 'cispo', 'epsilon_high': 1.1}),
    'sapo': ({'loss': 'sapo', 'clip_low': 0.2, 'clip_high': 0.2}, {'loss_type': 'sapo'}),
    'gspo': ({'ratio': 'sequence'}, {'importance_sampling_level': 'sequence'}),
    'gspo, dapo': ({'ratio': 'sequence', 'aggregation': 'token_mean'},
                   {'importance_sampling_level': 'sequence', 'loss_type': 'dapo'}),
    'two-sided clip': ({'dual_clip': 1.2}, {'delta': 1.2}),
    'kl': (KL, {'beta': 0.3, 'use_bias_correction_kl': False}),
    'unbiased kl': (KL | {'unbiased_kl': True}, {'beta': 0.3}),
    'gspo, unbiased kl': (KL | {'unbiased_kl': True, 'ratio': 'sequence'},
                          {'beta': 0.3, 'importance_sampling_level': 'sequence'}),
    'scale batch': ({'scale': 'batch_std'}, {'scale_rewards': 'batch'}),
    'scale none': ({'scale': 'none'}, {'scale_rewards': 'none'}),
    'gdpo': ({'reward_aggregation': 'normalize_then_sum', 'scale': 'batch_std'},
             {'multi_objective_aggregation': 'normalize_then_sum'}),
    'truncated': ({'kept': 'ended'}, {'mask_truncated_completions': True}),
    'truncated, dapo, kl': ({'kept': 'ended', 'aggregation': 'token_mean', **KL},
                            {'mask_truncated_completions': True, 'loss_type': 'dapo', 'beta': 0.3,
                             'use_bias_correction_kl': False}),
    'token truncate': ({'importance': 'token', 'importance_cap': 1.1},
                       {'vllm_importance_sampling_mode': 'token_truncate',
                        'vllm_importance_sampling_clip_max': 1.1, **SAMPLER}),
    'sequence truncate': ({'importance': 'sequence', 'importance_cap': 1.1},
                          {'vllm_importance_sampling_mode': 'sequence_truncate',
                           'vllm_importance_sampling_clip_max': 1.1, **SAMPLER}),
    'token mask': ({'importance': 'token_mask', 'importance_cap': 1.1, **KL},
                   {'vllm_importance_sampling_mode': 'token_mask', 'beta': 0.3,
                    'vllm_importance_sampling_clip_min': 1 / 1.1,
                    'vllm_importance_sampling_clip_max': 1.1, 'use_bias_correction_kl': False,
                    **SAMPLER}),
    'sequence mask': ({'importance': 'sequence_mask', 'importance_cap': 1.3},
                      {'vllm_importance_sampling_mode': 'sequence_mask',
                       'vllm_importance_sampling_clip_min': 1 / 1.3,
                       'vllm_importance_sampling_clip_max': 1.3, **SAMPLER}),
    'token mask above': ({'importance': 'token_upper_mask', 'importance_cap': 1.1},
                         {'vllm_importance_sampling_mode': 'token_mask',
                          'vllm_importance_sampling_clip_max': 1.1, **SAMPLER}),
    'sequence mask above': ({'importance': 'sequence_upper_mask', 'importance_cap': 1.3},
                            {'vllm_importance_sampling_mode': 'sequence_mask',
                             'vllm_importance_sampling_clip_max': 1.3, **SAMPLER}),
    'off-policy mask': ({'off_policy_threshold': 0.05},
                        {'off_policy_mask_threshold': 0.05, 'logprobs': True}),
    'top entropy': ({'top_entropy': 0.4, **KL},
                    {'top_entropy_quantile': 0.4, 'beta': 0.3, 'use_bias_correction_kl': False}),
    'vespo': ({'loss': 'vespo', 'clip_low': 0.2, 'clip_high': 0.2, 'aggregation': 'token_mean'},
              {'loss_type': 'vespo'}),
    'vespo, sampler': ({'loss': 'vespo', 'clip_low': 0.2, 'clip_high': 0.2,
                        'aggregation': 'token_mean', 'importance': 'token', 'importance_cap': 1.1},
                       {'loss_type': 'vespo', 'vllm_importance_sampling_mode': 'token_truncate',
                        'vllm_importance_sampling_clip_max': 1.1, **SAMPLER}),
    'luspo': ({'aggregation': 'sequence_sum', 'ratio': 'sequence'},
              {'loss_type': 'luspo', 'importance_sampling_level': 'sequence'}),
    'entropy bonus': ({'entropy_bonus': 0.05, 'aggregation': 'token_mean'},
                      {'entropy_coef': 0.05, 'loss_type': 'dapo'}),
    'no reward': ({'kept': 'scored', 'rewards': 'with None'}, {'rewards': 'with None'}),
    'no reward, batch': (
        {'kept': 'scored', 'rewards': 'with None', 'scale': 'batch_std'},
        {'rewards': 'with None', 'scale_rewards': 'batch'}),
    'no reward, gdpo': (
        {'kept': 'scored', 'rewards': 'with None', 'scale': 'batch_std',
         'reward_aggregation': 'normalize_then_sum'},
        {'rewards': 'with None', 'multi_objective_aggregation': 'normalize_then_sum'}),
}  # fmt: skip


# Metrics that differ, and why.
OF_BATCH = re.compile('frac_reward_zero_std')  # ours is always that of groups
# TRL's advantages of a group of equal rewards are not exactly 0, and have a sign.
ROUNDED = re.compile('frac_reward_zero_std|clip_ratio/.*')
# TRL trains on completions without a reward, with advantage 0.
TRAINED = re.compile('frac_reward_zero_std|clip_ratio/.*|entropy')
NOTHING = re.compile('')
DIFFERENT = {
    'scale batch': OF_BATCH,
    'gdpo': ROUNDED,
    'no reward': TRAINED,
    'no reward, batch': TRAINED,
    'no reward, gdpo': TRAINED,
}


@pytest.fixture(scope='module')
def setup(tmp_path_factory):
    """Folders of the policy and of the reference, and the package's model of them."""
    config = checkpoints.make_config(
        'llama', vocab_size=EOS + 1, eos_token_id=EOS, pad_token_id=EOS - 1, num_hidden_layers=2
    )
    folder = tmp_path_factory.mktemp('trl')
    for seed, name in enumerate(('policy', 'reference')):
        model = checkpoints.make_torch(config, seed)
        if name == 'reference':
            shared = dict(checkpoints.open_torch(folder / 'policy')[0].named_parameters())
            with torch.no_grad():
                for key, value in model.named_parameters():
                    value.copy_(shared[key] + 0.05 * (value - shared[key]))
        checkpoints.save(model, folder / name)
        byte_tokenizer().save_pretrained(folder / name)
    return folder


def make_rollout():
    """Random completions of visible ASCII; two thirds end, the others are cut off at T."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(33, 127, (B, G, T)).astype(np.int32)
    used = rng.integers(2, T + 1, (B, G))
    ended = rng.random((B, G)) < 0.6
    used = np.where(ended, used, T)
    mask = np.arange(T) < used[..., None]
    tokens = np.where(ended[..., None] & (np.arange(T) == used[..., None] - 1), EOS, tokens)
    prompts = rng.integers(33, 127, (B, max(LENGTHS))).astype(np.int32)
    return Rollout(
        Prompts(prompts, np.int32(LENGTHS), np.arange(B, dtype=np.int32)),
        np.where(mask, tokens, 0).astype(np.int32),
        mask,
        np.zeros((B, G, T), np.float32),
        ended,
    )


def make_rewards(kind):
    """The rewards of two functions, f32[B, G, 2]."""
    rng = np.random.default_rng(1)
    rewards = rng.choice([0.0, 0.25, 1.0], (B, G, 2)).astype(np.float32)
    rewards[1, :, 0] = 1.0  # a group that the first function does not tell apart
    rewards[3] = 0.25  # and one that none does
    if kind == 'with None':
        rewards[0, 1] = rewards[2, 3] = NONE  # no reward at all
        rewards[0, 2, 0] = rewards[1, 1, 1] = NONE  # one function does not apply
    return rewards


class Theirs:
    """Two steps of TRL's trainer from the same checkpoint."""

    def __init__(self, folder, workdir, rollout, options):
        options = dict(THEIRS) | options
        self.rollout, self.losses = rollout, []
        self.rewards = make_rewards(options.pop('rewards', None))
        sampler = options.pop('sampler', False)
        self.logprobs = options.pop('logprobs', sampler)
        arguments = {
            'output_dir': str(workdir), 'use_cpu': True, 'report_to': [], 'logging_steps': 1,
            'per_device_train_batch_size': B * G, 'gradient_accumulation_steps': 1,
            'num_generations': G, 'num_iterations': 2, 'max_steps': 2, 'save_strategy': 'no',
            'optim': 'sgd', 'learning_rate': RATE, 'lr_scheduler_type': 'constant',
            'max_grad_norm': 0.0, 'temperature': TEMPERATURE, 'max_completion_length': T,
            'shuffle_dataset': False, 'reward_weights': list(WEIGHTS), 'disable_tqdm': True,
            'gradient_checkpointing': False, 'bf16': False, 'pad_to_multiple_of': None,
            'model_init_kwargs': {'dtype': 'float32'},
        } | options  # fmt: skip
        trainer = trl.GRPOTrainer(
            model=str(folder / 'policy'),
            reward_funcs=[self.first, self.second],
            args=trl.GRPOConfig(**arguments),
            train_dataset=datasets.Dataset.from_dict({'prompt': [str(b) for b in range(B)]}),
            processing_class=byte_tokenizer(),
        )
        trainer.use_vllm = sampler  # which switches the corrections on; nothing is generated by it
        trainer._tokenize_prompts = self.tokenize
        trainer._generate_single_turn = self.generate
        if trainer.ref_model is not None:
            other = checkpoints.open_torch(folder / 'reference')[0]
            trainer.ref_model.load_state_dict(other.state_dict())
        compute_loss = trainer.compute_loss
        trainer.compute_loss = lambda *args, **kwargs: self.record(compute_loss(*args, **kwargs))
        trainer.train()
        checkpoints.save(trainer.model, workdir / 'trained')
        self.params = checkpoints.read(workdir / 'trained')[1]
        logs = [row for row in trainer.state.log_history if 'reward' in row or 'entropy' in row]
        names = {name for row in logs for name in row}
        self.metrics = {
            name: np.mean([row[name] for row in logs if row.get(name) is not None])
            for name in names
        } | {'num_tokens': logs[0]['num_tokens']}

    def record(self, loss):
        self.losses.append(float(loss.detach()))
        return loss

    def tokenize(self, prompts):
        table = self.rollout.prompts
        ids = [table.tokens[int(b)][: table.length[int(b)]].tolist() for b in prompts]
        self.order = [(int(b), i % G) for i, b in enumerate(prompts)]
        return ids, None, {}

    def generate(self, *_):
        used = [(self.rollout, place) for place in self.order]
        tokens = [r.tokens[place][r.mask[place]].tolist() for r, place in used]
        logprobs = [r.logprobs[place][r.mask[place]].tolist() for r, place in used]
        return tokens, logprobs if self.logprobs else None

    def table(self, column):
        values = [self.rewards[place][column] for place in self.order]
        return [None if np.isnan(value) else float(value) for value in values]

    def first(self, prompts, completions, **_):
        return self.table(0)

    def second(self, prompts, completions, **_):
        return self.table(1)


class Ours:
    """The same in one training step with two inner updates."""

    def __init__(self, folder, rollout, options):
        options = dict(OURS) | options
        rewards = make_rewards(options.pop('rewards', None))
        kept = options.pop('kept', None)
        total = np.where(
            np.isnan(rewards).all(-1), NONE, np.nansum(rewards * np.float32(WEIGHTS), -1)
        )
        if kept is not None:
            rollout = rollout._replace(kept=rollout.ended if kept == 'ended' else ~np.isnan(total))
        model, params, _ = checkpoints.read(folder / 'policy')
        reference = checkpoints.read(folder / 'reference')[1]
        algorithm = Algorithm(inner_updates=2, **options)
        given = total
        if algorithm.uses_function_rewards:
            given = FunctionRewards(rewards, np.tile(np.float32(WEIGHTS), (B, 1)))
        step = tiny.jit(
            functools.partial(
                train_step, model=model, optimizer=OPTIMIZER, compute=Compute(microbatch=B)
            )
        )
        self.initial = params
        state, metrics = step(
            init_state(model, OPTIMIZER, params),
            reference if algorithm.uses_reference else None,
            jax.tree.map(jnp.asarray, rollout),
            jax.tree.map(jnp.asarray, given),
            Sampling(temperature=TEMPERATURE),
            algorithm,
        )
        self.params = jax.device_get(state.params)
        self.metrics = {name: float(value) for name, value in metrics.items()}


@pytest.fixture(scope='module')
def rollout(setup):
    """Completions with a sampler's log-probs that differ a little from the policy's."""
    rollout = make_rollout()
    model, params, _ = checkpoints.read(setup / 'policy')
    logprobs, _ = completion_logprobs(model, params, rollout, Sampling(temperature=TEMPERATURE))
    noise = 0.1 * np.random.default_rng(2).standard_normal((B, G, T))
    return rollout._replace(logprobs=np.float32(np.where(rollout.mask, logprobs + noise, 0)))


@pytest.mark.parametrize('name', CASES)
def test_two_off_policy_steps(setup, rollout, tmp_path, name):
    ours, theirs = CASES[name]
    ours = Ours(setup, rollout, ours)
    theirs = Theirs(setup, tmp_path, rollout, theirs)
    moved = tiny.gap(theirs.params, ours.initial)
    gap = tiny.gap(ours.params, theirs.params)
    loss = np.mean(theirs.losses)
    print(f'{name}: loss {loss:.4f}, moved {moved:.1e}, differs {gap:.1e}')
    assert ours.metrics['loss'] == pytest.approx(loss, abs=1e-4)
    assert moved > 1e-3
    assert gap < min(1e-4, 1e-3 * moved)
    assert theirs.metrics.pop('num_tokens') == count_tokens(rollout)
    names = {*ours.metrics} & {*theirs.metrics} - {'loss'}
    assert {'reward', 'reward_std', 'entropy', 'completions/clipped_ratio'} < names
    for metric in sorted(names):
        if not DIFFERENT.get(name, NOTHING).fullmatch(metric):
            expected = pytest.approx(theirs.metrics[metric], rel=1e-4, abs=1e-5)
            assert ours.metrics[metric] == expected, metric
