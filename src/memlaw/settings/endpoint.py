"""The settings of an audit over HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from memlaw.core.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """Settings of an audit of an OpenAI-style server.

    Attributes:
        endpoint: URL of an OpenAI-style server to ask instead of loading a model, as
            http://localhost:8000/v1. A key is taken from MEMLAW_ENDPOINT_KEY alone.
        name: what the server calls the model or adapter.
        route: chat sends messages to /chat/completions; completions sends the prompt's bare text
            to /completions.
        concurrency: requests at a time.
        timeout: seconds that one answer may take.
        retries: how often a request is sent again that failed: no connection, no answer in time,
            status 408, 429 or 5xx.
    """

    endpoint: str | None = None
    name: str | None = None
    route: Literal["chat", "completions"] = "chat"
    concurrency: int = 4
    timeout: float = 120.0
    retries: int = 3

    def __post_init__(self) -> None:
        """Raise ConfigError on a setting out of range."""
        if (self.endpoint is None) != (self.name is None):
            raise ConfigError("endpoint and name belong together: give both, or neither.")
        if self.endpoint is not None:
            parts = urlsplit(self.endpoint)
            if parts.username or parts.password or parts.query or "@" in self.endpoint:
                raise ConfigError(
                    "endpoint holds a key or a query. Give the key in MEMLAW_ENDPOINT_KEY."
                )
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ConfigError(
                    f"endpoint '{self.endpoint}' is no URL. Give one as http://localhost:8000/v1."
                )
        for name, least in (("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if not self.timeout > 0:
            raise ConfigError(f"timeout is {self.timeout:g} s; it must be above 0.")
