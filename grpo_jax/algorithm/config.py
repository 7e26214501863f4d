"""What an update computes: one frozen options object, `Algorithm`.

Every method in DeepSeekMath's unified table (arXiv 2402.03300, table 10) and every variant in
`presets` is an `Algorithm`, together with the choice of the policy that samples. Options of speed
and memory are in `engine.compute.Compute`.
"""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from grpo_jax.algorithm import options
from grpo_jax.algorithm.binding import names_of
from grpo_jax.algorithm.estimators import ESTIMATORS
from grpo_jax.algorithm.losses import LOSSES
from grpo_jax.algorithm.preferences import PAIRWISE

Coef = Any  # a number or an array; `Any`, because JAX rebuilds pytrees with leaves of any kind


def _choice(default: Any) -> Any:
    """A static option: changing it compiles a new program."""
    return dataclasses.field(default=default, metadata={'static': True})


def _coef(default: float, valid: Callable[[float], bool], requirement: str) -> Any:
    """A traced scalar: changing it never recompiles, except to or from a value in `_NEUTRAL`."""
    return dataclasses.field(default=default, metadata={'range': (valid, requirement)})


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real)


def _is_array(value: Any) -> bool:
    return isinstance(value, jax.Array | np.ndarray)


def _equals(value: Any, number: float) -> bool:
    """Whether a coefficient is that number; false for arrays, which may be traced."""
    return _is_number(value) and bool(value == number)


