"""Sizes and options of a decoder; nothing here computes."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

from grpo_jax.models import rope

DTYPES = ('float32', 'bfloat16', 'float16')
NORMS = ('pre', 'post', 'both')
ACTIVATIONS = ('silu', 'gelu', 'gelu_tanh')
ATTENTIONS = ('auto', 'einsum', 'recomputed', 'splash', 'cudnn')
BASES = ('model', 'int8', 'nf4')

# Parameter -> the name that Hugging Face and PEFT give the projection.
PROJECTIONS = {
    'query': 'q_proj',
    'key': 'k_proj',
    'value': 'v_proj',
    'out': 'o_proj',
    'gate': 'gate_proj',
    'up': 'up_proj',
    'down': 'down_proj',
}


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters of the projections (Hu et al., arXiv 2106.09685): W + alpha / r * A B.

    Raises:
      ValueError: a negative rank, an unknown base, a target that matches no projection, or options
        without a rank.
    """

    rank: int = 0  # r; 0: no adapters, all parameters are trained
    alpha: float = 16.0  # the adapters' product is multiplied by alpha / rank
    targets: tuple[str, ...] = ('*_proj',)  # patterns of q_proj, k_proj, ..., down_proj to adapt
    # How the matrices in the layers of the frozen base are stored: 'model', as without adapters;
    # 'int8', one byte per weight; 'nf4', about half a byte (QLoRA). See `models.quantize_base`.
    base: str = 'model'

    def __post_init__(self) -> None:
        object.__setattr__(self, 'targets', tuple(self.targets))
        if self.rank < 0:
            raise ValueError(f'lora rank={self.rank}: make it 0 (no adapters) or more')
        for field in dataclasses.fields(self) if not self.rank else ():
            value = getattr(self, field.name)
            if value != field.default:
                raise ValueError(
                    f'lora {field.name}={value!r} with rank=0, which makes no adapters and trains '
                    f'all parameters: set a rank, or {field.name}={field.default!r}'
                )
        if self.base not in BASES:
            raise ValueError(f'lora base={self.base!r} is unknown: use one of {", ".join(BASES)}')
        for pattern in self.targets:
            if not fnmatch.filter(PROJECTIONS.values(), pattern):
                raise ValueError(
                    f'lora target {pattern!r} matches none of {", ".join(PROJECTIONS.values())}: '
                    'use a pattern that matches one of them'
                )

    @property
    def scale(self) -> float:
        """The factor of the adapters' product, alpha / r."""
        return self.alpha / self.rank

    def covers(self, name: str) -> bool:
        """Whether the projection whose parameter is called `name` has an adapter."""
        return bool(self.rank) and any(fnmatch.fnmatch(PROJECTIONS[name], p) for p in self.targets)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the decoder.

    Raises:
      ValueError: an option that is unknown, out of its range or in conflict with another.
    """

    vocab_size: int  # V, tokens of the vocabulary
    width: int  # D, of the hidden states
    layers: int  # L, number of layers
    heads: int  # H, query heads
    kv_heads: int  # K, key and value heads
    head_dim: int  # h, width of a head
    mlp_width: int  # hidden width of the MLP, or of each expert
    tied_head: bool = True  # the output projection is the embedding's transpose
    # Positions; see `rope`
    rope_theta: float = 10_000.0  # base of the rotary frequencies
    # For longer contexts, as in `rope_scaling` of a Hugging Face config; empty: none.
    rope_scaling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope_fraction: float = 1.0  # share of a head's components that is rotated
    local_rope_theta: float = 0.0  # of windowed layers, unscaled; 0: rope_theta (Gemma 3)
    unrotated_layers: tuple[int, ...] = ()  # layers without positions (SmolLM3)
    # Attention
    attention_bias: bool = False  # biases on the q, k and v projections (Qwen2)
    out_bias: bool = False  # biases on the output projection
    qk_norm: str = ''  # RMSNorm of q and k: '', 'head' (Qwen3) or 'projection', all heads (OLMo 2)
    attention_scale: float = 0.0  # factor of the scores; 0: head_dim ** -0.5
    attention_softcap: float = 0.0  # scores become cap * tanh(score / cap); 0: no cap
    window: int = 0  # how many positions a query of a windowed layer sees; 0: all
    window_layers: tuple[int, ...] = ()  # the windowed layers, by number
    # The rest of a layer
    norms: str = 'pre'  # 'pre': before attention and MLP; 'post': after (OLMo 2); 'both' (Gemma)
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    norm_plus_one: bool = False  # the scale is 1 + parameter (Gemma)
    activation: str = 'silu'  # of the MLP: 'silu', 'gelu' or 'gelu_tanh'
    mlp_bias: bool = False  # biases in the MLP
    experts: int = 0  # MLPs that tokens are routed to; 0: one MLP for all tokens
    experts_per_token: int = 0  # how many of them process a token
    normalize_experts: bool = True  # weights of a token's chosen experts sum to 1
    # Embedding and output
    embedding_scaled: bool = False  # embeddings times sqrt(D) (Gemma)
    logit_softcap: float = 0.0  # as `attention_softcap`, of the logits; 0: none
    # Ids that the tokenizer has tokens for, as (first, last + 1); the logits of others are -inf.
    token_ranges: tuple[tuple[int, int], ...] = ()  # (): all ids
    scalar_head: bool = False  # one number per token instead of logits: rewards and values
    # How it is computed
    dtype: str = 'float32'  # of the computation: 'float32', 'bfloat16' or 'float16'
    param_dtype: str = 'float32'  # of the parameters; adapters are always float32
    # Attention of several tokens: 'einsum'; 'recomputed', whose gradient computes the scores again;
    # a kernel that never has scores in memory, 'splash' on TPUs and 'cudnn' on NVIDIA GPUs; or
    # 'auto', the platform's kernel if it supports the model, else 'recomputed'.
    attention: str = 'auto'
    remat: bool = True  # recompute each layer in the backward pass instead of storing it
    lora: Lora = Lora()

    def __post_init__(self) -> None:
        scaling = dict(self.rope_scaling)
        rope.check_scaling(scaling)
        object.__setattr__(self, 'rope_scaling', _Frozen(scaling))
        for name in ('unrotated_layers', 'window_layers'):
            layers = tuple(getattr(self, name))
            object.__setattr__(self, name, layers)
            if not set(layers) <= set(range(self.layers)):
                raise ValueError(f'model {name}={layers}: use layers 0 to {self.layers - 1}')
        ranges = tuple((int(start), int(stop)) for start, stop in self.token_ranges)
        object.__setattr__(self, 'token_ranges', ranges)
        if not all(0 <= start < stop <= self.vocab_size for start, stop in ranges):
            raise ValueError(
                f'model token_ranges={ranges}: use pairs (first, last + 1) within 0 to '
                f'vocab_size={self.vocab_size}'
            )
        self._check_sizes()
        self._check_options()

    def _check_sizes(self) -> None:
        for name in (
            'vocab_size', 'width', 'layers', 'heads', 'kv_heads', 'head_dim', 'mlp_width'
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f'model {name}={getattr(self, name)}: make it at least 1')
        for name in ('window', 'local_rope_theta', 'norm_eps', 'experts'):
            if getattr(self, name) < 0:
                raise ValueError(f'model {name}={getattr(self, name)}: make it at least 0')
        if not self.rope_theta > 0:
            raise ValueError(f'model rope_theta={self.rope_theta}: make it larger than 0')
        if self.heads % self.kv_heads:
            raise ValueError(
                f'model heads={self.heads} is not a multiple of kv_heads={self.kv_heads}: '
                'make it one, since every key/value head serves equally many query heads'
            )
        if self.head_dim % 2:
            raise ValueError(f'model head_dim={self.head_dim} is odd: make it even for RoPE')
        if self.rope_width % 2 or not 0 < self.rope_fraction <= 1:
            raise ValueError(
                f'model rope_fraction={self.rope_fraction} rotates {self.rope_width} of '
                f'{self.head_dim} components: make that an even number of them'
            )
        if bool(self.window) != bool(self.window_layers):
            raise ValueError(
                f'model window={self.window} with window_layers={self.window_layers}: set both, '
                'or neither'
            )
        if not 0 <= self.experts_per_token <= self.experts or (
            bool(self.experts) != bool(self.experts_per_token)
        ):
            raise ValueError(
                f'model experts={self.experts} with experts_per_token={self.experts_per_token}: '
                'make experts_per_token 1 to experts, or both 0'
            )
        if self.experts and self.mlp_bias:
            raise ValueError('model mlp_bias=True with experts, which have none: make it False')

    def _check_options(self) -> None:
        for name, known in (
            ('dtype', DTYPES),
            ('param_dtype', DTYPES),
            ('norms', NORMS),
            ('activation', ACTIVATIONS),
            ('qk_norm', ('', 'head', 'projection')),
            ('attention', ATTENTIONS),
        ):
            value = getattr(self, name)
            if value not in known:
                choices = ', '.join(map(repr, known)) if '' in known else ', '.join(known)
                raise ValueError(f'model {name}={value!r} is unknown: use one of {choices}')
        unsupported = self.unsupported_by(self.attention)
        if unsupported:
            raise ValueError(
                f'model attention={self.attention!r} does not support {unsupported}: use '
                "attention='auto' or 'einsum'"
            )
        if self.scalar_head and self.lora.rank:
            raise ValueError(
                f'model scalar_head=True with lora rank={self.lora.rank}: adapters would leave the '
                'scalar head untrained; use rank 0'
            )
        for name in ('width', 'mlp_width'):
            if self.lora.base == 'nf4' and getattr(self, name) % 2:
                raise ValueError(
                    f"lora base='nf4' stores two weights in a byte, and model {name}="
                    f"{getattr(self, name)} is odd: use base='int8'"
                )
        if self.experts and any(self.lora.covers(name) for name in ('gate', 'up', 'down')):
            raise ValueError(
                f'lora targets={self.lora.targets}: experts have no adapters; '
                "use targets=('q_proj', 'k_proj', 'v_proj', 'o_proj') or some of them"
            )

    def unsupported_by(self, attention: str) -> str:
        """The option that this form of attention does not support; '' if it supports them all."""
        if attention in ('splash', 'cudnn') and self.window:
            return f'window={self.window}'
        if attention != 'cudnn':
            return ''
        if self.attention_softcap:
            return f'attention_softcap={self.attention_softcap}'
        if self.dtype == 'float32':
            return f'dtype={self.dtype!r}'
        if self.head_dim % 8 or self.head_dim > 128:  # up to 256 on some GPUs only
            return f'head_dim={self.head_dim}, which is not 8, 16, ... or 128'
        return ''

    @property
    def rope_width(self) -> int:
        """Components of a head that are rotated."""
        return int(self.head_dim * self.rope_fraction)

    @property
    def output_parameter(self) -> tuple[str, int] | None:
        """The parameter of the output matrix and its vocabulary axis; None if it is not trained."""
        if self.lora.rank:
            return None
        return ('embedding', 0) if self.tied_head else ('head', 1)

    @property
    def base(self) -> 'ModelConfig':
        """The same decoder without adapters."""
        return dataclasses.replace(self, lora=Lora())


def with_scalar_head(config: ModelConfig) -> ModelConfig:
    """The same decoder with a score instead of logits, and without adapters."""
    return dataclasses.replace(config, lora=Lora(), scalar_head=True)


class _Frozen(dict[str, Any]):
    """A hashable dict, for configs that are static arguments of compiled programs."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(sorted(self.items())))
