"""Fine-tunes a Hugging Face checkpoint (Llama, Mistral, Qwen3) on your own text.

    python scripts/train.py configs/finetune_hf.py --init.path DIR --data.corpus TEXT

DIR has config.json, .safetensors and tokenizer.json; model and tokenizer are the
checkpoint's. TEXT is a folder, a glob, a .txt, .jsonl or .parquet file. The first
loss is the checkpoint's own on that text: 1 to 4 for a pretrained model; ten or so
means weights and tokenizer that do not belong together. Training needs 16 bytes a
parameter and the activations; --mesh.fsdp 8 spreads them over 8 devices. On a CPU
add --model.dtype float32. docs/huggingface.md shows how to save the result for
transformers.
"""

from jaxlab.config import GPT, AdamW, Checkpoint, Data, Evaluate, Run, Sample


def config() -> Run:
    """The run."""
    return Run(
        out="runs/finetune_hf",
        steps=500,
        batch=8,
        length=512,
        model=GPT(dtype="bfloat16", remat="dots"),
        data=Data(corpus="stdlib", tokenizer="init", isolate_documents=True),
        optimizer=AdamW(lr=2e-5, b2=0.99, weight_decay=0.0, warmup=20, end_factor=0.0),
        evaluate=Evaluate(every=100, batches=16),
        checkpoint=Checkpoint(every=100),
        sample=Sample(prompt="def ", tokens=100),
    )
