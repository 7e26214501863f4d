"""The arrays passed from data to sample, score and update, and the letters of their shapes.

`B` prompts (= groups) in a batch, `G` completions per prompt (the paper's G), `P` padded prompt
tokens, `T` padded completion tokens, `V` vocabulary, `D` model width, `H` query heads, `K`
key/value heads, `h` width of one head, `L` layers.

The group (one prompt and its G completions) is the leading unit everywhere: every type below can be
indexed or `vmap`ped along B to obtain one group. Prompts and completions are padded on the right.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool, Float, Int, Shaped, UInt, UInt32

if TYPE_CHECKING:
    Array = jax.Array
else:
    Array = jax.Array | np.ndarray  # on a device or on the host
Scalar = int | float | np.number | Shaped[Array, '']
Params = Any  # a nested dict of arrays


class Prompts(NamedTuple):
    """A batch of tokenized prompts."""

    tokens: Int[Array, 'B P']
    length: Int[Array, ' B']  # real tokens of each prompt, at least 1
    # Row in the data set, which seeds a prompt's random numbers and names it in logs.
    index: Int[Array, ' B']  # type: ignore[assignment]  # hides tuple.index
    # Experts of each token in each layer, if the sampler recorded them; see `models.routing`.
    routing: UInt[Array, 'B P L k'] | None = None


class Rollout(NamedTuple):
    """Prompts with G completions each, sampled from a policy or demonstrations (G = 1)."""

    prompts: Prompts
    tokens: Int[Array, 'B G T']
    mask: Bool[Array, 'B G T']  # true up to and including the token that ends the completion
    logprobs: Float[Array, 'B G T']  # under the sampling policy; zeros for demonstrations
    ended: Bool[Array, 'B G']  # by an end-of-sequence token or stop string; false: cut off at T
    kept: Bool[Array, 'B G'] | None = None  # completions to train on; None: all
    # Bits of the tokens that the sampler's filters kept, if recorded; see `engine.support`.
    support: UInt32[Array, 'B G T words'] | None = None
    # Experts of the token before each, from which it was predicted; see `models.routing`.
    routing: UInt[Array, 'B G T L k'] | None = None
    # Tokens of the policy, where the others of the mask are an environment's; None: all of them.
    trained: Bool[Array, 'B G T'] | None = None

    @property
    def policy_mask(self) -> Bool[Array, '*B G T']:
        """True at the tokens of the policy. Attention reads all of `mask`; losses count these."""
        return self.mask if self.trained is None else self.trained


class StepRewards(NamedTuple):
    """A reward for each step of a completion (process supervision) instead of one for the whole."""

    values: Float[Array, 'B G T']  # read only where `ends` is true
    ends: Bool[Array, 'B G T']  # true at the last token of each step


class FunctionRewards(NamedTuple):
    """The rewards of R functions for each completion, instead of their weighted sum."""

    values: Float[Array, 'B G R']  # NaN where a function does not apply
    weights: Float[Array, 'B R']  # of the functions, the same for all groups


class BaselinedRewards(NamedTuple):
    """A reward for each completion, and for one more of each prompt that they are compared with."""

    values: Float[Array, 'B G']
    baseline: Float[Array, ' B']  # of the prompt's greedy completion


# NaN: see `estimators.estimate`.
Rewards = Float[Array, 'B G'] | StepRewards | FunctionRewards | BaselinedRewards


class Batch(NamedTuple):
    """A rollout with everything a per-token loss needs. Fields that are not needed are None."""

    rollout: Rollout
    advantages: Float[Array, 'B G T']
    weights: Float[Array, 'B G T']  # the loss is sum(weights * loss per token)
    ref_logprobs: Float[Array, 'B G T'] | None = None  # of the reference model
    old_logprobs: Float[Array, 'B G T'] | None = None  # of the policy before the inner updates
    old_values: Float[Array, 'B G T'] | None = None  # of the critic before the inner updates
    returns: Float[Array, 'B G T'] | None = None  # the critic's targets
    high_covariance: Bool[Array, 'B G T'] | None = None  # tokens that `covariance` treats
    selected: Bool[Array, 'B G T'] | None = None  # tokens of high entropy, if only they are trained

    def per_token(self) -> 'Batch':
        """The fields of shape [B, G, T, ...]; the others are None."""
        absent: Any = None
        rollout = self.rollout._replace(prompts=absent, ended=absent, kept=absent, routing=None)
        return self._replace(rollout=rollout)

    def loss_inputs(self) -> 'Batch':
        """The fields of shape [B, G, T], which a loss may use."""
        part = self.per_token()
        return part._replace(rollout=part.rollout._replace(support=None))

    def without_routing(self) -> 'Batch':
        """The batch for another model than the one that sampled it, with experts of its own."""
        prompts = self.rollout.prompts._replace(routing=None)
        return self._replace(rollout=self.rollout._replace(prompts=prompts, routing=None))


class TrainState(NamedTuple):
    """Everything that a training step changes."""

    step: Int[Array, '']  # calls of `train_step` so far
    params: Params
    opt_state: Any
    skipped: Int[Array, '']  # optimizer updates skipped because the gradient was not finite
    value_params: Params = None  # of the critic, if there is one
    value_opt_state: Any = None
    reference: Params = None  # a reference that follows the policy; None: it is fixed, or absent


class Sampling(NamedTuple):
    """The distribution of the next token. Traced scalars: changing one never recompiles.

    It is softmax(logits / temperature), restricted to the tokens that pass every filter and
    renormalized. A filter that is None is not compiled.
    """

    temperature: Array | float = 1.0  # the logits are divided by it; 0: greedy decoding
    top_k: Array | int | None = 0  # keep the k largest logits; 0 keeps all
    top_p: Array | float | None = 1.0  # keep the smallest set with this much probability
    min_p: Array | float | None = 0.0  # keep those with this share of the largest probability
