"""guidellm and aiperf: load generators, which ask for usage in every chunk of a stream."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import MODEL, Server, say

REQUESTS = 4
ANSWER = "Hello there."


def run(folder: Path, *command: str) -> str:
    program = str(Path(sys.executable).with_name(command[0]))
    environment = {**os.environ, "HF_HOME": str(folder / "hub")}
    done = subprocess.run(
        [program, *command[1:]],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_guidellm(server: Server, tmp_path: Path, path: str) -> None:
    lines = [json.dumps({"prompt": say(ANSWER)})] * REQUESTS
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    run(
        tmp_path,
        *("guidellm", "run", "--profile", "kind=synchronous", "--disable-progress"),
        *("--backend", f"kind=openai_http,target={server.url},model={MODEL},request_format={path}"),
        *("--constraint", f"kind=max_requests,count={REQUESTS}"),
        *("--data", f"kind=json_file,path={tmp_path}/prompts.jsonl"),
        *("--output", f"kind=json,path={tmp_path}/report.json"),
    )
    [report] = json.loads((tmp_path / "report.json").read_text())["benchmarks"]
    requests: Any = report["requests"]
    assert len(requests["successful"]) == REQUESTS
    assert requests["errored"] == []
    for one in requests["successful"]:
        assert one["output"] == ANSWER
        assert one["output_metrics"]["text_tokens"] >= 2, "as the usage says"


@pytest.mark.parametrize("kind", ["chat", "completions"])
def test_aiperf(server: Server, tmp_path: Path, kind: str) -> None:
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"text": say(ANSWER)}) + "\n")
    (tmp_path / "tokenizer").mkdir()
    vocabulary = (server.folder / "tokenizer.json").read_text()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(vocabulary)
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(config))
    run(
        tmp_path,
        *("aiperf", "profile", "-m", MODEL, "--url", server.url, "--endpoint-type", kind),
        *("--streaming", "--use-server-token-count", "--tokenizer", str(tmp_path / "tokenizer")),
        *("--request-count", str(REQUESTS), "--concurrency", "2", "--ui", "none"),
        *("--input-file", "prompts.jsonl", "--custom-dataset-type", "single_turn"),
        *("--artifact-dir", "report"),
    )
    with (tmp_path / "report" / "profile_export_aiperf.csv").open() as file:
        rows = {row[0]: row[1] for row in csv.reader(file) if len(row) > 1}
    assert float(rows["Request Count"]) == REQUESTS
    assert float(rows.get("Error Request Count", 0)) == 0
