"""Short runs of the methods, from the config to the records: each trains what it should."""

import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import runs
import tiny
from test_stages import newest, records

from grpo_jax import data, evaluate
from grpo_jax.algorithm.config import Algorithm
from grpo_jax.algorithm.program import init_state, make_train_step
from grpo_jax.engine.compute import Compute
from grpo_jax.run import checkpoint, methods, parameters, problems, report, setup
from grpo_jax.run.graders import make_grader
from grpo_jax.types import Sampling

pytestmark = pytest.mark.usefixtures('compiled_once')

B, G = 4, 4


def third_steps(prompts, completions, **columns):
    """A step ends every three characters; about half of them are right."""
    return [
        [
            (min(start + 3, len(text)), float(zlib.crc32(text[: start + 3].encode()) % 2))
            for start in range(0, len(text), 3)
        ]
        for text in completions
    ]


STEPS = 'test_runs_of_methods:third_steps'


def get_config(preset='grpo', **grpo):
    """From random parameters: few steps of the smallest model, and a large learning rate."""
    config = runs.get_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, qk_norm='')
    config.model.remat = False
    config.sft.update(steps=0)
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.grpo.compute.update(logprob_chunk=7)
    config.grpo.rewards = {'runs:lucky': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-2)
    config.eval.update(every=10, batch_size=B, samples=0)
    methods.apply(config, preset)
    config.grpo.update(steps=2, batch_size=B, group_size=G, **grpo)
    return config


