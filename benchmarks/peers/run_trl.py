"""Times TRL's GRPOTrainer on a workload, with its own sampler.

    python -m venv .venv/trl && .venv/trl/bin/pip install torch transformers trl datasets accelerate
    .venv/trl/bin/python -m benchmarks.peers.run_trl --workload W1 --micro 8

Run it in the root of this repository; it needs nothing of `grpo_jax`. The trainer is TRL's, its
methods are only wrapped with a clock. Gradient checkpointing is off, which is faster than TRL's
default wherever the activations fit.
"""

import argparse
import os
import tempfile
import time
from typing import Any

os.environ.setdefault('HF_HUB_OFFLINE', '1')
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')

import datasets
import torch
import transformers
import trl  # type: ignore[import-not-found,unused-ignore]

from benchmarks import timing, workloads
from benchmarks.workloads import Workload


def main() -> None:
    """Measures the workload that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--workload', default='W1', choices=[*workloads.WORKLOADS])
    parser.add_argument('--steps', type=int, default=5)
    parser.add_argument('--warmup', type=int, default=2)
    parser.add_argument('--micro', type=int, default=8, help='completions per backward pass')
    parser.add_argument('--checkpointing', action='store_true', help="TRL's default")
    parser.add_argument('--record', default='', help='file that a line of JSON is added to')
    options = parser.parse_args()
    workload = workloads.WORKLOADS[options.workload]
    transformers.set_seed(0)
    clock, tokens = timing.Clock(), []

    def reward(completions, completion_ids, **_):
        tokens.append(sum(map(len, completion_ids)))
        return [workloads.reward(text) for text in completions]

    class Cut(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.cut()
            print(f'step {len(clock.steps)}: {clock.steps[-1]["step"]:.1f} s', flush=True)

    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        trainer = make_trainer(workload, folder, options, reward, Cut())
        wrap(trainer, clock)
        print(f'trainer made in {time.perf_counter() - begun:.1f} s', flush=True)
        clock.start()
        trainer.train()
    for step in clock.steps:
        step['update'] = step['step'] - step['sample'] - step['score']
    on_gpu = torch.cuda.is_available()
    row = timing.record(
        'trl',
        options.workload,
        clock,
        tokens,
        warmup=options.warmup,
        versions={module.__name__: module.__version__ for module in (torch, transformers, trl)},
        settings={
            'device': torch.cuda.get_device_name() if on_gpu else 'cpu',
            'micro': options.micro,
            'checkpointing': options.checkpointing,
            'threads': torch.get_num_threads(),
            'attention': trainer.model.config._attn_implementation,
        },
        peak_bytes=torch.cuda.max_memory_allocated() if on_gpu else None,
    )
    timing.write(row, options.record)


def make_trainer(workload: Workload, folder: str, options, reward, callback) -> Any:
    """TRL's trainer of a random Qwen2; the reference is loaded from the folder, as TRL does."""
    c, dtype = workload.shape, getattr(torch, workload.shape.dtype)
    config = transformers.Qwen2Config(
        vocab_size=c.vocab_size, hidden_size=c.width, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        intermediate_size=c.mlp_width, rms_norm_eps=c.norm_eps, tie_word_embeddings=c.tied_head,
        rope_parameters={'rope_type': 'default', 'rope_theta': c.rope_theta},
        initializer_range=workloads.SPREAD, max_position_embeddings=4096,
        pad_token_id=workloads.PAD, eos_token_id=workloads.EOS, bos_token_id=None,
    )  # fmt: skip
    with torch.device('cuda' if torch.cuda.is_available() else 'cpu'):  # CPUs are slow at drawing
        transformers.Qwen2ForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer = workloads.hugging_face_tokenizer(c.vocab_size)
    tokenizer.save_pretrained(folder)
    model: Any = transformers.Qwen2ForCausalLM.from_pretrained(folder, dtype=dtype)
    generation = None
    if workload.ends:
        model.generation_config.eos_token_id = workload.eos_ids
    else:
        generation = {'min_new_tokens': workload.completion}
    steps = options.steps + options.warmup
    texts = workloads.prompt_texts(workload.groups * steps, workload.prompt)
    arguments = trl.GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=options.micro,
        gradient_accumulation_steps=workload.rows // options.micro,
        num_generations=workload.group_size,
        max_completion_length=workload.completion,
        temperature=1.0,
        beta=workloads.BETA,
        num_iterations=1,
        learning_rate=workloads.LEARNING_RATE,
        lr_scheduler_type='constant',
        max_grad_norm=workloads.CLIP_NORM,
        max_steps=steps,
        gradient_checkpointing=options.checkpointing,
        bf16=c.dtype == 'bfloat16',
        use_cpu=not torch.cuda.is_available(),
        generation_kwargs=generation,
        model_init_kwargs={'dtype': c.dtype},
        logging_steps=10_000,
        report_to='none',
        save_strategy='no',
        disable_tqdm=True,
    )
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({'prompt': texts}),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def wrap(trainer: Any, clock: timing.Clock) -> None:
    """Puts the clock around sampling and scoring."""

    def wait(_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def scored_by() -> str:  # the same method scores the reference and, in the loss, the policy
        return 'forward' if torch.is_grad_enabled() else 'score'

    trainer._generate_single_turn = clock.timed('sample', trainer._generate_single_turn, wait)
    trainer._get_per_token_logps_and_entropies = clock.timed(
        scored_by, trainer._get_per_token_logps_and_entropies, wait
    )


if __name__ == '__main__':
    main()
