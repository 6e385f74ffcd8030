"""The run of `configs/gpt_noloco.py` with DiLoCo: an all-reduce every 25 steps.

python scripts/train.py configs/gpt_diloco.py

Nesterov momentum, as in the original (arXiv 2311.08105), which has 0.9 in far longer
runs. Ends near eval/loss 1.82, after 2 minutes on 2 CPU cores.
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Evaluate, MeshShape, NoLoCo, Run


def config() -> Run:
    """The run."""
    return Run(
        out="runs/gpt_diloco",
        steps=600,
        batch=32,
        length=128,
        model=GPT(layers=4, width=128, heads=4, kv_heads=2),
        optimizer=NoLoCo(
            inner=AdamW(lr=3e-3, warmup=50),
            inner_steps=25,
            momentum=0.6,
            nesterov=True,
            pairing="all",
            gamma=0.0,
        ),
        mesh=MeshShape(replica=8, data=1),
        evaluate=Evaluate(every=100, batches=8),
        checkpoint=Checkpoint(every=100),
    )
