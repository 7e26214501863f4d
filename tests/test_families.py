"""Every family computes what transformers does: logits by all entries, and greedy completions."""

import dataclasses
import functools
import json

import checkpoints
import numpy as np
import pytest
import safetensors.torch
import tiny
from checkpoints import rope, torch, transformers
from test_transformer import decode_logits, group_logits

from grpo_jax.algorithm.reward_model import outcome_scores
from grpo_jax.algorithm.sample import sample
from grpo_jax.models import hf
from grpo_jax.models.hf import model_config
from grpo_jax.models.hf.families import FAMILIES
from grpo_jax.types import Sampling

TOLERANCE = 3e-5  # of the largest logit; float32 in both gives about 1e-6, at worst 1e-5

# Prompts of 11, 4 and 1 tokens and completions of 9: the windows of 3 to 6 are shorter than the
# longest prompt, those of 13 begin in it, those of 64 hold everything; 8 positions are the length
# that the stretched ones were trained with.
ROLLOUT = tiny.make_rollout(
    vocab=checkpoints.VOCAB,
    groups=3,
    group_size=2,
    length=11,
    max_tokens=9,
    lengths=(11, 4, 1),
)
STRETCHED = {'factor': 4.0, 'original_max_position_embeddings': 8}
LLAMA3 = rope('llama3', low_freq_factor=1.0, high_freq_factor=4.0, **STRETCHED)
FINE_YARN = rope(
    'yarn', beta_fast=2.0, beta_slow=0.3, mscale=1.2, mscale_all_dim=0.7, truncate=False,
    **STRETCHED,
)  # fmt: skip
DYNAMIC = rope('dynamic', factor=4.0) | {'max_position_embeddings': 8}
LONGROPE = {
    'rope_type': 'longrope',
    'rope_theta': 500.0,
    'short_factor': [1.0, 1.3],
    'long_factor': [1.5, 4.0],
    'original_max_position_embeddings': 8,
    'partial_rotary_factor': 0.5,
}
CASES = {
    'llama, biases, one kv head, wide heads, llama3': (
        'llama',
        LLAMA3
        | {'num_key_value_heads': 1, 'head_dim': 14, 'attention_bias': True, 'mlp_bias': True}
        | {'rms_norm_eps': 0.1, 'hidden_act': 'gelu'},
    ),
    'mistral, window over the seam, dynamic': ('mistral', DYNAMIC | {'sliding_window': 13}),
    'qwen2, tied, windows above': (
        'qwen2',
        {'tie_word_embeddings': True, 'use_sliding_window': True, 'sliding_window': 6}
        | {'max_window_layers': 1},
    ),
    'qwen3, biases, yarn': ('qwen3', rope('yarn', **STRETCHED) | {'attention_bias': True}),
    'gemma2, soft caps': (
        'gemma2',
        {'attn_logit_softcapping': 1.5, 'final_logit_softcapping': 4.0},
    ),
    'gemma3, two wavelengths, linear': (
        'gemma3_text',
        {
            'rope_parameters': {
                'full_attention': {'rope_type': 'linear', 'rope_theta': 900.0, 'factor': 4.0},
                'sliding_attention': {'rope_type': 'default', 'rope_theta': 20.0},
            },
            'final_logit_softcapping': 9.0,
        },
    ),
    'phi3, one kv head, window, partly rotated, longrope': (
        'phi3',
        {'rope_parameters': LONGROPE, 'original_max_position_embeddings': 8}
        | {'sliding_window': 7, 'num_key_value_heads': 1},
    ),
    'smollm3, biases, windows': (
        'smollm3',
        {'use_sliding_window': True, 'sliding_window': 5, 'attention_bias': True},
    ),
    'olmo2, biases, one kv head, yarn with settings': (
        'olmo2',
        FINE_YARN | {'attention_bias': True, 'num_key_value_heads': 1},
    ),
    'mixtral, window': ('mixtral', {'sliding_window': 6}),
    'qwen3_moe, not normalized': (
        'qwen3_moe',
        {'norm_topk_prob': False, 'num_experts_per_tok': 3, 'attention_bias': True},
    ),
}
MORE_CASES = {
    'llama, as it is': ('llama', {}),
    'llama, tied, as many kv heads, linear': (
        'llama',
        rope('linear', factor=4.0) | {'num_key_value_heads': 4, 'tie_word_embeddings': True},
    ),
    'mistral, short window': ('mistral', {'sliding_window': 3}),
    'llama, dynamic': ('llama', DYNAMIC),
    'llama, dynamic within its length': ('llama', DYNAMIC | {'max_position_embeddings': 64}),
    'llama, yarn': ('llama', rope('yarn', **STRETCHED)),
    'mistral, no window': ('mistral', {'sliding_window': None}),
    'mistral, window over everything': ('mistral', {'sliding_window': 64}),
    'mistral, window of one': ('mistral', {'sliding_window': 1}),
    'qwen2, no window': ('qwen2', {}),
    'qwen3, windows': (
        'qwen3',
        {'use_sliding_window': True, 'sliding_window': 13, 'max_window_layers': 2},
    ),
    'gemma2, untied, no caps': (
        'gemma2',
        {'tie_word_embeddings': False, 'attn_logit_softcapping': None, 'sliding_window': 64}
        | {'final_logit_softcapping': None, 'attention_bias': True},
    ),
    'gemma3, as it is': ('gemma3_text', {'attention_bias': True}),
    'phi3, window': ('phi3', {'sliding_window': 7}),
    'phi3, tied, partly rotated': (
        'phi3',
        rope('default', partial_rotary_factor=0.5) | {'tie_word_embeddings': True},
    ),
    'smollm3, tied': ('smollm3', {'tie_word_embeddings': True}),
    'olmo2, wide heads': ('olmo2', {'head_dim': 14}),
    'mixtral, all experts': ('mixtral', {'num_experts_per_tok': 5, 'num_key_value_heads': 4}),
    'qwen3_moe, tied': ('qwen3_moe', {'tie_word_embeddings': True}),
}


