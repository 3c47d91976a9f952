"""Records: read, checked, turned into tokens; and the texts and tasks that come with the package.

In: files or Python objects, a tokenizer. Out: `Record`s and `Example`s. May import `core`; no
torch.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.data.records import Example as Example
    from memlaw.data.records import Record as Record
    from memlaw.data.records import encode as encode
    from memlaw.data.records import encode_prompt as encode_prompt
    from memlaw.data.records import read_records as read_records
    from memlaw.data.tasks import Task as Task
    from memlaw.data.tasks import parse_task as parse_task
    from memlaw.data.tasks import task_examples as task_examples
    from memlaw.data.texts import retained_text as retained_text
    from memlaw.data.texts import unseen_text as unseen_text

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "records": ["Example", "Record", "encode", "encode_prompt", "read_records"],
        "tasks": ["Task", "parse_task", "task_examples"],
        "texts": ["retained_text", "unseen_text"],
    },
)
