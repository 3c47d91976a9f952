"""The frozen base model, and the adapters that sit on it.

In: what names a model, a placement. Out: a loaded model, adapters attached to it or saved, logits
and losses. May import `core`, `data` and `settings`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.model.adapter import Adapter as Adapter
    from memlaw.model.adapter import Site as Site
    from memlaw.model.adapter import loaded_adapter as loaded_adapter
    from memlaw.model.adapter import resolve_sites as resolve_sites
    from memlaw.model.adapter import save_adapter as save_adapter
    from memlaw.model.base import BaseModel as BaseModel
    from memlaw.model.base import load_model as load_model

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "base": ["BaseModel", "load_model"],
        "adapter": ["Adapter", "Site", "loaded_adapter", "resolve_sites", "save_adapter"],
    },
)
