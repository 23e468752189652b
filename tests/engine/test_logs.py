"""Log lines are JSON objects, one a line, whatever is logged."""

from __future__ import annotations

import json
import logging

from engine.logs import JsonFormatter


def line(message: str, *args: object, **more: object) -> dict:
    record = logging.LogRecord("a.b", logging.WARNING, __file__, 1, message, args, None)
    vars(record).update(more)
    text = JsonFormatter().format(record)
    assert "\n" not in text
    return json.loads(text)


def test_fields():
    found = line("two\nlines of %s", "text", request_id="r1")
    assert found["time"].endswith("+00:00")
    assert (found["level"], found["logger"]) == ("warning", "a.b")
    assert (found["message"], found["request_id"]) == ("two\nlines of text", "r1")


def test_a_message_that_is_json_stays_json():
    assert line("%s", json.dumps({"status": 200}))["message"] == {"status": 200}
    assert line('{"no json')["message"] == '{"no json'


def test_exceptions_and_values_that_json_does_not_know():
    try:
        raise ValueError("broken")
    except ValueError as error:
        found = line("failed", exc_info=(ValueError, error, error.__traceback__), at=object)
    assert "ValueError: broken" in found["exception"]
    assert "object" in found["at"]
