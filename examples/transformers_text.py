"""A tiny Llama learns to write Python, byte by byte, watched in the Hugging Face Trainer.

python examples/transformers_text.py
"""

import json
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from gradwatch_transformers import attach

sources = sorted(Path(json.__file__).parent.glob("*.py"))  # ships with Python
text = "".join(path.read_text(encoding="utf-8") for path in sources).encode()
rows = [{"input_ids": row, "labels": row} for row in torch.tensor(list(text)).split(64)[:-1]]

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,  # a token a byte
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=2,
)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder,
        max_steps=100,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(LlamaForCausalLM(config), arguments, train_dataset=rows)
    watch = attach(trainer, every_n_steps=10, log_every_n_steps=10)  # this line
    trainer.train()

print(watch.summary())  # and this one
