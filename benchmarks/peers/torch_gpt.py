"""The peer of `train_throughput.py`: the same model and optimizer in PyTorch.

Written as PyTorch's users write it: modules, `scaled_dot_product_attention`, fused
AdamW, bf16 by autocast over float32 weights. The modules bear the names of jaxlab's
parameters, so that its weights load by name.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
linear = partial(nn.Linear, bias=False)


def rotate(x, cos, sin):
    """Rotary embeddings, half-split pairs, in float32."""
    first, second = x.float().chunk(2, -1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    return torch.cat(turned, -1).to(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention."""

    def __init__(self, c):
        super().__init__()
        self.heads = c.heads
        self.q, self.k, self.v, self.out = (linear(c.width, c.width) for _ in range(4))

    def forward(self, x, cos, sin):
        """[b, t, width] to the same."""
        b, t, _ = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, -1).transpose(1, 2)
            for f in (self.q, self.k, self.v)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(b, t, -1))


class MLP(nn.Module):
    """GELU (tanh form) or SwiGLU."""

    def __init__(self, c):
        super().__init__()
        self.up, self.down = linear(c.width, c.mlp), linear(c.mlp, c.width)
        self.gate = linear(c.width, c.mlp) if c.activation == "swiglu" else None

    def forward(self, x):
        """[b, t, width] to the same."""
        if self.gate is not None:
            return self.down(F.silu(self.gate(x)) * self.up(x))
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """One layer."""

    def __init__(self, c):
        super().__init__()
        self.attention, self.mlp = Attention(c), MLP(c)
        self.attention_norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        self.mlp_norm = nn.RMSNorm(c.width, eps=c.norm_eps)

    def forward(self, x, cos, sin):
        """[b, t, width] to the same."""
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """The whole model; gives the mean loss."""

    def __init__(self, c, length):
        super().__init__()
        self.layers = c.layers
        self.embedding = nn.Embedding(c.vocab, c.width)
        for i in range(c.layers):
            self.add_module(f"layer_{i}", Block(c))
        self.norm = nn.RMSNorm(c.width, eps=c.norm_eps)
        pairs = torch.arange(0, c.head_dim, 2) / c.head_dim
        angle = torch.arange(length)[:, None] * c.rope_theta**-pairs
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, inputs, targets):
        """Tokens and targets, int64[b, t], to the mean loss."""
        x = self.embedding(inputs)
        for i in range(self.layers):
            x = self.get_submodule(f"layer_{i}")(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load(model: GPT, weights: Path) -> None:
    """Loads jaxlab's weights: names joined by "/", kernels [in, out]."""
    state = {}
    for path, x in np.load(weights).items():
        *modules, kind = path.split("/")
        name = ".".join([*(modules or [kind]), "weight"])
        state[name] = torch.tensor(x.T if kind == "kernel" else x)
    model.load_state_dict(state)


def make_step(
    c: Any,
    weights: Path,
    *,
    length: int,
    lr: float,
    weight_decay: float,
    compiled: bool,
) -> Callable[[np.ndarray], torch.Tensor]:
    """A function that takes a step on int32[batch, length + 1] and gives the loss."""
    model = GPT(c, length)
    load(model, weights)
    model.to(DEVICE)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    scales = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": scales, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        eps=1e-8,
        weight_decay=weight_decay,
        fused=True,
    )
    loss_of = torch.compile(model) if compiled else model
    half = c.dtype == "bfloat16"

    def step(tokens: np.ndarray) -> torch.Tensor:
        batch = torch.from_numpy(tokens).to(DEVICE, torch.int64)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=half):
            loss = loss_of(batch[:, :-1], batch[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def settle() -> None:
    """Waits until the device has done all that was asked."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
