"""Kills tiny runs at random moments, starts them again until they end, and compares the results.

    python tests/kill_runs.py --folder=FOLDER [--kinds=grpo,ppo] [--kills=20] [--seed=0]

One process imports all that a run needs, and forks another for each start, so that a kill costs a
few seconds. Prints how many kills fell into which part of a run, and what differs from an unbroken
run, of which nothing may: parameters and moments, metrics without times, completions, held-out
answers, and the points of the curves. Ends with status 1 if anything does.
"""

import argparse
import atexit
import collections
import contextlib
import json
import os
import pathlib
import re
import select
import signal
import socket
import string
import struct
import subprocess
import sys
import time
import traceback
import zlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
if __name__ == '__main__':
    sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]
    os.environ.setdefault('JAX_PLATFORMS', 'cpu')
    os.environ['JAX_NUM_CPU_DEVICES'] = '1'  # of each process
    os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = '1'
    os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
    os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

import numpy as np  # noqa: E402

from configs import smoke  # noqa: E402
from grpo_jax import train  # noqa: E402
from grpo_jax.run import (  # noqa: E402
    checkpoint,
    checksums,
    evaluation,
    hosts,
    json_lines,
    methods,
    stage_loop,
)
from grpo_jax.run.command import one_line_errors  # noqa: E402

TIMES = re.compile('timing/|step_time$|perf/')
ROUNDED = re.compile('timing/|step_time$|perf/|sampling/')
WEIGHTS = {'step': 0.4, 'save': 0.35, 'evaluation': 0.15, 'record': 0.1}  # of kills in parts
CLASSES = tuple(WEIGHTS)


# The runs


def get_config(preset='grpo', **grpo):
    config = smoke.get_config()
    config.model.update(width=16, layers=1, heads=2, kv_heads=1, mlp_width=16, qk_norm='')
    config.model.remat = False
    config.sft.update(steps=0, batch_size=4, microbatch=4)
    config.sft.optimizer.warmup_steps = 1
    config.grpo.algorithm.update(inner_updates=1, entropy=False)
    config.grpo.rewards = {'kill_runs:lucky': 1.0}
    config.grpo.optimizer.update(learning_rate=1e-2)
    config.eval.update(every=2, batch_size=4, samples=0, correct='kill_runs:lucky')
    methods.apply(config, preset)
    config.grpo.update(steps=6, batch_size=2, group_size=4, **grpo)
    config.checkpoint.update(every=2)
    config.log.completions = 8
    return config


def lucky(prompts, completions, **columns):
    pairs = zip(prompts, completions, strict=True)
    return [float(zlib.crc32((prompt + text).encode()) % 2) for prompt, text in pairs]


def third_steps(prompts, completions, **columns):
    return [
        [
            (min(start + 3, len(text)), float(zlib.crc32(text[: start + 3].encode()) % 2))
            for start in range(0, len(text), 3)
        ]
        for text in completions
    ]


def sft():
    config = get_config()
    config.sft.steps, config.grpo.steps = 6, 0
    return config


def both():
    config = get_config()
    config.sft.steps, config.grpo.steps = 4, 4
    return config


def ahead(**grpo):
    config = get_config('tis', **grpo)
    return config


def moving():
    config = get_config()
    config.grpo.algorithm.reference_decay = 0.5
    return config


def trpo():
    config = get_config('trpo')
    config.grpo.algorithm.cg_steps = 2
    return config


def process():
    config = get_config('grpo_process')
    config.grpo.step_rewards = {'kill_runs:third_steps': 0.5}
    config.grpo.rewards = {}
    return config


def iterative():
    config = get_config()
    config.grpo.update(steps=3, iterations=2, rewards={})
    config.reward_model.update(weight=2.0, steps=3, batch_size=2, group_size=4, microbatch=2)
    config.reward_model.update(replay=0.5)
    return config


def lora():
    config = both()
    config.model.lora.update(rank=2, targets=('q_proj', 'o_proj'))
    return config


def tool():
    config = get_config()
    config.data.completion_length = 24
    config.data.stops = tuple(string.ascii_letters)  # which end a turn
    config.environment.update(name='kill_runs:often', turns=3, reply_tokens=4, template='{reply}')
    return config


def often(prompts, completions, turns, **columns):
    """A tool that takes its time."""
    time.sleep(0.02)
    numbers = [zlib.crc32(text.encode()) for text in completions]
    return [f'{number % 100}=' if number % 3 else None for number in numbers]


