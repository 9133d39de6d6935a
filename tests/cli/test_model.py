"""The fetched model is what its makers shipped: tokens, chat template, end token."""

from __future__ import annotations

from typing import Any

import pytest

from models import store

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(store.resolve(store.DEFAULT_MODEL)))


def test_chat_template_opens_the_assistants_turn(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\n")


def test_special_tokens(tokenizer: Any) -> None:
    from transformers import AutoConfig, GenerationConfig

    folder = str(store.resolve(store.DEFAULT_MODEL))
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [1, 2]
    assert tokenizer("Hi")["input_ids"][0] != tokenizer.bos_token_id  # the template writes the start marks itself
    assert AutoConfig.from_pretrained(folder).eos_token_id == 2
    assert GenerationConfig.from_pretrained(folder).eos_token_id == 2
    assert tokenizer.model_max_length == 8192


def test_numbers_are_split_into_digits(tokenizer: Any) -> None:
    assert tokenizer.tokenize("x  42") == ["x", "ĠĠ", "4", "2"]
