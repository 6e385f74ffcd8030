"""The policy of `jaxlab.models.gui_policy` as the asynchronous parts want it."""

from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jaxlab.errors import ConfigError
from jaxlab.models import gpt, gui_policy, hf
from jaxlab.rl.actions import KINDS, ActionTokens
from jaxlab.rl.config import GuiPolicy
from jaxlab.rl.policy import Acted, Policy, Scored


def build(config: GuiPolicy, space: Any) -> Policy:
    """The policy for an observation space of `envs.api`.

    With a tower the instruction is what `envs.tokenized` makes of it, `config.typed`
    says how many words the environment types, and `init` reads the tower's weights
    from its folder (not where it is traced: then only shapes are right).

    Raises:
        ConfigError: sizes do not go together; the message names both.
        UserError: the tower cannot be read.
    """
    height, width, _ = space["image"].shape
    check(config, height, width)
    words = int(space["instruction"].high.max()) + 1
    typed = words if config.typed is None else config.typed
    grid = ActionTokens(height // config.cell, width // config.cell, typed)
    tower = None if config.tower is None else hf.load_config(config.tower)
    model = gui_policy.PointerPolicy(config, words, KINDS, grid.others, tower)
    allowed = grid.allowed()

    def run(params: Any, images: Any, instruction: Any, choose: Any) -> Any:
        seen = jnp.asarray(images), jnp.asarray(instruction)
        found: Any = model.apply({"params": params}, *seen, allowed, choose)
        return tuple(jnp.stack(places, 1) for places in found)

    @jax.jit
    def fresh(key: jax.Array) -> Any:
        image = jnp.zeros((1, height, width, 3), jnp.uint8)
        text = jnp.zeros((1, *space["instruction"].shape), jnp.int32)
        return gui_policy.init_params(model, key, image, text, allowed)

    def init(key: jax.Array) -> Any:
        params = fresh(key)
        if tower is not None and config.tower is not None:
            if isinstance(key, jax.core.Tracer):  # by `jax.eval_shape`
                params["tower"] = gpt.init_params(tower, key)
            else:
                params["tower"] = hf.load_params(config.tower, tower)[1]
        return params

    def act(
        params: Any, images: Any, instruction: Any, keys: Any, temperature: Any
    ) -> Acted:
        sharpness = 1 / jnp.maximum(temperature, 1e-6)

        def choose(place: int, logits: Any) -> tuple[Any, Any]:
            logits = logits * sharpness
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, place)
            return jax.vmap(jax.random.categorical)(own, logits), logits

        index, logp, entropy = run(params, images, instruction, choose)
        tokens = index + jnp.array([0, KINDS, KINDS])[None]
        used = _used(allowed, index[:, 0])
        tokens = jnp.where(used, tokens, -1).astype(jnp.int32)
        return Acted(tokens, *(jnp.where(used, x, 0) for x in (logp, entropy)))

    def score(
        params: Any, images: Any, instruction: Any, tokens: Any, mask: Any
    ) -> Scored:
        index = jnp.where(mask, tokens - jnp.array([0, KINDS, KINDS])[None], 0)

        def choose(place: int, logits: Any) -> tuple[Any, Any]:
            return index[:, place], logits

        _, logp, entropy = run(params, images, instruction, choose)
        return Scored(logp, entropy)

    return Policy(init, act, score, grid.decode, grid.encode)


def _used(allowed: Any, kind: Any) -> Any:
    """Which tokens an action of a kind has: bool [row, LENGTH]."""
    second, third = jnp.asarray(allowed.any(2))
    return jnp.stack([jnp.ones_like(kind, bool), second[kind], third[kind]], 1)


def check(config: GuiPolicy, height: int, width: int) -> None:
    """Raises ConfigError where sizes do not go together, naming both."""
    sizes = {
        "the screen's height": height,
        "the screen's width": width,
        "policy.cell": config.cell,
        "policy.stride": config.stride,
        "policy.patch": config.patch,
        "policy.width": config.width,
        "policy.heads": config.heads,
    }
    for part, whole in (
        ("policy.cell", "the screen's height"),
        ("policy.cell", "the screen's width"),
        ("policy.stride", "policy.cell"),
        ("policy.stride", "policy.patch"),
        ("policy.heads", "policy.width"),
    ):
        if sizes[part] < 1 or sizes[whole] < 1 or sizes[whole] % sizes[part]:
            raise ConfigError(
                f"{whole} {sizes[whole]} is not a multiple of {part} {sizes[part]}"
            )
    if config.width // config.heads % 2:
        raise ConfigError(
            f"policy.width {config.width} over policy.heads {config.heads} is odd; "
            "rotary embeddings turn pairs"
        )
