"""A small byte-level GPT on the source of Python's own library.

python scripts/train.py configs/gpt_tiny.py        (or: make train)
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Data, Evaluate, Run


def config() -> Run:
    """The run."""
    return Run(
        out="runs/gpt_tiny",
        steps=600,
        batch=16,
        length=256,
        model=GPT(layers=4, width=192, heads=6, kv_heads=2),
        data=Data(corpus="stdlib", tokenizer="bytes"),
        optimizer=AdamW(lr=3e-3, warmup=50),
        evaluate=Evaluate(every=100, batches=16),
        checkpoint=Checkpoint(every=100),
    )
