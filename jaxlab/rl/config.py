"""What a reinforcement learning run is; `jaxlab.config` loads and saves it as well."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from jaxlab.config import Checkpoint
from jaxlab.errors import ConfigError
from jaxlab.optimizers import AdamW


@dataclass(frozen=True)
class TinyPolicy:
    """A bilinear pointer of a few hundred weights, for tests and for measuring."""

    width: int = 8
    """width of the query that the instruction becomes"""

    def build(self, space: Any) -> Any:
        """The `jaxlab.rl.policy.Policy` for observations of a space."""
        from jaxlab.rl import tiny

        return tiny.build(self.width, space)


@dataclass(frozen=True)
class GuiPolicy:
    """Reads an instruction and a screen, and points (`jaxlab.models.gui_policy`)."""

    cell: int = 4
    """pixels between the places that it points at; divides the screen's sides"""
    stride: int = 2
    """pixels between the patches that it reads; divides cell"""
    patch: int = 12
    """side of a patch, pixels; a multiple of stride"""
    pool: int = 2
    """cells a side that the transformer sees as one"""
    features: int = 32
    """of a patch, and in the comparison with a word"""
    width: int = 64
    """of the transformer"""
    layers: int = 1
    """transformer blocks"""
    heads: int = 4
    """of their attention"""
    typed: int | None = None
    """words that the environment types by number; None: those of its instructions, if
    there is no tower"""
    tower: str | None = None
    """folder with a Hugging Face config.json and .safetensors (Llama family): that
    language model reads the instruction, as `envs.tokenizer` gives it"""
    train_tower: bool = True
    """train the language model's weights, too"""

    def build(self, space: Any) -> Any:
        """The `jaxlab.rl.policy.Policy` for observations of a space."""
        from jaxlab.rl import pointer

        return pointer.build(self, space)


@dataclass(frozen=True)
class Envs:
    """The environment cluster: processes that host environments, each on a thread."""

    id: str = "jaxlab/Pix-v0"
    """gymnasium's name of the environment; `module:name` imports a module first"""
    tasks: tuple[str, ...] = ("click",)
    """tasks to learn, all at once"""
    hosts: int = 2
    """processes"""
    slots: int = 4
    """environments a process"""
    max_steps: int = 10
    """actions that any rollout may take"""
    tokenizer: str | None = None
    """folder with the tokenizer.json that makes tokens of instructions, for a policy
    with a tower; None: the tower's, or words by number where there is none"""
    tokens: int = 32
    """of an instruction; a longer one loses its end"""
    step_timeout: float = 30.0
    """seconds after which an action or a reset is given up, with its environment"""


@dataclass(frozen=True)
class Rollout:
    """The rollout service and the order of rollouts."""

    mode: Literal["rollout", "task", "batch", "lockstep"] = "rollout"
    """what is waited for before an environment goes on: nothing, its group, the batch
    and its update, or every other environment at each step"""
    workers: int = 2
    """processes that compute actions"""
    buckets: tuple[int, ...] = (1, 4, 16)
    """batch sizes that are compiled; requests are padded to one of them"""
    temperature: float = 1.0
    """of the sampled tokens"""
    sync: Literal["per_worker", "all"] = "per_worker"
    """who stops for new weights: one worker after the other, or all at once"""
    max_lag: int = 2
    """versions by which a trained step may be behind; 0: synchronous"""
    attempts: int = 3
    """times that a rollout whose environment or host died is run"""


@dataclass(frozen=True)
class Curation:
    """DART's adaptive curation, piece by piece; see `jaxlab.rl.curation`."""

    dynamic_rollouts: bool = True
    """fewer rollouts for tasks that often succeed"""
    n_max: int = 8
    """rollouts of a group"""
    n_min: int = 2
    """rollouts of a group of a solved task"""
    threshold: float = 0.6
    """success rate up to which a task gets n_max"""
    dynamic_length: bool = True
    """no longer than a success of the task needs"""
    probe_share: float = 0.05
    """share of the rollouts that are not capped"""
    experience: bool = True
    """a stored success for groups that failed as a whole"""
    per_task: int = 16
    """successes stored of a task"""
    max_age: int | None = 200
    """versions that a success of the policy itself stays; None: for ever"""
    max_injections: int | None = None
    """times that one success may be used; None: any number"""
    entropy_quantile: float = 0.2
    """share of the steps, those of lowest entropy, left out; 0: none"""
    importance_cap: float | None = 1.0
    """C of truncated importance sampling; None: no weights"""
    keep_uninformative: bool = False
    """train groups of equal rewards too, which have no advantage (but a KL)"""
    max_rejected: int | None = None
    """groups of equal rewards after which an update takes what others there are, at
    least one, instead of waiting for all; None: it waits"""


@dataclass(frozen=True)
class Objective:
    """The loss of an update; see `jaxlab.rl.loss.dart_loss`."""

    clip_low: float = 0.2
    """the ratio is clipped at 1 - clip_low"""
    clip_high: float = 0.28
    """and at 1 + clip_high"""
    beta: float = 0.01
    """weight of the KL to the policy at the start"""
    ratio: Literal["token", "sequence"] = "token"
    """of tokens (GRPO), or of whole actions (GSPO)"""
    passes: int = 1
    """optimizer steps an update takes on its batch; at 1 no ratio is ever clipped"""


@dataclass(frozen=True)
class Cloning:
    """Imitation of the environments' experts, before the policy acts."""

    updates: int = 0
    """optimizer steps; 0: none, the policy starts from nothing"""
    batch: int = 64
    """steps of demonstrations in each"""
    episodes: int = 1000
    """demonstrations, all tasks together; they also go to the experience pool"""
    optimizer: AdamW = field(default_factory=lambda: AdamW(lr=3e-3, weight_decay=0.0))
    """of the imitation alone"""


