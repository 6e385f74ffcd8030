"""The usual recipe: clipping, AdamW with a decay mask, a learning-rate schedule."""

from typing import Any, Literal

import jax
import optax


def learning_rate(
    lr: float,
    steps: int,
    *,
    schedule: Literal["cosine", "wsd", "constant"] = "cosine",
    warmup: int = 0,
    decay_share: float = 0.2,
    end_factor: float = 0.1,
) -> optax.Schedule:
    """Learning rate of each step: linear warm-up, then one of three shapes.

    Args:
        lr: peak.
        steps: length of the run; the shapes end there.
        schedule: "cosine" to `end_factor * lr` (Loshchilov & Hutter 2017,
            arXiv 1608.03983); "wsd", constant with a linear tail over the last
            `decay_share` of the steps (arXiv 2404.06395); or "constant".
        warmup: steps of the warm-up from 0, at most all of them.
        decay_share: see "wsd".
        end_factor: last learning rate as a share of the peak.
    """
    warmup = min(warmup, steps)
    rest = max(steps - warmup, 1)
    if schedule == "cosine":
        body = optax.cosine_decay_schedule(lr, rest, alpha=end_factor)
    elif schedule == "wsd":
        tail = max(int(steps * decay_share), 1)
        body = optax.join_schedules(
            [
                optax.constant_schedule(lr),
                optax.linear_schedule(lr, lr * end_factor, tail),
            ],
            [max(rest - tail, 0)],
        )
    else:
        body = optax.constant_schedule(lr)
    return optax.join_schedules([optax.linear_schedule(0, lr, warmup), body], [warmup])


def decay_mask(params: Any) -> Any:
    """True for matrices; the scales of norms and biases are left out, by name."""

    def decays(path: tuple, _: Any) -> bool:
        return getattr(path[-1], "key", None) not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(
    learning_rate: optax.ScalarOrSchedule,
    *,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    clip: float | None = 1.0,
) -> optax.GradientTransformationExtraArgs:
    """Clipping by global norm, then AdamW (arXiv 1711.05101) on matrices' decay."""
    steps = [] if clip is None else [optax.clip_by_global_norm(clip)]
    steps.append(
        optax.adamw(
            learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=decay_mask
        )
    )
    return optax.with_extra_args_support(optax.chain(*steps))
