"""The frozen base model, and the adapters that sit on it.

In: what names a model, a placement. Out: a loaded model, adapters attached to it or saved, logits
and losses. May import `core`, `data` and `settings`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.model.adapter import Adapter as Adapter
    from memlaw.model.base import BaseModel as BaseModel
    from memlaw.model.base import load_model as load_model
    from memlaw.model.formats import adapter_sha256 as adapter_sha256
    from memlaw.model.formats import loaded_adapter as loaded_adapter
    from memlaw.model.formats import save_adapter as save_adapter
    from memlaw.model.sites import Site as Site
    from memlaw.model.sites import resolve_sites as resolve_sites

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "adapter": ["Adapter"],
        "base": ["BaseModel", "load_model"],
        "formats": ["adapter_sha256", "loaded_adapter", "save_adapter"],
        "sites": ["Site", "resolve_sites"],
    },
)