_NOT_NEGATIVE: Any = (lambda x: 0 <= x < float('inf'), 'at least 0')
_ONE_OR_MORE: Any = (lambda x: 1 <= x < float('inf'), 'at least 1')
_POSITIVE: Any = (lambda x: 0 < x < float('inf'), 'above 0')
_FINITE: Any = (lambda x: abs(x) < float('inf'), 'finite')
_PART: Any = (lambda x: 0 < x <= 1, 'above 0 and at most 1')
_SHARE: Any = (lambda x: 0 <= x <= 1, 'between 0 and 1')


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Algorithm:
    """Static choices and traced coefficients of one training step.

    The choices are pytree metadata and the coefficients its leaves, so an `Algorithm` is an
    ordinary argument of a jitted function. The constructor checks it.

    Raises:
      ValueError: an unknown choice, a coefficient out of its range, a combination that computes the
        wrong thing, or an option without effect. The message begins with the option's name.
    """

    loss: str | Callable[..., jax.Array] = _choice('clipped')  # of `losses.LOSSES`, or your own
    ratio: str = _choice('token')  # see `off_policy.sequence_level`
    importance: str = _choice('none')  # sampler correction, see `off_policy.importance_weights`
    supervision: str = _choice('outcome')  # a reward per completion, or per step: 'process'
    baseline: str = _choice('mean')  # see `group_advantages`; 'greedy': ReMax, 'critic': PPO
    scale: str = _choice('std')  # what advantages are divided by, see `group_advantages`
    # Of `estimators.ESTIMATORS`, or your own, instead of baseline and scale.
    advantage_estimator: str | Callable[..., jax.Array] | None = _choice(None)
    pass_k: int = _choice(4)  # k of the advantage_estimator 'pass_at_k'
    # 'normalize_then_sum': each function's rewards in the group by themselves before the sum (GDPO)
    reward_aggregation: str = _choice('sum_then_normalize')
    aggregation: str = _choice('sequence_mean')  # see `logprobs.token_weights`
    kl: str = _choice('k3')  # estimator of the KL term; it is left out where beta is 0
    kl_place: str = _choice('loss')  # 'loss', or 'reward': r - beta * KL
    # The KL of a token times its ratio: its gradient is that of the reverse KL (DeepSeek-V3.2).
    unbiased_kl: bool = _choice(False)
    covariance: str = _choice('none')  # tokens of high covariance: 'clip' or 'kl', see `covariance`
    inner_updates: int = _choice(1)  # optimizer updates per rollout (the paper's mu)
    entropy: bool = _choice(False)  # report the policy's entropy
    step: str = _choice('optimizer')  # 'trust_region': TRPO's natural gradient step
    cg_steps: int = _choice(10)  # TRPO: iterations of the conjugate gradient
    backtracks: int = _choice(10)  # TRPO: most step sizes to try, each half the previous one

    advantage_eps: Coef = _coef(1e-4, *_NOT_NEGATIVE)  # added to a standard deviation
    clip_low: Coef = _coef(0.2, *_NOT_NEGATIVE)  # the ratio's lower bound: 1 - clip_low
    clip_high: Coef = _coef(0.2, *_NOT_NEGATIVE)  # the ratio's upper bound: 1 + clip_high
    dual_clip: Coef = _coef(0.0, *_NOT_NEGATIVE)  # A < 0: loss <= dual_clip * |A|; 0: off
    beta: Coef = _coef(0.0, *_NOT_NEGATIVE)  # weight of the KL term, or of DPO's margin
    kl_clamp: Coef = _coef(0.0, *_NOT_NEGATIVE)  # bound on the KL of a token; 0: none
    tau_positive: Coef = _coef(1.0, *_POSITIVE)  # SAPO's temperature where A > 0
    tau_negative: Coef = _coef(1.05, *_POSITIVE)  # SAPO's temperature where A <= 0
    vespo_k_positive: Coef = _coef(2.0, *_NOT_NEGATIVE)  # VESPO's k where A >= 0
    vespo_k_negative: Coef = _coef(3.0, *_NOT_NEGATIVE)  # VESPO's k where A < 0
    vespo_lambda_positive: Coef = _coef(3.0, *_NOT_NEGATIVE)  # VESPO's lambda where A >= 0
    vespo_lambda_negative: Coef = _coef(2.0, *_NOT_NEGATIVE)  # VESPO's lambda where A < 0
    importance_cap: Coef = _coef(2.0, *_ONE_OR_MORE)  # C of `importance_weights`
    # delta of `off_policy.off_policy_mask`, in nats per token; 0: every completion counts.
    off_policy_threshold: Coef = _coef(0.0, *_NOT_NEGATIVE)
    # Weight of the load-balancing loss of a mixture of experts, see `router_balance`.
    router_balance: Coef = _coef(0.0, *_NOT_NEGATIVE)
    cov_share: Coef = _coef(2e-4, *_PART)  # fraction of the tokens that `covariance` treats
    cov_low: Coef = _coef(1.0, *_FINITE)  # covariance='clip': only tokens above this covariance
    cov_high: Coef = _coef(5.0, *_FINITE)  # covariance='clip': only tokens below this covariance
    cov_kl: Coef = _coef(1.0, *_NOT_NEGATIVE)  # covariance='kl': weight of those tokens' KL
    entropy_bonus: Coef = _coef(0.0, *_NOT_NEGATIVE)  # weight of the entropy, which is maximized
    # Fraction of the tokens that are trained, those of the highest entropy; 1: all.
    top_entropy: Coef = _coef(1.0, *_PART)
    reference_decay: Coef = _coef(1.0, *_SHARE)  # d: ref <- d * ref + (1 - d) * policy
    # DPO: probability that a preference label is wrong.
    label_smoothing: Coef = _coef(0.0, lambda x: 0 <= x < 0.5, 'at least 0 and below 0.5')
    gamma: Coef = _coef(1.0, *_SHARE)  # PPO's discount per token
    lam: Coef = _coef(0.95, *_SHARE)  # PPO's lambda, see `critic.gae`
    value_clip: Coef = _coef(0.2, *_NOT_NEGATIVE)  # see `critic.value_loss`; 0: no clip
    max_kl: Coef = _coef(0.01, *_POSITIVE)  # TRPO's bound on the mean KL of a step
    damping: Coef = _coef(0.1, *_NOT_NEGATIVE)  # TRPO: added to the Fisher diagonal

    # Names of the coefficients that differ from their value in `_NEUTRAL`, such as 'beta'; static,
    # so that a program computes only the terms that are switched on. An array always differs.
    terms: frozenset[str] | None = dataclasses.field(
        default=None, repr=False, metadata={'static': True}
    )

    def __post_init__(self) -> None:
        coefficients = self.coefficients
        rebuilt = self.terms is not None and not any(map(_is_number, coefficients.values()))
        if rebuilt or not all(_is_number(x) or _is_array(x) for x in coefficients.values()):
            return  # JAX rebuilds the object around leaves of any kind, which cannot be checked
        terms = frozenset(
            name for name, x in _NEUTRAL.items() if not _equals(coefficients[name], x)
        )
        object.__setattr__(self, 'terms', terms)
        options.check_choices(self)
        options.check_combinations(self)
        for name, value in coefficients.items():
            valid, requirement = _FIELDS[name].metadata['range']
            if _is_number(value) and not valid(value):
                raise ValueError(f'{name}={value} is out of range: make it {requirement}')
        options.check_effects(self)

    @property
    def _terms(self) -> frozenset[str]:
        return self.terms or frozenset()

    @property
    def has_std(self) -> bool:
        """Whether advantages are divided by a standard deviation."""
        by_scale = self.scale not in ('none', 'informative') and self.advantage_estimator is None
        return by_scale or self.reward_aggregation == 'normalize_then_sum'

    @property
    def estimator_function(self) -> Callable[..., jax.Array] | None:
        """The advantage estimator as a function; None: by baseline and scale."""
        if isinstance(self.advantage_estimator, str):
            return ESTIMATORS[self.advantage_estimator]
        return self.advantage_estimator

    @property
    def estimator_arguments(self) -> frozenset[str]:
        """What the advantage estimator's signature names."""
        return names_of(self.estimator_function) if self.estimator_function else frozenset()

    @property
    def name_of_estimator(self) -> str | None:
        """The name of the advantage estimator, or of its function; None: by baseline and scale."""
        if isinstance(self.advantage_estimator, str) or self.advantage_estimator is None:
            return self.advantage_estimator
        return str(getattr(self.advantage_estimator, '__name__', 'estimator'))

    @property
    def uses_function_rewards(self) -> bool:
        """Whether the update needs the rewards of each function, `FunctionRewards`."""
        named = {'function_rewards', 'function_weights'} & self.estimator_arguments
        return bool(named) or self.reward_aggregation == 'normalize_then_sum'

    @property
    def coefficients(self) -> dict[str, Any]:
        """All coefficients by name."""
        return {name: getattr(self, name) for name in COEFFICIENTS}

    @property
    def loss_function(self) -> Callable[..., jax.Array]:
        """The loss as a function of arrays and coefficients."""
        return LOSSES[self.loss] if isinstance(self.loss, str) else self.loss

    @property
    def name_of_loss(self) -> str:
        """The name of the loss, or of its function."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, '__name__', 'loss')

    @property
    def pairwise(self) -> bool:
        """Whether the loss compares the two completions of a pair."""
        return self.loss in PAIRWISE

    @property
    def tokenwise(self) -> bool:
        """Whether the loss of a token depends on that token alone.

        Then it is computed from one chunk of logits at a time, in any order. A loss of your own is
        never treated as tokenwise, nor is one of `losses.LOSSES` that names `mask`: they get whole
        completions.
        """
        builtin = isinstance(self.loss, str) and 'mask' not in names_of(self.loss_function)
        whole = self.ratio != 'token' or self.importance.startswith('sequence')
        return builtin and not whole and not self.masks_off_policy

    @property
    def has_clip_bounds(self) -> bool:
        """Whether `clip_ratio/*` can be reported."""
        return self.loss in ('clipped', 'cispo')

    @property
    def has_kl(self) -> bool:
        """Whether there is a KL term."""
        return 'beta' in self._terms and self.kl != 'none'

    @property
    def kl_in_reward(self) -> bool:
        """Whether the KL term is subtracted from the rewards."""
        return self.has_kl and self.kl_place == 'reward'

    @property
    def uses_reference(self) -> bool:
        """Whether the program computes the reference's log-probs."""
        return self.has_kl or self.pairwise or 'ref_logprobs' in names_of(self.loss_function)

    @property
    def moves_reference(self) -> bool:
        """Whether the reference follows the policy."""
        return 'reference_decay' in self._terms

    @property
    def masks_entropy(self) -> bool:
        """Whether only the tokens of highest entropy are trained."""
        return 'top_entropy' in self._terms

    @property
    def masks_off_policy(self) -> bool:
        """Whether bad completions far from the sampler's policy are left out."""
        return 'off_policy_threshold' in self._terms

    @property
    def balances_routers(self) -> bool:
        """Whether there is a load-balancing loss."""
        return 'router_balance' in self._terms

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether the policy's log-probs are computed before the inner updates."""
        several = self.inner_updates > 1 or self.step == 'trust_region'
        return several or self.kl_in_reward or self.covariance != 'none'

    @property
    def needs_entropy(self) -> bool:
        """Whether the policy's entropy is computed in the training pass."""
        return self.entropy or 'entropy_bonus' in self._terms

    @property
    def has_critic(self) -> bool:
        """Whether advantages come from a trained value function."""
        return self.baseline == 'critic'


# Coefficient -> the value that switches its term off.
_NEUTRAL = {
    'beta': 0.0, 'entropy_bonus': 0.0, 'top_entropy': 1.0, 'reference_decay': 1.0,
    'off_policy_threshold': 0.0, 'router_balance': 0.0,
}  # fmt: skip
_FIELDS = {field.name: field for field in dataclasses.fields(Algorithm)}
COEFFICIENTS = tuple(name for name, field in _FIELDS.items() if 'range' in field.metadata)
