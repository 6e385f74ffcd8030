"""Metrics: what is written is read back by TensorBoard and by jaxlab itself."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import textwrap
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from jaxlab import metrics
from jaxlab.errors import UserError
from jaxlab.metrics import open_writer, read_jsonl

ROOT = Path(__file__).parent.parent


def tensorboard(folder):
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    return reader.Reload()


def points(folder, tag):
    return [(event.step, event.value) for event in tensorboard(folder).Scalars(tag)]


def test_scalars_are_exact_in_the_rows_and_float32_in_tensorboard(tmp_path):
    values = [0.1, np.float32(0.1), jnp.float32(1 / 3), 7, 1e-300]
    with open_writer(tmp_path / "run", None) as writer:
        for step, value in enumerate(values):
            writer.scalars(step, {"train/loss": value, "train/step": step})
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["train/loss"] for row in rows] == [float(v) for v in values]
    expected = [(step, float(np.float32(v))) for step, v in enumerate(values)]
    assert points(tmp_path / "run", "train/loss") == expected
    assert points(tmp_path / "run", "train/step")[3] == (3, 3.0)


def test_what_is_not_finite_stays_valid_json(tmp_path):
    with open_writer(tmp_path, None) as writer:
        writer.scalars(1, {"a": math.nan, "b": math.inf, "c": -math.inf})

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=refuse)["b"] == "Infinity"
    (row,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf
    assert points(tmp_path, "b") == [(1, math.inf)]


def test_text_image_and_hparams_read_back(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    shown = {"lr": 1e-3, "layers": 4, "tied": True, "corpus": "stdlib", "mesh": [2, 4]}
    with open_writer(tmp_path, None) as writer:
        writer.text(3, "sample", "Grüße, **Welt**")
        writer.image(4, "attention", pixels)
        writer.hparams(shown, ["eval/loss"])
    reader = tensorboard(tmp_path)

    (text,) = reader.Tensors("sample")
    assert text.step == 3
    assert text.tensor_proto.string_val[0].decode() == "Grüße, **Welt**"
    assert reader.SummaryMetadata("sample").plugin_data.plugin_name == "text"

    (image,) = reader.Images("attention")
    assert (image.step, image.width, image.height) == (4, 7, 5)
    from io import BytesIO

    from PIL import Image

    decoded = np.asarray(Image.open(BytesIO(image.encoded_image_string)))
    np.testing.assert_array_equal(decoded, pixels)

    contents = [
        plugin_data_pb2.HParamsPluginData.FromString(content)
        for content in reader.PluginTagToContent("hparams").values()
    ]
    (page,) = (c.experiment for c in contents if c.HasField("experiment"))
    assert [info.name for info in page.hparam_infos] == list(shown)
    assert [info.name.tag for info in page.metric_infos] == ["eval/loss"]
    (session,) = (c for c in contents if not c.HasField("experiment"))
    hparams = session.session_start_info.hparams
    assert hparams["lr"].number_value == 1e-3 and hparams["layers"].number_value == 4
    assert hparams["tied"].bool_value is True
    assert hparams["corpus"].string_value == "stdlib"
    assert hparams["mesh"].string_value == "[2, 4]"


KILLED = """
    import os, signal, sys
    from jaxlab.metrics import open_writer

    writer = open_writer(sys.argv[1], None)
    for step in range(1, 8):
        writer.scalars(step, {"train/loss": 1 / step})
    writer._rows.write('{"step": 8, "train/lo')  # what a kill in a write leaves
    writer._rows.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_resume_after_a_kill_goes_on_from_the_checkpoint(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False,
    )  # fmt: skip
    assert process.returncode == -signal.SIGKILL
    rows = tmp_path / "metrics.jsonl"
    assert rows.read_text().endswith('{"step": 8, "train/lo')
    assert [row["step"] for row in read_jsonl(rows)] == [1, 2, 3, 4, 5, 6, 7]
    assert len(points(tmp_path, "train/loss")) == 7  # flushed although killed

    before = rows.read_text().splitlines()
    with open_writer(tmp_path, 5) as writer:
        assert rows.read_text().splitlines() == before[:5]
        writer.scalars(6, {"train/loss": 60.0})
    with open_writer(tmp_path, 6) as writer:  # within the same second
        writer.scalars(7, {"train/loss": 70.0})
    expected = [1.0, 1 / 2, 1 / 3, 1 / 4, 1 / 5, 60.0, 70.0]
    assert [row["train/loss"] for row in read_jsonl(rows)] == expected
    expected = [(i, float(np.float32(v))) for i, v in enumerate(expected, 1)]
    assert points(tmp_path, "train/loss") == expected
    assert sorted(p.suffix for p in tmp_path.iterdir() if "tf" not in p.name) == [
        ".jsonl"
    ]

    with open_writer(tmp_path, None) as writer:  # from scratch in the same folder
        writer.scalars(0, {"train/loss": 9.0})
    assert [row["step"] for row in read_jsonl(rows)] == [0]
    assert points(tmp_path, "train/loss") == [(0, 9.0)]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with open_writer(None, None) as writer:
        writer.scalars(1, {"a": 1.0})
        writer.text(1, "b", "c")
        writer.flush()
    assert not list(tmp_path.iterdir())