KINDS = {
    'sft': sft,
    'grpo': get_config,
    'both': both,
    'refill': lambda: get_config(refill=2),
    'ahead': lambda: ahead(ahead=True),
    'int8': lambda: ahead(weights='int8'),
    'moving': moving,
    'ppo': lambda: get_config('ppo'),
    'dpo': lambda: get_config('dpo', refill=1),
    'trpo': trpo,
    'process': process,
    'iterative': iterative,
    'lora': lora,
    'tool': tool,
    'two': get_config,  # in two processes
}


# A process that trains, and says where it is


class Watched:
    """Writes a line into a pipe when a part of the run begins and when it ends.

    Args:
      pipe: to write to.
      torn: the number of the text written to a file in the middle of which the process ends; 0:
        none.
    """

    def __init__(self, pipe, torn):
        self.pipe, self.torn, self.texts = pipe, torn, 0
        self.wrap(stage_loop.StageLoop, '_step', 'step')
        self.wrap(evaluation, 'evaluate', 'evaluation')
        self.begin_at(checkpoint, 'save', 'save')
        self.end_at(checksums, '_write_last', 'save')
        write = json_lines.Appender.write

        def torn_write(file, text):
            self.texts += 1
            if self.texts == self.torn:
                self.say('b record')
                write(file, text[: len(text) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            write(file, text)

        json_lines.Appender.write = torn_write

    def say(self, text):
        os.write(self.pipe, f'{text}\n'.encode())

    def wrap(self, owner, name, part):
        self.begin_at(owner, name, part)
        self.end_at(owner, name, part)

    def begin_at(self, owner, name, part):
        function = getattr(owner, name)

        def begun(*arguments, **options):
            self.say(f'b {part}')
            return function(*arguments, **options)

        setattr(owner, name, begun)

    def end_at(self, owner, name, part):
        function = getattr(owner, name)

        def ended(*arguments, **options):
            result = function(*arguments, **options)
            self.say(f'e {part}')
            return result

        setattr(owner, name, ended)


def fork(function, output):
    """The id of a new process that calls a function; what it prints is appended to a file."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        function()
        status = 0
    except SystemExit as stopped:
        status = stopped.code
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def start(kind, workdir, torn=0):
    """Starts a run: the ids of its processes, and the pipe of the first."""
    reading, writing = os.pipe()
    with socket.create_server(('127.0.0.1', 0)) as server:
        address = f'127.0.0.1:{server.getsockname()[1]}'
    count = 2 if kind == 'two' else 1

    def run(number):
        if number == 0:
            Watched(writing, torn)
        with hosts.stopped_by_signal(), one_line_errors(), hosts.ending_together():
            if count > 1:
                hosts.start(hosts.Start(address, count, number))
            config = KINDS[kind]()
            config.mesh.fsdp = count
            config.data.cache_dir = str(workdir.parent / 'data')
            train.train(config, str(workdir))

    output = workdir.with_suffix('.txt')
    processes = [fork(lambda number=number: run(number), output) for number in range(count)]
    os.close(writing)
    return processes, reading


def lines_of(pipe):
    """Yields the lines of a pipe as they come, until its end."""
    text = b''
    while data := os.read(pipe, 65536):
        *lines, text = (text + data).split(b'\n')
        yield from (line.decode() for line in lines)


def wait(processes, seconds=300):
    """The exit statuses of processes; those that do not end are killed."""
    deadline, statuses = time.monotonic() + seconds, []
    for process in processes:
        while (found := os.waitpid(process, os.WNOHANG)) == (0, 0):
            time.sleep(0.02)
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGKILL)
        statuses.append(os.waitstatus_to_exitcode(found[1]))
    return statuses


def attempt(kind, workdir, plan=None):
    """Starts a run and kills it as planned.

    Args:
      kind: of the run.
      workdir: its folder.
      plan: (part, number, delay in seconds, process); None: it is not killed.

    Returns:
      The part in which it was killed, 'other' if it was in none, or '' if it has ended before.
    """
    part, number, delay, victim = plan or ('', 0, 0, 0)
    processes, pipe = start(kind, workdir, torn=number if part == 'record' else 0)
    victim = processes[victim % len(processes)]
    open_parts, seen, killed = collections.Counter(), 0, False

    def follow(line):
        nonlocal seen
        what, name = line.split()
        open_parts[name] += 1 if what == 'b' else -1
        seen += what == 'b' and name == part

    lines = lines_of(pipe)
    for line in lines:
        follow(line)
        if part not in ('', 'record') and seen == number and not killed:
            killed = True
            deadline = time.monotonic() + delay
            while (left := deadline - time.monotonic()) > 0:
                select.select([], [], [], left)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
    os.close(pipe)
    statuses = wait(processes)
    if set(statuses) == {0}:
        return ''
    if -signal.SIGKILL not in statuses:
        raise RuntimeError(f'{kind}: {statuses}:\n{workdir.with_suffix(".txt").read_text()}')
    if part == 'step' and open_parts['evaluation']:
        return 'evaluation'
    return part if open_parts[part] > 0 else 'other'


# What a run leaves


def left_out(workdir):
    """A pattern of what may differ: times, and rounding that depends on them.

    The last bits of the sampler's log-probs depend on when the replies of a tool come.
    """
    return ROUNDED if (workdir / 'replies').is_dir() else TIMES


def records(workdir):
    """The rows of all records without times, by file."""
    ignored = left_out(workdir)
    return {
        name: [
            {k: v for k, v in line.row.items() if not ignored.match(k)}
            for line in json_lines.read(workdir / f'{name}.jsonl')
        ]
        for name in ('metrics', 'completions', 'heldout')
    }


def points(workdir):
    """All points of the curves, as the files hold them, sorted; without times."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted((workdir / 'tensorboard').rglob('events.out.tfevents.*')):
        data, begin = path.read_bytes(), 0
        while begin < len(data):
            (length,) = struct.unpack_from('<Q', data, begin)
            event = Event.FromString(data[begin + 12 : begin + 12 + length])
            begin += 16 + length
            found += [
                (path.parent.name, event.step, value.tag, value.simple_value)
                for value in event.summary.value
                if not left_out(workdir).match(value.tag)
            ]
    return sorted(found, key=str)


def states(workdir):
    """The bytes of all arrays of the newest checkpoint of each stage, by name."""
    import jax
    import orbax.checkpoint as ocp

    found = {}
    for stage, steps in checkpoint.steps_of_stages(workdir).items():
        folder = workdir / 'checkpoints' / stage / str(steps[-1])
        for item in ('params', 'rest'):
            handler = ocp.PyTreeCheckpointHandler()
            shapes = handler.metadata(folder / item).tree
            options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
            tree = handler.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=options))
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                name = f'{stage}/{steps[-1]}/{item}{jax.tree_util.keystr(path)}'
                found[name] = np.asarray(leaf).tobytes()
    return found


