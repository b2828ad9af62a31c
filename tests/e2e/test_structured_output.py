"""A real model's answers follow the schemas that they were asked for."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from precast.system.redis_server import RedisServer
from tests.support.decode_worker import decode_worker
from tests.support.json_schemas import CASES
from tests.support.structured_output import ASKED, AT_ONCE, judged


@pytest.mark.timeout(300)
def test_every_answer_that_ends_is_valid(
    demo_model: Path, tmp_path: Path, redis_server: RedisServer
) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / demo_model.name).symlink_to(demo_model)
    tokenizer = Tokenizer.from_file(str(demo_model / "tokenizer.json"))
    settings = {"batch_sizes": "1", "max_batch_size": AT_ONCE, "max_context_length": 512}
    with decode_worker(
        tmp_path, redis_server.url, demo_model.name, quantization="q4_1", **settings
    ) as worker:
        schemas = [case.schema for case in CASES[::2]][:ASKED]  # bench constraints asks for all
        verdict = judged(worker, tokenizer, schemas, max_tokens=64)
    assert verdict.wrong == []
    assert verdict.ended > len(schemas) // 2
