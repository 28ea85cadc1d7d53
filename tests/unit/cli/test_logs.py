"""What the log shows, and what it never shows."""

import json
import subprocess
import sys

import pytest

CODE = """
import logging, sys, structlog
from gpulane.cli.logs import set_up_logs
from gpulane.config.settings import LogSettings
set_up_logs(LogSettings(format=sys.argv[1]))
def fails():
    password = "s3cr" + "et"
    raise ValueError("it failed")
structlog.get_logger().debug("unseen")
structlog.get_logger().info("started", gpu="gpu0")
try:
    fails()
except ValueError:
    structlog.get_logger().exception("ours")
    logging.getLogger("aiohttp.server").exception("of a library")
"""


def logged(kind: str) -> str:
    done = subprocess.run([sys.executable, "-c", CODE, kind], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    return done.stderr


@pytest.mark.parametrize("kind", ["console", "json"])
def test_tracebacks_show_no_values_of_variables(kind: str) -> None:
    text = logged(kind)
    assert text.count("it failed") == 2
    assert "s3cret" not in text
    assert "unseen" not in text
    assert "\x1b" not in text


def test_json_is_a_line_per_event_also_from_libraries() -> None:
    lines = [json.loads(line) for line in logged("json").splitlines()]
    assert [line["event"] for line in lines] == ["started", "ours", "of a library"]
    assert lines[0]["gpu"] == "gpu0"
    assert all("Traceback" in line["exception"] for line in lines[1:])
    assert all(line["timestamp"].endswith("Z") and line["level"] for line in lines)
