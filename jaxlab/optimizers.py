"""Configs of the optimizers, and what they build; `jaxlab.config` has the rest."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay, clipping and a learning-rate schedule."""

    lr: float = 1e-3
    """peak learning rate"""
    b1: float = 0.9
    """decay of the first moment"""
    b2: float = 0.95
    """decay of the second moment"""
    eps: float = 1e-8
    """epsilon of Adam"""
    weight_decay: float = 0.1
    """decoupled weight decay, on matrices only (not on norms)"""
    clip: float | None = 1.0
    """global norm that gradients are clipped to"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """after warm-up: cosine, warm-up-stable-decay (linear tail), or constant"""
    warmup: int = 50
    """steps of linear warm-up"""
    decay_share: float = 0.2
    """share of the steps in the decay of wsd"""
    end_factor: float = 0.1
    """final learning rate as a share of the peak"""

    def learning_rate(self, steps: int) -> Any:
        """The optax schedule of a run of so many steps."""
        from jaxlab import optim

        return optim.learning_rate(
            self.lr,
            steps,
            schedule=self.schedule,
            warmup=self.warmup,
            decay_share=self.decay_share,
            end_factor=self.end_factor,
        )

    def build(self, steps: int) -> Any:
        """The optax transformation of a run of so many steps."""
        from jaxlab import optim

        return optim.adamw(
            self.learning_rate(steps),
            b1=self.b1,
            b2=self.b2,
            eps=self.eps,
            weight_decay=self.weight_decay,
            clip=self.clip,
        )


@dataclass(frozen=True)
class NoLoCo:
    """Replicas (mesh.replica) that train apart and gossip every `inner_steps`."""

    inner: AdamW = field(default_factory=AdamW)
    """optimizer of the steps between exchanges"""
    inner_steps: int = 50
    """steps between exchanges"""
    outer_lr: float = 0.7
    """share of the replicas' mean progress that an exchange takes"""
    momentum: float = 0.5
    """momentum of the exchange"""
    gamma: float | None = None
    """pull towards the partner's weights; None: outer_lr"""
    nesterov: bool = False
    """Nesterov's form of the momentum"""
    pairing: Literal["round_robin", "random", "all"] = "round_robin"
    """who exchanges with whom; all: one all-reduce, which makes it DiLoCo"""
    group_size: int = 2
    """replicas that average in a round, a power of 2"""
    exchange: Literal["fused", "pair"] = "fused"
    """tensors sent per weight: one, or two as in the paper"""
    wire: Literal["float32", "bfloat16", "int8"] = "float32"
    """type on the wire"""
    error_feedback: bool = False
    """send later what a narrow wire has rounded off"""

    def learning_rate(self, steps: int) -> Any:
        """The inner optimizer's schedule."""
        return self.inner.learning_rate(steps)

    def build(self, steps: int) -> Any:
        """The inner optimizer of a run of so many steps."""
        return self.inner.build(steps)

    def outer(self, replicas: int, seed: int) -> dict[str, Any]:
        """Arguments of `optim.noloco` and `optim.outer_step`."""
        return {
            "axis_size": replicas,
            "inner_steps": self.inner_steps,
            "outer_lr": self.outer_lr,
            "momentum": self.momentum,
            "gamma": self.gamma,
            "nesterov": self.nesterov,
            "pairing": self.pairing,
            "group_size": self.group_size,
            "seed": seed,
            "exchange": self.exchange,
            "wire_dtype": None if self.wire == "float32" else self.wire,
            "error_feedback": self.error_feedback,
        }
