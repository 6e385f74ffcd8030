"""The objective of DART (arXiv 2509.23866): step-wise GRPO between three policies.

To be maximised, over the steps D of the groups (one group: all steps of all rollouts
of one task), for a step's tokens a after the history h and the observation s:

    J = E_D[ 1[H >= q(H)] ( w min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)
                            - beta KL(pi || pi_ref) ) ]
    A   = (R - mean_D R) / std_D R         `stepwise_advantage`
    w   = min(pi_old / pi_rollout, C)      `truncated_importance_weights`
    rho = pi / pi_old
    H                                      `jaxlab.rl.curation.entropy_mask`

Three policies are kept apart: pi_rollout chose the action, on another machine, with
other arithmetic, maybe some versions ago; pi_old is the trainer's own when it took up
the batch; pi is what is being changed. Only pi has a gradient.

Everything is computed in float32, or in float64 where the arguments are.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Real

from jaxlab.rl.curation import group_index

MAX_LOG_RATIO = 20.0
"""Log-ratios are held within this, so that exp stays finite; beyond it no gradient."""


def stepwise_advantage(
    reward: Real[ArrayLike, " step"],
    group: Int[ArrayLike, " step"],
    eps: ArrayLike = 1e-6,
    *,
    mask: Bool[ArrayLike, " step"] | None = None,
) -> Float[Array, " step"]:
    """Advantage of each step within its group (DART, step-wise GRPO).

    (R - mean) / (std + eps), mean and std over the steps of the group, so that long
    trajectories weigh more. The std is the group's own (divided by n), as the paper
    writes it; the released code divides by n - 1 and leaves a group of one its reward.
    Here the advantages of every group sum to zero: a group of one, or of equal
    rewards, has exactly none.

    Args:
        reward: of the trajectory that the step belongs to; any real type.
        group: task of each step: any integers (within int32 unless x64 is on), in any
            order.
        eps: added to the std.
        mask: False where the step is padding: not counted, advantage 0.

    Returns:
        float32 or wider, without a gradient.

    Raises:
        ValueError: `group` or `mask` does not have one entry for each step.
    """
    rewards = stop_gradient(_wide(reward))
    if rewards.size == 0:
        return rewards
    steps = rewards.shape[0]
    index, sizes = group_index(steps, group, mask)
    if mask is not None:
        rewards = jnp.where(jnp.asarray(mask, bool), rewards, 0)
    count = jnp.maximum(sizes, 1).astype(rewards.dtype)

    def mean(values: Array) -> Array:
        return (jax.ops.segment_sum(values, index, steps + 1) / count)[index]

    deviation = rewards - mean(rewards)
    advantage = deviation / (jnp.sqrt(mean(jnp.square(deviation))) + eps)
    # Equal rewards: their mean is rounded, and eps would not hide what that leaves.
    highest = jax.ops.segment_max(rewards, index, steps + 1)[index]
    lowest = jax.ops.segment_min(rewards, index, steps + 1)[index]
    differs = highest > lowest
    if mask is not None:
        differs &= jnp.asarray(mask, bool)
    return jnp.where(differs, advantage, 0)


def truncated_importance_weights(
    logp_old: Real[ArrayLike, "*shape"],
    logp_rollout: Real[ArrayLike, "*shape"],
    cap: ArrayLike = 1.0,
) -> Float[Array, "*shape"]:
    """Weights w = min(pi_old / pi_rollout, cap), elementwise (DART's truncated IS).

    The paper writes w for the whole action; per token here, as in the released code:
    the variance of a product over tokens grows with their number. That code falls back
    to 1 where a row's rollout log-probabilities are all about 0; pass the same array
    twice where there are none.

    Args:
        logp_old: nats, of the trainer's policy when it took up the batch.
        logp_rollout: nats, of the policy that acted, as recorded.
        cap: C; inf is plain importance sampling.

    Returns:
        float32 or wider, in [0, cap], without a gradient; where both are -inf, as in
        padding, min(1, cap).
    """
    log_ratio = _log_ratio(_wide(logp_old), _wide(logp_rollout))
    return stop_gradient(jnp.minimum(jnp.exp(log_ratio), cap))


def dart_loss(
    logp: Float[ArrayLike, "step token"],
    logp_old: Float[ArrayLike, "step token"],
    logp_rollout: Float[ArrayLike, "step token"],
    logp_ref: Float[ArrayLike, "step token"] | None,
    advantage: Real[ArrayLike, " step"],
    token_mask: Bool[ArrayLike, "step token"],
    step_mask: Bool[ArrayLike, " step"] | None = None,
    *,
    clip_low: ArrayLike = 0.2,
    clip_high: ArrayLike = 0.28,
    beta: ArrayLike = 0.1,
    cap: ArrayLike = 1.0,
    ratio: Literal["token", "sequence"] = "token",
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """-J of the module's equation: the mean over steps of the mean over their tokens.

    The mean is over the steps that are trained: padding, and steps that the entropy
    mask leaves out, change neither the loss nor its gradient and may hold anything
    (-inf, NaN). (E_D as printed divides by the steps left out too: by a factor of
    about 0.8 smaller.) To add up micro-batches, weight each by its `steps`.

    Where the paper and its released code differ: clip 0.2 / 0.28 is the paper's (code
    0.1 / 0.28); the KL is k3, exp(d) - d - 1 with d = log(pi_ref / pi), not weighted by
    w; averages are the code's (the paper leaves them open); the code's dual clip is
    left out.

    With ratio="sequence" rho is that of GSPO (arXiv 2507.18071, eq. 7),
    exp(mean over tokens of log(pi / pi_old)), one for all tokens of a step, in its
    token form (eq. 14) so that each token's gradient keeps its own w: the value is the
    sequence's, the gradient with respect to a token's logp is rho w A / tokens. GSPO
    wants far smaller clips, of the order of 4e-4. (The released code trains with this
    ratio and its own clip.)

    Args:
        logp: log-probability (nats) of the chosen tokens under the policy; float32,
            bfloat16 or float64. The only argument with a gradient.
        logp_old: the same under the policy when the batch was taken up; `logp` itself
            where a batch is used for one update.
        logp_rollout: the same, recorded when acting; `logp_old` for no correction.
        logp_ref: the same under the frozen reference; None: no KL.
        advantage: of each step, as of `stepwise_advantage`.
        token_mask: True for the tokens that the policy chose; a step without any is
            padding.
        step_mask: True for the steps to train on, as of `entropy_mask`; None: all.
        clip_low: e_low; the ratio is clipped at 1 - e_low.
        clip_high: e_high; at 1 + e_high.
        beta: weight of the KL; 0.1 in the paper, for a pretrained policy.
        cap: C of the importance weights.
        ratio: "token" or "sequence"; static under `jax.jit`.

    Returns:
        the loss, and without a gradient, averaged as the loss is: `policy_loss`, `kl`
        (to the reference), `ratio`, `clipped_low`, `clipped_high` (shares at which the
        clip takes the gradient), `weight` (w), `truncated` (share with pi_old /
        pi_rollout over the cap by more than 0.1 %, which rounding does not reach),
        `mismatch` (|log(pi_old / pi_rollout)|), `advantage` (its absolute value); and
        `ratio_max`, `steps` and `tokens` trained, `kept` (share of the steps with
        tokens that are trained). All 0 where nothing is trained.

    Raises:
        ValueError: shapes differ, or `ratio` is another.
    """
    if ratio not in ("token", "sequence"):
        raise ValueError(f"no ratio {ratio!r}: choose token or sequence")
    mask_st = jnp.asarray(token_mask, bool)
    real_s = mask_st.any(axis=1)
    kept_s = real_s
    if step_mask is not None:
        _check_shape("step_mask", step_mask, real_s)
        kept_s = real_s & jnp.asarray(step_mask, bool)
    mask_st = mask_st & kept_s[:, None]

    def clean(name: str, values: ArrayLike, mask: Array) -> Array:
        _check_shape(name, values, mask)
        return jnp.where(mask, _wide(values), 0)

    logp_st = clean("logp", logp, mask_st)
    old_st = stop_gradient(clean("logp_old", logp_old, mask_st))
    rollout_st = stop_gradient(clean("logp_rollout", logp_rollout, mask_st))
    advantage_s1 = stop_gradient(clean("advantage", advantage, kept_s))[:, None]

    # Each step counts 1 / steps, each of its tokens 1 / (its tokens) of that.
    tokens_s = mask_st.sum(axis=1)
    steps = kept_s.sum()
    share_st = mask_st / jnp.maximum(tokens_s, 1)[:, None] / jnp.maximum(steps, 1)
    share_st = share_st.astype(logp_st.dtype)

    def average(values_st: Array) -> Array:
        return jnp.sum(share_st * values_st)

    log_rho_st = _log_ratio(logp_st, old_st)
    if ratio == "sequence":
        mean_s = jnp.sum(log_rho_st, axis=1) / jnp.maximum(tokens_s, 1)
        # 0, with each token's gradient:
        own_st = _log_ratio(logp_st, stop_gradient(logp_st))
        log_rho_st = stop_gradient(mean_s)[:, None] + own_st
    log_rho_st = jnp.clip(log_rho_st, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    rho_st = jnp.exp(log_rho_st)
    weight_st = truncated_importance_weights(old_st, rollout_st, cap)
    free_st = rho_st * advantage_s1
    clipped_st = jnp.clip(rho_st, 1 - clip_low, 1 + clip_high) * advantage_s1
    policy_loss = -average(weight_st * jnp.minimum(free_st, clipped_st))

    kl = jnp.zeros((), logp_st.dtype)
    if logp_ref is not None:
        ref_st = stop_gradient(clean("logp_ref", logp_ref, mask_st))
        d_st = _log_ratio(ref_st, logp_st)
        d_st = jnp.clip(d_st, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = average(jnp.expm1(d_st) - d_st)
    loss = policy_loss + beta * kl

    mismatch_st = jnp.abs(_log_ratio(old_st, rollout_st))
    truncated_st = jnp.exp(_log_ratio(old_st, rollout_st)) > 1.001 * cap
    gone_st = clipped_st < free_st
    metrics = {
        "loss": loss,
        "policy_loss": policy_loss,
        "kl": kl,
        "ratio": average(rho_st),
        "ratio_max": jnp.max(jnp.where(mask_st, rho_st, 0), initial=0),
        "clipped_low": average(gone_st & (rho_st < 1)),
        "clipped_high": average(gone_st & (rho_st > 1)),
        "weight": average(weight_st),
        "truncated": average(truncated_st),
        "mismatch": average(mismatch_st),
        "advantage": average(jnp.broadcast_to(jnp.abs(advantage_s1), mask_st.shape)),
        "steps": steps.astype(logp_st.dtype),
        "tokens": tokens_s.sum().astype(logp_st.dtype),
        "kept": steps / jnp.maximum(real_s.sum(), 1).astype(logp_st.dtype),
    }
    return loss, jax.tree.map(stop_gradient, metrics)


def _check_shape(name: str, values: ArrayLike, like: Array) -> None:
    if jnp.shape(values) != like.shape:
        raise ValueError(
            f"{name} has shape {jnp.shape(values)} instead of {like.shape}, "
            "as token_mask has it"
        )


def _wide(values: ArrayLike) -> Array:
    """As floats of at least 32 bits: a log-ratio in bfloat16 would be noise."""
    array = jnp.asarray(values)
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _log_ratio(above: Array, below: Array) -> Array:
    """The difference above - below, 0 where both are the same infinity, not NaN.

    A NaN of the caller's stays one: it says that the policy has diverged.
    """
    same = (above == below) & jnp.isinf(above)
    return jnp.where(same, 0, above - jnp.where(same, 0, below))
