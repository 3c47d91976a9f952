"""Exports: an adapter in the form in which others run it, audited again in that form.

In: a folder with a LoRA, its records. Out: a merged model, a GGUF file of either, a `Modelfile`,
an adapter for vLLM, a task for lm-eval, a signature; what became of recall on the way; the
survival table, of every form. May import all up to `certify`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.export.run import Exported as Exported
    from memlaw.export.run import export as export
    from memlaw.export.survive import Survival as Survival
    from memlaw.export.survive import survival as survival

__getattr__, __dir__ = lazy_exports(
    __name__, {"run": ["Exported", "export"], "survive": ["Survival", "survival"]}
)
