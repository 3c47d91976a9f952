"""Questions to an OpenAI-style server: each way in which one can fail, told apart in words."""

from __future__ import annotations

import http.client
import json
import math
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from memlaw.core.errors import MemlawError
from memlaw.settings.endpoint import EndpointConfig

KEY_VARIABLE = "MEMLAW_ENDPOINT_KEY"
_PIECE = 65536
_MOST_BYTES = 2**26  # of an answer
_LONGEST_WAIT_S = 30.0
_AGAIN = (408, 429, *range(500, 600))


class EndpointError(MemlawError):
    """A server can't be asked, or gives no answer that can be judged."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a server answered.

    Attributes:
        text: the answer.
        finish: its `finish_reason`: `stop`, `length`, …; empty where it gave none.
        model: the model that the server says it asked; empty where it doesn't say.
        p: the probability of each token, as far as the server gives them.
    """

    text: str
    finish: str
    model: str
    p: tuple[float, ...] = ()


class Client:
    """Asks one server.

    Args:
        config: with an endpoint.
    """

    def __init__(self, config: EndpointConfig) -> None:
        self.config = config
        base = str(config.endpoint).rstrip("/")
        self.base = base if base.endswith("/v1") else f"{base}/v1"
        self._open = urllib.request.build_opener(_NoRedirect).open

    def models(self) -> list[str] | None:
        """Names of the models that the server offers; None: it doesn't say.

        Raises:
            EndpointError: no connection, or the key is refused.
        """
        try:
            content = json.loads(self._body("models", None)[0])
            return [str(model["id"]) for model in content["data"]]
        except _Status as error:
            if error.status in (401, 403):
                raise
            return None
        except (ValueError, KeyError, TypeError, RecursionError):
            return None

    def ask(self, path: str, request: Mapping[str, Any]) -> Reply:
        """The answer to a request, sent again where that may help.

        Raises:
            EndpointError: there was none; the message says what came instead, the last time.
        """
        for attempt in range(self.config.retries + 1):
            try:
                body, kind = self._body(path, request)
                return _reply(body, streams="event-stream" in kind)
            except EndpointError as error:
                last = error
                if attempt == self.config.retries or not getattr(error, "again", True):
                    break
                wait = getattr(error, "wait_s", None)
                time.sleep(min(_LONGEST_WAIT_S, 0.25 * 2**attempt if wait is None else wait))
        times = f", {attempt + 1} times" if attempt else ""
        raise EndpointError(f"{last}{times}")

    def _body(self, path: str, request: Mapping[str, Any] | None) -> tuple[bytes, str]:
        """The bytes of an answer, and their content type."""
        deadline = time.monotonic() + self.config.timeout
        data = None if request is None else json.dumps(request).encode()
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        sent = urllib.request.Request(f"{self.base}/{path}", data=data, headers=headers)
        late = EndpointError(f"no answer within {self.config.timeout:g} s")
        try:
            with self._open(sent, timeout=self.config.timeout) as response:
                parts, size = [], 0
                while piece := response.read1(_PIECE):
                    parts.append(piece)
                    size += len(piece)
                    if time.monotonic() > deadline:  # the timeout above is for each piece
                        raise late
                    if size > _MOST_BYTES:
                        raise EndpointError("the answer doesn't end")
                wanted = response.headers.get("Content-Length")
                if wanted is not None and size < int(wanted):
                    raise _cut_off(size, wanted)
                return b"".join(parts), response.headers.get_content_type()
        except urllib.error.HTTPError as error:
            with error:  # it holds the connection
                raise _Status(error) from error
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError | socket.timeout):
                raise late from error
            raise EndpointError(f"no connection to {self.base} ({error.reason})") from error
        except TimeoutError as error:
            raise late from error
        except http.client.IncompleteRead as error:
            raise _cut_off(len(error.partial), error.expected) from error
        except (http.client.HTTPException, OSError) as error:
            raise EndpointError(
                f"the connection broke ({str(error) or type(error).__name__})"
            ) from error


def _cut_off(size: int, wanted: Any) -> EndpointError:
    of = "" if wanted is None else f" of {int(wanted) if str(wanted).isdigit() else 'more'}"
    return EndpointError(f"the answer was cut off after {size}{of} bytes")


class _Status(EndpointError):
    """A status that isn't 200."""

    def __init__(self, error: urllib.error.HTTPError) -> None:
        self.status = error.code
        self.again = error.code in _AGAIN
        after = error.headers.get("Retry-After", "")
        self.wait_s = float(after) if after.isdigit() else None
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        try:
            content = json.loads(said)
            inner = content.get("error", content)
            said = str(inner.get("message", said) if isinstance(inner, dict) else inner)
        except (ValueError, AttributeError, RecursionError):
            pass
        what = {401: ": the key is refused", 403: ": the key is refused"}.get(error.code, "")
        if 300 <= error.code < 400:
            what = f": it points to {error.headers.get('Location')}; name that URL instead"
        super().__init__(f"status {error.code}{what} ({' '.join(said.split())[:200] or 'no text'})")


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key is for the server that was named, for no other."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _reply(body: bytes, *, streams: bool) -> Reply:
    """An answer's text from its JSON, or from the pieces of a stream."""
    try:
        pieces = list(_events(body)) if streams else [json.loads(body)]
        text, finish, model, p = "", "", "", []
        for piece in pieces:
            if "error" in piece:
                raise EndpointError(f"an error instead of an answer: {piece['error']!s:.200}")
            model = str(piece.get("model") or model)
            for choice in piece["choices"][:1]:
                message = choice.get("message") or choice.get("delta") or {}
                text += message.get("content") or choice.get("text") or ""
                finish = choice.get("finish_reason") or finish
                p += _probabilities(choice.get("logprobs"))
    except EndpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EndpointError(
            f"not the JSON of an answer: {body[:80].decode('utf-8', 'replace')!r}"
        ) from error
    if streams and not finish:
        raise EndpointError("the stream broke off before its end")
    return Reply(text=text, finish=finish, model=model, p=tuple(p))


def _events(body: bytes) -> Iterator[dict[str, Any]]:
    for line in body.decode("utf-8", "replace").splitlines():
        if line.startswith("data:") and line[5:].strip() not in ("", "[DONE]"):
            yield json.loads(line[5:])


def _probabilities(given: Any) -> list[float]:
    """Of a choice's `logprobs`: as the chat route gives them, or the other one."""
    if not isinstance(given, dict):
        return []
    logs = [token["logprob"] for token in given.get("content") or []]
    logs = logs or [log for log in given.get("token_logprobs") or [] if log is not None]
    return [math.exp(min(0.0, log)) for log in logs]