def metrics(workdir, stage='grpo'):
    return report.read(workdir / 'metrics.jsonl', stage)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The folder of a finished run, by its name in RUNS."""

    @functools.cache
    def train(name):
        workdir = tmp_path_factory.mktemp(name)
        runs.train(RUNS[name](), workdir)
        return workdir

    return train


# Methods


def process():
    config = get_config('grpo_process')
    config.grpo.step_rewards = {STEPS: 0.5}
    config.grpo.rewards = {}
    return config


def trpo():
    config = get_config('trpo')
    config.grpo.algorithm.cg_steps = 2
    return config


def ppo():
    config = get_config('ppo')
    config.critic.optimizer.learning_rate = 1e-2
    return config


def remax():
    """One completion for each prompt, and the greedy one as its baseline."""
    config = get_config('remax', refill=2)
    config.grpo.group_size = 1
    return config


def iterative_process():
    """Iterations whose rewards are those of a process reward model alone."""
    config = get_config('grpo_process', iterations=2)
    config.grpo.step_rewards = {STEPS: 0.0}
    config.grpo.rewards = {}
    config.reward_model.update(weight=1.0, kind='process', loss='step', steps=2)
    config.reward_model.update(batch_size=B, group_size=G, microbatch=2)
    config.reward_model.optimizer.learning_rate = 1e-2
    return config


def iterative():
    """Iterations with all that a run can keep: reward model, critic and a moving reference."""
    config = ppo()
    config.grpo.iterations = 2
    config.grpo.rewards = {}
    config.grpo.algorithm.reference_decay = 0.5
    config.reward_model.update(weight=2.0, steps=2, batch_size=B, group_size=G, microbatch=2)
    config.reward_model.update(replay=0.5)
    config.reward_model.optimizer.learning_rate = 1e-2
    config.checkpoint.update(every=1, keep=9)
    return config


def adapted(preset, **grpo):
    """The policy that a stage began with samples, which has no adapters."""
    config = get_config(preset, **grpo)
    config.model.lora.update(rank=2, targets=('q_proj', 'o_proj'))
    return config


def adapted_with_reward_model():
    config = adapted('grpo', iterations=2)
    config.reward_model.update(weight=2.0, steps=2, batch_size=B, group_size=G, microbatch=2)
    return config


VARIANTS = (
    'deepseek_v32', 'kl_cov', 'clip_cov', 'luspo', 'vespo', 'gmpo', 'trl_defaults',
)  # fmt: skip
RUNS = {
    'rft': lambda: get_config('rft'),
    'online_rft': lambda: get_config('online_rft'),
    'dpo': lambda: get_config('dpo', refill=2),
    'ppo': ppo,
    'trpo': trpo,
    'process': process,
    'iterative_process': iterative_process,
    'iterative': iterative,
    **{name: functools.partial(get_config, name) for name in VARIANTS},
    'remax': remax,
    'adapted rft': lambda: adapted('rft'),
    'adapted dpo': lambda: adapted('dpo'),
    'adapted, reward model': adapted_with_reward_model,
}


# `iterative` has a critic too, and step rewards are graded in tests/test_grading.py.
@pytest.mark.parametrize(
    'name',
    tiny.some_slow(
        ['rft', 'online_rft', 'dpo', 'ppo', 'trpo', 'process', *VARIANTS],
        *('rft', 'online_rft', 'ppo', 'trpo', 'process', *VARIANTS[1:]),
    ),
)
def test_methods_train(name, trained):
    """To the end, with finite numbers and other parameters than at first."""
    rows = metrics(trained(name))
    assert [row['step'] for row in rows] == [0, 1]
    assert all(value is not None for row in rows for value in row.values())
    assert all(row['skipped_updates'] == 0 for row in rows)
    made = setup.prepare(RUNS[name](), trained(name))
    assert tiny.gap(parameters.initial_params(made), newest(trained(name))['params']) > 1e-4


def groups_of(workdir, step, stage='grpo'):
    """Completions of a step as they were sampled: [B][G] rows of the records."""
    rows = [r for r in report.read(workdir / 'completions.jsonl', stage) if r['step'] == step]
    assert len(rows) == B * G
    return [rows[start : start + G] for start in range(0, B * G, G)]


@pytest.mark.parametrize(
    'name',
    tiny.some_slow(
        ['adapted rft', 'adapted dpo', 'adapted, reward model'],
        *('adapted dpo', 'adapted, reward model'),
    ),
)
def test_adapters_train_where_their_base_samples(name, trained):
    rows = metrics(trained(name))
    assert [row['step'] for row in rows] == [0, 1]
    gaps = [row['sampling/sampling_logp_difference/max'] for row in rows]
    assert gaps[0] < 1e-4
    if name != 'adapted, reward model':  # whose policy samples for itself
        assert gaps[1] > 1e-3
    assert tiny.largest(newest(trained(name))['params']) > 0


@pytest.mark.parametrize('name', tiny.some_slow(['rft', 'online_rft'], 'rft'))
def test_rejected_completions_are_not_learnt_from(name, trained):
    seen = set()
    for row in metrics(trained(name)):
        kept = 0
        for group in groups_of(trained(name), row['step']):
            right = [(r['prompt'], r['completion']) for r in group if r['reward'] > 0]
            kept += len(set(right) - seen if name == 'rft' else right)
            seen |= set(right)
        assert row['completions/kept_ratio'] == pytest.approx(kept / (B * G))
        assert 0 < row['completions/kept_ratio'] < 1
        assert 'kl' not in row


def test_who_samples(trained):
    """Off-policy the second step is not sampled by the current policy; on-policy it is.

    Sampler and update agree on log-probs to rounding where they are of the same parameters.
    """
    for name in ('rft', 'online_rft'):
        gaps = [r['sampling/sampling_logp_difference/max'] for r in metrics(trained(name))]
        assert gaps[0] < 1e-4
        assert (gaps[1] > 1e-3) == (name == 'rft')


def test_pairs_of_preferences(trained):
    first, second = metrics(trained('dpo'))
    assert first['loss'] == pytest.approx(np.log(2) * first['refill/informative_ratio'], rel=1e-5)
    assert first['rewards/margins'] == pytest.approx(0, abs=1e-6)
    assert second['rewards/margins'] != 0
    for row in (first, second):
        assert 1 <= row['refill/batches'] <= 3
        ratio = np.mean(
            [len({r['reward'] for r in g}) > 1 for g in groups_of(trained('dpo'), row['step'])]
        )
        assert row['refill/informative_ratio'] == ratio
        assert row['reward'] == pytest.approx(0.5)  # one right, one wrong of each pair


def test_a_critic_is_trained(trained):
    for row in metrics(trained('iterative')):
        assert {'critic/loss', 'critic/explained_variance', 'critic/grad_norm', 'kl'} <= row.keys()
        assert row['critic/explained_variance'] <= 1
    assert metrics(trained('iterative'))[0]['critic/values_mean'] == pytest.approx(0, abs=1e-6)
    rest = newest(trained('iterative'))['rest']
    assert tiny.largest(rest['value_params']) > 0


def test_the_greedy_completions_are_the_baseline(trained):
    """ReMax with groups of one: the first step's are those of the initial policy."""
    workdir = trained('remax')
    rows = metrics(workdir)
    assert [row['step'] for row in rows] == [0, 1]
    made = setup.prepare(RUNS['remax'](), workdir)
    training = problems.training_problems(made, problems.heldout_problems(made))
    params, grader = parameters.initial_params(made), make_grader(made, training, Algorithm())
    batches, of_prompt = data.batches(training.table, B, seed=made.config.seed, name=''), {}
    for number in range(int(rows[0]['refill/batches'])):
        greedy = made.sampler(
            params, batches[number], step=7, sampling=Sampling(temperature=0.0), group_size=1
        )
        graded = grader.grade(greedy, None)
        of_prompt |= zip(graded.texts.prompts, graded.total[:, 0], strict=True)
    first = [r for r in report.read(workdir / 'completions.jsonl', 'grpo') if r['step'] == 0]
    baseline = np.array([of_prompt[r['prompt']] for r in first])
    assert rows[0]['reward_greedy'] == pytest.approx(baseline.mean())
    differ = np.array([r['reward'] for r in first]) != baseline
    assert len(differ) == B
    assert rows[0]['refill/informative_ratio'] == differ.mean() > 0  # in groups of one
    assert tiny.gap(params, newest(workdir)['params']) > 1e-4


