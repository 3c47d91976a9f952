"""Records: read, checked, turned into tokens; and the texts and tasks that come with the package.

In: files or Python objects, a tokenizer. Out: `Record`s and `Example`s. May import `core`; no
torch.
"""

from typing import TYPE_CHECKING

from memlaw.core.lazy import lazy_exports

if TYPE_CHECKING:
    from memlaw.data.encoding import PromptFormat as PromptFormat
    from memlaw.data.encoding import encode as encode
    from memlaw.data.encoding import encode_prompt as encode_prompt
    from memlaw.data.encoding import end_of_turn_id as end_of_turn_id
    from memlaw.data.encoding import resolve_prompt_format as resolve_prompt_format
    from memlaw.data.encoding import special_ids as special_ids
    from memlaw.data.readers import RECITE_PROMPT as RECITE_PROMPT
    from memlaw.data.readers import DataFormat as DataFormat
    from memlaw.data.reading import read_records as read_records
    from memlaw.data.record import Example as Example
    from memlaw.data.record import Message as Message
    from memlaw.data.record import Prompt as Prompt
    from memlaw.data.record import Record as Record
    from memlaw.data.tasks import Task as Task
    from memlaw.data.tasks import parse_task as parse_task
    from memlaw.data.tasks import task_examples as task_examples
    from memlaw.data.texts import retained_text as retained_text
    from memlaw.data.texts import unseen_text as unseen_text

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "encoding": [
            "PromptFormat",
            "encode",
            "encode_prompt",
            "end_of_turn_id",
            "resolve_prompt_format",
            "special_ids",
        ],
        "readers": ["DataFormat", "RECITE_PROMPT"],
        "reading": ["read_records"],
        "record": ["Example", "Message", "Prompt", "Record"],
        "tasks": ["Task", "parse_task", "task_examples"],
        "texts": ["retained_text", "unseen_text"],
    },
)