def compare(folder, kind, options, seed=0):
    """Relative errors of the logits by prefill and extend, and by decode."""
    reference = checkpoints.make_torch(checkpoints.make_config(kind, **options), seed)
    model, params, _ = checkpoints.read(checkpoints.save(reference, folder))
    cached = model.config.rope_scaling.get('rope_type') in ('dynamic', 'longrope')
    expected = checkpoints.completion_logits(reference, ROLLOUT, cached=cached)

    @tiny.jit
    def both(params):
        return [entry(model, params, ROLLOUT) for entry in (group_logits, decode_logits)]

    assert np.abs(expected).max() > 1  # else the tolerance says nothing
    return [checkpoints.error(ours, expected) for ours in both(params)]


@pytest.mark.parametrize(
    'case',
    [*CASES.items(), *(pytest.param(case, marks=pytest.mark.slow) for case in MORE_CASES.items())],
    ids=[*CASES, *MORE_CASES],
)
def test_logits_equal_transformers(case, tmp_path):
    extended, decoded = compare(tmp_path, *case[1])
    assert extended < TOLERANCE
    assert decoded < TOLERANCE


def write_with_images(folder, names):
    """A Gemma 3 for text and images whose text is that of a small `gemma3_text`."""
    text = checkpoints.make_config('gemma3_text')
    vision = {
        'hidden_size': 8, 'image_size': 8, 'intermediate_size': 8, 'num_attention_heads': 2,
        'num_hidden_layers': 1, 'patch_size': 4, 'model_type': 'siglip_vision_model',
    }  # fmt: skip
    config = transformers.Gemma3Config(
        text_config=text.to_dict(), vision_config=vision, mm_tokens_per_image=4,
        eos_token_id=[1, 6],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration._from_config(
        config, attn_implementation='eager', dtype=torch.float32
    ).eval()
    reference = checkpoints.make_torch(text)
    missing = model.model.language_model.load_state_dict(reference.model.state_dict())
    assert not missing.missing_keys
    model.save_pretrained(folder)
    stored = safetensors.torch.load_file(folder / 'model.safetensors')
    renamed = {names(name): tensor for name, tensor in stored.items()}
    safetensors.torch.save_file(renamed, folder / 'model.safetensors', metadata={'format': 'pt'})
    return model


@pytest.mark.parametrize('prefix', ['language_model.model.', 'model.language_model.'])
def test_the_text_part_of_a_model_with_images(prefix, tmp_path):
    def names(name):
        """As published checkpoints have them, or as some versions of transformers write them."""
        if prefix == 'language_model.model.':
            return name
        return f'model.{name}'.replace('model.language_model.model.', prefix)

    reference = write_with_images(tmp_path, names)
    stored = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    assert f'{prefix}embed_tokens.weight' in stored
    model, params, _ = checkpoints.read(tmp_path)
    expected = checkpoints.completion_logits(reference, ROLLOUT)
    ours = tiny.jit(lambda params: group_logits(model, params, ROLLOUT))(params)
    assert checkpoints.error(ours, expected) < TOLERANCE
    fields = hf.read_config(tmp_path)
    assert (fields['model_type'], fields['eos_token_id']) == ('gemma3_text', [1, 6])
    exported = tmp_path / 'text'
    exported.mkdir()
    (exported / 'config.json').write_text(json.dumps(fields))
    hf.save(params, model.config, fields, exported, dtype='float32')
    again, complaints = checkpoints.open_torch(exported)
    assert not complaints
    assert checkpoints.error(checkpoints.completion_logits(again, ROLLOUT), expected) < TOLERANCE


def test_every_family_is_a_case():
    assert {kind for kind, _ in CASES.values()} == set(FAMILIES)


def draw(seed):
    """A family and random options of it."""
    rng = np.random.default_rng(seed)

    def one(*values):
        return values[rng.integers(len(values))]

    kind = one(*FAMILIES)
    options = {
        'num_hidden_layers': 3,
        'num_attention_heads': one(2, 4),
        'num_key_value_heads': one(1, 2),
        'tie_word_embeddings': one(True, False),
        'rms_norm_eps': one(1e-6, 1e-2),
        'intermediate_size': one(24, 40),
    }
    if kind != 'phi3':
        options |= {'head_dim': one(6, 8, 14, 16)}
    if kind not in ('mistral', 'qwen2', 'phi3', 'mixtral'):
        options |= {'attention_bias': one(True, False)}
    if kind in ('mistral', 'mixtral', 'phi3', 'gemma2', 'gemma3_text'):
        options |= {'sliding_window': one(2, 3, 5, 9, 13, 64)}
    if kind in ('qwen2', 'qwen3', 'smollm3', 'qwen3_moe'):
        options |= {'use_sliding_window': one(True, False), 'sliding_window': one(2, 7, 13)}
    if kind in ('qwen2', 'qwen3'):
        options |= {'max_window_layers': one(0, 1, 2, 3)}
    if kind in ('gemma2', 'gemma3_text'):
        options |= {
            'query_pre_attn_scalar': one(6, 30),
            'final_logit_softcapping': one(None, 5.0),
            'layer_types': [one('sliding_attention', 'full_attention') for _ in range(3)],
        }
    if kind == 'gemma2':
        options |= {'attn_logit_softcapping': one(None, 1.0, 20.0)}
    if kind == 'smollm3':
        options |= {'no_rope_layers': [one(0, 1) for _ in range(3)]}
    if kind in ('mixtral', 'qwen3_moe'):
        options |= {'num_local_experts': one(3, 8), 'num_experts_per_tok': one(1, 2, 3)}
    if kind == 'qwen3_moe':
        options |= {'norm_topk_prob': one(True, False), 'moe_intermediate_size': one(8, 28)}
    if kind == 'phi3':
        options |= one({}, rope('default', partial_rotary_factor=0.5))
    elif kind != 'gemma3_text':
        options |= one(
            {},
            rope('linear', factor=one(1.5, 8.0)),
            rope('dynamic', factor=one(1.5, 8.0)) | {'max_position_embeddings': one(2, 8, 64)},
            rope('yarn', factor=one(1.5, 8.0), original_max_position_embeddings=one(4, 12)),
            rope(
                'llama3', factor=one(1.5, 8.0), original_max_position_embeddings=one(4, 12),
                low_freq_factor=1.0, high_freq_factor=one(1.5, 4.0),
            ),
        )  # fmt: skip
    return kind, options


def check_draw(folder, seed):
    kind, options = draw(seed)
    errors = compare(folder, kind, options, seed)
    assert max(errors) < TOLERANCE, (kind, options)


@pytest.mark.parametrize('seed', range(1))
def test_random_options(seed, tmp_path):
    check_draw(tmp_path, seed)


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(1, 100))
def test_more_random_options(seed, tmp_path):
    check_draw(tmp_path, seed)


