"""Reading and writing Hugging Face checkpoints: their configs and tensors."""

from grpo_jax.models.hf.config import hugging_face_fields, model_config, read_config
from grpo_jax.models.hf.folder import (
    copy_description,
    description_files,
    find_folder,
    read_json,
)
from grpo_jax.models.hf.weights import load, save, save_adapter

__all__ = [
    'copy_description',
    'description_files',
    'find_folder',
    'hugging_face_fields',
    'load',
    'model_config',
    'read_config',
    'read_json',
    'save',
    'save_adapter',
]