@dataclass(frozen=True)
class RLRun:
    """One reinforcement learning run of a GUI agent."""

    out: str = "runs/rl"
    """run folder; one that has a checkpoint is resumed"""
    steps: int = 100
    """updates in all"""
    seed: int = 0
    """of the weights, the episodes and the sampled actions"""
    groups: int = 4
    """groups of rollouts an update"""
    log_every: int = 1
    """updates between logged metrics"""
    store: str | None = None
    """postgresql://... for several hosts; None: SQLite in the run folder"""
    keep_blobs: int | None = 5000
    """newest rollouts whose frames stay on disk, beside those in the experience pool;
    None: all"""
    engine: Literal["local", "ray"] = "local"
    """where the processes run: on this host, or on those of a Ray cluster"""
    ray_address: str | None = None
    """of the Ray cluster; None: one is started on this host"""
    page: int | None = None
    """port, on loopback, of a web page to watch the run by; 0: any; None: no page"""
    policy: TinyPolicy | GuiPolicy = field(default_factory=TinyPolicy)
    cloning: Cloning = field(default_factory=Cloning)
    envs: Envs = field(default_factory=Envs)
    rollout: Rollout = field(default_factory=Rollout)
    curation: Curation = field(default_factory=Curation)
    objective: Objective = field(default_factory=Objective)
    optimizer: AdamW = field(
        default_factory=lambda: AdamW(schedule="constant", weight_decay=0.0)
    )
    checkpoint: Checkpoint = field(default_factory=lambda: Checkpoint(every=20))


def complete(run: RLRun) -> RLRun:
    """With what follows from other fields: a tower brings its own tokenizer."""
    tower = getattr(run.policy, "tower", None)
    if tower is None or run.envs.tokenizer is not None:
        return run
    return replace(run, envs=replace(run.envs, tokenizer=tower))


def validate(run: RLRun) -> None:
    """Checks a run before anything is started.

    Raises:
        ConfigError: a field out of range, or two that do not go together; the
            message names them and their values.
    """
    least = {
        "steps": (run.steps, 1),
        "groups": (run.groups, 1),
        "log_every": (run.log_every, 1),
        "objective.passes": (run.objective.passes, 1),
        "cloning.updates": (run.cloning.updates, 0),
        "cloning.batch": (run.cloning.batch, 1),
        "cloning.episodes": (run.cloning.episodes, 1),
        "envs.hosts": (run.envs.hosts, 1),
        "envs.slots": (run.envs.slots, 1),
        "envs.max_steps": (run.envs.max_steps, 1),
        "envs.tokens": (run.envs.tokens, 1),
        "rollout.workers": (run.rollout.workers, 1),
        "rollout.max_lag": (run.rollout.max_lag, 0),
        "rollout.attempts": (run.rollout.attempts, 1),
        "curation.n_min": (run.curation.n_min, 1),
        "curation.per_task": (run.curation.per_task, 1),
        "checkpoint.keep_last": (run.checkpoint.keep_last, 1),
    }
    for name, (value, smallest) in least.items():
        if value < smallest:
            raise ConfigError(f"{name} is {value}, and must be at least {smallest}")
    most = run.curation.max_rejected
    if most is not None and most < 1:
        raise ConfigError(
            f"curation.max_rejected is {most}, and must be at least 1, or None"
        )
    for name, share in (
        ("curation.probe_share", run.curation.probe_share),
        ("curation.entropy_quantile", run.curation.entropy_quantile),
        ("curation.threshold", run.curation.threshold),
    ):
        if not 0 <= share <= 1:
            raise ConfigError(f"{name} is {share}, and must lie between 0 and 1")
    policy, tower = run.policy, getattr(run.policy, "tower", None)
    if tower is None and run.envs.tokenizer is not None:
        raise ConfigError(
            f"envs.tokenizer {run.envs.tokenizer} without policy.tower, the folder of "
            "the language model that reads its tokens"
        )
    if isinstance(policy, GuiPolicy) and tower is not None and policy.typed is None:
        raise ConfigError(
            "policy.tower without policy.typed, the number of words that the "
            "environment types: len(env.unwrapped.vocabulary)"
        )
    if not run.envs.step_timeout > 0:
        raise ConfigError(
            f"envs.step_timeout is {run.envs.step_timeout}, and must be positive"
        )
    if run.curation.n_max < run.curation.n_min:
        raise ConfigError(
            f"curation.n_max {run.curation.n_max} is less than "
            f"curation.n_min {run.curation.n_min}"
        )
    if run.curation.n_min < 2 and not run.curation.keep_uninformative:
        raise ConfigError(
            f"curation.n_min {run.curation.n_min} makes groups that have nothing to "
            "compare with; set it to 2, or curation.keep_uninformative"
        )
    if not run.envs.tasks or len(set(run.envs.tasks)) != len(run.envs.tasks):
        raise ConfigError(f"envs.tasks {run.envs.tasks} is empty or names one twice")
    buckets = run.rollout.buckets
    if not buckets or buckets[0] < 1 or list(buckets) != sorted(set(buckets)):
        raise ConfigError(
            f"rollout.buckets {buckets} must ascend from at least 1, like 1 4 16"
        )
    if run.store is not None and not run.store.startswith("postgresql://"):
        raise ConfigError(
            f"store {run.store!r} is no postgresql:// address; leave it out for SQLite"
        )
    if run.engine == "ray" and run.ray_address is not None and run.store is None:
        raise ConfigError(
            f"ray_address {run.ray_address} may span hosts, which SQLite does not "
            "reach; set --store postgresql://..."
        )
    if run.ray_address is not None and run.engine != "ray":
        raise ConfigError(f"ray_address {run.ray_address} without --engine ray")
