"""Hugging Face's Trainer on a small model with random weights: accumulation, clipping, evaluation."""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from optwatch.integrations.transformers import OptwatchCallback

torch.manual_seed(4)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=32, n_layer=2, n_head=2))
rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(64, (64, 16))]
arguments = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    run_name="hf-trainer",
    max_steps=20,
    per_device_train_batch_size=2,
    gradient_accumulation_steps=2,
    learning_rate=1e-3,
    warmup_steps=5,
    logging_steps=1,
    eval_strategy="steps",
    eval_steps=10,
    save_strategy="no",
    report_to=[],
    use_cpu=True,
    disable_tqdm=True,
    seed=4,
)


class Losses(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **given):
        if "loss" in logs:
            print(logs["loss"])


trainer = Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows[:8], callbacks=[Losses()])
trainer.add_callback(OptwatchCallback())
trainer.train()
