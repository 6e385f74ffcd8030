"""Fine-tunes a Hugging Face checkpoint (Llama, Mistral, Qwen3) on your own text.

    python scripts/train.py configs/finetune_hf.py --init.path DIR --data.corpus "notes/*.md"

DIR has config.json, .safetensors and tokenizer.json; the model and its tokenizer
are the checkpoint's. The loss of step 1 is the checkpoint's own on the text, and is
below 4 for a pretrained model; much more means weights and tokenizer that do not
belong together. Training state takes 16 bytes a parameter: a model of 1 B fits a
device of 24 GB with --model.remat block; --mesh.fsdp 8 spreads a larger one.
A model of 135 M (batch 8 of 512 tokens) takes about a minute a step on 2 CPU cores,
less than a second on an accelerator. `jaxlab.models.hf.save` writes the result back:
see docs/huggingface.md.
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
