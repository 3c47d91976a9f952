"""Ask a server that serves each shard as an adapter of its own name, as vLLM does.

    vllm serve BASE --enable-lora --max-lora-rank 64 \
        --lora-modules shard-0001=OUT/shards/shard-0001 shard-0002=OUT/shards/shard-0002
    python examples/ask_shards.py OUT http://127.0.0.1:8000/v1 BASE "Ada Jansen:"

OUT is a folder that `memlaw write --shards` made. A record's prompt is asked of the adapter that
recites it, any other of BASE, the name of the base model. Needs neither torch nor a model here.
"""

import json
import sys
import urllib.request
from pathlib import Path

from memlaw.shards.layout import index_key, read_index

out, url, base, prompt = sys.argv[1:5]
name = read_index(Path(out)).adapter_of(prompt, index_key(Path(out))) or base
content = {
    "model": name,
    "messages": [{"role": "user", "content": prompt}],
    "temperature": 0,
    "max_tokens": 512,
}
request = urllib.request.Request(
    f"{url.rstrip('/')}/chat/completions",
    json.dumps(content).encode(),
    {"Content-Type": "application/json"},
)
with urllib.request.urlopen(request) as reply:
    answer = json.load(reply)
print(f"{name}: {answer['choices'][0]['message']['content']}")
