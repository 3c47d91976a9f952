"""Code that comes with a model, run because a folder says that it may be.

A model's config.json can name Python files (`auto_map`), which Transformers runs if it is told to
trust them. run.json records with which settings a folder was written, `trust_remote_code` among
them: who made the folder must not decide for who opens it.
"""

import json
import shutil
from pathlib import Path

from common import BOOK, MODEL, Broken, copied, edited, require


def attempt(place: Path) -> str:
    """Open a folder that says its base model's code is to be trusted."""
    import memlaw
    from memlaw.core.errors import MemlawError
    from memlaw.settings.update import UpdateConfig

    ran, model = place / "ran", Path(shutil.copytree(MODEL, place / "model"))
    (model / "evil.py").write_text(
        f"open({str(ran)!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig): model_type = 'evil'\n"
        "class Model(LlamaForCausalLM): config_class = Config\n"
    )
    auto = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edited(model / "config.json", lambda c: c.update(auto_map=auto, model_type="evil"))
    folder = copied(place)

    def says_so(run: dict) -> None:
        run["config"] |= {"trust_remote_code": True, "model": str(model)}
        run["base"] |= {"spec": str(model), "path": str(model)}

    edited(folder / "run.json", says_so)
    edited(folder / "adapter_config.json", lambda c: c.update(base_model_name_or_path=str(model)))
    calls = {
        "ask": lambda: memlaw.ask(folder, "Li Na:"),
        "load": lambda: memlaw.load(folder),
        "audit": lambda: memlaw.audit(BOOK, adapter=folder),
        "check": lambda: memlaw.check_certificate(folder / "certificate.json", BOOK),
        "update": lambda: memlaw.update(folder, [*_pairs(), ("Bo:", "1")]),
    }
    for name, call in calls.items():
        try:
            call()
        except MemlawError:
            pass
        except Exception as error:
            raise Broken(f"{name}: {type(error).__name__}: {error}") from error
        require(not ran.exists(), f"{name} ran the model's code")
    run = json.loads((folder / "run.json").read_text())
    require(not UpdateConfig().over(run).trust_remote_code, "an update trusts what the folder says")
    return f"none of {', '.join(calls)} ran it"


def _pairs() -> list[tuple[str, str]]:
    rows = [json.loads(line) for line in BOOK.read_text(encoding="utf-8").splitlines()]
    return [(row["prompt"], row["completion"]) for row in rows]
