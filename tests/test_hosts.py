"""Several processes on one machine; their tokens and rewards are those of one process."""

import json
import queue
import signal
import socket
import threading
import time

import host_runs
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import runs
import tiny

from grpo_jax.run import checkpoint, hosts
from grpo_jax.run.hosts.roll_call import RollCallError, meet


def free_address():
    with socket.create_server(('127.0.0.1', 0)) as server:
        return f'127.0.0.1:{server.getsockname()[1]}'


def meeting(members, *, timeout=20, lost=None):
    """What `meet` returns or raises for (count, index) of each member, in threads."""
    address, found = free_address(), [None] * len(members)

    def join(i, count, index):
        try:
            found[i] = meet(
                address, count, index, timeout=timeout, on_lost=(lost or [print] * len(members))[i]
            )
        except RollCallError as error:
            found[i] = str(error)

    threads = [threading.Thread(target=join, args=(i, *member)) for i, member in enumerate(members)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_missing_processes_are_named_in_all():
    errors = meeting([(4, 0), (4, 2)], timeout=1)
    assert errors[0] == errors[1]
    assert errors[0].startswith('processes 1, 3 of 4 did not connect to process 0 at 127.0.0.1:')


def test_without_process_0_the_others_say_so():
    (error,) = meeting([(2, 1)], timeout=0.5)
    assert error.startswith('process 0 of 2 did not answer process 1 at 127.0.0.1:')


@pytest.mark.parametrize(
    ('members', 'message'),
    [
        ([(3, 0), (3, 1), (3, 1)], 'have the same number: give each its own --process_id'),
        ([(2, 0), (4, 1)], 'was started for 4 processes and process 0 for 2'),
    ],
)
def test_processes_with_wrong_numbers(members, message):
    for error in meeting(members):
        assert isinstance(error, str)
        assert message in error


def test_the_others_learn_which_process_is_lost():
    texts = queue.SimpleQueue()
    calls = meeting([(3, 0), (3, 1), (3, 2)], lost=[texts.put, texts.put, print])
    (connection,) = calls[2]._peers
    connection.shutdown(socket.SHUT_RDWR)  # as the system does for a process that was killed
    for _ in range(2):
        text = texts.get(timeout=20)
        assert text.startswith('process 2 on ')
        assert 'is gone' in text


def test_the_others_learn_why_a_process_fails():
    texts = queue.SimpleQueue()
    calls = meeting([(3, 0), (3, 1), (3, 2)], lost=[texts.put, texts.put, print])
    calls[2].announce('process 2 failed: MemoryError: no\nroom')
    assert [texts.get(timeout=20) for _ in range(2)] == [
        'process 2 failed: MemoryError: no room'
    ] * 2


def test_a_process_that_leaves_is_not_lost():
    lost = []
    calls = meeting([(2, 0), (2, 1)], lost=[lost.append] * 2)
    for call in calls:
        call.leave()
    time.sleep(0.2)
    calls[1].announce('late')
    time.sleep(0.2)
    assert lost == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (('a:1', '2', ''), '--process_id is missing'),
        (('a:1', '', ''), '--num_processes, --process_id is missing'),
        (('a', '2', '0'), '--coordinator=a: give host and port'),
        (('a:1', '2', '2'), '--num_processes=2 --process_id=2: give'),
        (('a:1', 'two', '0'), '--num_processes=two'),
    ],
)
def test_options(options, message):
    with pytest.raises(hosts.ProcessesError, match=message):
        hosts.start_from(*options)


def test_no_options_are_one_process():
    assert hosts.start_from('', '', '') is None
    assert hosts.start_from('a:1', '2', '1') == hosts.Start('a:1', 2, 1)


SLURM = {
    'SLURM_JOB_ID': '4096', 'SLURM_STEP_NODELIST': 'node[3-4]', 'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1', 'SLURM_LOCALID': '0', 'SLURM_STEP_NUM_NODES': '2',
}  # fmt: skip
OPEN_MPI = {
    'OMPI_MCA_orte_hnp_uri': '4096.0;tcp://10.0.0.3,10.1.0.3:34911', 'OMPI_COMM_WORLD_SIZE': '2',
    'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_LOCAL_RANK': '0',
}  # fmt: skip


