"""Malformed inputs for every reader of the package, each of which has to end in one clear error.

    python benchmarks/fuzz.py [--count=20000] [--seed=0] [--kind=NAME]

Valid inputs are mutated: values of JSON are replaced, removed, nested and added, bytes of files are
cut, changed and inserted. Each reader is called in this process with a deadline. What comes out is

    accepted    a value of the right types
    error       one ValueError or OSError
    traceback   any other exception, or a message of many lines or characters
    hang        no answer within the deadline
    silent      accepted, although it has a wrong type

Exits with 1 if there is any of the last three.
"""

import argparse
import collections
import copy
import functools
import json
import logging
import math
import pathlib
import random
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

SECONDS = 5.0  # for one input, and ten times that in a second try
LONGEST = 20_000  # characters of an error


class Reader(NamedTuple):
    """A format: `make` draws an input, and `read` reads it and raises Silent if it should not."""

    make: Callable[[random.Random], Any]
    read: Callable[[Any], None]
    share: float  # of all inputs


class Silent(Exception):
    """A wrong value was accepted."""


def wild(rng: random.Random, depth: int = 0) -> Any:
    """A value that is probably wrong."""
    values: list[Any] = [
        None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, -(2**63), 10**30, 10**400, 0.5, -0.5, 1e30,
        1e308, math.nan, math.inf, -math.inf, '', ' ', 'x', '0', '-1', '1e30', 'nan', 'None', '\0',
        '\ud800', '\u2028', '../x', '/etc/passwd', 'a' * 5000, '{question', '{0}', '{a.b}', [], {},
        [[]], [None], ['x'], [1, 2], {'x': 1}, {'': None}, {'weight': 1.0}, 'math_answer', 'bytes',
    ]  # fmt: skip
    if depth < 3 and rng.random() < 0.1:
        return [wild(rng, depth + 1) for _ in range(rng.randrange(4))]
    if depth < 3 and rng.random() < 0.1:
        return {str(wild(rng, 3))[:20]: wild(rng, depth + 1) for _ in range(rng.randrange(4))}
    return rng.choice(values)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values inside a JSON value."""
    items: Any = value.items() if isinstance(value, dict) else ()
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield (*path, key)
        yield from places(item, (*path, key))


def mutated(rng: random.Random, value: Any) -> Any:
    """A JSON value with one to three changes."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        found = list(places(value))
        if not found or rng.random() < 0.01:
            return wild(rng)
        *parents, last = rng.choice(found)
        inside = value
        for key in parents:
            inside = inside[key]
        action = rng.randrange(10)
        if action == 0:
            del inside[last]
        elif action == 1 and isinstance(inside, dict):
            inside[str(wild(rng))[:40]] = wild(rng)
        elif action == 2:
            inside[last] = [inside[last]]
        elif action == 3:
            inside[last] = str(inside[last])
        else:
            inside[last] = wild(rng)
    return value


def text_of(rng: random.Random, value: Any) -> bytes:
    """JSON of a mutated value, sometimes with damaged bytes."""
    if rng.random() < 0.02:
        return rng.choice(
            [b'[' * 100_000, b'', b'\xff\xfe', b'null', b'NaN', b'\0', b'{"a":' * 9999]
        )
    try:
        text = json.dumps(mutated(rng, value)).encode()
    except ValueError:  # an integer of more than 4300 digits
        return b'{"a": ' + b'9' * 5000 + b'}'
    return damaged(rng, text) if rng.random() < 0.15 else text


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Bytes that are cut, changed or inserted."""
    at = rng.randrange(len(content) + 1)
    noise = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
    return rng.choice([
        content[:at], content[at:], content[:at] + noise + content[at + len(noise) :],
        content[:at] + noise + content[at:],
    ])  # fmt: skip


def run(readers: dict[str, Reader], count: int, seed: int, kind: str = '') -> dict[str, Any]:
    """Read `count` inputs; return the numbers by kind, and the faults by their places."""
    from grpo_jax.rewards.deadlines import DeadlineExceeded, call_within

    numbers: dict[str, collections.Counter[str]] = {name: collections.Counter() for name in readers}
    faults: dict[tuple[str, str, str], list[Any]] = {}
    for name, reader in readers.items():
        if kind not in ('', name):
            continue
        rng = random.Random(f'{seed} {name}')
        for _ in range(round(count * reader.share)):
            made, place = reader.make(rng), ''
            read = functools.partial(reader.read, made)
            try:
                try:
                    call_within(SECONDS, name, read)
                except DeadlineExceeded:  # once more, if other programs have used the processor
                    call_within(10 * SECONDS, name, read)
                outcome = 'accepted'
            except (ValueError, OSError) as error:
                clear = type(error).__name__ != 'TypeCheckError' and len(str(error)) < LONGEST
                outcome, place = ('error', '') if clear else ('traceback', 'a long message')
            except Silent as error:
                outcome, place = 'silent', str(error)[:80]
            except DeadlineExceeded as error:
                outcome, place = 'hang', place_of(error)
            except BaseException as error:
                outcome = 'traceback'
                place = f'{type(error).__name__} {place_of(error)}: {str(error)[:60]!r}'
            numbers[name][outcome] += 1
            if place:
                faults.setdefault((name, outcome, place), []).append(made)
    return {'numbers': numbers, 'faults': faults}


def place_of(error: BaseException) -> str:
    """The last line of this package that an exception passed."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if 'grpo_jax' in f.filename and 'deadlines' not in f.filename]
    return f'{pathlib.Path(ours[-1].filename).name}:{ours[-1].lineno}' if ours else '?'


