"""The arrays that flow from data to sample, score and update, and the legend of their shapes.

`B` prompts (= groups) in a batch, `G` completions per prompt (the paper's G), `P` padded prompt
tokens, `T` padded completion tokens, `V` vocabulary, `D` model width, `H` query heads, `K`
key/value heads, `h` width of one head, `L` layers.

The group (one prompt and its G completions) is the leading unit everywhere, so every type below can
be indexed or `vmap`ped along B to obtain one group. Prompts and completions are padded on the
right.
"""

from typing import Any, NamedTuple

Array = Any  # jax.Array or np.ndarray, of the dtype and shape in the comment
Params = Any  # a nested dict of arrays


class Prompts(NamedTuple):
    """A batch of tokenised prompts."""

    tokens: Array  # i32[B, P]
    length: Array  # i32[B], real tokens of each prompt, at least 1
    index: Array  # i32[B], row in the data set: names the prompt in random numbers and in logs


class Rollout(NamedTuple):
    """Prompts with G completions each, sampled from a policy or given as demonstrations (G = 1)."""

    prompts: Prompts
    tokens: Array  # i32[B, G, T]
    mask: Array  # bool[B, G, T], true up to and including the end-of-sequence token
    logprobs: Array  # f32[B, G, T] of the policy as sampled; zeros for demonstrations
    ended: Array  # bool[B, G], the row holds its end-of-sequence token; false where T cut it off
    kept: Array = None  # bool[B, G], the rows that are learnt from; None: all


class StepRewards(NamedTuple):
    """Rewards of the steps that a completion consists of, in the place of one for all of it."""

    values: Array  # f32[B, G, T], read where a step ends
    ends: Array  # bool[B, G, T], the last token of each step


class Batch(NamedTuple):
    """A rollout with everything a per-token loss needs. A field is None where no loss reads it."""

    rollout: Rollout
    advantages: Array  # f32[B, G, T]
    weights: Array  # f32[B, G, T], the loss is sum(weights * per_token_loss)
    ref_logprobs: Array = None  # f32[B, G, T] of the reference model
    old_logprobs: Array = None  # f32[B, G, T] of the policy before the first inner update
    old_values: Array = None  # f32[B, G, T] of the critic before the first inner update
    returns: Array = None  # f32[B, G, T], what its values are trained towards

    def per_token(self) -> 'Batch':
        """Only what is [B, G, T]."""
        nothing: Any = None
        rollout = self.rollout._replace(prompts=nothing, ended=nothing, kept=nothing)
        return self._replace(rollout=rollout)


class TrainState(NamedTuple):
    """All that a training step changes."""

    step: Array  # i32[], calls of the update program so far
    params: Params
    opt_state: Any
    skipped: Array  # i32[], optimizer updates left out because the gradient was not finite
    value_params: Params = None  # of the critic, where there is one
    value_opt_state: Any = None
    reference: Params = None  # a reference that follows the policy; None: one that does not move


class Sampling(NamedTuple):
    """How the next token is drawn. Scalars, traced by jit: changing one never recompiles.

    The log-softmax of `logits / temperature` is cut to the tokens that pass every filter and
    renormalised. Temperature 0 is greedy decoding.
    """

    temperature: Array | float = 1.0
    top_k: Array | int = 0  # keep the k largest logits; 0 keeps all
    top_p: Array | float = 1.0  # keep the smallest set of tokens that holds this probability
    min_p: Array | float = 0.0  # keep tokens with at least this share of the largest probability


class Objective(NamedTuple):
    """Scalars of the loss, traced by jit: changing one never recompiles."""

    clip_low: Array | float = 0.2  # the ratio's lower bound is 1 - clip_low
    clip_high: Array | float = 0.2  # its upper bound 1 + clip_high
    beta: Array | float = 0.0  # weight of the KL term to the reference; scales a pair's `margin`
    dual_clip: Array | float = 0.0  # for A < 0 the loss is at most dual_clip * |A|; 0: unbounded
    kl_clamp: Array | float = 0.0  # the KL term lies within +- kl_clamp; 0: anywhere
    tau_positive: Array | float = 1.0  # SAPO's temperature where A > 0
    tau_negative: Array | float = 1.05  # and where A <= 0
    importance_cap: Array | float = 2.0  # C of `importance_weights`
    entropy_bonus: Array | float = 0.0  # weight of the entropy, which is then raised
    top_entropy: Array | float = 1.0  # share of the tokens, the least certain, that are trained
    reference_decay: Array | float = 1.0  # d: after a step, ref = d * ref + (1 - d) * policy
    label_smoothing: Array | float = 0.0  # DPO: probability that a pair is the wrong way round
    gamma: Array | float = 1.0  # PPO's discount per token
    lam: Array | float = 0.95  # its lambda, see `advantages.gae`
    value_clip: Array | float = 0.2  # how far a value may move for its loss to count; 0: any way
    max_kl: Array | float = 0.01  # TRPO's bound on the mean KL to the policy before the step
    damping: Array | float = 0.1  # added to the diagonal of its Fisher matrix


def stage_order(name: str) -> tuple[int, int]:
    """Sorts the stages of a run: sft, reward, grpo, reward-2, grpo-2, ..."""
    kind, _, iteration = name.partition('-')
    return (0 if kind == 'sft' else int(iteration or 1), ('sft', 'reward', 'grpo').index(kind))
