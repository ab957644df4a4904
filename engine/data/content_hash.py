"""Hashes of the content of traces, by which files of the same traces are joined.

They depend on the texts alone, not on the row's shape, place or id, nor on a tokenizer.
"""

from __future__ import annotations

import json

import xxhash

from redi.engine.data.messages import as_messages
from redi.engine.data.traces import Trace


def prompt_hash(trace: Trace) -> str:
    """Hash of a trace's prompt and of the tools that it offers."""
    messages = [
        (one.role, one.content, one.thought, one.calls, one.extra)
        for one in as_messages(trace.prompt)
    ]
    return _hash(messages, trace.tools)


def trace_hash(trace: Trace) -> str:
    """Hash of a trace's prompt and completion; its verdict is not part of it."""
    return _hash(prompt_hash(trace), trace.completion, trace.calls)


def _hash(*content: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content).encode())