# Greedy completions

# Family -> a seed whose completions are lively and have no near ties, and options.
GREEDY = {
    'llama': (2, LLAMA3),
    'gemma2': (3, {'attn_logit_softcapping': 5.0, 'final_logit_softcapping': 8.0}),
    'mixtral': (0, {}),
    'qwen2': (3, {'use_sliding_window': True, 'sliding_window': 20, 'max_window_layers': 1}),
    'qwen3': (0, rope('yarn', **STRETCHED)),
    'gemma3_text': (3, {}),
    'phi3': (2, {'sliding_window': 20}),
}
MAX_TOKENS = 64


@functools.cache
def greedy_pair(kind, folder):
    """The reference, and our sampler of greedy completions [B, G, T] for ends i32[2]."""
    seed, options = GREEDY[kind]
    config = checkpoints.make_config(kind, **{'max_position_embeddings': 128} | options)
    reference = checkpoints.make_torch(config, seed)
    model, params, _ = checkpoints.read(checkpoints.save(reference, folder))

    @tiny.jit
    def ours(prompts, ends):
        return sample(
            model, params, prompts, seed=0, step=0, sampling=Sampling(temperature=0.0),
            eos_ids=ends, group_size=2, max_tokens=MAX_TOKENS,
        )  # fmt: skip

    return reference, ours


