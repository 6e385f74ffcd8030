"""Model servers for tests: real HTTP on loopback, in the OpenAI format.

`answer(body)` gets a request's JSON and returns a reply by `calls` or `text`, or raises
`Raw` to send other bytes, hang, or cut the connection.
"""

import contextlib
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

from pydantic_ai.messages import (
    ModelRequest,
    ModelResponse,
    SystemPromptPart,
    TextPart,
    ToolCallPart,
    ToolReturnPart,
    UserPromptPart,
)


class Raw(Exception):
    """Something else than a reply."""

    def __init__(self, status=200, body=b"", headers=(), hang=0.0, cut=None):
        self.status, self.body, self.headers = status, body, dict(headers)
        self.hang, self.cut = hang, cut


def words(text):
    """A tokenizer: one token for two characters, and one for each quote."""
    return len(text) // 2 + text.count('"')


def calls(*made, text=None, usage=None):
    """A reply with tool calls, each (name, arguments); arguments may be any text."""
    listed = [
        {
            "id": f"call_{i}",
            "type": "function",
            "function": {
                "name": name,
                "arguments": args if isinstance(args, str) else json.dumps(args),
            },
        }
        for i, (name, args) in enumerate(made)
    ]
    message = {"role": "assistant", "content": text}
    if listed:
        message["tool_calls"] = listed
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": usage
        or {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
    }


@contextlib.contextmanager
def serving(answer):
    """Yields (address, list of the requests' bodies)."""
    seen = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            length = int(self.headers["content-length"])
            body = json.loads(self.rfile.read(length))
            seen.append(body)
            try:
                status, headers, reply = 200, {}, json.dumps(answer(body)).encode()
            except Raw as raw:
                time.sleep(raw.hang)
                status, headers, reply = raw.status, raw.headers, raw.body
                if raw.cut is not None:
                    self.send_response(200)
                    self.send_header("content-type", "application/json")
                    self.send_header("content-length", "100000")
                    self.end_headers()
                    self.wfile.write(raw.cut)
                    self.wfile.flush()
                    self.connection.close()
                    self.close_connection = True
                    return
            with contextlib.suppress(OSError):
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


def transcript(body):
    """A request's messages as pydantic-ai has them."""
    made, parts, names = [], [], {}
    for row in body["messages"]:
        role, content = row["role"], row.get("content")
        if role == "assistant":
            made.append(ModelRequest(parts))
            parts = []
            called = [
                ToolCallPart(c["function"]["name"], c["function"]["arguments"], c["id"])
                for c in row.get("tool_calls", [])
            ]
            names |= {c.tool_call_id: c.tool_name for c in called}
            said = [TextPart(content)] if content else []
            made.append(ModelResponse(said + called))
        elif role == "tool":
            id = row["tool_call_id"]
            parts.append(ToolReturnPart(names[id], content, id))
        elif role == "system":
            parts.append(SystemPromptPart(content))
        else:
            parts.append(UserPromptPart(content))
    return [*made, ModelRequest(parts)]


def by_policy(policy):
    """An answer function that asks a rule policy."""

    def answer(body):
        tools = [SimpleNamespace(name=t["function"]["name"]) for t in body["tools"]]
        response = policy(transcript(body), SimpleNamespace(function_tools=tools))
        part = response.parts[0]
        size = words(json.dumps([body["messages"], body["tools"]]))
        usage = {
            "prompt_tokens": size,
            "completion_tokens": 9,
            "total_tokens": size + 9,
        }
        return calls((part.tool_name, part.args_as_dict()), usage=usage)

    return answer
