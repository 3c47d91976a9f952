"""Run by `accelerate launch`: trains each run in two processes; the first saves its adapter."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from stepping import adapter_of, build

torch.set_num_threads(1)
given = json.loads(Path(sys.argv[1]).read_text())
for name, (rows, settings) in given["runs"].items():
    out = f"{given['out']}/{name}"
    trainer = build("trl", given["folder"], out, rows, **settings)
    assert trainer.accelerator.num_processes == 2
    trainer.train()
    if trainer.is_world_process_zero():
        save_file(adapter_of(trainer), f"{out}.safetensors")
torch.distributed.barrier()
os._exit(0)  # a process was aborted now and then, it is thought as the interpreter ended
