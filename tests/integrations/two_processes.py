"""Run by `accelerate launch`: a few steps in this many processes; the first saves the adapter."""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from stepping import adapter_of, build

torch.set_num_threads(1)
given = json.loads(Path(sys.argv[1]).read_text())
folder, rows, out = (given.pop(name) for name in ("folder", "rows", "out"))
trainer = build("trl", folder, out, rows, size=4, learning_rate=1e-3, **given)
assert trainer.accelerator.num_processes == 2
trainer.train()
if trainer.is_world_process_zero():
    save_file(adapter_of(trainer), out + ".safetensors")
