"""Environments for GUI agents; importing this registers them with gymnasium.

    import jaxlab.rl.envs
    env = gymnasium.make("jaxlab/Pix-v0", task="click")

`gymnasium.make("jaxlab.rl.envs:jaxlab/Pix-v0")` imports it by itself. What an
environment needs is imported when one is made.
"""

from gymnasium.envs.registration import register

register(
    id="jaxlab/Pix-v0",
    entry_point="jaxlab.rl.envs.pix:PixEnv",
    vector_entry_point="jaxlab.rl.envs.pix:PixVectorEnv",
)
register(
    id="jaxlab/MiniWoB-v0",
    entry_point="jaxlab.rl.envs.miniwob:MiniWoBEnv",
)
register(
    id="jaxlab/Farama-v0",
    entry_point="jaxlab.rl.envs.adapters:FaramaEnv",
)
register(
    id="jaxlab/BrowserGym-v0",
    entry_point="jaxlab.rl.envs.adapters:BrowserGymEnv",
)