def differences(workdir, unbroken):
    """Names of what differs between two runs."""
    ours, theirs = ({**records(w), 'points': points(w), **states(w)} for w in (workdir, unbroken))
    names = sorted({*ours, *theirs})
    return [name for name in names if ours.get(name) != theirs.get(name)]


def compare(workdir, unbroken):
    """`differences` in a process of its own, for this one must not start a device."""
    reading, writing = os.pipe()
    output = workdir.with_suffix('.txt')
    process = fork(
        lambda: os.write(writing, json.dumps(differences(workdir, unbroken)).encode()), output
    )
    os.close(writing)
    text = ''.join(lines_of_all(reading))
    os.close(reading)
    if wait([process]) != [0]:
        return [f'not comparable: {output.read_text()[-2000:]}']
    return json.loads(text)


def lines_of_all(pipe):
    while data := os.read(pipe, 65536):
        yield data.decode()


def prepare(folder):
    """Imports what runs import late, and keeps what they prepare and compile in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    import jax
    import matplotlib.pyplot  # noqa: F401
    import tensorboardX.event_file_writer  # noqa: F401

    from grpo_jax import data
    from grpo_jax.data import datasets  # noqa: F401

    data.byte_tokenizer()
    options = get_config().data.options

    def load():  # starts threads, after which a process cannot be forked
        data.load('arithmetic', 'test', cache_dir=folder / 'data', **options)

    assert wait([fork(load, folder / 'data.txt')]) == [0]
    if not os.environ.get('JAX_COMPILATION_CACHE_DIR'):
        jax.config.update('jax_compilation_cache_dir', str(folder / 'programs'))


@contextlib.contextmanager
def small_disk(folder, kilobytes):
    """A disk of that size in a folder; yields a function that gives it another size."""
    folder.mkdir(exist_ok=True)
    subprocess.run(['mount', '-t', 'tmpfs', 'tmpfs', str(folder)], check=True)

    def resize(kilobytes):
        options = f'remount,size={kilobytes}k'
        subprocess.run(['mount', '-o', options, str(folder)], check=True)

    try:
        resize(kilobytes)
        yield resize
    finally:
        subprocess.run(['umount', '-l', str(folder)], check=True)


def start_on(disk, kind):
    """Starts a run on a disk: its exit status, and what it prints beside its progress."""
    output = disk.with_suffix('.txt')
    output.unlink(missing_ok=True)
    processes, pipe = start(kind, disk)
    for _ in lines_of(pipe):
        pass
    os.close(pipe)
    status = wait(processes)[0]
    lines = re.split('[\r\n]+', output.read_text())
    return status, [
        line for line in lines if not re.match(r'((sft|reward|grpo)(-\d+)?: |\s*$)', line)
    ]


def check_full(disk, status, lines):
    """What is wrong with the end of a run on a full disk; empty if nothing is."""
    if status != 2 or len(lines) != 1:
        return f'status {status}: {lines}'
    named = re.fullmatch(
        r'error: (/.*) cannot be written \(No space left on .*make room.*', lines[0]
    )
    return '' if named and named[1].startswith(f'{disk}/') else lines[0]


def full_disk(folder, kind):
    """Starts runs on disks that are full, and again when there is room.

    Of each size once on an empty disk, which is made large then, and once on one disk that has
    grown up to that size, until runs end.

    Returns:
      {kilobytes: problems}.
    """
    unbroken, disk = folder / f'{kind}-unbroken', folder / f'{kind}-disk'
    attempt(kind, unbroken)
    found, kilobytes, status = {}, 4, 1
    with small_disk(folder / f'{kind}-growing', kilobytes) as grow:
        while status:
            problems = []
            with small_disk(disk, kilobytes) as resize:
                status, lines = start_on(disk, kind)
                if status:
                    problems.append(check_full(disk, status, lines))
                    say(f'{kind} {kilobytes} KiB: {lines}')
                resize(1 << 20)
                again = start_on(disk, kind)
                if again[0]:
                    problems.append(f'with room: {again}')
                problems += compare(disk, unbroken)
            grow(kilobytes)
            growing = folder / f'{kind}-growing'
            status, lines = start_on(growing, kind)
            if status:
                problems.append(check_full(growing, status, lines))
            found[kilobytes] = [problem for problem in problems if problem]
            kilobytes += max(4, kilobytes // 5)
        found[kilobytes] = compare(growing, unbroken)
    return found


def say(text):
    print(text, file=sys.stderr, flush=True)


def main(folder, kinds, kills, seed, parts=CLASSES):
    """Runs all kinds; returns {kind: [{part in which it was killed: kills}, differences]}."""
    results = {}
    prepare(folder)
    for kind in kinds:
        rng = np.random.default_rng([seed, zlib.crc32(kind.encode())])
        unbroken = folder / f'{kind}-unbroken'
        if attempt(kind, unbroken):
            raise RuntimeError(f'{kind}: killed without a plan')
        counts, different, number = collections.Counter(), [], 0
        while True:
            number += 1
            workdir = folder / f'{kind}-{number}'
            while True:
                weights = np.array([WEIGHTS[part] for part in parts])
                part = parts[rng.choice(len(parts), p=weights / weights.sum())]
                most = {'step': 4, 'save': 2, 'evaluation': 2, 'record': 12}[part]
                span = {'step': 0.06, 'save': 0.25, 'evaluation': 0.04, 'record': 0}[part]
                plan = part, int(rng.integers(1, most + 1)), rng.uniform(0, span), rng.integers(2)
                before = time.monotonic()
                where = attempt(kind, workdir, plan if counts.total() < kills else None)
                if not where:
                    break
                counts[where] += 1
                seconds = time.monotonic() - before
                planned = f'{part} {plan[1]} +{plan[2]:.3f} s'
                say(f'{kind}-{number}: killed in {where} ({planned}) after {seconds:.1f} s')
            found = compare(workdir, unbroken)
            say(f'{kind}-{number}: ended, ' + (f'differs: {found}' if found else 'equal'))
            different += found
            if counts.total() >= kills:
                break
        results[kind] = [dict(counts), different]
    return results


if __name__ == '__main__':
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument('--folder', type=pathlib.Path, required=True)
    parser.add_argument('--kinds', default=','.join(KINDS))
    parser.add_argument('--kills', type=int, default=10, help='of each kind')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--parts', default=','.join(CLASSES), help='in which they are killed')
    parser.add_argument('--full', action='store_true', help='runs on a full disk; needs root')
    options = parser.parse_args()
    # Rewards are named by the path of this module.
    sys.modules['kill_runs'] = sys.modules['__main__']
    folder, kinds = options.folder.resolve(), options.kinds.split(',')
    if options.full:
        prepare(folder)
        found = {kind: full_disk(folder, kind) for kind in kinds}
        print(json.dumps(found))
        sys.exit(any(problems for sizes in found.values() for problems in sizes.values()))
    found = main(folder, kinds, options.kills, options.seed, options.parts.split(','))
    print(json.dumps(found))
    total = collections.Counter()
    for counts, _ in found.values():
        total.update(counts)
    print(json.dumps(total))
    sys.exit(1 if any(different for _, different in found.values()) else 0)
