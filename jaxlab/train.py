"""The training loop, from top to bottom: data, step, metrics, checkpoint.

Metrics are fetched one step behind, so the device always has the next step queued
while the host looks at the last one. A batch is a function of the step number and
the state holds all the rest, so a run that was interrupted ends with the same
numbers as one that was not.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
from tqdm import tqdm

from jaxlab import ahead, config, data, metrics, program, record, replicas
from jaxlab.errors import UserError
from jaxlab.files import locked_folder
from jaxlab.health.worker import Monitor, monitor
from jaxlab.mesh import local_rows, placed, put_batch, start_processes
from jaxlab.signals import stop_agreed, stop_requests
from jaxlab.state import TrainState
from jaxlab.step import mean_loss

Say = Callable[[str], None]


def train(run: config.Run, say: Say = print) -> TrainState:
    """Trains a language model to `run.steps`, or to a signal; resumes by itself.

    Args:
        run: what to do; see `jaxlab.config.Run`.
        say: takes the lines for the user (on process 0 only).

    Returns:
        the last state, on the mesh.

    Raises:
        UserError: bad configuration, data, run folder or checkpoint, or a loss
            that is not finite; nothing that was saved is lost.
    """
    with contextlib.ExitStack() as stack:
        health = stack.enter_context(monitor())
        start_processes(placed(run.distributed), run.mesh)
        program.use_compilation_cache()
        primary = jax.process_index() == 0
        if primary:
            stack.enter_context(locked_folder(run.out))
        run = program.adopt_init(run)
        tokens = program.open_tokens(run.data, run.data.corpus)
        made = program.build(run, tokens.tokenizer.vocab_size)
        config.validate(made.run, config.MeshShape(**made.mesh.shape))
        stack.enter_context(jax.set_mesh(made.mesh))
        step = stack.enter_context(ahead.compiling(made, health))
        made = made._replace(step=health.wrap(step))
        say = say if primary else lambda line: None
        return _train(made, tokens, health, stack, say)


def _train(
    made: program.Program,
    tokens: data.Tokens,
    health: Monitor,
    stack: contextlib.ExitStack,
    say: Say,
) -> TrainState:
    from jaxlab import checkpoint, snapshot  # orbax takes a while to import

    run, out = made.run, Path(made.run.out)
    description = program.description(made, tokens.tokenizer.fingerprint)
    folder, seconds = out / "checkpoints/snapshots", run.checkpoint.snapshot_seconds
    local = run.checkpoint.snapshot_folder
    hot = stack.enter_context(
        snapshot.open_snapshots(folder, seconds, say, local=local)
    )
    saved = stack.enter_context(
        contextlib.closing(
            checkpoint.open_checkpoints(
                out / "checkpoints",
                keep_last=run.checkpoint.keep_last,
                keep_best=run.checkpoint.keep_best,
            )
        )
    )
    found = program.restore(saved, made, tokens.tokenizer, say, hot)
    state, start = found or (program.first_state(made), 0)
    for line in record.start_up(made, tokens, start if found else None):
        say(line)
    if start >= run.steps:
        say(f"{out} is already at step {start} of {run.steps}; raise --steps to go on")
        return state

    write = stack.enter_context(
        metrics.open_writer(
            out if jax.process_index() == 0 else None, start if found else None
        )
    )
    record.write_run(made, tokens, write, start)
    batches, held_out = _pipelines(made, tokens, start, stack)
    stop = stack.enter_context(stop_requests())
    bar = stack.enter_context(_progress_bar(start, run.steps))
    rate = run.optimizer.learning_rate(run.steps)
    rate(start)  # compiles it here, and not between two steps
    watch = record.Stopwatch(made, start, health.pause)
    pending: tuple[int, dict[str, jax.Array]] | None = None

    def settle() -> None:
        """Waits for the pending step, checks its loss, logs it if it is its turn."""
        nonlocal pending
        if pending is None:
            return
        (step, scalars), pending = pending, None
        values = replicas.to_host(scalars)
        bar.update()
        if not values["finite"].all() and run.on_nonfinite == "stop":
            kept = "the last checkpoint there is whole"  # other replicas have gone on
            if made.outer is None:
                good = state._replace(skipped=state.skipped * 0)
                checkpoint.save(saved, step - 1, good, description)
                kept = "the state before it is saved there"
            raise UserError(
                f"the loss or gradient of step {step} is not finite (loss "
                f"{values['loss']}) in {out}; {kept}; try a lower learning rate, or "
                "--on-nonfinite skip"
            )
        if made.outer:
            told = replicas.exchange_metrics(made.outer, made.abstract, step, values)
            if told:
                write.scalars(step, told)
        if _due(step, run.log_every) or step == run.steps:
            seen, times = record.step_scalars(values), watch.lap(step)
            rated = {"train/learning_rate": float(rate(step - 1))}
            write.scalars(step, seen | rated | times)
            loss = seen["train/loss"]
            bar.set_postfix_str(f"loss {loss:.3f}")
            if bar.disable:  # no terminal
                say(
                    f"step {step}/{run.steps}: loss {loss:.4f}, "
                    f"{times['time/tokens_per_second']:.0f} tokens/s"
                )

    for step in range(start + 1, run.steps + 1):
        health.step(step)
        with watch("data"):
            batch = next(batches)
        with _trace(run, step - start), watch("compile" if step == start + 1 else None):
            state, scalars = made.step(state, batch)
        settle()
        pending = step, scalars

        last, stopping, scores = step == run.steps, stop_agreed(stop, step), None
        if last or _due(step, run.evaluate.every):
            settle()
            with watch("evaluation"):
                scores, text = _evaluate(made, state, held_out, tokens, write, step)
            with tqdm.external_write_mode():
                say(f"step {step}/{run.steps}: eval/loss {scores['eval/loss']:.4f}")
                if last and text:
                    say(f"sample:\n{text}")
        if last or stopping or _due(step, run.checkpoint.every):
            settle()
            with watch("checkpoint"):
                checkpoint.save(saved, step, state, description, scores)
        elif hot.due(step):
            settle()
            with watch("checkpoint"):
                hot.save(step, state, description)
        if stopping and not last:
            say(
                f"stopped by {' '.join(stop) or 'another process'} after step {step}; "
                "the same command goes on from there"
            )
            break
    return state


def _pipelines(made, tokens, start, stack) -> tuple[Iterator, Callable[[], Iterator]]:
    """Global training batches from step `start` on; the held-out ones, ever anew."""
    run = made.run
    rows = run.batch // run.accumulate
    local = local_rows(made.mesh, rows)
    eos = tokens.tokenizer.eos if run.data.isolate_documents else None
    training = data.train_batches(
        tokens.train,
        length=run.length,
        batch=run.batch,
        seed=run.seed,
        rows=local,
        accumulate=run.accumulate,
        eos=eos,
    )
    held_out = data.eval_batches(
        tokens.eval,
        length=run.length,
        batch=rows,
        rows=local,
        eos=eos,
        limit=run.evaluate.batches or None,
    )
    ahead = stack.enter_context(
        data.prefetch(training, start=start, threads=run.data.threads)
    )
    put = partial(put_batch, made.mesh, rows=rows, local=local)
    return map(put, ahead), lambda: map(put, held_out)


def _evaluate(made, state, held_out, tokens, write, step) -> tuple[dict, str]:
    """Mean loss on the held-out documents and a sample of text, both logged."""
    params = made.weights(state)
    sums, sums_of_each = [], []
    for batch in held_out():
        sums.append(made.evaluate(params, batch))
        if made.evaluate_each is not None:
            each = state.params if state.ema is None else state.ema
            sums_of_each.append(made.evaluate_each(each, batch))
    scores = {"eval/loss": mean_loss(sums)[0]}
    if sums_of_each:
        scores |= replicas.evaluation_metrics(sums_of_each)
    write.scalars(step, scores)
    text = program.sample(made, params, tokens.tokenizer)
    if text:
        write.text(step, "sample", f"```text\n{text}\n```")
    return scores, text


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


@contextlib.contextmanager
def _progress_bar(start: int, steps: int) -> Iterator[tqdm]:
    """Progress with the time left; silent off a terminal and beside process 0."""
    disable = True if jax.process_index() else None
    with tqdm(total=steps, initial=start, unit="step", disable=disable) as bar:
        yield bar


@contextlib.contextmanager
def _trace(run: config.Run, nth: int) -> Iterator[None]:
    """With `run.profile`, traces the fifth to eighth step of this process."""
    if run.profile and nth == 5:
        jax.profiler.start_trace(f"{run.out}/profile")
    yield
    if run.profile and nth == 8:
        jax.profiler.stop_trace()