@pytest.fixture(scope='module')
def greedy(tmp_path_factory):
    return lambda kind: greedy_pair(kind, tmp_path_factory.getbasetemp() / f'greedy-{kind}')


def generate(reference, prompt, ends):
    """transformers' greedy completion of one prompt, and the smallest lead of a chosen token."""
    tokens = torch.tensor(prompt)[None]
    out = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=MAX_TOKENS, do_sample=False,
        eos_token_id=ends, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    best = torch.stack(out.logits)[:, 0].topk(2).values
    lead = (best[:, 0] - best[:, 1]).min() / best.abs().max()
    return out.sequences[0, len(prompt) :].tolist(), float(lead)


def prompts_of(lengths=(11, 4, 1, 7)):
    return tiny.make_rollout(
        seed=3, vocab=checkpoints.VOCAB, groups=len(lengths), length=max(lengths), lengths=lengths
    ).prompts


def rows_of(prompts):
    for tokens, length in zip(prompts.tokens, prompts.length, strict=True):
        yield tokens[:length].tolist()


@pytest.mark.parametrize(
    'kind',
    [pytest.param(kind, marks=[pytest.mark.slow] * (n > 1)) for n, kind in enumerate(GREEDY)],
)
def test_greedy_completions_equal_transformers(kind, greedy):
    """64 tokens each; the reference reads every prompt alone, ours all of them padded."""
    reference, ours = greedy(kind)
    prompts = prompts_of()
    rollout = ours(prompts, np.array([-1, -1]))
    expected, leads = zip(
        *(generate(reference, row, None) for row in rows_of(prompts)), strict=True
    )
    assert min(leads) > TOLERANCE, 'ties: these tokens cannot be compared'
    assert all(len(row) == MAX_TOKENS for row in expected)
    assert len({token for row in expected for token in row}) > 20  # not one loop
    for g in range(2):
        np.testing.assert_array_equal(rollout.tokens[:, g], expected)


