"""general.name says Phi-3 where the tokenizer is Phi-3's, and nowhere else: llama.cpp goes by it."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from quantkit.formats.gguf.model_name import fitting_name, name_remarks
from quantkit.formats.gguf.tokenizer import tokenizer_metadata
from quantkit.formats.gguf.vocabulary import token_count
from tests.tiny_tokenizers import byte_level, phi3_folder, tokenizer_folder

NAMES = ["Phi-3-mini-4k-instruct", "my-tuned-phi3", "PHI3.5", "org phi-3 x", "phi-3-phi3"]


def name_of(folder: Path, name: str) -> str:
    return tokenizer_metadata(folder, token_count(folder) + 2, name=name)["general.name"][1]


def heeded(name: str) -> bool:
    """What llama.cpp looks for."""
    return "phi-3" in name.lower() or "phi3" in name.lower()


@pytest.mark.parametrize("name", NAMES)
def test_a_phi3_keeps_its_name(name: str, tmp_path: Path) -> None:
    assert name_of(phi3_folder(tmp_path), name) == name
    assert name_remarks(name, name) == []


@pytest.mark.parametrize("name", ["assistant-v2", "phi-4", "phi_3", "", "Phi"])
def test_a_phi3_of_another_name_says_so(name: str, tmp_path: Path) -> None:
    found = name_of(phi3_folder(tmp_path), name)
    assert found == f"{name} (Phi-3)"
    assert heeded(found)
    assert "would keep the spaces behind special tokens, which this tokenizer drops" in name_remarks(name, found)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["byte-level", "phi-3 that keeps spaces"])
def test_another_tokenizer_is_not_taken_for_phi3(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "byte-level":  # without <s> and the like llama.cpp would not even load the file
        tokenizer_folder(tmp_path, byte_level())
    else:
        phi3_folder(tmp_path, swallowing=False)
    found = name_of(tmp_path, name)
    assert not heeded(found)
    assert found.lower().replace("_", "-").replace("phi-3", "phi3") == name.lower().replace("phi-3", "phi3")
    assert "would drop the spaces behind special tokens, which this tokenizer keeps" in name_remarks(name, found)[0]
    assert name_of(tmp_path, "Qwen2.5-7B") == "Qwen2.5-7B"


def test_a_phi3_without_one_of_the_four_tokens_cannot_be_loaded_as_one() -> None:
    texts = ["<unk>", "<s>", "</s>", "<|end|>", "a"]
    assert fitting_name("phi3", texts, texts[:4], ["<|end|>"]) == "phi_3"
    whole = [*texts, "<|endoftext|>"]
    assert fitting_name("phi3", whole, texts[:4], ["<|end|>", "</s>"]) == "phi3"


def test_the_token_that_ends_a_turn_is_the_one_behind_an_answer(tmp_path: Path) -> None:
    """Phi-3 lists <|assistant|> among those that end a generation, and its template writes it too."""
    phi3_folder(tmp_path)
    keys = tokenizer_metadata(tmp_path, token_count(tmp_path))
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert keys["tokenizer.ggml.eot_token_id"] == ("u32", tokenizer.token_to_id("<|end|>"))
    assert keys["tokenizer.ggml.eos_token_id"] == ("u32", tokenizer.token_to_id("<|endoftext|>"))
