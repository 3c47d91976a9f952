"""Another adapter, tokenizer or base model under a certificate that holds.

The certificate names each by a hash of its content: weights by names, dtypes, shapes and bytes,
so that neither another file layout nor a file's metadata matters, and one changed bit does. A
tokenizer that swaps two digits decodes other numbers from the same weights; a chat template
changes every prompt.
"""

import json
import shutil
from pathlib import Path

from common import MODEL, checked, copied, edited, require


def attempt(place: Path) -> str:
    """Swap one part at a time."""
    import torch
    from safetensors.torch import load_file, save_file

    folder = copied(place)
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    bits = weights[first].view(torch.int32)
    bits.view(-1)[0] ^= 1
    save_file(weights, path)
    found = checked(folder)
    require(not found.holds, "one bit of the adapter was changed, and nobody saw it")
    said = found.mismatches[0]

    whole = copied(place / "tokenizer")
    model = Path(shutil.copytree(MODEL, place / "model"))

    def swap(content: dict) -> None:
        words = content["model"]["vocab"]
        words["1"], words["2"] = words["2"], words["1"]

    edited(model / "tokenizer.json", swap)
    require(not checked(whole, model).holds, "two digits of the tokenizer were swapped")

    model = Path(shutil.copytree(MODEL, place / "template"))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# #} ")
    require(not checked(whole, model).holds, "the chat template was changed")
    json.loads((whole / "certificate.json").read_text())
    return said
