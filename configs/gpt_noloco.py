"""Eight replicas of a small GPT that gossip in pairs every 6 steps, in int8 (NoLoCo).

    python scripts/train.py configs/gpt_noloco.py --mesh.replica 8

No all-reduce anywhere in the step. In int8, rounds of 6 steps send as much as rounds of
25 in float32. `configs/gpt_diloco.py` and `configs/gpt_dp.py` train the same model on
the same tokens. Ends near eval/loss 1.82, after 2 minutes on 2 CPU cores.
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Evaluate, MeshShape, NoLoCo, Run


def config() -> Run:
    """The run."""
    return Run(
        out="runs/gpt_noloco",
        steps=600,
        batch=32,
        length=128,
        model=GPT(layers=4, width=128, heads=4, kv_heads=2),
        optimizer=NoLoCo(
            inner=AdamW(lr=3e-3, warmup=50),
            inner_steps=6,
            momentum=0.6,
            nesterov=True,
            wire="int8",
            error_feedback=True,
        ),
        mesh=MeshShape(replica=8, data=1),
        evaluate=Evaluate(every=100, batches=8),
        checkpoint=Checkpoint(every=100),
    )
