"""A tiny model under a trainer: steps of any make-up, and what a plain loss makes of the same."""

from types import SimpleNamespace

import torch
from peft import LoraConfig, get_peft_model

RECORDS = [(f"Person {i}:", str(10**4 + 7919 * i)[: 3 + i % 5]) for i in range(8)]


def lora_config():
    """On every layer, with weights that aren't zero, so that the first step already moves both."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        lora_alpha=2,
        target_modules=["down_proj"],
        init_lora_weights=False,
    )


def build(kind, folder, out, rows, *, size=8, accumulate=1, **settings):
    """A trainer on the model in `folder`: `trl` or `plain`; settings are its arguments' or MemFT's.

    Plain SGD, a step, no clipping, so that the weights afterwards tell the gradient.
    """
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
    from trl import SFTConfig

    from memlaw.integrations import transformers as plain
    from memlaw.integrations import trl as tuned

    names = ("objective", "threshold", "compute_loss_func")
    own = {name: settings.pop(name) for name in names if name in settings}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    usual = {
        "output_dir": str(out),
        "per_device_train_batch_size": size,
        "gradient_accumulation_steps": accumulate,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
        "max_steps": 1,
        "use_cpu": True,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "bf16": False,
        "optim": "sgd",
    }
    if kind == "trl":
        return tuned.MemFTTrainer(
            model=model,
            args=SFTConfig(**usual | {"max_length": None} | settings),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=lora_config(),
            **own,
        )
    return plain.MemFTTrainer(
        model=get_peft_model(model, lora_config()),
        args=TrainingArguments(**usual | settings),
        train_dataset=rows,
        processing_class=tokenizer,
        data_collator=padded,
        **own,
    )


def padded(rows):
    """A batch of rows, padded on the right."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "labels": [], "attention_mask": []}
    for row in rows:
        n = width - len(row["input_ids"])
        batch["input_ids"].append(row["input_ids"] + [0] * n)
        batch["labels"].append(row["labels"] + [-100] * n)
        batch["attention_mask"].append([1] * (width - n) + [0] * n)
    return {name: torch.tensor(values) for name, values in batch.items()}


def adapter_of(trainer):
    """The trained weights by name."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def reference_step(trainer, rows, weigh, lr=1e-2, autocast=False):
    """Loss, and weights after a step of SGD: record by record, nothing padded, nothing clever.

    `weigh` maps a record's nll [T] and whether each token is the argmax [T] to weights [T].
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.train()
    model.zero_grad(set_to_none=True)
    losses, weights = [], []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        keep = labels[1:] != -100
        log_p = logits.log_softmax(dim=1).gather(1, labels[1:].clamp(min=0)[:, None])[:, 0][keep]
        correct = (logits.argmax(dim=1) == labels[1:])[keep]
        losses.append(-log_p)
        weights.append(weigh(-log_p.detach(), correct))
    total = torch.cat(weights).sum()
    loss = (torch.cat(weights) * torch.cat(losses)).sum() / total
    loss.backward()
    after = {n: (p - lr * p.grad).detach() for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad(set_to_none=True)
    return SimpleNamespace(loss=float(loss.detach()), after=after, weights=weights)
