"""States are restored bit for bit, on any mesh; a folder belongs to one run."""

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
import tiny

from grpo_jax import sharding
from grpo_jax.algorithm.optimizer import adamw
from grpo_jax.run import checkpoint
from grpo_jax.types import TrainState


@pytest.fixture(scope='module')
def state(params):
    """A state of which no two leaves are equal."""
    optimizer, _ = adamw(learning_rate=1e-3, steps=10)
    state = TrainState(np.int32(7), params, jax.eval_shape(optimizer.init, params), np.int32(2))
    rng = np.random.default_rng(0)

    def fill(leaf):
        if isinstance(leaf, jax.ShapeDtypeStruct):
            return (100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype)
        return np.asarray(leaf)

    return jax.tree.map(fill, state)


def saved(folder, states, keep=3):
    manager = checkpoint.open_manager(folder, keep=keep)
    for step, state in states.items():
        checkpoint.save(manager, step, state)
        manager.wait_until_finished()
    return manager


def test_a_state_comes_back_on_any_mesh(tmp_path, state):
    manager = saved(tmp_path, {7: state})
    abstract = jax.eval_shape(lambda: state)
    for shape in ({'fsdp': 1, 'tensor': 1}, {'fsdp': 2, 'tensor': 2}, {'fsdp': 8, 'tensor': 1}):
        mesh = sharding.make_mesh(**shape)
        restored = checkpoint.restore(manager, abstract, mesh)
        assert jax.tree.structure(restored) == jax.tree.structure(state)
        assert tiny.same(restored, state)
        assert jax.tree.map(lambda x: x.dtype, restored) == jax.tree.map(lambda x: x.dtype, state)
        wanted = sharding.shardings(abstract, mesh)
        lies = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), restored, wanted)
        assert all(jax.tree.leaves(lies))
        assert tiny.same(checkpoint.restore_params(manager, abstract.params, mesh), state.params)


def test_the_newest_or_the_named_step_of_those_kept(tmp_path, state):
    mesh = sharding.make_mesh()
    manager = saved(tmp_path, {k: state._replace(step=np.int32(k)) for k in (2, 5, 9)}, keep=2)
    assert int(checkpoint.restore(manager, state, mesh).step) == 9
    assert int(checkpoint.restore(manager, state, mesh, step=5).step) == 5
    with pytest.raises(ValueError, match=r'holds no checkpoint of step 2; it has \[5, 9\]'):
        checkpoint.restore(manager, state, mesh, step=2)


def test_no_checkpoint_is_an_error(tmp_path, state):
    manager = checkpoint.open_manager(tmp_path / 'checkpoints' / 'sft', keep=1)
    with pytest.raises(ValueError, match='holds no checkpoint of step None'):
        checkpoint.restore_params(manager, state.params, sharding.make_mesh())
    with pytest.raises(ValueError, match=f'{tmp_path} holds no checkpoint: train first, or name'):
        checkpoint.newest_manager(tmp_path, ('sft', 'grpo'))


def test_a_save_that_was_cut_off_does_not_count(tmp_path, state):
    manager = saved(tmp_path, {3: state, 6: state._replace(step=np.int32(6))})
    manager.close()
    (tmp_path / '6').rename(tmp_path / '6.orbax-checkpoint-tmp')
    manager = checkpoint.open_manager(tmp_path, keep=3)
    assert manager.latest_step() == 3
    assert int(checkpoint.restore(manager, state, sharding.make_mesh()).step) == 7
    checkpoint.save(manager, 6, state)
    manager.wait_until_finished()
    assert manager.all_steps() == [3, 6]


def test_the_newest_manager_is_that_of_the_last_stage(tmp_path, state):
    for stage, step in (('sft', 60), ('grpo', 4), ('grpo-2', 3), ('grpo-10', 1)):
        assert not list(tmp_path.glob(f'checkpoints/{stage}'))
        saved(tmp_path / 'checkpoints' / stage, {step: state}).close()
        manager = checkpoint.newest_manager(tmp_path, ('sft', 'grpo'))
        assert (manager.directory.name, manager.latest_step()) == (stage, step)
    saved(tmp_path / 'checkpoints' / 'reward-11', {2: state}).close()
    assert checkpoint.newest_manager(tmp_path, ('sft', 'grpo')).directory.name == 'grpo-10'
    assert checkpoint.newest_manager(tmp_path, ('reward',)).directory.name == 'reward-11'


# What the next step starts from


def test_positions_and_samples_come_back(tmp_path, state, rollout):
    mesh = sharding.make_mesh(fsdp=2)
    with checkpoint.open_manager(tmp_path, keep=2) as manager:
        checkpoint.save(manager, 1, state)
        manager.wait_until_finished()
        assert checkpoint.restore_position(manager) is None
        assert checkpoint.restore_samples(manager, mesh) is None
        checkpoint.save(manager, 2, state, rollout, {'step': 2, 'trained': ['a']})
        manager.wait_until_finished()
        assert checkpoint.restore_position(manager) == {'step': 2, 'trained': ['a']}
        assert tiny.same(checkpoint.restore_samples(manager, mesh), rollout)


def test_samples_in_parts_as_earlier_versions_saved_them(tmp_path, state, rollout):
    parts = {}
    for i in range(4):
        part = jax.tree.map(lambda x, i=i: np.asarray(x[i : i + 1]), rollout)
        parts[str(i)] = part._asdict() | {'prompts': part.prompts._asdict()}
    with checkpoint.open_manager(tmp_path, keep=1) as manager:
        manager.save(1, args=ocp.args.Composite(sampled=ocp.args.StandardSave(parts)))
        manager.wait_until_finished()
        restored = checkpoint.restore_samples(manager, sharding.make_mesh())
    assert tiny.same(restored, rollout)


