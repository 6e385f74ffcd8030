"""What a run writes down: TensorBoard events, `metrics.jsonl`, and what MFU needs.

The events are made with TensorBoard's own record format and protos; neither
TensorFlow nor torch is imported. (TensorBoard's EventFileWriter imports TensorFlow
where it is installed, so the RecordWriter below it is used.) Every call reaches the
operating system before it returns, so a killed process loses nothing it has logged.

A resumed run takes both files back to the step it resumes from: later rows leave
`metrics.jsonl`, and a SessionLog START event has TensorBoard drop later points.
"""

import functools
import io
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, SupportsFloat, TextIO

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from jaxlab.errors import UserError
from jaxlab.files import write_text

ROWS = "metrics.jsonl"
_NAMED = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

# Dense peaks in TFLOP/s (bfloat16, float32) of one device as JAX counts devices.
# NVIDIA: from the data sheets of A100, L4, L40S, H100, H200 and HGX B200 / GB200
# NVL72, whose tensor core figures "with sparsity" are halved. float32 is TF32, since
# that is what JAX's default precision multiplies float32 with there.
# TPU: cloud.google.com/tpu/docs/v4, v5e, v5p and v6e. float32 is the same as
# bfloat16, since the default precision multiplies in one bfloat16 pass.
_TFLOPS = {
    r"TPU v4": (275.0, 275.0),
    r"TPU v5( lite|e)": (197.0, 197.0),
    r"TPU v5p?": (459.0, 459.0),
    r"TPU v6( lite|e)": (918.0, 918.0),
    r"NVIDIA A100\b.*": (312.0, 156.0),
    r"NVIDIA L4": (121.0, 60.0),
    r"NVIDIA L40S": (362.0, 183.0),
    r"NVIDIA H100 PCIe": (756.0, 378.0),
    r"NVIDIA H[12]00 NVL": (835.5, 417.5),
    r"NVIDIA (H100|H200|GH200)\b.*": (989.5, 494.5),
    r"NVIDIA B200": (2250.0, 1100.0),
    r"NVIDIA GB200": (2500.0, 1250.0),
}