def test_greedy_completions_end_where_those_of_transformers_do(greedy):
    """At whichever of two end tokens comes first, or not at all."""
    reference, ours = greedy('llama')
    prompts = prompts_of()
    free = np.asarray(ours(prompts, np.array([-1, -1])).tokens)[:, 0]
    ends = [int(free[3, 19]), int(free[2, 11])]
    rollout = ours(prompts, np.array(ends))
    completions = [generate(reference, row, ends)[0] for row in rows_of(prompts)]
    assert [row[-1] in ends and (ends.index(row[-1]), len(row)) for row in completions] == [
        (0, 29), False, (1, 12), (0, 20),
    ]  # fmt: skip
    for b, row in enumerate(completions):
        assert rollout.tokens[b, 0][rollout.mask[b, 0]].tolist() == row
        assert bool(rollout.ended[b, 0]) == (row[-1] in ends)


# Reward models


def torch_scorer(config):
    """A random reward model of transformers, whose layers are those of `checkpoints.make_torch`."""
    trunk = checkpoints.make_torch(config)
    scorer = transformers.AutoModelForSequenceClassification.from_config(
        config, attn_implementation='eager', dtype=torch.float32
    ).eval()
    scorer.model.load_state_dict(trunk.model.state_dict())
    with torch.no_grad():
        scorer.score.weight.copy_(torch.randn(scorer.score.weight.shape))
    return scorer


@pytest.mark.parametrize(
    'kind',
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind not in ('llama', 'qwen2', 'gemma2')))
        for kind in FAMILIES
    ],
)
def test_scores_equal_transformers(kind, tmp_path):
    """At the last tokens of ragged completions of ragged prompts, each sequence read alone."""
    reference = torch_scorer(checkpoints.make_config(kind, num_labels=1))
    model, params, _ = checkpoints.read(checkpoints.save(reference, tmp_path))
    assert model.config.scalar_head
    expected = np.zeros(ROLLOUT.mask.shape[:2])
    for b, g in np.ndindex(*expected.shape):
        prompt = ROLLOUT.prompts.tokens[b, : ROLLOUT.prompts.length[b]]
        completion = ROLLOUT.tokens[b, g][ROLLOUT.mask[b, g]]
        sequence = torch.tensor(np.concatenate([prompt, completion]))[None]
        with torch.no_grad():
            expected[b, g] = reference(sequence).logits[0, 0]
    assert np.abs(expected).max() > 0.3
    ours = tiny.jit(functools.partial(outcome_scores, model))(params, ROLLOUT)
    assert checkpoints.error(ours, expected) < TOLERANCE


@pytest.mark.parametrize('kind', FAMILIES)
def test_reward_models_of_every_family(kind):
    """Their architecture is that of transformers, and means a scalar head; one label is needed."""
    config = checkpoints.make_config(kind, num_labels=1)
    raw = json.loads(config.to_json_string()) | {'architectures': [FAMILIES[kind].scorer]}
    known = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert FAMILIES[kind].scorer == known[kind]
    plain = raw | {'architectures': [FAMILIES[kind].architecture]}
    assert model_config(raw) == dataclasses.replace(model_config(plain), scalar_head=True)
    assert not model_config(raw | {'architectures': None}).scalar_head


@pytest.mark.parametrize(
    ('labels', 'found'),
    [({}, 2), ({'num_labels': 5}, 5), ({'id2label': {'0': 'a', '1': 'b', '2': 'c'}}, 3)],
)
def test_reward_models_have_one_label(labels, found):
    raw = {'model_type': 'qwen2', 'architectures': ['Qwen2ForSequenceClassification']}
    message = rf'Qwen2ForSequenceClassification with num_labels={found} is not supported: .*=1'
    with pytest.raises(ValueError, match=message):
        model_config(checkpoints.SIZES | raw | labels)