def readers_of(folder: pathlib.Path) -> dict[str, Reader]:
    """All formats; `folder` is where their files are written."""
    from transformers import CONFIG_MAPPING, AutoTokenizer  # noqa: F401  slow to import

    from grpo_jax.data.datasets.records import read_records
    from grpo_jax.data.datasets.registry import resolve
    from grpo_jax.data.tokenizers import byte_tokenizer, load_tokenizer
    from grpo_jax.models import ModelConfig, hf
    from grpo_jax.models.hf.families import FAMILIES
    from grpo_jax.models.hf.folder import list_tensors
    from grpo_jax.run import (
        arguments,
        completions,
        compute_plans,
        environment,
        inputs,
        loggers,
        saved_config,
    )  # fmt: skip
    from grpo_jax.run.config import flatten
    from grpo_jax.run.config_checks import check_keys, check_values
    from grpo_jax.run.defaults import defaults
    from grpo_jax.run.errors import ConfigError
    from grpo_jax.run.plan import listed

    folder.mkdir(parents=True, exist_ok=True)

    def safetensors_header(rng: random.Random) -> bytes:
        header = {
            '__metadata__': {'format': 'pt'},
            'a': {'dtype': 'F32', 'shape': [2, 3], 'data_offsets': [0, 24]},
            'b': {'dtype': 'BF16', 'shape': [4], 'data_offsets': [24, 32]},
            'c': {'dtype': 'I64', 'shape': [], 'data_offsets': [32, 40]},
        }
        text = text_of(rng, header)
        content = len(text).to_bytes(8, 'little') + text + bytes(40)
        return damaged(rng, content) if rng.random() < 0.1 else content

    def read_safetensors(content: bytes) -> None:
        from safetensors import SafetensorError, safe_open

        (folder / 'model.safetensors').write_bytes(content)
        list_tensors(folder)
        try:
            with safe_open(folder / 'model.safetensors', 'numpy'):
                pass
        except SafetensorError as error:
            raise Silent(f'safetensors refuses it: {error}') from error

    families = sorted(FAMILIES)
    computed = {'dtype': 'float32', 'param_dtype': 'float32', 'attention': 'auto', 'remat': False}
    small = {
        'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'vocab_size': 99,
        'num_key_value_heads': 2, 'intermediate_size': 64, 'rms_norm_eps': 1e-6, 'head_dim': 8,
        'rope_theta': 10000.0, 'tie_word_embeddings': False, 'max_position_embeddings': 512,
        'hidden_act': 'silu', 'eos_token_id': [1, 2], 'torch_dtype': 'bfloat16',
        'rope_scaling': {'rope_type': 'yarn', 'factor': 4.0,
                         'original_max_position_embeddings': 128},
        'sliding_window': 64, 'layer_types': ['full_attention', 'sliding_attention'],
    }  # fmt: skip

    def hf_config(rng: random.Random) -> bytes:
        kind = rng.choice(families)
        fields = small | {'model_type': kind, 'architectures': [FAMILIES[kind].architecture]}
        if rng.random() < 0.7:
            del fields['rope_scaling']
        return text_of(rng, fields)

    def read_hf_config(content: bytes) -> None:
        (folder / 'config.json').write_bytes(content)
        made = hf.model_config(hf.read_config(folder), **computed)
        for name, field in ModelConfig.__dataclass_fields__.items():
            value, kind = getattr(made, name), type(field.default)
            if kind is int and not (type(value) is int and value >= 0):
                raise Silent(f'{name}={value!r}')
            if kind is float and not (type(value) in (int, float) and math.isfinite(value)):
                raise Silent(f'{name}={value!r}')
            if kind is bool and type(value) is not bool:
                raise Silent(f'{name}={value!r}')

    tokenizer_folder = folder / 'tokenizer'
    byte_tokenizer().save_pretrained(tokenizer_folder)
    tokenizer_files = {
        name: json.loads((tokenizer_folder / name).read_text())
        for name in ('tokenizer.json', 'tokenizer_config.json')
    }
    tokenizer_files['tokenizer_config.json']['add_bos_token'] = False

    def tokenizer(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(['tokenizer.json', 'tokenizer_config.json', 'tokenizer_config.json'])
        return name, text_of(rng, tokenizer_files[name])

    def read_tokenizer(made: tuple[str, bytes]) -> None:
        for name, value in tokenizer_files.items():
            content = made[1] if name == made[0] else json.dumps(value).encode()
            (tokenizer_folder / name).write_bytes(content)
        loaded = load_tokenizer(str(tokenizer_folder))
        if type(loaded.eos_token_id) is not int:
            raise Silent(f'eos_token_id={loaded.eos_token_id!r}')

    rows = [{'question': 'a?', 'answer': 1, 'nums': [1, 2], 'note': None, 'more': {'a': 0.5}}] * 2

    def row_lines(rng: random.Random) -> bytes:
        return b'\n'.join(text_of(rng, row) for row in rows)

    def read_rows(content: bytes) -> None:
        (folder / 'train.jsonl').write_bytes(content)
        for _, row in read_records(folder / 'train.jsonl'):
            if not all(isinstance(column, str) for column in row):
                raise Silent(str(row))

    def data_options(rng: random.Random) -> tuple[str, Any]:
        if rng.random() < 0.5:
            (folder / 'train.jsonl').write_text('\n'.join(map(json.dumps, rows)))
            located = {
                'folder': str(folder), 'file': '{split}.jsonl', 'columns': {'a': 'question'},
                'required': ['answer'], 'heldout': 0.5,
            }  # fmt: skip
            return 'jsonl', mutated(rng, located)
        name = rng.choice(['arithmetic', 'countdown'])
        common: dict[str, Any] = {
            'train_size': 5, 'test_size': 5, 'seed': 1, 'max_numbers': 4, 'min_numbers': 3,
        }  # fmt: skip
        own: dict[str, dict[str, Any]] = {
            'arithmetic': {'operations': '+-', 'mistakes': 0.5, 'max_digits': 2},
            'countdown': {'max_number': 99, 'max_target': 100},
        }
        return name, mutated(rng, common | own[name])

    def read_options(made: tuple[str, Any]) -> None:
        name, options = made
        if not isinstance(options, dict):
            return
        builder, config, _ = resolve(name, 'train', options)
        if name != 'jsonl' and max(config.train_size, config.test_size) > 10**7:
            raise Silent(f'{config.description}')
        if name != 'jsonl' and max(config.train_size, config.test_size) < 100:
            problems = builder._problems(collections.namedtuple('B', 'builder_config')(config))
            next(iter(problems), None)

    saved = json.loads(saved_config.to_json(defaults()))

    def read_saved(content: bytes) -> None:
        (folder / 'saved.json').write_bytes(content)
        config = saved_config.read(folder / 'saved.json', quiet=True)
        check_values(config)
        check_types(config)

    default_types = {path: type(value) for path, value in flatten(defaults()).items()}

    def check_types(config: Any) -> None:
        for path, value in flatten(config).items():
            kind = default_types.get(path)
            if kind in (bool, int, float, str, tuple) and type(value) is not kind:
                raise Silent(f'{path}={value!r:.30}')

    keys = sorted(flatten(defaults()))
    sections = sorted({key.rpartition('.')[0] for key in keys if '.' in key})

    def overrides(rng: random.Random) -> list[str]:
        made = []
        for _ in range(rng.randrange(1, 4)):
            value = wild(rng)
            writers: list[Callable[[Any], str]] = [repr, str, json_of]
            write = rng.choice(writers)
            text = value if isinstance(value, str) else write(value)
            made.append(f'--config.{rng.choice(keys)}={text}')
        return made

    def json_of(value: Any) -> str:
        try:
            return json.dumps(value)
        except ValueError:
            return 'x'

    def read_overrides(made: list[str]) -> None:
        config = defaults()
        for argument in made:
            arguments._change_by(config, argument)
        check_values(config)
        check_types(config)

    graded = {'answer': '18', 'completions': ['18', 'x'], 'scores': [0.5, 1.0]}

    def completion_lines(rng: random.Random) -> bytes:
        return b'\n'.join(text_of(rng, graded) for _ in range(2))

    def read_completions(content: bytes) -> None:
        (folder / 'completions.jsonl').write_bytes(content)
        for row in completions.read(folder / 'completions.jsonl'):
            if not all(isinstance(text, str) for text in [row.answer, *row.completions]):
                raise Silent(str(row))
            if not all(math.isfinite(score) for score in row.scores or ()):
                raise Silent(str(row))

    plan = {
        'microbatch': 2, 'rows': 0, 'packed': False, 'widths': 4, 'unroll': False,
        'logprob_chunk': 4, 'remat': True,
    }  # fmt: skip
    kept_files: dict[str, Any] = {
        'compute.json': {'sft': {'plan': plan, 'needed': None},
                         'grpo': {'plan': plan, 'needed': 1e9}},
        'environment.json': {'jax': '0.10.2', 'devices': '1 cpu', 'processes': '1'},
        'inputs.json': {'digests': {'tokens': '12ab'}, 'rows': {'tokens': 'AAAA'}},
        'loggers.json': {'fuzz:log': 'id'},
        'plan.json': {'listed': {'12ab': 'the update'}},
    }  # fmt: skip
    run_folder = folder / 'run'
    run_folder.mkdir()

    def kept_file(rng: random.Random) -> tuple[str, bytes]:
        name = rng.choice(sorted(kept_files))
        return name, text_of(rng, kept_files[name])

    def read_kept(made: tuple[str, bytes]) -> None:
        name, content = made
        (run_folder / name).write_bytes(content)
        try:
            if name == 'compute.json':
                compute_plans._read(run_folder)
            elif name == 'environment.json':
                environment.read_environment(run_folder).get('jax')
            elif name == 'inputs.json':
                checked = inputs.Inputs({'tokens': '34cd'}, {'tokens': 'AAAA'})
                inputs.check_inputs(checked, run_folder, override=True)
            elif name == 'loggers.json':
                with loggers.opened(logged, run_folder):
                    pass
            else:
                with listed.warned_of_others(run_folder):
                    pass
        finally:
            (run_folder / name).unlink()

    logged = defaults()

    def config_file(rng: random.Random) -> str:
        key, value = rng.choice(keys if rng.random() < 0.8 else sections), wild(rng)
        lines = [
            'from grpo_jax.run.config import defaults',
            'def get_config():',
            '  c = defaults()',
        ]
        lines += [f'  c.{key} = {value!r}'.replace('nan', 'float("nan")').replace('inf', '1e999')]
        text = '\n'.join([*lines, '  return c\n'])
        if rng.random() < 0.3:
            text = damaged(rng, text.encode()).decode(errors='replace')
        return text

    def read_config_file(text: str) -> None:
        from grpo_jax.run import config as files

        (folder / 'config_file.py').write_text(text, errors='replace')
        config, problems = files.read(folder / 'config_file.py')
        if problems or config is None:
            raise ConfigError(problems)
        check_keys(config)
        check_values(config)
        check_types(config)

    return {
        'safetensors': Reader(safetensors_header, read_safetensors, 0.15),
        'HF configs': Reader(hf_config, read_hf_config, 0.15),
        'tokenizers': Reader(tokenizer, read_tokenizer, 0.1),
        'JSONL rows': Reader(row_lines, read_rows, 0.15),
        'data options': Reader(data_options, read_options, 0.1),
        'saved configs': Reader(lambda rng: text_of(rng, saved), read_saved, 0.1),
        'overrides': Reader(overrides, read_overrides, 0.05),
        'config files': Reader(config_file, read_config_file, 0.05),
        'completions': Reader(completion_lines, read_completions, 0.1),
        'files of runs': Reader(kept_file, read_kept, 0.05),
    }


def main() -> None:
    """Run all readers and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--count', type=int, default=20_000)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--kind', default='')
    options = parser.parse_args()
    logging.disable()
    np.seterr(all='ignore')
    with tempfile.TemporaryDirectory() as folder:
        found = run(readers_of(pathlib.Path(folder)), options.count, options.seed, options.kind)
    outcomes = ('accepted', 'error', 'traceback', 'hang', 'silent')
    print(f'{"":14}' + ''.join(f'{outcome:>11}' for outcome in outcomes))
    for name, counts in found['numbers'].items():
        print(f'{name:14}' + ''.join(f'{counts[outcome]:11}' for outcome in outcomes))
    for (name, outcome, place), inputs in sorted(found['faults'].items()):
        print(f'{len(inputs):5} {outcome:10} {name}: {place}\n      {inputs[0]!r:.150}')
    sys.exit(bool(found['faults']))


if __name__ == '__main__':
    main()
