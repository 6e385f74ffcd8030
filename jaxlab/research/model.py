"""Where turns come from: the rule policy, a model server, or an earlier journal.

All are pydantic-ai models, asked by direct requests. A journal is the recording: its
`request` events hold the key of what was asked, its `reply` events the answer.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import importlib.util
import ipaddress
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from jaxlab.errors import ConfigError, UserError
from jaxlab.research.journal import Event, canonical, read_journal
from jaxlab.research.types import Stopped

if TYPE_CHECKING:
    from pydantic_ai.messages import ModelMessage, ModelResponse
    from pydantic_ai.models import Model
    from pydantic_ai.tools import ToolDefinition

SECRET = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|CREDENTIAL", re.IGNORECASE)


class ModelFailure(Exception):
    """A request brought no usable turn."""

    def __init__(self, text: str, again: bool, too_long: bool = False) -> None:
        """`again`: trying again may help; `too_long`: a shorter request may."""
        super().__init__(text)
        self.again, self.too_long = again, too_long


class ReplayMiss(UserError):
    """What is asked was not asked when the journal was written."""

    exit_code = 4


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """Which model, and how it is asked."""

    model: str = "rule"
    """rule; openai:NAME, anthropic:NAME, ... (pydantic-ai's names); replay:WORKSPACE"""
    base_url: str | None = None
    """address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1"""
    key_env: str = "OPENAI_API_KEY"
    """environment variable that holds the server's key"""
    allow_remote: bool = False
    """let requests, with what the study holds, leave this machine"""
    window: int = 32_768
    """tokens that the model takes in"""
    answer: int = 2_048
    """tokens of an answer at most"""
    timeout: float = 300.0
    """seconds after which a request has failed"""
    attempts: int = 5
    """requests for one turn before the study waits for a person"""
    price: tuple[float, float] | None = None
    """USD for a million tokens in and out; without: what pydantic-ai knows"""
    replay: Literal["strict", "order"] = "strict"
    """of replay: requests must be the recorded ones, or only as many"""


@dataclasses.dataclass(frozen=True)
class Turn:
    """A model's answer."""

    message: dict[str, Any]
    """ModelResponse as JSON"""
    tokens_in: int
    tokens_out: int
    usd: float


def secrets_of(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Values of variables that look like secrets, to be kept out of files."""
    return tuple(
        value
        for name, value in sorted(environment.items())
        if SECRET.search(name) and len(value) >= 8 and not value.startswith("/")
    )


def is_loopback(url: str) -> bool:
    """Whether an address names this machine by number, or as localhost."""
    host = urlsplit(url).hostname or ""
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


class Backend:
    """A model that is asked for turns; `open_backend` makes it."""

    def __init__(
        self, options: ModelOptions, model: "Model | None", client: Any = None
    ) -> None:
        """`client`: what has to be closed in the end, an AsyncOpenAI."""
        self.options, self._model, self._client = options, model, client
        self._runner = asyncio.Runner()

    def close(self) -> None:
        """Closes connections and the event loop."""
        if self._client is not None:
            self._runner.run(self._client.close())
        self._runner.close()

    def ask(
        self,
        messages: Sequence["ModelMessage"],
        tools: Sequence["ToolDefinition"],
        key: str,
        check: Callable[[], Any],
    ) -> Turn:
        """One turn; `check` is called ten times a second and may raise to cancel.

        Raises:
            ModelFailure: the server refused, failed, hung or answered nonsense.
        """
        response = self._runner.run(self._ask(messages, tools, check))
        return Turn(
            dump(response),
            response.usage.input_tokens,
            response.usage.output_tokens,
            self._usd(response),
        )

    async def _ask(self, messages, tools, check) -> "ModelResponse":
        from pydantic_ai import exceptions as failures
        from pydantic_ai.direct import model_request
        from pydantic_ai.models import ModelRequestParameters

        assert self._model is not None
        request = asyncio.ensure_future(
            model_request(
                self._model,
                list(messages),
                model_settings={
                    "max_tokens": self.options.answer,
                    "temperature": 0.0,
                    "timeout": self.options.timeout,
                },
                model_request_parameters=ModelRequestParameters(
                    function_tools=list(tools), allow_text_output=True
                ),
            )
        )
        loop = asyncio.get_running_loop()
        until = loop.time() + self.options.timeout
        try:
            while not request.done():
                await asyncio.wait({request}, timeout=0.1)
                if not request.done():
                    check()
                    if loop.time() > until:
                        raise ModelFailure(
                            f"no answer within {self.options.timeout:g} s", again=True
                        )
            return request.result()
        except (Stopped, ModelFailure):
            raise
        except failures.ModelHTTPError as error:
            body = str(error.body)[:300]
            long = isinstance(error, failures.ModelContextWindowExceededError)
            long = long or (error.status_code in (400, 413) and "context" in body)
            again = (
                error.status_code in (408, 409, 425, 429) or error.status_code >= 500
            )
            text = f"HTTP {error.status_code}: {body}"
            raise ModelFailure(text, again, long) from None
        except Exception as error:  # whatever a broken answer breaks on its way here
            raise ModelFailure(f"{type(error).__name__}: {error}"[:300], True) from None
        finally:
            if not request.done():
                request.cancel()
                with contextlib.suppress(BaseException):
                    await request

    def _usd(self, response: "ModelResponse") -> float:
        usage, price = response.usage, self.options.price
        if price is not None:
            return (
                usage.input_tokens * price[0] + usage.output_tokens * price[1]
            ) / 1e6
        if self.options.model == "rule" or self.options.base_url is not None:
            return 0.0
        with contextlib.suppress(LookupError, ValueError, AssertionError):
            return float(response.cost().total_price)
        return 0.0


class Replay(Backend):
    """Answers from a journal, each once."""

    def __init__(self, options: ModelOptions, events: Sequence[Event]) -> None:
        super().__init__(options, None)
        self._recorded: list[tuple[str, dict[str, Any]]] = []
        asked = ""
        for event in events:
            if event.kind == "request":
                asked = event.data["key"]
            elif event.kind == "reply":
                self._recorded.append((asked, event.data))

    def ask(self, messages, tools, key, check) -> Turn:
        """The recorded turn of this request, or, by order, the next one."""
        place = 0
        if self.options.replay == "strict":
            keys = [k for k, _ in self._recorded]
            if key not in keys:
                raise ReplayMiss(
                    f"the recording has no answer left to request {key[:12]}; it was "
                    "made by another version, question or data (--replay order "
                    "takes the answers in their order)"
                )
            place = keys.index(key)
        elif not self._recorded:
            raise ReplayMiss("the recording has no answer left")
        _, data = self._recorded.pop(place)
        usage = data["usage"]
        return Turn(data["message"], usage["input"], usage["output"], usage["usd"])


def open_backend(
    options: ModelOptions, policy: Callable[..., Any], done: Sequence[Event] = ()
) -> Backend:
    """The backend of some options.

    Args:
        options: which.
        policy: the rule policy, a function for pydantic-ai's FunctionModel.
        done: the study's own journal; a replay goes on after its replies.

    Raises:
        ConfigError: see `check_options`; an unknown name.
    """
    check_options(options)
    kind, _, name = options.model.partition(":")
    if kind == "replay":
        events = read_journal(Path(name) / "journal.jsonl")
        backend = Replay(options, events)
        del backend._recorded[: sum(e.kind == "reply" for e in done)]
        return backend
    if options.model == "rule":
        from pydantic_ai.models.function import FunctionModel

        return Backend(options, FunctionModel(policy, model_name="rule"))
    if options.base_url is not None:
        return _server(options, name)
    from pydantic_ai.models import infer_model

    try:
        return Backend(options, infer_model(options.model))
    except Exception as error:  # each provider complains in its own way
        raise ConfigError(f"--model {options.model}: {error}") from None


def check_options(options: ModelOptions) -> None:
    """Refuses options that cannot work, before anything is made.

    Raises:
        ConfigError: a remote server without leave, a name without its provider, or the
            extra is not installed.
    """
    if importlib.util.find_spec("pydantic_ai") is None:
        raise ConfigError(
            "agents need the extra `research`: pip install 'jaxlab[research]'"
        )
    kind, _, name = options.model.partition(":")
    if options.model == "rule" or (kind == "replay" and name):
        return
    if not name:
        raise ConfigError(
            f"--model {options.model!r}: give rule, replay:WORKSPACE, or PROVIDER:NAME "
            "such as openai:qwen3 with --base-url"
        )
    if options.allow_remote:
        return
    if options.base_url is None:
        raise ConfigError(
            f"--model {options.model} is asked over the network; --allow-remote lets "
            "the study's texts go there, or name a server here by --base-url"
        )
    if not is_loopback(options.base_url):
        raise ConfigError(
            f"--base-url {options.base_url} is not this machine; --allow-remote "
            "lets the study's texts go there"
        )


def _server(options: ModelOptions, name: str) -> Backend:
    """An OpenAI-compatible server; tries are the driver's, so the client makes one."""
    from openai import AsyncOpenAI
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    client = AsyncOpenAI(
        base_url=options.base_url,
        api_key=os.environ.get(options.key_env) or "none",
        max_retries=0,
        timeout=options.timeout,
    )
    provider = OpenAIProvider(openai_client=client)
    return Backend(options, OpenAIChatModel(name, provider=provider), client)


def dump(response: "ModelResponse") -> dict[str, Any]:
    """A response as JSON: what was said and called, no times and no addresses."""
    parts: list[dict[str, Any]] = []
    for part in response.parts:
        if part.part_kind == "text":
            parts.append({"part_kind": "text", "content": part.content})
        elif part.part_kind == "tool-call":
            parts.append(
                {
                    "part_kind": "tool-call",
                    "tool_name": part.tool_name,
                    "args": part.args,
                    "tool_call_id": part.tool_call_id,
                }
            )
    return {"kind": "response", "parts": parts, "model_name": response.model_name}


def request_key(
    messages: Sequence["ModelMessage"], tools: Sequence["ToolDefinition"]
) -> str:
    """SHA-256 of what a request says; times and ids of the client do not count."""
    said = [
        {
            "kind": message.kind,
            "parts": [
                {
                    name: getattr(part, name)
                    for name in ("part_kind", "content", "tool_name", "args")
                    if hasattr(part, name)
                }
                for part in message.parts
            ],
        }
        for message in messages
    ]
    offered = [[t.name, t.description, t.parameters_json_schema] for t in tools]
    return hashlib.sha256(canonical([said, offered]).encode()).hexdigest()


@contextlib.contextmanager
def opened(
    options: ModelOptions, policy: Callable[..., Any], done: Sequence[Event] = ()
) -> Iterator[Backend]:
    """`open_backend`, closed in the end."""
    backend = open_backend(options, policy, done)
    try:
        yield backend
    finally:
        backend.close()