def test_bad_files_are_named(tmp_path):
    rows = tmp_path / "metrics.jsonl"
    rows.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    for attempt in (lambda: read_jsonl(rows), lambda: open_writer(tmp_path, 3)):
        with pytest.raises(UserError, match=f"{re.escape(str(rows))}, line 2"):
            attempt()
    with pytest.raises(UserError, match="jsonl: Not a directory|jsonl: File exists"):
        open_writer(rows, None)


NO_FRAMEWORKS = """
    import sys
    from jaxlab import metrics

    assert not any(name.startswith("tensorboard") for name in sys.modules)
    with metrics.open_writer(sys.argv[1], None) as writer:
        import numpy as np

        writer.scalars(1, {"a": 1.0})
        writer.text(1, "b", "c")
        writer.image(1, "d", np.zeros((2, 2, 3), np.uint8))
        writer.hparams({"e": 1}, ["a"])
    print({"tensorflow", "torch"} & set(sys.modules))
"""


def test_neither_tensorflow_nor_torch_is_imported_where_they_are_installed(tmp_path):
    for name in ("tensorflow", "torch"):  # found first, and importable
        (tmp_path / "path" / name).mkdir(parents=True)
        (tmp_path / "path" / name / "__init__.py").write_text("")
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(NO_FRAMEWORKS),
         tmp_path / "run"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path / 'path'}:{ROOT}"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (process.stdout, process.stderr) == ("set()\n", "")


@pytest.mark.parametrize(
    ("kind", "bfloat16", "float32"),
    [
        ("TPU v4", 275e12, 275e12),
        ("TPU v5 lite", 197e12, 197e12),
        ("TPU v5p", 459e12, 459e12),
        ("TPU v6 lite", 918e12, 918e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 156e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12, 494.5e12),
        ("NVIDIA H100 PCIe", 756e12, 378e12),
        ("NVIDIA H200", 989.5e12, 494.5e12),
        ("NVIDIA B200", 2250e12, 1100e12),
        ("NVIDIA GB200", 2500e12, 1250e12),
        ("NVIDIA L40S", 362e12, 183e12),
    ],
)
def test_data_sheet_peaks(kind, bfloat16, float32):
    assert metrics.data_sheet_flops(kind, "bfloat16") == bfloat16
    assert metrics.data_sheet_flops(kind, "float32") == float32
    assert metrics.data_sheet_flops(kind, "float64") is None


@pytest.mark.parametrize(
    "kind", ["cpu", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA H20", "RTX A1000"]
)
def test_devices_without_a_data_sheet(kind):
    assert metrics.data_sheet_flops(kind, "float32") is None


def test_the_measured_rate_of_this_cpu_is_possible():
    device = jax.devices()[1]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):  # as the training loop calls it
        rate = metrics.peak_flops(device, jnp.float32)
    # Two flops of one lane at 0.5 GHz; 64 lanes of 2 FMA units at 5 GHz a core.
    assert 1e9 < rate < (os.cpu_count() or 1) * 64 * 4 * 5e9
    assert metrics.peak_flops(device, jnp.float32) == rate


def forward(weights, x_td, activation):
    """One block and the logits with matrix products only, so that they are counted."""
    q, k, v = (jnp.einsum("td,dhk->thk", x_td, weights[name]) for name in "qkv")
    groups = q.shape[1] // k.shape[1]
    k, v = (jnp.repeat(y, groups, axis=1) for y in (k, v))
    scores = jnp.einsum("thk,shk->hts", q, k)
    x_td = jnp.einsum("hts,shk,hkd->td", scores, v, weights["o"])
    up = x_td @ weights["up"]
    if activation == "swiglu":
        up = up * (x_td @ weights["gate"])
    return (up @ weights["down"]) @ weights["out"]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_train_flops_are_those_that_xla_counts(activation):
    d, h, kv, k, mlp, vocab, t = 64, 4, 2, 32, 192, 160, 48
    shapes = {
        "q": (d, h, k), "k": (d, kv, k), "v": (d, kv, k), "o": (h, k, d),
        "up": (d, mlp), "gate": (d, mlp), "down": (mlp, d), "out": (d, vocab),
    }  # fmt: skip
    if activation == "gelu":
        del shapes["gate"]
    weights = {name: jnp.zeros(shape) for name, shape in shapes.items()}

    def train(weights, x_td, gradient_tv):
        logits_of = partial(forward, activation=activation)
        logits_tv, backward = jax.vjp(logits_of, weights, x_td)
        return logits_tv, backward(gradient_tv)

    arguments = weights, jnp.zeros((t, d)), jnp.zeros((t, vocab))
    counted = jax.jit(train).lower(*arguments).cost_analysis()["flops"]
    model = types.SimpleNamespace(
        vocab=vocab, layers=1, width=d, heads=h, kv_heads=kv, head_dim=k, mlp=mlp,
        activation=activation,
    )  # fmt: skip
    expected = t * metrics.train_flops_per_token(model, t)
    # XLA counts the few elementwise operations too.
    assert expected <= counted < 1.005 * expected


def test_train_flops_by_hand():
    # 2 layers of (4*8*8 attention + 3*8*20 MLP) and 50*8 logits; 2*2*4*6 attention.
    model = types.SimpleNamespace(
        vocab=50, layers=2, width=8, heads=2, kv_heads=2, head_dim=4, mlp=20,
        activation="swiglu",
    )  # fmt: skip
    expected = 6 * (2 * (256 + 480) + 400) + 12 * 2 * 2 * 4 * 6
    assert metrics.train_flops_per_token(model, 6) == expected
