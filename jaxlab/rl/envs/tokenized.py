"""The instruction as a language model reads it, for a policy with a tower."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces


class Tokenized(gymnasium.ObservationWrapper):
    """Replaces the ids of the instruction's words by tokens of its text.

    Args:
      env: one of `api`'s spaces.
      folder: of a Hugging Face checkpoint, with its tokenizer.json.
      length: tokens; a longer instruction loses its end.
    """

    def __init__(self, env: gymnasium.Env, folder: str | Path, length: int) -> None:
        from jaxlab.tokens import load_tokenizer

        super().__init__(env)
        self.tokenizer, self.length = load_tokenizer(folder), length
        inner = env.observation_space
        assert isinstance(inner, spaces.Dict)
        tokens = spaces.Box(0, self.tokenizer.vocab_size, (length,), np.int32)
        self.observation_space = spaces.Dict({**inner.spaces, "instruction": tokens})

    def observation(self, observation: dict[str, Any]) -> dict[str, Any]:
        """With the instruction as tokens, each plus 1, then 0."""
        tokens = self.tokenizer.encode(observation["text"])[: self.length]
        padded = np.zeros(self.length, np.int32)
        padded[: len(tokens)] = np.asarray(tokens, np.int32) + 1
        return observation | {"instruction": padded}