@pytest.mark.slow
def test_a_trust_region_bounds_the_step(trained):
    for row in metrics(trained('trpo')):
        assert row['trust_region/accepted'] == 1
        assert 0 < row['trust_region/kl_step'] <= 0.01 * 1.001
        assert 'learning_rate' not in row


def test_process_supervision(trained):
    for row in metrics(trained('process')):
        groups = groups_of(trained('process'), row['step'])
        found = [
            [sum(v for _, v in third_steps([], [r['completion']])[0]) for r in g] for g in groups
        ]
        assert [[r['reward'] for r in g] for g in groups] == (0.5 * np.array(found)).tolist()
        assert row['reward'] == pytest.approx(0.5 * np.mean(found))
        assert row['completions/mean_steps'] > 0
        assert row['rewards/runs:lucky/mean'] == row['accuracy']  # called, but with weight 0


# The entropy bonus


def controlled(*, ahead=False):
    """Whose entropy is above the target at times: all tokens are alike at first."""
    config = get_config('tis' if ahead else 'grpo', ahead=ahead)
    config.grpo.update(steps=4)
    config.grpo.optimizer.learning_rate = 0.1
    config.grpo.entropy_control.update(target=5.0, step=0.25)
    config.grpo.algorithm.entropy_bonus = 0.5
    return config