# Whose folder is it?


def test_a_folder_is_claimed_by_one_config(tmp_path):
    config = runs.get_config()
    path, same = checkpoint.check_workdir(str(tmp_path / 'new' / 'run'), config)
    assert same is config
    assert path.is_dir()
    assert not list(path.iterdir())
    config.seed = 1
    checkpoint.check_workdir(str(path), config)  # a failed start leaves no claim
    checkpoint.claim_workdir(path, config)
    checkpoint.claim_workdir(path, config)
    assert [file.name for file in path.iterdir()] == ['config.json']
    assert checkpoint.check_workdir(str(path), config) == (path, config)
    (path / 'checkpoints' / 'sft' / '3').mkdir(parents=True)
    config.grpo.compute.microbatch = None  # chosen automatically: as the run in the folder does
    _, resumed = checkpoint.check_workdir(str(path), config)
    assert resumed.grpo.compute.microbatch == 2
    config.eval.samples = 5
    config.seed = 2
    with pytest.raises(ValueError) as error:  # noqa: PT011 the message follows
        checkpoint.check_workdir(str(path), config)
    assert str(error.value) == (
        f"workdir '{path}' holds the run of another config: eval.samples (there 4, here 5); "
        'seed (there 1, here 2). Use another --workdir, or the same config to resume'
    )


def test_a_try_without_a_checkpoint_holds_no_folder(tmp_path, caplog):
    """Another config begins afresh, and nothing of the failed try is left."""
    failed, config = runs.get_config(), runs.get_config()
    failed.seed, failed.grpo.compute.rows = 1, 8
    config.grpo.compute.rows = None  # automatic: not that of the failed try
    checkpoint.claim_workdir(tmp_path, failed)
    (tmp_path / 'data').mkdir()  # prepared data has the names of what it was made from
    for name in ('tensorboard/grpo', 'checkpoints/grpo', 'pretrained', 'replay/1'):
        (tmp_path / name).mkdir(parents=True)
    for name in (*runs.FILES, 'changes.jsonl', 'loggers.json', 'reward.png'):
        (tmp_path / name).write_text('{}')

    for extend in (False, True):
        path, fresh = checkpoint.check_workdir(str(tmp_path), config, extend=extend)
        assert fresh is config
    assert (path / 'metrics.jsonl').exists()  # until all checks are done
    assert (path / 'pretrained').exists()  # but the checks do not use it
    assert checkpoint.holds_failed_try(path, config)
    assert not checkpoint.holds_failed_try(path, failed)
    assert not caplog.records
    checkpoint.remove_failed_try(path, config)
    assert [record.message for record in caplog.records] == [
        f'workdir {str(tmp_path)!r} held a run of another config without a checkpoint: its records '
        'are removed, and this run starts from the beginning'
    ]
    assert [file.name for file in path.iterdir()] == ['data']
    checkpoint.claim_workdir(path, config)
    assert sorted(file.name for file in path.iterdir()) == ['config.json', 'data']
    assert checkpoint.check_workdir(str(path), config) == (path, config)


def test_a_run_keeps_its_records(tmp_path, caplog):
    config = runs.get_config()
    checkpoint.claim_workdir(tmp_path, config)
    (tmp_path / 'metrics.jsonl').write_text('{}')
    checkpoint.remove_failed_try(tmp_path, config)  # the same config
    config.eval.samples = 5
    (tmp_path / 'checkpoints' / 'sft' / '3').mkdir(parents=True)
    checkpoint.remove_failed_try(tmp_path, config)  # it has a checkpoint
    assert (tmp_path / 'metrics.jsonl').exists()
    assert not [record for record in caplog.records if record.name == 'grpo_jax']


def test_a_relative_folder_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert checkpoint.check_workdir('run', runs.get_config())[0] == tmp_path / 'run'


def test_a_folder_that_cannot_be_written_to(tmp_path):
    file = tmp_path / 'file'
    file.touch()
    for workdir, reason in ((file / 'run', 'Not a directory'), (file, 'File exists')):
        message = rf"workdir '{workdir}' cannot be written to \({reason}\): name another folder"
        with pytest.raises(ValueError, match=message):
            checkpoint.check_workdir(str(workdir), runs.get_config())


@pytest.mark.parametrize(
    ('error', 'kind', 'message'),
    [
        (
            TypeError("'NoneType' object is not callable"),
            ValueError,
            'was not written (TypeError: ',
        ),
        (PermissionError(13, 'Permission denied', '/x'), PermissionError, "denied: '/x'"),
        (RuntimeError('/x: No space left on device'), RuntimeError, 'No space left'),
        (jax.errors.JaxRuntimeError('a process ended'), jax.errors.JaxRuntimeError, 'ended'),
        (KeyError('two\nlines'), ValueError, "(KeyError: 'two\\nlines')"),
    ],
)
def test_what_a_save_in_the_background_raised_is_one_line(
    tmp_path, state, monkeypatch, error, kind, message
):
    manager = saved(tmp_path, {1: state})

    def fail():
        raise error

    monkeypatch.setattr(manager, 'wait_until_finished', fail)
    with pytest.raises(kind) as caught:
        checkpoint.save(manager, 2, state)
    assert message in str(caught.value)
    assert (str(tmp_path) in str(caught.value)) == (kind is ValueError)
