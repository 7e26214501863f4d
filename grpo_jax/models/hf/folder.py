"""The folder of a Hugging Face checkpoint: finding it, listing its tensors and reading them.

The safetensors format is read here because the safetensors library cannot return bfloat16 NumPy
arrays, and because its memory map would keep in memory what has been read.
"""

import json
import logging
import math
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

log = logging.getLogger('grpo_jax')

DTYPES = {
    'F64': np.dtype('float64'),
    'F32': np.dtype('float32'),
    'F16': np.dtype('float16'),
    'BF16': np.dtype(ml_dtypes.bfloat16),
}
INDEX = 'model.safetensors.index.json'
SINGLE = 'model.safetensors'
ADAPTER = 'adapter_config.json'

# Prefixes of tensor names in models with images -> those of a model of text; None: not of the text.
_TEXT_PREFIXES: dict[str, str | None] = {
    'language_model.model.': 'model.',
    'model.language_model.': 'model.',
    'language_model.lm_head.': 'lm_head.',
    'vision_tower.': None,
    'model.vision_tower.': None,
    'multi_modal_projector.': None,
    'model.multi_modal_projector.': None,
}


class StoredTensor(NamedTuple):
    """Where a tensor is on disk."""

    file: pathlib.Path
    offset: int  # bytes
    dtype: str  # its name in the file
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def find_folder(name: str, *, weights: bool = True) -> pathlib.Path:
    """The local folder of a checkpoint: `name` itself, or a download of that repository of the hub.

    Args:
      name: a folder, or a repository.
      weights: whether they have to be there; without, they are not downloaded.

    Raises:
      ValueError: neither exists, the folder is not a checkpoint, or its weights are pickled.
    """
    folder = pathlib.Path(name).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        patterns = ['*.json', 'tokenizer*', '*.model', '*.jinja', '*.txt']
        patterns += ['*.safetensors'] if weights else []
        try:
            folder = pathlib.Path(snapshot_download(name, allow_patterns=patterns))
        except (OSError, ValueError) as error:
            raise ValueError(
                f'pretrained={name!r} is neither a folder nor a checkpoint that the Hugging Face '
                f'hub returned: give the path of a folder ({type(error).__name__}: {error})'
            ) from error
    _check_no_adapter(folder)
    if not (folder / 'config.json').is_file():
        raise ValueError(f'{folder} holds no config.json: give the folder of a checkpoint')
    if weights and not _files(folder):
        pickled = sorted(path.name for path in folder.glob('*.bin'))
        if pickled:
            architectures = str(read_json(folder / 'config.json').get('architectures'))
            kind = 'SequenceClassification' if 'ForSequence' in architectures else 'CausalLM'
            raise ValueError(
                f'{folder} holds pickled weights ({", ".join(pickled)}), which can run code when '
                'they are read. Convert them once, where you trust them: python -c "from '
                f'transformers import AutoModelFor{kind} as M; '
                f"M.from_pretrained('{folder}', dtype='auto').save_pretrained('{folder}-safe')\""
            )
        raise ValueError(f'{folder} holds no *.safetensors file: give the folder of a checkpoint')
    return folder


def _check_no_adapter(folder: pathlib.Path) -> None:
    """Refuses a folder of adapters, of which transformers would load the base instead."""
    if (folder / ADAPTER).is_file():
        base = read_json(folder / ADAPTER).get('base_model_name_or_path') or 'an unnamed base'
        raise ValueError(
            f'{folder} holds an adapter of {base}, not a model. Merge it into that base first: '
            'python -c "from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{folder}').merge_and_unload().save_pretrained('{folder}-merged')"
            f'", copy the tokenizer of the base, and set pretrained to {folder}-merged'
        )