@pytest.mark.parametrize(
    ('environment', 'host'), [(SLURM, 'node3'), (OPEN_MPI, '10.0.0.3')], ids=['slurm', 'open mpi']
)
def test_processes_of_the_environment(monkeypatch, environment, host):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = hosts.detected()
    assert found.coordinator.split(':')[0] == host
    assert found[1:] == (2, 1, [0])


@pytest.mark.parametrize(
    'environment',
    [
        SLURM | {'SLURM_NTASKS': '1', 'SLURM_PROCID': '0'},
        {'KUBERNETES_SERVICE_HOST': '10.0.0.1'},
        {},
    ],
    ids=['one task', 'a container', 'none'],
)
def test_one_process_of_the_environment(monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert hosts.detected() is None


@pytest.mark.parametrize('processes', [1, 2, 3, 5])
@pytest.mark.parametrize('groups', [1, 4, 7])
def test_every_group_is_in_one_share(monkeypatch, processes, groups):
    monkeypatch.setattr(hosts.arrays, 'count', lambda: processes)
    parts = hosts.shares(groups)
    assert len(parts) == processes
    assert np.concatenate(parts).tolist() == list(range(groups))
    sizes = {len(part) for part in parts}
    assert max(sizes) - min(sizes) <= 1


def test_numbers_are_gathered_as_they_are(monkeypatch):
    """Another process holds the same arrays plus one; 64 bits are kept."""
    tree = {'a': np.array([1, 2**40]), 'b': np.array([[True, False]]), 'c': np.float64(0.1)}
    other = jax.tree.map(lambda x: x, tree) | {'a': np.array([2, 2**41])}

    def gathered(flat):
        theirs = b''.join(np.asarray(x).tobytes() for x in jax.tree.leaves(other))
        rows = [np.frombuffer(np.asarray(1).tobytes() + theirs, np.uint8), flat]
        return np.stack(rows)  # by the order of devices, which is another

    monkeypatch.setattr(hosts.arrays, 'count', lambda: 2)
    monkeypatch.setattr(hosts.arrays, '_wait_for_all', lambda what: None)
    monkeypatch.setattr(hosts.arrays.multihost_utils, 'process_allgather', gathered)
    first, second = hosts.gather(tree, 'a test')
    for found, expected in ((first, tree), (second, other)):
        for name, x in expected.items():
            np.testing.assert_array_equal(found[name], x)
            assert found[name].dtype == x.dtype


def test_steps_of_stages_are_those_of_the_manager(tmp_path):
    folder = tmp_path / 'checkpoints' / 'grpo'
    with ocp.CheckpointManager(folder) as manager:
        for step in (3, 11):
            args = ocp.args.Composite(params=ocp.args.StandardSave({'x': np.zeros(2)}))
            manager.save(step, args=args)
        manager.wait_until_finished()
        (folder / '12.orbax-checkpoint-tmp').mkdir()  # a save that was interrupted
        assert checkpoint.steps_of_stages(tmp_path) == {'grpo': sorted(manager.all_steps())}


# Whole runs


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    """The folder of an unbroken run of one process with four devices."""
    workdir = tmp_path_factory.mktemp('reference')
    runs.train(on_four(), workdir)  # in this process, which has imported everything
    return workdir


def on_four():
    """The config of runs in this process, which has more devices."""
    config = host_runs.get_config()
    config.mesh.fsdp = host_runs.DEVICES
    return config


def assert_same(workdir, reference, *names, stage='grpo', parameters=1e-6, rounding=float):
    """Texts are equal, and so are rewards, up to `rounding`; parameters differ by rounding."""
    for name in ('completions', *names):
        ours, theirs = (host_runs.rows(path / f'{name}.jsonl') for path in (workdir, reference))
        for row, other in zip(ours, theirs, strict=True):
            rounded = [json.loads(json.dumps(x), parse_float=rounding) for x in (row, other)]
            assert rounded[0] == rounded[1]
    assert host_runs.largest_difference(workdir, reference, stage) <= parameters


@pytest.mark.parametrize('processes', tiny.some_slow([1, 2], 2))
def test_a_failed_reward_ends_two_processes_and_their_run_resumes(reference, tmp_path, processes):
    """In one process it is this one, which has compiled the program for the reference."""
    failing = {'HOST_RUNS_FAILURE': 'raise', 'HOST_RUNS_VICTIM': '1'}
    on_all = f'--config.mesh.fsdp={host_runs.DEVICES}'
    results = host_runs.Processes('train', 2, [*command(tmp_path), on_all], failing).wait()
    lines = [err.splitlines()[-1] for _, _, err in results]
    assert [status for status, _, _ in results] == [2, 2], results
    assert lines[0] == lines[1]
    assert lines[0].startswith("error: process 1: reward 'host_runs:unreliable'")
    assert 'no such answer' in lines[0]
    if processes == 2:
        out = host_runs.train(tmp_path, 2, on_all)
    else:
        out = runs.train(on_four(), tmp_path)
    assert 'grpo: resumed at step 2 of 3' in out
    assert_same(tmp_path, reference)


def command(workdir):
    return [f'--config={host_runs.__file__}', f'--workdir={workdir}']


@pytest.mark.slow
def test_four_processes(reference, tmp_path):
    host_runs.train(tmp_path, 4)
    assert_same(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize('failure', ['time-out', 'nonsense'])
@pytest.mark.parametrize('victim', ['0', '1'])
def test_other_failures_of_rewards(tmp_path, failure, victim):
    variables = {'HOST_RUNS_FAILURE': failure, 'HOST_RUNS_VICTIM': victim}
    results = host_runs.Processes('train', 2, command(tmp_path), variables).wait()
    lines = [err.splitlines()[-1] for _, _, err in results]
    assert [status for status, _, _ in results] == [2, 2], results
    assert lines[0] == lines[1]
    assert lines[0].startswith(f"error: process {victim}: reward 'host_runs:unreliable'")
    assert checkpoint.steps_of_stages(tmp_path) == {'grpo': [2]}


@pytest.mark.slow
@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_other_and_the_run_resumes(reference, tmp_path, victim):
    variables = {'HOST_RUNS_FAILURE': 'kill', 'HOST_RUNS_VICTIM': str(victim)}
    changes = '--config.checkpoint.every=1'
    arguments = [*command(tmp_path), changes]
    processes = host_runs.Processes('train', 2, arguments, variables)
    assert processes.started[victim].wait(300) == -signal.SIGKILL
    other = processes.started[1 - victim]
    other.wait(60)
    _, _, err = processes.wait()[1 - victim]
    assert f'error: process {victim} ' in err
    assert 'is gone (killed, or its machine was lost)' in err
    assert 'resumed at step ' in host_runs.train(tmp_path, 2, changes)
    assert_same(tmp_path, reference)


@pytest.mark.slow
@pytest.mark.parametrize(('number', 'process'), [(signal.SIGINT, 0), (signal.SIGTERM, 1)])
def test_a_signal_to_one_process_stops_all_after_a_step(tmp_path, number, process):
    workdir, unbroken, grading = (tmp_path / name for name in ('run', 'unbroken', 'grading'))
    grading.mkdir()
    variables = {'HOST_RUNS_FAILURE': 'slow', 'HOST_RUNS_GRADING': str(grading)}
    steps = '--config.grpo.steps=6'  # all stop one or two steps after the one of the signal
    processes = host_runs.Processes('train', 2, [*command(workdir), steps], variables)
    file = grading / str(process)
    while not file.exists() and all(p.poll() is None for p in processes.started):
        time.sleep(0.1)
    processes.started[process].send_signal(number)
    for status, _, err in processes.wait():
        assert status == 128 + number, err
        assert 'grpo: stopped after step ' in err.splitlines()[-1]
    step = max(checkpoint.steps_of_stages(workdir)['grpo'])
    assert step < 6
    assert f'resumed at step {step} of 6' in host_runs.train(workdir, 2, steps)
    host_runs.train(unbroken, 1, steps)
    assert_same(workdir, unbroken)


@pytest.mark.slow
def test_a_sudden_gradient_stops_two_processes(tmp_path):
    changes = [
        '--config.grpo.algorithm.scale=none', '--config.health.grad_norm=50',
        '--config.health.history=2',
    ]  # fmt: skip
    variables = {'HOST_RUNS_FAILURE': 'huge'}
    results = host_runs.Processes('train', 2, [*command(tmp_path), *changes], variables).wait()
    lines = [[line for line in err.splitlines() if 'error: ' in line] for _, _, err in results]
    assert [status for status, _, _ in results] == [2, 2], results
    assert lines[0] == lines[1]
    assert len(lines[0]) == 1
    assert lines[0][0].startswith('error: grpo step 2: grad_norm=')
    assert [path.name for path in (tmp_path / 'stopped').iterdir()] == ['grpo-2.npz']
    with np.load(tmp_path / 'stopped' / 'grpo-2.npz') as arrays:
        assert arrays['rollout/tokens'].shape[:2] == (8, 4)  # of both processes
    assert checkpoint.steps_of_stages(tmp_path) == {'grpo': [2]}


@pytest.mark.slow
def test_a_second_run_of_two_processes_is_refused(tmp_path):
    grading = tmp_path / 'grading'
    grading.mkdir()
    variables = {'HOST_RUNS_FAILURE': 'slow', 'HOST_RUNS_GRADING': str(grading)}
    first = host_runs.Processes('train', 2, command(tmp_path / 'run'), variables)
    while not list(grading.iterdir()) and all(p.poll() is None for p in first.started):
        time.sleep(0.1)
    results = host_runs.Processes('train', 2, command(tmp_path / 'run')).wait()
    assert [status for status, _, _ in results] == [2, 2], results
    for _, _, err in results:
        assert err.splitlines()[-1].startswith('error: ')
        assert f'is in use: process {first.started[0].pid} on ' in err.splitlines()[-1]
    assert [status for status, _, _ in first.wait()] == [0, 0]
    assert not (tmp_path / 'run' / 'train.lock').exists()


@pytest.mark.slow
def test_a_step_of_two_processes_is_replayed(tmp_path):
    """Bit for bit by two; by one with as many devices, sums of gradients are rounded otherwise."""
    host_runs.train(tmp_path / 'run', 2)
    arguments = (f'--workdir={tmp_path / "run"}', '--step=2', f'--output={tmp_path / "out"}')
    equal = 'equal to the run, bit for bit: 32 completions and their rewards'
    out = host_runs.run('replay', 2, *arguments)
    assert 'grpo: replays the steps 2 to 2' in out
    assert f'{equal}, ' in out
    assert 'DIFFERENT' not in out
    assert (tmp_path / 'out' / 'page.html').is_file()
    ((status, out, _),) = host_runs.Processes('replay', 1, arguments).wait()
    assert status == 1
    assert equal in out
    assert 'Likely because processes was 2 and is 1 here' in out


@pytest.mark.slow
@pytest.mark.parametrize('processes', [1, 4])
def test_a_run_resumes_with_another_number_of_processes(reference, tmp_path, processes):
    variables = {'HOST_RUNS_FAILURE': 'raise', 'HOST_RUNS_VICTIM': '0'}
    host_runs.Processes('train', 2, command(tmp_path), variables).wait()
    assert 'resumed at step 2' in host_runs.train(tmp_path, processes)
    assert_same(tmp_path, reference)


VARIANTS = {
    'sft': (
        '--config.sft.steps=3', '--config.sft.optimizer.eps=0.01',
        '--config.sft.optimizer.warmup_steps=1', '--config.data.heldout_split=test',
        '--config.grpo.steps=1',
    ),
    'refill': ('--config.grpo.refill=2', '--config.grpo.rewards.host_runs:third=0.0'),
    'ppo': (
        '--config.grpo.algorithm.baseline=critic', '--config.grpo.algorithm.scale=none',
        '--config.critic.optimizer.eps=0.01',
    ),
    'lora': ('--config.model.lora.rank=4', '--config.grpo.algorithm.beta=0.04'),
    'dpo': (
        '--config.grpo.algorithm.loss=dpo', '--config.grpo.algorithm.scale=none',
        '--config.grpo.algorithm.kl=none',
    ),
    'rft': (
        '--config.grpo.algorithm.loss=nll', "--config.grpo.drop=('wrong','duplicates')",
    ),
    'environment': (
        '--config.environment.name=episode_tools:echo', '--config.environment.turns=3',
        '--config.environment.reply_tokens=6', "--config.environment.template='{reply}'",
        '--config.data.completion_length=24', '--config.sft.steps=6',
        '--config.sft.optimizer.eps=0.01',
        "--config.grpo.rewards={'episode_tools:seen':1.0,'host_runs:third':0.5}",
    ),
    'reward_model': (
        '--config.reward_model.weight=1.0', '--config.reward_model.steps=2',
        '--config.reward_model.batch_size=4', '--config.reward_model.group_size=4',
        '--config.reward_model.optimizer.eps=0.01',
    ),
    'sampling mesh': ('--config.mesh.sampling_tensor=2', '--config.grpo.refill=2'),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('changes', VARIANTS.values(), ids=VARIANTS)
def test_methods(tmp_path, changes):
    for processes in (1, 2):
        host_runs.train(tmp_path / str(processes), processes, *changes)
    # The scores of a reward model depend on its parameters.
    rounding = (lambda x: round(float(x), 4)) if 'reward_model' in str(changes) else float
    assert_same(tmp_path / '2', tmp_path / '1', rounding=rounding)


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'base'), [('qwen2', 'int8'), ('mixtral', 'nf4')])
def test_a_checkpoint_is_quantized_by_two_processes(tmp_path, family, base):
    """One tensor after the other, onto devices of both; adapters are then trained over it."""
    checkpoints = pytest.importorskip('checkpoints')
    sizes = checkpoints.make_config(family, vocab_size=258, eos_token_id=257, bos_token_id=None)
    folder = checkpoints.save(checkpoints.make_torch(sizes), tmp_path / 'pretrained')
    plain = {
        'width': 128, 'layers': 4, 'head_dim': 32, 'mlp_width': 512, 'qk_norm': '',
        'lora.rank': 2, 'lora.base': base,
    }  # fmt: skip
    changes = [f'--config.model.{key}={value}' for key, value in plain.items()]
    if family == 'mixtral':
        changes.append("--config.model.lora.targets=('q_proj','o_proj')")
    for processes in (1, 2):
        host_runs.train(
            tmp_path / str(processes), processes, *changes,
            f'--config.pretrained={folder}', '--config.tokenizer=bytes', '--config.mesh.tensor=2',
            '--config.grpo.steps=2',
        )  # fmt: skip
    assert_same(tmp_path / '2', tmp_path / '1')


@pytest.mark.slow
def test_evaluation_and_export(reference, tmp_path):
    """pass@k, maj@k and avg@k of two processes, and the files that they export."""
    options = (
        '--config.data.heldout_split=test', '--config.eval.samples=4', '--config.eval.k=(1,4)',
    )  # fmt: skip
    printed, tensors = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        workdir = f'--workdir={reference}'
        answers = f'--output={folder / "answers.jsonl"}'
        out = host_runs.run('evaluate', processes, workdir, answers, *options)
        printed.append(json.loads(out.splitlines()[-1]))  # after lines of the CPU's collectives
        host_runs.run('export', processes, workdir, f'--output={folder / "model"}')
        tensors.append((folder / 'model' / 'model.safetensors').read_bytes())
    assert printed[0] == printed[1]
    assert {'eval/pass@4', 'eval/maj@4', 'eval/avg@4'} <= printed[0].keys()
    assert tensors[0] == tensors[1]
    ours, theirs = (host_runs.rows(tmp_path / n / 'answers.jsonl') for n in '12')
    assert ours == theirs
