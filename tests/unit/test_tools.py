"""What stands at the head of every prompt is the same bytes each time: tools, schemas, arguments, whole requests."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmem.errors import InvalidInput
from agentmem.types import ToolCall

adapter = importlib.import_module("agentmem.adapters.providers._tools")
GOLDEN = Path(__file__).parents[1] / "golden" / "requests"


def test_tools_are_sorted_by_name_in_either_spelling() -> None:
    tools = [{"name": "b"}, {"type": "function", "function": {"name": "a"}}, {"type": "web_search"}, {"name": "c"}]
    orders = {json.dumps(adapter.in_order(some)) for some in itertools.permutations(tools)}
    assert orders == {json.dumps([tools[2], tools[1], tools[0], tools[3]])}


def test_keywords_of_a_schema_are_sorted_and_properties_keep_their_order() -> None:
    schema = {"type": "object", "properties": {"z": {"type": "string", "enum": ["b", "a"]}, "a": {}}, "required": ["z"]}
    turned = {key: schema[key] for key in reversed(schema)}
    texts = {json.dumps(adapter.tool_parts({"name": "f", "parameters": given})[2]) for given in (schema, turned)}
    assert texts == {
        '{"properties": {"z": {"enum": ["b", "a"], "type": "string"}, "a": {}}, "required": ["z"], "type": "object"}'
    }


@pytest.mark.parametrize("parameters", ["text", ["type"], 5])
def test_parameters_that_are_no_schema_are_refused(parameters: Any) -> None:
    with pytest.raises(InvalidInput, match="'f'"):
        adapter.tool_parts({"name": "f", "parameters": parameters})


def test_arguments_are_compact_sorted_and_go_there_and_back() -> None:
    call = ToolCall(id="c", name="f", arguments={"b": {"d": 1, "c": "ü\u2028"}, "a": [1.5, None]})
    text = adapter.arguments_text(call)
    assert text == '{"a":[1.5,null],"b":{"c":"ü\u2028","d":1}}'
    assert adapter.tool_call("c", "f", text) == call


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(InvalidInput, match="JSON"):
        adapter.canonical({"a": object()})


@pytest.mark.parametrize("seed", ["0", "1"])
def test_a_request_is_the_same_bytes_in_another_process(seed: str, tmp_path: Path) -> None:
    """The golden files were written by another process too: its sets had another order."""
    command = [sys.executable, str(GOLDEN / "write_requests.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=60, env={**os.environ, "PYTHONHASHSEED": seed})
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) == 5
    assert written == {path.name: path.read_bytes() for path in GOLDEN.glob("*.json")}
