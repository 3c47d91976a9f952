"""Shards: records spread over several adapters of one base model, and found again; and `diff`.

In: records, settings, a folder's name. Out: a folder of adapters, each made by `writer`, with one
certificate over all, and an index that says where a record is. May import everything below it, and
`writer`.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.shards.asking import ask as ask
    from memlaw.shards.checking import check_shards as check_shards
    from memlaw.shards.diffing import diff as diff
    from memlaw.shards.loading import Loaded as Loaded
    from memlaw.shards.loading import load as load
    from memlaw.shards.updating import ShardsUpdate as ShardsUpdate
    from memlaw.shards.updating import update_shards as update_shards
    from memlaw.shards.writing import ShardsResult as ShardsResult
    from memlaw.shards.writing import write_shards as write_shards

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "asking": ["ask"],
        "checking": ["check_shards"],
        "diffing": ["diff"],
        "loading": ["Loaded", "load"],
        "updating": ["ShardsUpdate", "update_shards"],
        "writing": ["ShardsResult", "write_shards"],
    },
)
