"""The same processes as actors of a real Ray cluster on this host."""

import pytest

from jaxlab.rl import launch
from jaxlab.rl.config import Envs, Rollout
from tests.test_rl_run import check_store, killer, tiny


@pytest.mark.requires("ray")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_run_on_ray_survives_the_death_of_an_actor(tmp_path):
    run = tiny(
        tmp_path / "run",
        engine="ray",
        steps=2,
        envs=Envs(tasks=("color",), hosts=1, slots=2, max_steps=3),
        rollout=Rollout(max_lag=1, buckets=(1,), workers=1),
    )
    watch = killer("host0")
    launch.train(run, print, watch)
    assert not watch.left
    check_store(run)
