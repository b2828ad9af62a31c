"""Clients in JavaScript: openai-node and Vercel's AI SDK (``node/package-lock.json``)."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MODEL, Server

NODE = Path(sys.executable).with_name("node")
FOLDER = Path(__file__).with_name("node")


@pytest.mark.parametrize("program", ["openai.mjs", "ai_sdk.mjs"])
def test_node(server: Server, program: str) -> None:
    """Each program asserts what it gets."""
    command = [str(NODE), program, server.base, MODEL]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
