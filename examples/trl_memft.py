"""TRL with MemFT: three lines to a certificate.

    python examples/trl_memft.py [RECORDS] [OUT] [MODEL] [EPOCHS] [SEED]

An SFTTrainer on the records (by default the phone book of twenty, on the embedded model), with
MemFT's loss, until they are certified: docs/trainers.md says after how many epochs, and what these
settings do to other text. OUT/recall then holds the adapter and its certificate:

    memlaw audit RECORDS --certificate OUT/recall/certificate.json
"""

import sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig

from memlaw.integrations.trl import MemFTTrainer, RecallCallback, training_rows
from memlaw.model.base import load_model

given = dict(enumerate(sys.argv[1:]))
records, out = given.get(0, "examples/phonebook.jsonl"), given.get(1, "trl-memft")
base = given.get(2) or load_model().path  # of the embedded model; any hub id or folder will do
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base)
args = SFTConfig(
    output_dir=out,
    num_train_epochs=int(given.get(3, 50)),
    seed=int(given.get(4, 42)),  # of the adapter's first weights, and of the order of the records
    per_device_train_batch_size=2,  # what counts is the number of steps
    learning_rate=1e-3,
    lr_scheduler_type="linear",  # at a constant rate some records are thrown off now and then
    max_length=None,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",  # or trackio, wandb, tensorboard: recall and damage are logged there
)
n = model.config.num_hidden_layers
lora = LoraConfig(
    task_type="CAUSAL_LM",
    r=32,
    lora_alpha=64,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    layers_to_transform=list(range(2 * n // 3, n)),  # none below: half the way back is saved
)
dataset = Dataset.from_list(training_rows(records, tokenizer))

trainer = MemFTTrainer(model, args, train_dataset=dataset, peft_config=lora)
trainer.add_callback(watch := RecallCallback(trainer, records, every=5))
trainer.train()

print(watch.certificate.statement)
sys.exit(0 if watch.certificate.certified else 1)
