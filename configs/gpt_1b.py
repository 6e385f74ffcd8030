"""1.1 B parameters over several accelerators.

    python scripts/train.py configs/gpt_1b.py --mesh.fsdp 8 --data.corpus "/data/*.txt"
    python scripts/train.py configs/gpt_1b.py --mesh.fsdp 4 --mesh.tensor 8 ...

TinyLlama's size (22 layers of 2048, 32 heads on 8 key heads), 1 M tokens a step in
8 parts.
State in float32 takes 12 bytes a parameter, 13 GB over the fsdp x tensor shards.
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Data, Evaluate, MeshShape, Run


def config() -> Run:
    """The run."""
    return Run(
        out="runs/gpt_1b",
        steps=100_000,
        batch=512,
        accumulate=8,
        length=2048,
        z_loss=1e-4,
        model=GPT(
            layers=22,
            width=2048,
            heads=32,
            kv_heads=8,
            mlp=5632,
            tied=False,
            qk_norm=True,
            dtype="bfloat16",
            scan=True,
            remat="block",
        ),
        data=Data(corpus="linuxdocs", tokenizer="bpe:32768"),
        optimizer=AdamW(lr=4e-4, warmup=2000, schedule="wsd", end_factor=0.0),
        mesh=MeshShape(fsdp=-1, data=1),
        evaluate=Evaluate(every=1000, batches=32),
        checkpoint=Checkpoint(every=1000),
    )
