"""What an update computes, as one set of static options.

Every row of DeepSeekMath's unified table (arXiv 2402.03300, table 10) and every variant in
`presets` is a choice of these options, of the scalars in `types.Objective` and of who samples.
"""

import dataclasses

from grpo_jax.advantages import check_group_options
from grpo_jax.losses import LOSSES
from grpo_jax.preferences import PAIRWISE
from grpo_jax.score import AGGREGATIONS

RATIOS = ('token', 'sequence', 'sequence_token')
_OF_TOKENS = ('none', 'token', 'token_mask')
IMPORTANCES = ('none', 'token', 'sequence', 'token_mask', 'sequence_mask')
KL_ESTIMATORS = ('k1', 'k2', 'k3', 'none')
KL_PLACES = ('loss', 'reward')
SUPERVISIONS = ('outcome', 'process')
STEPS = ('optimizer', 'trust_region')


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Changing an option compiles a new program.

    Raises:
      ValueError: an unknown option, or options of which one would do nothing or the wrong thing.
    """

    loss: str = 'clipped'  # a function of `losses`
    ratio: str = 'token'  # see `losses.at_level`
    importance: str = 'none'  # correction for the sampler, see `losses.importance_weights`
    supervision: str = 'outcome'  # one reward for each completion, or 'process': one for each step
    baseline: str = 'mean'  # see `advantages.group_advantages`; 'critic': PPO, `advantages.gae`
    scale: str = 'std'
    advantage_eps: float = 1e-4
    aggregation: str = 'sequence_mean'  # see `score.token_weights`
    kl: str = 'k3'  # estimator; 'none' leaves the reference out of the program
    kl_place: str = 'loss'  # 'loss', or 'reward': r - beta * KL, see `penalty_to_go`
    inner_updates: int = 1  # optimizer updates per rollout (the paper's mu)
    microbatch: int = 1  # groups whose gradient is computed at a time
    rows: int = 0  # completions of a microbatch read at a time, longest first; 0: all of them
    packed: bool = False  # `rows` are sequences of T columns that completions are packed into
    widths: int = 4  # numbers of columns that are compiled: T, T / 2, ..., see `microbatch`
    unroll: bool = False  # layers, see `models.unrolled`: faster but on TPUs, longer to compile
    logprob_chunk: int = 128  # completion positions whose logits exist at a time
    entropy: bool = False  # compute the policy's entropy: a metric, and what its bonus needs
    entropy_mask: bool = False  # train only the share `top_entropy` of the tokens
    step: str = 'optimizer'  # 'trust_region': TRPO's natural gradient, see `trust_region`
    cg_steps: int = 10  # of its conjugate gradient
    backtracks: int = 10  # of its line search, each half as long as the one before

    def __post_init__(self) -> None:
        check_group_options(2, baseline=self.baseline, scale=self.scale)
        for name, known in (
            ('loss', tuple(LOSSES)),
            ('ratio', RATIOS),
            ('importance', IMPORTANCES),
            ('supervision', SUPERVISIONS),
            ('aggregation', AGGREGATIONS),
            ('kl', KL_ESTIMATORS),
            ('kl_place', KL_PLACES),
            ('step', STEPS),
        ):
            if getattr(self, name) not in known:
                value = getattr(self, name)
                raise ValueError(f'{name}={value!r} is unknown: use one of {", ".join(known)}')
        for name, least in (
            ('inner_updates', 1),
            ('microbatch', 1),
            ('rows', 0),
            ('widths', 1),
            ('logprob_chunk', 1),
            ('cg_steps', 1),
            ('backtracks', 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f'{name}={getattr(self, name)} must be at least {least}')
        self._check_kl()
        if self.packed:
            self._require_tokens()
        if self.supervision == 'process' and self.baseline == 'leave_one_out':
            raise ValueError(
                "supervision='process' has no baseline='leave_one_out': use 'mean', 'none' or "
                "'critic'"
            )
        if self.loss in PAIRWISE:
            self._require_pairs()
        if self.loss == 'nll' and self.ratio != 'token':
            raise ValueError(
                f"loss='nll' with ratio={self.ratio!r}, of which it has none: use ratio='token'"
            )
        if self.step == 'trust_region' and (self.loss != 'surrogate' or self.inner_updates > 1):
            raise ValueError(
                f"step='trust_region' with loss={self.loss!r}, inner_updates={self.inner_updates}: "
                "its line search bounds the step itself, so use loss='surrogate' and one update"
            )
        if self.step == 'trust_region' and self.unroll:
            raise ValueError(
                "unroll=True with step='trust_region', whose products scan over the layers: use "
                'unroll=False'
            )

    def _check_kl(self) -> None:
        if self.kl == 'k1' and self.kl_place == 'loss':
            raise ValueError(
                "kl='k1' with kl_place='loss' has an expected on-policy gradient of zero: "
                "use kl='k2' or 'k3', or kl_place='reward'"
            )
        in_reward = self.kl != 'none' and self.kl_place == 'reward'
        if in_reward and self.supervision == 'process' and self.baseline != 'critic':
            raise ValueError(
                "kl_place='reward' with supervision='process' would need a KL for each step: "
                "use kl_place='loss', or baseline='critic', whose rewards are per token"
            )

    def _require_tokens(self) -> None:
        """In a packed sequence no loss finds the end of a completion, and nothing is trimmed."""
        if not self.rows:
            raise ValueError('packed=True with rows=0: say how many sequences are read at a time')
        for name, known in (('ratio', ('token',)), ('widths', (1,)), ('importance', _OF_TOKENS)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(
                    f'packed=True with {name}={value!r}: use packed=False, or {name} of '
                    f'{", ".join(map(repr, known))}'
                )

    def _require_pairs(self) -> None:
        """A preference loss reads the order of its two rewards and nothing else of these."""
        for name, value in (
            ('ratio', 'token'),
            ('importance', 'none'),
            ('supervision', 'outcome'),
            ('baseline', 'mean'),
            ('scale', 'none'),
            ('aggregation', 'sequence_mean'),
            ('kl', 'none'),
            ('rows', 0),
            ('entropy_mask', False),
        ):
            if getattr(self, name) != value:
                raise ValueError(
                    f'loss={self.loss!r} with {name}={getattr(self, name)!r}: preference losses '
                    f'compare whole completions; use {name}={value!r}'
                )

    @property
    def of_tokens(self) -> bool:
        """Whether the loss is a sum over tokens that know nothing of each other."""
        return self.ratio == 'token' and self.importance in _OF_TOKENS and self.loss not in PAIRWISE

    @property
    def has_bounds(self) -> bool:
        """Whether the loss reads `clip_low` and `clip_high`."""
        return self.loss in ('clipped', 'cispo')

    @property
    def reads_reference(self) -> bool:
        """Whether log-probs of the reference are part of the program."""
        return self.kl != 'none' or self.loss in PAIRWISE

    @property
    def penalty_to_go(self) -> bool:
        """Whether a KL in the reward counts at the tokens up to its own, and not at the whole row.

        So it is without a group to compare with (REINFORCE++, arXiv 2501.03262: A_t = r - beta *
        sum of KL_i, i >= t). A critic's advantages have a reward for each token anyway.
        """
        return self.baseline == 'none' and self.scale in ('none', 'batch')

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a trained value function."""
        return self.baseline == 'critic'
