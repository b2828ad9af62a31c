"""Tokenizers and chat templates out of model folders."""

import asyncio
import json
from pathlib import Path

import pytest

from precast.errors import InvalidRequest, ModelCorrupt
from precast.tokenizer.model_tokenizer import (
    ModelTokenizer,
    TokenizerStore,
    read_model_tokenizer,
)
from tests.support.gateway_stack import make_model_folder

HI = [{"role": "user", "content": "hi"}]


def with_template(folder: Path, template: object) -> ModelTokenizer:
    config = {"chat_template": template, "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return read_model_tokenizer(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model_folder(tmp_path)


async def test_text_to_ids_and_back(folder: Path) -> None:
    tokenizer = read_model_tokenizer(folder)
    texts = ["the fox 🦊", "é" * 10_000]  # one for the event loop, one for a thread
    for text in texts:
        (ids,) = await tokenizer.encode([text], add_special_tokens=True)
        assert tokenizer.decode(ids) == text
    assert await tokenizer.encode([], add_special_tokens=True) == []


async def test_the_loop_goes_on_while_a_long_text_is_tokenised(folder: Path) -> None:
    tokenizer = read_model_tokenizer(folder)
    work = asyncio.create_task(tokenizer.encode(["the fox " * 100_000], add_special_tokens=True))
    turns = 0
    while not work.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 10


def test_template_with_special_tokens_and_helpers(folder: Path) -> None:
    source = "{{ bos_token }}{{ messages[0]['content'] | tojson }}{{ eos_token }}"
    assert with_template(folder, source).chat_template.render(HI) == '<s>"hi"</s>'


def test_a_template_file_comes_before_the_config(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("from the file")
    assert with_template(folder, "from the config").chat_template.render(HI) == "from the file"


def test_the_default_of_several_templates(folder: Path) -> None:
    several = [{"name": "tool_use", "template": "a"}, {"name": "default", "template": "b"}]
    assert with_template(folder, several).chat_template.render(HI) == "b"


def test_no_template(folder: Path) -> None:
    with pytest.raises(InvalidRequest, match="no chat template"):
        with_template(folder, None).chat_template.render(HI)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('no') }}",
        "{{ messages[7]['content'].x.y }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{% for i in range(999999999) %}{% endfor %}",
        "{{ 1 / 0 }}",
        "{{ messages + 1 }}",
    ],
)
def test_templates_that_fail_or_reach_out(folder: Path, source: str) -> None:
    with pytest.raises(InvalidRequest, match="chat template"):
        with_template(folder, source).chat_template.render(HI)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("config.json", '{"vocab_size": "many"}'),
    ],
)
def test_corrupt_folders(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(ModelCorrupt):
        read_model_tokenizer(folder)


async def test_the_store_reads_once_and_again_after_a_change(folder: Path) -> None:
    store = TokenizerStore(folder.parent)
    first, second = await asyncio.gather(store.get("tiny"), store.get("tiny"))
    assert first is second
    (folder / "chat_template.jinja").write_text("new")
    assert (await store.get("tiny")).chat_template.render(HI) == "new"


@pytest.mark.parametrize("name", ["missing", "..", ".", "a/b", "../tiny", "/etc"])
async def test_names_that_are_no_folder_of_models(folder: Path, name: str) -> None:
    with pytest.raises(ModelCorrupt):
        await TokenizerStore(folder.parent).get(name)
