"""GPT-2 small's size in today's form, on an accelerator.

    python scripts/train.py configs/gpt_124m.py --data.corpus "/data/text/*.txt"

135 M parameters with the untied output matrix, 0.5 M tokens a step. The default
corpus is small (`pydocs`, from a Debian package): enough to try the speed, not to
train a model of this size. Needs an accelerator; nobody waits for it on a CPU.
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Data, Evaluate, Run


def config() -> Run:
    """The run."""
    return Run(
        out="runs/gpt_124m",
        steps=20_000,
        batch=256,
        accumulate=8,
        length=2048,
        z_loss=1e-4,
        model=GPT(
            layers=12,
            width=768,
            heads=12,
            head_dim=64,
            mlp=2048,
            tied=False,
            qk_norm=True,
            dtype="bfloat16",
            remat="dots",
        ),
        data=Data(corpus="pydocs", tokenizer="bpe:32768"),
        optimizer=AdamW(lr=1e-3, warmup=1000, schedule="wsd", end_factor=0.0),
        evaluate=Evaluate(every=500, batches=32),
        checkpoint=Checkpoint(every=500),
    )
