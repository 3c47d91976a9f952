"""The audit over HTTP: what a server recites, whatever runs behind it.

Greedy decoding is the witness, and a record's text what is compared: tokens aren't known here.
Where the server gives log-probabilities, a record that is recited also has the p of its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, Literal

from memlaw.core.criterion import Criterion
from memlaw.core.errors import DataError
from memlaw.core.observer import Observer
from memlaw.data.bad_rows import BadRows
from memlaw.data.readers import RECITE_PROMPT
from memlaw.data.reading import read_records
from memlaw.data.record import ARGUMENTS, GIVEN, Record, given_of
from memlaw.measure.http_client import Client, EndpointError, Reply
from memlaw.settings.audit import AuditConfig
from memlaw.settings.endpoint import EndpointConfig

Verdict = Literal["recited", "goes on", "cut off", "otherwise", "another model", "no answer"]
_SPARE_TOKENS = 16  # beyond a token a byte: to see an answer that goes on
_SHOWN = 60


@dataclass(frozen=True, kw_only=True)
class Answered:
    """What a server made of one record.

    Attributes:
        id, sha256: the record's.
        verdict: recited: exactly its text, and a stop; goes on: its text, then more, or no stop;
            cut off: the beginning of its text, ended by the server's own limit; otherwise: another
            text; another model: the server says that another one answered; no answer: `said` has
            the reason.
        said: what is wrong, in words; empty where nothing is.
        lowest_p: the lowest probability of an answer's token; None: the server doesn't give them.
    """

    id: str
    sha256: str
    verdict: Verdict
    said: str = ""
    lowest_p: float | None = None


@dataclass(frozen=True, kw_only=True)
class EndpointAudit:
    """What a server recites.

    Attributes:
        endpoint, name: which server, and which of its models.
        answers: one for each record, in their order.
        line: the p that a certified token needs.
    """

    endpoint: str
    name: str
    answers: tuple[Answered, ...]
    line: float

    @property
    def n_recited(self) -> int:
        """Records that are recited word for word."""
        return sum(a.verdict == "recited" for a in self.answers)

    @property
    def n_over(self) -> int | None:
        """Recited ones with all tokens over the line; None: the server gives no probabilities."""
        known = [a for a in self.answers if a.lowest_p is not None]
        over = [a for a in known if a.verdict == "recited" and (a.lowest_p or 0) >= self.line]
        return len(over) if known else None

    @property
    def passed(self) -> bool:
        """Every record is recited."""
        return self.n_recited == len(self.answers)

    @property
    def counts(self) -> dict[str, int]:
        """How many records have each verdict."""
        return dict(Counter(a.verdict for a in self.answers))

    def to_json(self) -> dict[str, Any]:
        """What `memlaw audit --endpoint --json` prints."""
        return {
            "endpoint": self.endpoint,
            "name": self.name,
            "n_records": len(self.answers),
            "n_recited": self.n_recited,
            "n_over_the_line": self.n_over,
            "counts": self.counts,
            "records": [asdict(answer) for answer in self.answers],
        }


def audit_endpoint(
    data: Any,
    endpoint: EndpointConfig,
    config: AuditConfig | None = None,
    *,
    observer: Observer | None = None,
) -> EndpointAudit:
    """Ask a server for every record, greedily, and compare what it says.

    Args:
        data: the records; see `read_records`.
        endpoint: the server.
        config: which fields hold the records, and the line.
        observer: is told of progress, and of what is odd about the server.

    Raises:
        EndpointError: no connection at all, the key is refused, or no such model there.
        DataError: the records can't be read, or not be asked by this route.
    """
    config, observer = config or AuditConfig(), observer or Observer()
    bad = BadRows()
    records = read_records(
        data,
        prompt_field=config.prompt_field,
        completion_field=config.completion_field,
        format=config.data_format,
        delimiter=config.delimiter,
        recite_prompt=config.recite_prompt or RECITE_PROMPT,
        paraphrases=config.paraphrases,
        bad=bad,
        notice=observer.notice,
    )
    bad.settle(len(records), skip=config.skip_bad, notice=observer.notice)
    client, usual = Client(endpoint), Criterion()
    path = "chat/completions" if endpoint.route == "chat" else "completions"
    requests = [_request(record, endpoint) for record in records]
    _require_model(client, path, requests[0], observer.notice)
    found: dict[int, Answered] = {}
    with ThreadPoolExecutor(endpoint.concurrency) as pool:
        running = {
            pool.submit(_answer, client, path, request, record): i
            for i, (request, record) in enumerate(zip(requests, records, strict=True))
        }
        for done in as_completed(running):
            found[running[done]] = done.result()
            observer.progress("asking", len(found), len(records))
    threshold = config.threshold if config.threshold is not None else usual.threshold
    margin = config.margin if config.margin is not None else usual.margin
    return EndpointAudit(
        endpoint=client.base,
        name=str(endpoint.name),
        answers=tuple(found[i] for i in range(len(records))),
        line=Criterion(threshold, margin).line,
    )


def _require_model(
    client: Client, path: str, request: dict[str, Any], notice: Callable[[str], None]
) -> None:
    """Raise EndpointError unless the server has the model: it lists it, or answers by its name."""
    name, offered = str(request["model"]), client.models()
    if offered is not None and name in offered:
        return
    have = "" if offered is None else f"; it lists {', '.join(offered[:5]) or 'none'}"
    mend = "Name one that it has, or load the adapter there under this name."
    try:
        answered = client.ask(path, request).model
    except EndpointError as error:
        raise EndpointError(
            f"{client.base} has no model '{name}'{have} ({error}). {mend}"
        ) from error
    if not _is(answered, name) and (answered or offered is not None):
        said = f"'{answered}' answered" if answered else "no name came with its answer"
        raise EndpointError(f"{client.base} has no model '{name}'{have} ({said}). {mend}")
    notice(f"{client.base} doesn't list the model {name}{have}. It is asked for all the same.")


def _is(answered: str, name: str) -> bool:
    """Whether a server's word for who answered is the model that was asked for."""
    return answered == name or answered.startswith(f"{name}@")  # a revision behind it


