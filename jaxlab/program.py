"""A run made ready: its model, optimizer, mesh and compiled functions.

`scripts/train.py`, evaluation, generation and the benchmarks all start here, so a
state is built, laid out and read back in one way only.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxlab import config, data, manual, optim, replicas
from jaxlab._compat import cache_on_every_process
from jaxlab.errors import ConfigError, UserError
from jaxlab.mesh import link_delays, make_mesh, partition_spec
from jaxlab.models import gpt
from jaxlab.state import TrainState, new_state, state_shardings, with_shardings
from jaxlab.step import (
    Gradient,
    eval_step,
    mean_gradient,
    mean_loss,
    train_step,
    update,
)


class Program(NamedTuple):
    """What a run does, as functions of explicit state."""

    run: config.Run
    """the config with its model resolved"""
    mesh: Mesh
    abstract: TrainState
    """shapes and shardings of the state"""
    init: Callable[[], TrainState]
    """fresh state on the mesh"""
    from_params: Callable[[Any], TrainState]
    """state before the first step of given weights"""
    step: Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]
    """jitted `train_step`; the state is donated"""
    evaluate: Callable[[Any, Any], tuple[jax.Array, jax.Array]]
    """jitted `eval_step`"""
    weights: Callable[[TrainState], Any]
    """the model to evaluate: weights or their moving average, mean over replicas"""
    outer: dict[str, Any] | None
    """arguments of `optim.outer_step`; None: all devices train one model"""
    evaluate_each: Callable[[Any, Any], Any] | None
    """jitted: sums of `eval_step` of each replica"""
    overlap_report: Callable[[], Any] | None
    """what `overlap.explain` says of the model, to print; None: nothing overlaps"""


def adopt_init(run: config.Run) -> config.Run:
    """Takes the architecture, and the tokenizer if it is "init", from `init.path`.

    How the model is computed (`scan`, `remat`, `dtype`) stays as the run says.

    Raises:
        UserError: no model there that jaxlab can load.
    """
    path = run.init.path
    if path is None:
        if run.data.tokenizer == "init":
            raise ConfigError("data.tokenizer is init, and there is no --init.path")
        return run
    from jaxlab.models import hf

    ours = run.model
    model = dataclasses.replace(
        hf.load_config(path), scan=ours.scan, remat=ours.remat, dtype=ours.dtype
    )
    spec = run.data.tokenizer
    spec = str(Path(path) / "tokenizer.json") if spec == "init" else spec
    return dataclasses.replace(
        run, model=model, data=dataclasses.replace(run.data, tokenizer=spec)
    )


def open_tokens(text: config.Data, corpus: str) -> data.Tokens:
    """Token files of a corpus, made now if they are not there yet."""
    return data.open_tokens(
        data.prepare(
            corpus,
            text.tokenizer,
            eval_fraction=text.eval_fraction,
            text_field=text.text_field,
            cache=text.cache,
        )
    )


def build(
    run: config.Run,
    vocab: int,
    replicas_saved: int | None = None,
    mesh: Mesh | None = None,
) -> Program:
    """Resolves a run against the devices and makes its functions; compiles nothing.

    Args:
        run: the config as written.
        vocab: size of the tokenizer.
        replicas_saved: to read a state of so many replicas; None: those of the mesh.
        mesh: with the axes of `jaxlab.mesh`, for devices that need not be here; None:
            `run.mesh` over those that are.

    Raises:
        ConfigError: see `config.resolve_model` and `resolve_mesh`, or replicas that
            cannot hold together.
    """
    if mesh is None:
        planned = run.health.plan_mesh and jax.process_count() > 2
        mesh = make_mesh(run.mesh, link_delays() if planned else None)
    model = config.resolve_model(run.model, vocab)
    run = dataclasses.replace(run, model=model)

    tx, outer = run.optimizer.build(run.steps), None
    if isinstance(run.optimizer, config.NoLoCo):
        count = replicas_saved or mesh.shape[replicas.AXIS]
        outer = run.optimizer.outer(count, run.seed)
        apart: dict[str, Any] = outer | {"inner_steps": None}
        try:
            optim.noloco(tx, **outer)  # checks what the exchange will need
            tx = optim.noloco(tx, **apart)
        except ValueError as error:
            raise ConfigError(f"optimizer: {error}") from error
    apply = gpt.GPT(model).apply

    def make(params: Any) -> TrainState:
        return new_state(params, tx, run.ema is not None)

    def fresh() -> TrainState:
        return make(gpt.init_params(model, jax.random.key(run.seed)))

    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(fresh)
    shardings = state_shardings(shapes, gpt.param_names(model), tx, mesh)
    gradient, report = partial(mean_gradient, apply=apply, z_loss=run.z_loss), None
    by_hand = run.parallel.overlap != "off" and mesh.shape[manual.TENSOR] > 1
    if by_hand:
        gradient, report = _by_hand(run, mesh, shapes.params, outer is not None)
    compiler = None if report is None else _compiler_options(mesh)
    options: Any = {"tx": tx, "ema": run.ema, "on_nonfinite": run.on_nonfinite}
    evaluate = partial(eval_step, apply=apply)

    def weights(state: TrainState) -> Any:
        return state.params if state.ema is None else state.ema

    if outer is None:
        return Program(
            run,
            mesh,
            with_shardings(shapes, shardings),
            init=jax.jit(fresh, out_shardings=shardings),
            from_params=jax.jit(make, out_shardings=shardings),
            step=jax.jit(
                partial(train_step, gradient=gradient, **options),
                donate_argnums=0,
                out_shardings=(shardings, None),
                compiler_options=compiler,
            ),
            evaluate=jax.jit(evaluate),
            weights=weights,
            outer=None,
            evaluate_each=None,
            overlap_report=report,
        )

    count = outer["axis_size"]
    mean = jax.jit(optim.mean_params, out_shardings=shardings.params)
    shapes = jax.eval_shape(partial(optim.replicate, axis_size=count), shapes)
    shardings = replicas.lead(shardings, mesh, count)
    options["exchange"] = partial(optim.outer_step, **outer)
    if by_hand:
        # `gradient` is one flat shard_map over the mesh, and none may lie in another,
        # so the rest of the step has its own.
        spread_update = replicas.spread_update(partial(update, **options), shapes, mesh)

        def step(state, batch):
            return spread_update(state, *gradient(state.params, batch))
    else:
        one = partial(train_step, gradient=gradient, **options)
        step = replicas.spread_step(one, shapes, mesh)
    return Program(
        run,
        mesh,
        with_shardings(shapes, shardings),
        init=jax.jit(lambda: optim.replicate(fresh(), count), out_shardings=shardings),
        from_params=jax.jit(
            lambda params: optim.replicate(make(params), count),
            out_shardings=shardings,
        ),
        step=jax.jit(
            step,
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compiler,
        ),
        evaluate=jax.jit(evaluate),
        weights=lambda state: mean(weights(state)),
        outer=outer,
        evaluate_each=jax.jit(replicas.spread_evaluation(evaluate, mesh)),
        overlap_report=report,
    )


def _by_hand(
    run: config.Run, mesh: Mesh, params: Any, replicas_apart: bool
) -> tuple[Gradient, Callable[[], Any] | None]:
    """`mean_gradient` with the mesh handled by hand, as `run.parallel` says.

    Args:
        run: the config with its model resolved.
        mesh: the run's.
        params: shapes of one replica's weights.
        replicas_apart: weights, gradient and loss lead with the axis `replica`.

    Returns:
        (params, batch) to gradient and loss on the whole mesh, and `overlap_report`.
    """
    model = gpt.GPT(gpt.local(run.model, mesh.shape[manual.TENSOR]), by_hand=True)
    specs = manual.param_specs(gpt.param_names(run.model))

    def forward(params, tokens_bt, segments_bt):
        return model.apply({"params": params}, tokens_bt, segments_bt=segments_bt)

    run_forward, report = forward, None
    how = run.parallel.overlap
    if how != "plain" and how != "off":
        from jaxlab import overlap
        from jaxlab.overlap.hardware import find

        device = mesh.devices.flat[0]
        policy = overlap.Policy(
            mode=how,
            chunks=2 if device.platform == "tpu" else 1,  # see matmul_reduce_scatter
            axes=(manual.TENSOR,),
            hardware=find(device.device_kind),
        )
        run_forward = overlap.overlap(forward, policy=policy, on_skip="ignore")
        rows = run.batch // run.accumulate
        tokens = jax.ShapeDtypeStruct((1, rows, run.length), jnp.int32)
        logits = manual.spread(
            lambda params, tokens_abt: forward(params, tokens_abt[0], None),
            specs,
            partition_spec(("batch", None, "vocab")),
            mesh,
        )
        report = partial(
            overlap.explain,
            logits,
            params,
            tokens,
            policy=policy,
            log=lambda text: None,
        )

    def apply(variables, tokens_bt, *, segments_bt):
        return run_forward(variables["params"], tokens_bt, segments_bt)

    gradient = partial(
        mean_gradient,
        apply=apply,
        z_loss=run.z_loss,
        row_axes=manual.row_axes(replicas_apart),
    )
    results = (specs, PartitionSpec())
    return manual.spread(gradient, specs, results, mesh, replicas_apart), report


def _compiler_options(mesh: Mesh) -> dict[str, Any] | None:
    """Options with which XLA keeps the rings of a step, and hides them."""
    if mesh.devices.flat[0].platform != "gpu":
        return None
    from jaxlab.overlap import compiler_options

    return compiler_options("cuda")


def description(program: Program, tokenizer_fingerprint: str) -> dict[str, Any]:
    """What a checkpoint says of itself; restored under no other model or tokenizer."""
    model = config.to_json(program.run.model)
    count = program.outer["axis_size"] if program.outer else None
    return {
        "model": model | {"tokenizer": tokenizer_fingerprint[:16]},
        "replicas": count,
    }


def restore(
    saved: Any,
    program: Program,
    tokenizer: Any,
    log: Callable[[str], Any] = print,
    hot: Any = None,
) -> tuple[TrainState, int] | None:
    """The newest sound state, on this program's number of replicas.

    Args:
        saved: of `checkpoint.open_checkpoints`.
        program: the run.
        tokenizer: its tokenizer.
        log: takes lines about damage, resizing and snapshots.
        hot: of `snapshot.open_snapshots`: a newer one there goes before a checkpoint.

    Raises:
        UserError: see `checkpoint.restore`.
    """
    from jaxlab import checkpoint, snapshot

    ours = description(program, tokenizer.fingerprint)
    readers = [
        (checkpoint.newest_description(saved), partial(checkpoint.restore, saved))
    ]
    if hot is not None:
        last = max(checkpoint.steps(saved), default=-1)
        newest = snapshot.newest(hot, last, log)
        said = newest[2] if newest else {}
        readers.insert(0, (said, partial(snapshot.restore, hot, after=last)))
    for said, read in readers:
        found = _resized(read, said.get("replicas"), ours, program, tokenizer, log)
        if found is not None:
            return found
    return None


def _resized(
    read: Callable[..., Any],
    there: int | None,
    ours: dict[str, Any],
    program: Program,
    tokenizer: Any,
    log: Callable[[str], Any],
) -> tuple[TrainState, int] | None:
    """A state of `there` replicas, read onto this program's number of them."""
    here = ours["replicas"]
    if there is None or here is None or there == here:
        return read(program.abstract, description=ours, log=log)
    other = build(program.run, tokenizer.vocab_size, replicas_saved=there)
    found = read(other.abstract, description=ours, log=log)
    if found is None:
        return None
    log(
        f"the checkpoint has {there} replicas and this run {here}: "
        + ("the first ones go on" if here < there else "the first ones are copied")
    )
    shardings = jax.tree.map(lambda x: x.sharding, program.abstract)
    resize = jax.jit(
        partial(optim.resize, axis_size=here),
        out_shardings=shardings,
    )
    return resize(found[0]), found[1]