@pytest.mark.slow
@pytest.mark.parametrize('ahead', [False, True])
def test_the_entropy_bonus_follows_the_entropy(ahead, tmp_path, monkeypatch):
    """The bonus of each step by hand; a stopped run has the same, to the last bit."""
    runs.train(controlled(ahead=ahead), tmp_path / 'whole')
    rows = metrics(tmp_path / 'whole')
    coefficient = bonus = 0.5
    for row in rows:
        assert row['entropy_bonus'] == bonus
        low = row['entropy'] <= 5
        coefficient = min(max(coefficient + (0.25 if low else -0.25), 0), 1)
        bonus = coefficient if low else 0.0
    assert len({row['entropy_bonus'] for row in rows}) > 2
    write, stops = report.Records.metrics, [1, 2]

    def interrupt(records, step, values):
        if stops and step == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        write(records, step, values)

    monkeypatch.setattr(report.Records, 'metrics', interrupt)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            runs.train(controlled(ahead=ahead), tmp_path / 'stopped')
    runs.train(controlled(ahead=ahead), tmp_path / 'stopped')
    assert records(tmp_path / 'stopped') == records(tmp_path / 'whole')
    assert tiny.same(newest(tmp_path / 'stopped'), newest(tmp_path / 'whole'))


# Iterations


ITERATIVE = tiny.some_slow(['iterative', 'iterative_process'], 'iterative_process')


@pytest.mark.parametrize('name', ITERATIVE)
def test_iterations_with_a_reward_model(name, trained):
    workdir = trained(name)
    order = [(row['stage'], row['step']) for row in runs.lines(workdir / 'metrics.jsonl')]
    assert order == [(s, k) for s in ('reward', 'grpo', 'reward-2', 'grpo-2') for k in (0, 1)]
    found = sorted(p.relative_to(workdir / 'replay').as_posix() for p in workdir.rglob('*.npz'))
    assert found == ['1/0.npz', '1/1.npz', '2/0.npz', '2/1.npz']
    for stage in ('reward', 'reward-2'):
        for row in metrics(workdir, stage):
            expected = {'loss', 'accuracy', 'grad_norm'} if name == 'iterative' else {'loss'}
            assert {f'reward_model/{key}' for key in expected} <= row.keys()
            assert {'accuracy', 'skipped_updates', 'num_tokens', 'learning_rate'} <= row.keys()
    for stage in ('grpo', 'grpo-2'):
        for row in metrics(workdir, stage):
            rows = [r for g in groups_of(workdir, row['step'], stage) for r in g]
            scores = [r['rewards']['reward_model'] for r in rows]
            assert row['rewards/reward_model/mean'] == pytest.approx(np.mean(scores), rel=1e-4)
            assert row['rewards/reward_model/std'] == pytest.approx(
                np.std(scores, ddof=1), rel=1e-4
            )
            assert np.std(scores) > 0
            if name == 'iterative':  # of weight 2, and no rules
                rewards = [r['reward'] for r in rows]
                np.testing.assert_allclose(rewards, 2 * np.array(scores), rtol=1e-5)


@pytest.mark.parametrize('name', ITERATIVE)
def test_each_iteration_begins_with_its_own_reference(name, trained):
    """The policy as the one before left it."""
    for stage in ('grpo', 'grpo-2'):
        first, second = metrics(trained(name), stage)
        assert first['kl'] == pytest.approx(0, abs=1e-7)  # two programs' rounding
        assert abs(second['kl']) > 1e-4


def test_a_reference_that_follows_the_policy(trained):
    """Halfway after each step, from where the iteration began."""
    workdir = trained('iterative')
    made = setup.prepare(iterative(), workdir)
    before = jax.device_get(parameters.initial_params(made))
    for stage in ('grpo', 'grpo-2'):
        reference = before
        for step in (1, 2):
            saved = newest(workdir, stage, step)
            reference = jax.tree.map(lambda a, b: (a + b) / 2, reference, saved['params'])
            assert tiny.gap(reference, saved['rest']['reference']) < 1e-6
            assert tiny.gap(reference, saved['params']) > 1e-4
        before = saved['params']


def test_models_are_carried_from_iteration_to_iteration(trained):
    """The reward model and the critic go on from where they were; only their optimizers begin anew.

    One step moves each number by at most about the learning rate.
    """
    workdir = trained('iterative')
    for part in ('reward', 'grpo'):
        last, next_one = newest(workdir, part), newest(workdir, f'{part}-2', 1)
        if part == 'reward':
            assert 0 < tiny.gap(last['params'], next_one['params']) < 0.011
        else:
            last, next_one = (x['rest']['value_params'] for x in (last, next_one))
            assert 0 < tiny.gap(last, next_one) < 0.011