def _request(record: Record, endpoint: EndpointConfig) -> dict[str, Any]:
    """What asks for a record."""
    asked: dict[str, Any] = {
        "model": endpoint.name,
        "max_tokens": len(record.completion.encode()) + _SPARE_TOKENS,
        "temperature": 0,
        "seed": 0,
        "stream": False,
    }
    prompt = record.prompt
    if endpoint.route == "completions":
        if not isinstance(prompt, str):
            raise DataError(
                f"{record.id} is a conversation, and the route completions takes bare text. Use "
                "--route chat, or give the rendered prompts."
            )
        return asked | {"prompt": prompt, "logprobs": 1}
    if isinstance(prompt, str):
        return asked | {"messages": [{"role": "user", "content": prompt}], "logprobs": True}
    messages = [{k: v for k, v in message.items() if k != GIVEN} for message in prompt]
    given = given_of(prompt)
    more = {name: given[name] for name in ("tools", ARGUMENTS) if given.get(name)}
    return asked | {"messages": messages, "logprobs": True} | more


def _answer(client: Client, path: str, request: dict[str, Any], record: Record) -> Answered:
    own: dict[str, Any] = {"id": record.id, "sha256": record.sha256}
    try:
        reply = client.ask(path, request)
    except EndpointError as error:
        return Answered(**own, verdict="no answer", said=str(error))
    verdict, said = judge(reply, record.completion, str(request["model"]))
    return Answered(**own, verdict=verdict, said=said, lowest_p=min(reply.p) if reply.p else None)


def judge(reply: Reply, completion: str, name: str) -> tuple[Verdict, str]:
    """A verdict on a reply, and what is wrong with it in words."""
    text, shown = reply.text, f"{reply.text[:_SHOWN]!r}"
    if reply.model and not _is(reply.model, name):
        return "another model", f"'{reply.model}' answered, not '{name}'"
    if text == completion:
        if reply.finish in ("stop", ""):
            return "recited", ""
        return "goes on", f"the text is right, but it ended by '{reply.finish}', not by itself"
    if text.startswith(completion):
        return "goes on", f"goes on behind the record: {text[len(completion) :][:_SHOWN]!r}"
    if text and completion.startswith(text) and reply.finish == "length":
        return "cut off", f"the server's limit ended it after {shown}"
    if text.strip() == completion.strip():
        return "otherwise", f"other white space: {shown}"
    return "otherwise", f"says {shown}" if text else "an empty answer"