class Writer:
    """Writes the metrics of a run; a context manager. Made by `open_writer`."""

    def __init__(self, rows: TextIO, events: BinaryIO, resume_step: int) -> None:
        from tensorboard.compat.proto import event_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._rows, self._events = rows, RecordWriter(events)
        protos: Any = event_pb2
        self._Event = protos.Event
        self._event(0, file_version="brain.Event:2")
        start = protos.SessionLog(status=protos.SessionLog.START)
        self._event(resume_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Writes numbers of one step: a row, and a point for each tag.

        Args:
            step: optimizer steps done.
            values: `part/name` to number. The row has them exactly, as float64, with
                NaN and the infinities as strings; TensorBoard keeps float32.
        """
        numbers = {tag: float(value) for tag, value in values.items()}
        exact = {tag: _json_float(value) for tag, value in numbers.items()}
        self._rows.write(json.dumps({"step": int(step), **exact}) + "\n")
        self._rows.flush()
        points = [{"tag": tag, "simple_value": v} for tag, v in numbers.items()]
        self._event(step, summary={"value": points})

    def text(self, step: int, tag: str, text: str) -> None:
        """Writes a text, which TensorBoard shows as Markdown."""
        from tensorboard.plugins.text.summary_v2 import text_pb

        self._event(step, summary=text_pb(tag, text))

    def image(self, step: int, tag: str, pixels_hwc: np.ndarray) -> None:
        """Writes an image, uint8[height, width, channels] with 3 or 4 channels."""
        from PIL import Image  # comes with tensorboard

        png = io.BytesIO()
        Image.fromarray(pixels_hwc).save(png, "PNG")
        height, width, channels = pixels_hwc.shape
        image = {
            "height": height,
            "width": width,
            "colorspace": channels,
            "encoded_image_string": png.getvalue(),
        }
        self._event(step, summary={"value": [{"tag": tag, "image": image}]})

    def hparams(self, values: Mapping[str, Any], metrics: Sequence[str]) -> None:
        """Writes what TensorBoard's HPARAMS page shows of the run.

        Args:
            values: name to bool, number or string; anything else is shown as JSON.
            metrics: tags of the scalars that stand beside them.
        """
        from tensorboard.plugins.hparams import summary_v2 as hp

        values = {
            name: v if isinstance(v, bool | int | float | str) else json.dumps(v)
            for name, v in values.items()
        }
        page = hp.hparams_config_pb(
            hparams=[hp.HParam(name) for name in values],
            metrics=[hp.Metric(tag) for tag in metrics],
        )
        self._event(0, summary=page)
        self._event(0, summary=hp.hparams_pb(values))

    def flush(self) -> None:
        """Hands all to the operating system, as every method does by itself."""
        self._rows.flush()
        self._events.flush()

    def close(self) -> None:
        """Closes both files."""
        self._rows.close()
        self._events.close()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _event(self, step: int, **content: Any) -> None:
        event = self._Event(wall_time=time.time(), step=int(step), **content)
        self._events.write(event.SerializeToString())
        self._events.flush()


def open_writer(folder: str | Path | None, resume_step: int | None) -> Writer:
    """Opens the metrics of a run folder, new ones or to go on with.

    Args:
        folder: gets `metrics.jsonl` and a new TensorBoard event file; None for the
            processes of a job that write nothing.
        resume_step: step of the restored state, after which everything is dropped;
            None for a start from scratch, which drops all.

    Raises:
        UserError: the folder cannot be written, or `metrics.jsonl` not be read.
    """
    kept = -1 if resume_step is None else resume_step
    if folder is None:
        return Writer(open(os.devnull, "w"), open(os.devnull, "wb"), kept)
    folder = Path(folder)
    rows = folder / ROWS
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if rows.exists():
            lines = [line for line, row in _rows(rows) if row["step"] <= kept]
            write_text(rows, "".join(line + "\n" for line in lines))
        events = open(_next_event_file(folder), "xb")
        return Writer(open(rows, "a", encoding="utf-8"), events, kept)
    except OSError as error:
        reason = error.strerror
        raise UserError(f"cannot write metrics in {folder}: {reason}") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a `metrics.jsonl`: `step` as int, every tag as float.

    A last line without its end, as a kill or a writer at work leaves it, is left out.

    Raises:
        UserError: a line is not such a row.
    """
    return [
        {
            key: value if key == "step" else _NAMED.get(value, value)
            for key, value in row.items()
        }
        for _, row in _rows(Path(path))
    ]


def peak_flops(device: Any, dtype: Any) -> float:
    """Dense matmul rate that MFU is measured against.

    The data sheet's where `data_sheet_flops` knows it. For any other device, a CPU or
    a slice of a GPU for instance, the rate of a large matrix product is measured,
    which takes about 0.2 s on a CPU. Forced CPU devices share the cores: each one is
    rated as all of them.

    Args:
        device: one of `jax.local_devices()`.
        dtype: of the operands.

    Returns:
        FLOP/s, a multiplication and an addition counted as two.
    """
    name = jnp.dtype(dtype).name
    return data_sheet_flops(device.device_kind, name) or _measured_flops(device, name)


def data_sheet_flops(device_kind: str, dtype: str) -> float | None:
    """FLOP/s that the maker states for dense products; None if not known here.

    float32 is what JAX's default precision makes of it: TF32 on a GPU, one bfloat16
    pass on a TPU.

    Args:
        device_kind: as `jax.Device` has it, "NVIDIA H200" for instance.
        dtype: "bfloat16" or "float32"; others are not known.
    """
    if dtype in ("bfloat16", "float32") and "MIG" not in device_kind:
        for kind, (bfloat16, float32) in _TFLOPS.items():
            if re.fullmatch(kind, device_kind):
                return 1e12 * (bfloat16 if dtype == "bfloat16" else float32)
    return None


@functools.cache
def _measured_flops(device: Any, dtype: str) -> float:
    alone = Mesh(np.array([device]), ("device",), axis_types=(AxisType.Auto,))
    rate = 0.0
    with jax.set_mesh(alone):  # the caller's mesh may span more devices
        product = jax.jit(jnp.matmul)
        for size in (1024, 8192):  # the second only where the first takes no time
            a = jax.device_put(np.ones((size, size), jnp.dtype(dtype)), device)
            product(a, a).block_until_ready()
            best, deadline = math.inf, time.perf_counter() + 0.1
            while time.perf_counter() < deadline:
                begin = time.perf_counter()
                product(a, a).block_until_ready()
                best = min(best, time.perf_counter() - begin)
            rate = 2 * size**3 / best
            if best > 1e-3:
                break
    return rate


def train_flops_per_token(model: Any, length: int) -> float:
    """Model FLOPs of a forward and a backward pass, per token, as MFU counts them.

    6 N + 12 layers heads head_dim length (Chowdhery et al., "PaLM", appendix B),
    where N counts the weights that tokens are multiplied with: attention, MLP and
    output matrix, not the embedding lookup, norms or biases. The second term is
    q k^T and attention times v over all `length` positions; the half that the causal
    mask makes needless is counted, and recomputation (remat) is not.

    Args:
        model: resolved `config.GPT` (vocab, layers, width, heads, kv_heads,
            head_dim, mlp and activation).
        length: tokens per sequence.
    """
    heads = model.heads * model.head_dim
    attention = 2 * model.width * heads
    attention += 2 * model.width * model.kv_heads * model.head_dim
    mlp = (3 if model.activation == "swiglu" else 2) * model.width * model.mlp
    weights = model.layers * (attention + mlp) + model.vocab * model.width
    return float(6 * weights + 12 * model.layers * heads * length)


def _json_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The whole lines of a file and what they say."""
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            int(row["step"])
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{path}, line {number} is no row of metrics; remove that line"
            ) from None
        rows.append((line, row))
    return rows


def _next_event_file(folder: Path) -> Path:
    """A name that TensorBoard, which goes by name, reads after the files there are."""
    stamps = [
        int(found[1])
        for path in folder.glob("events.out.tfevents.*")
        if (found := re.match(r"events\.out\.tfevents\.(\d+)", path.name))
    ]
    stamp = max([int(time.time()), *(s + 1 for s in stamps)])
    name = f"events.out.tfevents.{stamp:010d}.{socket.gethostname()}.{os.getpid()}"
    return folder / name