def test_replayed_groups_are_those_of_the_first_iteration(trained):
    """What the second keeps is what its own policy sampled."""
    kept = {}
    for iteration in (1, 2):
        for path in sorted((trained('iterative') / 'replay' / str(iteration)).glob('*.npz')):
            with np.load(path) as arrays:
                kept[iteration, path.stem] = [arrays[name] for name in arrays.files]
    assert [len(arrays[0]) for arrays in kept.values()] == [B] * 4
    prompts = [tuple(arrays[2].tolist()) for arrays in kept.values()]
    assert len(set(prompts)) == 4  # the second iteration asks others


STOPS = [('reward-2', 1), ('grpo-2', 1)]


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_unbroken_one(trained, tmp_path, monkeypatch):
    """To the last bit, stopped in both stages of the second iteration."""
    write, stops = report.Records.metrics, list(STOPS)

    def interrupt(records, step, values):
        if stops and (records.stage, step) == stops[0]:
            stops.pop(0)
            raise KeyboardInterrupt
        write(records, step, values)

    monkeypatch.setattr(report.Records, 'metrics', interrupt)
    while stops:
        with pytest.raises(KeyboardInterrupt):
            runs.train(iterative(), tmp_path)
    runs.train(iterative(), tmp_path)
    workdir = trained('iterative')
    assert records(tmp_path) == records(workdir)
    for stage in ('reward', 'grpo', 'reward-2', 'grpo-2'):
        assert tiny.same(newest(tmp_path, stage), newest(workdir, stage))


@pytest.mark.parametrize('name', ITERATIVE)
def test_best_of_k_by_the_reward_model(name, trained, capsys):
    config = RUNS[name]()
    config.eval.update(samples=G, k=(1, 4))
    evaluate.main(config, str(trained(name)))
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found['checkpoint'] == 'grpo-2/2'
    assert {'eval/rm@1', 'eval/rm@4', 'eval/pass@4'} <= found.keys()
    assert found['eval/rm@1'] == pytest.approx(found['eval/pass@1'])
    assert 0 <= found['eval/rm@4'] <= found['eval/pass@4']


# A moving reference by hand


def bigram_logprobs(params, rollout):
    """f64[B, G, T] in NumPy."""
    prompts = rollout.prompts
    last = np.take_along_axis(prompts.tokens, prompts.length[:, None] - 1, 1)
    first = np.broadcast_to(last[:, :, None], (*rollout.tokens.shape[:2], 1))
    read = np.concatenate([first, rollout.tokens[..., :-1]], -1)
    logits = np.asarray(params['embedding'], float)[read] @ np.asarray(params['head'], float)
    logits -= np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logits, rollout.tokens[..., None], -1)[..., 0]