class Trained(NamedTuple):
    """A trained model read back from its run folder."""

    run: config.Run
    model: config.GPT
    params: Any
    tokenizer: Any
    step: int


def load(folder: str | Path) -> Trained:
    """Reads the newest good checkpoint of a run folder, whole on every device.

    Of replicas that have drifted apart it takes the mean.

    Raises:
        UserError: no run or no checkpoint there, or none that is whole.
    """
    from jaxlab import checkpoint, tokens

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no run folder: it has no config.json")
    run = config.load(folder / "config.json")
    tokenizer = tokens.load_tokenizer(folder / "tokenizer.json")
    whole = dataclasses.replace(run, mesh=config.MeshShape(data=-1))
    with checkpoint.open_checkpoints(folder / "checkpoints", read_only=True) as saved:
        count = checkpoint.newest_description(saved).get("replicas")
        program = build(whole, tokenizer.vocab_size, replicas_saved=count)
        found = restore(saved, program, tokenizer)
    if found is None:
        raise UserError(f"{folder} has no checkpoint yet")
    state, step = found
    params = program.weights(state)
    return Trained(run, program.run.model, params, tokenizer, step)


def use_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that a second start compiles nothing.

    Leaves a cache alone that the user has configured.
    """
    cache_on_every_process()
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        home = Path(os.environ.get("JAXLAB_CACHE", "~/.cache/jaxlab")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def first_state(program: Program) -> TrainState:
    """State before the first step: fresh, or with the weights of `run.init.path`.

    Raises:
        UserError: the weights are not of this model.
    """
    path = program.run.init.path
    if path is None:
        return program.init()
    from jaxlab.models import hf

    shardings = jax.tree.map(lambda x: x.sharding, program.abstract.params)
    _, params = hf.load_params(path, program.run.model, shardings=shardings)
    return program.from_params(params)


def sample(program: Program, params: Any, tokenizer: Any) -> str:
    """Prompt and continuation that the model writes, as `run.sample` says; or ""."""
    from jaxlab.models import generate

    want = program.run.sample
    if not want.tokens:
        return ""
    prompt = tokenizer.encode(want.prompt).tolist() or [tokenizer.eos]
    written = generate.generate(
        program.run.model,
        params,
        [prompt],
        tokens=want.tokens,
        key=jax.random.key(program.run.seed),
        temperature=want.temperature,
        top_k=want.top_k,
        top_p=want.top_p,
        eos=tokenizer.eos,
        vocab=tokenizer.vocab_size,
    )
    return want.prompt + tokenizer.decode(token[0] for token in written)


def held_out_loss(
    trained: Trained, corpus: str, batches: int = 0, rows: int = 16
) -> tuple[float, int, int]:
    """Evaluates a trained model on the held-out documents of a corpus.

    Args:
        trained: the model.
        corpus: any that `data.prepare` takes.
        batches: how many batches at most; 0: all.
        rows: sequences a batch.

    Returns:
        mean loss (nats per token), number of targets, their bytes of UTF-8.
    """
    run = trained.run
    tokens = open_tokens(run.data, corpus)
    eos = trained.tokenizer.eos if run.data.isolate_documents else None
    held_out = data.eval_batches(
        tokens.eval,
        length=run.length,
        batch=rows,
        limit=batches or None,
        eos=eos,
    )
    evaluate = jax.jit(partial(eval_step, apply=gpt.GPT(trained.model).apply))
    sums, size = [], 0
    for batch in held_out:
        sums.append(evaluate(trained.params, jax.tree.map(jnp.asarray, batch)))
        kept = batch.targets_abt[batch.mask_abt > 0]
        size += len(trained.tokenizer.decode(kept).encode())
    loss, count = mean_loss(sums)
    return loss, count, size