def description_files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The files of a checkpoint without its weights: configs and tokenizer."""
    kinds = ('.json', '.jinja', '.model', '.txt')
    paths = (path for path in folder.iterdir() if path.is_file() and path.suffix in kinds)
    return sorted(path for path in paths if path.name != INDEX)


def copy_description(folder: pathlib.Path, target: pathlib.Path, names: str = '*') -> None:
    """Copies the files of `description_files`, with their permissions.

    A link to a file elsewhere is left out, with a warning: the copy would give away what it leads
    to. Links into the cache of the Hugging Face hub are followed.

    Args:
      folder: of a checkpoint.
      target: an existing folder.
      names: a pattern of the names of files.
    """
    for path in description_files(folder):
        if not path.match(names):
            continue
        if _is_inside(path, folder):
            shutil.copy(path, target / path.name)
        else:
            log.warning(
                '%s is a link to a file outside of its folder, which is not copied: replace the '
                'link by the file if it belongs to the checkpoint', path,
            )  # fmt: skip


def _is_inside(path: pathlib.Path, folder: pathlib.Path) -> bool:
    """Whether a file is in its folder, or in the blobs of the repository in the hub's cache."""
    real, home = path.resolve(), folder.resolve()
    blobs = home.parent.parent / 'blobs' if home.parent.name == 'snapshots' else home
    return real.parent in (home, blobs)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Reads a JSON object from a file.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding='utf-8'))
    except (ValueError, RecursionError) as error:
        raise ValueError(f'{path} is not valid JSON: {error}') from error
    if not isinstance(value, dict):
        raise ValueError(f'{path} holds {type(value).__name__}, not a JSON object')
    return value


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
    """The safetensors files that belong to the checkpoint: a single one comes before shards."""
    index = folder / INDEX
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if not index.is_file():
        return sorted(folder.glob('*.safetensors'))
    weight_map = read_json(index).get('weight_map')
    if not isinstance(weight_map, dict):
        raise ValueError(f'{index} holds no weight_map: copy it again')
    for name in weight_map.values():
        if not isinstance(name, str) or name in ('', '.', '..') or {'/', '\\', '\0'} & {*name}:
            raise ValueError(
                f'{index} names the file {name!r:.80}, which is not in its folder: copy the '
                'checkpoint again, from where you trust it'
            )
    files = {folder / name for name in weight_map.values()}
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        names = ', '.join(missing)
        raise ValueError(f'{index} names files that do not exist: {names}; copy them too')
    return sorted(files)


def list_tensors(folder: pathlib.Path) -> dict[str, StoredTensor]:
    """All tensors of the folder by name, from the headers of its files.

    Raises:
      ValueError: a file is damaged or missing, or two hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for path in _files(folder):
        start, header = _header(path)
        for name, entry in header.items():
            stored, begin, end = _stored(path, start, name, entry)
            if name in tensors:
                raise ValueError(
                    f'{name} is in {tensors[name].file} and in {path}: leave the files of one '
                    'checkpoint in the folder'
                )
            if start + end > path.stat().st_size:
                raise ValueError(
                    f'{path} was cut off: {name} ends after the end of the file; copy it again'
                )
            if stored.dtype in DTYPES and end - begin != stored.bytes:
                raise ValueError(
                    f'{path}: {name} has {end - begin} bytes, but its shape {stored.shape} of '
                    f'{stored.dtype} needs {stored.bytes}; copy it again'
                )
            tensors[name] = stored
        _check_layout(path)
    return tensors


def text_tensors(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors of the decoder of text, under the names that a model of text alone has."""
    renamed = {}
    for name, stored in tensors.items():
        prefix = next((p for p in _TEXT_PREFIXES if name.startswith(p)), '')
        replacement = _TEXT_PREFIXES.get(prefix, '')
        if replacement is not None:
            renamed[replacement + name.removeprefix(prefix)] = stored
    return renamed


def _stored(path: pathlib.Path, start: int, name: str, entry: Any) -> tuple[StoredTensor, int, int]:
    """The tensor that an entry of a header describes, and the offsets of its data."""
    fields = entry if isinstance(entry, dict) else {}
    described: Any = (fields.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    dtype, shape, offsets = described
    typed = isinstance(dtype, str) and _are_sizes(shape) and _are_sizes(offsets)
    if not typed or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(
            f'{path}: the entry of {name!r:.80} is damaged: {entry!r:.80}; copy it again'
        )
    return StoredTensor(path, start + offsets[0], dtype, tuple(shape)), *offsets


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(
        isinstance(x, int) and not isinstance(x, bool) and 0 <= x < 2**63 for x in values
    )


def _check_layout(path: pathlib.Path) -> None:
    """Refuses what the safetensors library does, such as data that overlap or have gaps."""
    try:
        with safe_open(path, framework='numpy'):
            pass
    except SafetensorError as error:
        raise ValueError(f'{path} is damaged ({error}): copy it again') from error


def _header(path: pathlib.Path) -> tuple[int, dict[str, Any]]:
    """The offset of the data in a safetensors file, and the entries of its tensors."""
    with path.open('rb') as file:
        size = int.from_bytes(file.read(8), 'little')
        text = file.read(size) if size < path.stat().st_size else b''
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise ValueError(
            f'{path} is not a safetensors file (perhaps a Git LFS pointer to one): copy it again'
        )
    header.pop('__metadata__', None)
    return 8 + size, header


def read_rows(stored: StoredTensor, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads rows of a stored tensor, from `start` on."""
    dtype = DTYPES[stored.dtype]
    skip = start * math.prod(stored.shape[1:]) * dtype.itemsize
    rows = np.fromfile(stored.file, dtype, math.prod(shape), offset=stored.offset + skip)
    return rows.reshape(shape)