@pytest.mark.parametrize('decay', [0.9, 0.25])
def test_the_moving_reference_by_hand(decay, rollout, rewards):
    """reference' = d * reference + (1 - d) * policy, measured by the KL of the next step."""
    model, optimizer = tiny.Bigram(), optax.sgd(0.5)
    algorithm = Algorithm(beta=0.1, reference_decay=decay)
    compute = Compute(microbatch=4, logprob_chunk=5)
    step = make_train_step(model, optimizer, algorithm, compute=compute)
    params = model.make_params()
    state = init_state(model, optimizer, params, moving_reference=True)
    expected = params
    for _ in range(3):
        before = jax.device_get(state.params)
        state, found = step(state, None, rollout, rewards, Sampling(), algorithm)
        gap = bigram_logprobs(expected, rollout) - bigram_logprobs(before, rollout)
        kl = (np.exp(gap) - gap - 1)[rollout.mask].mean()
        assert float(found['kl']) == pytest.approx(kl, rel=1e-3, abs=1e-6)
        expected = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * np.asarray(new), expected, state.params
        )
        assert tiny.gap(expected, state.reference) < 1e-6
    assert kl > 1e-4


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_the_moving_reference_has_room_for_small_steps(dtype, rollout, rewards):
    """A policy of two bytes that stays where it is stays its reference; one that jumps is reached.

    In two bytes the average would end a step before, as 1 % of what is left is rounded away.
    """
    model, optimizer = tiny.Bigram(), optax.identity()
    params = jax.tree.map(lambda x: x.astype(dtype), model.make_params())
    algorithm = Algorithm(beta=1e-9, reference_decay=0.99)
    step = make_train_step(model, optimizer, algorithm, compute=Compute(microbatch=4))
    state = init_state(model, optimizer, params, moving_reference=True)
    target = jax.tree.map(lambda x: (1.05 * x).astype(dtype), params)
    for goal in (params, target):
        for _ in range(300):
            state = state._replace(params=jax.tree.map(jnp.copy, goal))
            state, _ = step(state, None, rollout, 0 * rewards, Sampling(), algorithm)
        wide = jax.tree.map(np.float32, (goal, params))
        assert tiny.gap(state.reference, wide[0]) < 0.06 * tiny.gap(*wide) + 1e-6


# What does not fit together


def test_adapters_have_no_moving_reference(tmp_path):
    config = get_config()
    config.model.lora.rank = 2
    config.grpo.algorithm.reference_decay = 0.9
    with pytest.raises(ValueError, match=r'reference_decay=0\.9 with adapters, whose reference'):
        runs.train(config, tmp_path)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda c: c.grpo.algorithm.update(supervision='process'), 'name a step function'),
        (
            lambda c: setattr(c.grpo, 'step_rewards', {STEPS: 1.0}),
            'grpo.step_rewards has no effect',
        ),
        (
            lambda c: c.reward_model.update(weight=1.0, steps=1, loss='step'),
            "reward_model.loss='step' with kind='outcome'",
        ),
        (
            lambda c: c.reward_model.update(weight=1.0, steps=1, kind='process'),
            "reward_model.loss='bradley_terry' with kind='process'",
        ),
        (lambda c: c.reward_model.update(weight=1.0), 'neither pretrained nor trained'),
        (lambda c: c.reward_model.update(weight=1.0, steps=1, replay=1.5), 'reward_model.replay=1'),
        (
            lambda c: c.reward_model.update(weight=1.0, steps=1, group_size=1),
            "reward_model.group_size=1 with loss='bradley_terry'",
        ),
        (lambda c: c.grpo.update(iterations=0), 'grpo.iterations=0 is out of range'),
    ],
)
def test_what_does_not_fit_is_said_before_anything_is_computed(change, message, tmp_path):
    config = get_config()
    change(config)
    with pytest.raises(ValueError, match=message):
        runs.train(config, tmp_path / 'run')
    assert not (tmp_path / 'run' / 'config.json').exists()
    assert checkpoint.check_workdir(str(tmp_path / 'run'), get_config())


@pytest.mark.slow
def test_a_run_records_support_and_experts(tmp_path):
    """Two batches are joined and one half of the pairs is selected, with what was recorded."""
    config = get_config('dpo', refill=1, record=('support', 'routing'))
    config.model.update(experts=3, experts_per_token=1)
    config.grpo.sampling.update(top_p=0.8)
    runs.train(config, tmp_path)
    gaps = [row['sampling/sampling_logp_difference/max'] for row in metrics(tmp_path)]
    assert len(gaps) == 2
    assert gaps[0] < 1e-5  # the first update trains the policy that sampled


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'record': ('routing',)}, "record='routing' has no effect on a model without experts"),
        ({'record': ('support',)}, "record='support' has no effect without a filter"),
    ],
)
def test_a_record_without_effect_is_found_before_the_run(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        setup.prepare(get_config(**options), tmp_path)
