"""Calibration data from Python: every kind becomes token windows or one message."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoTokenizer, BatchEncoding

from quantkit.errors import UserError
from quantkit.quantization.calibration.data import CalibrationTokens, token_batches
from quantkit.quantization.calibration.given import Given, given
from quantkit.recipe.sections import Calibration

MODEL = Path(__file__).resolve().parents[2] / "examples" / "tiny-llama"
CHAT = [{"role": "user", "content": "one two three"}, {"role": "assistant", "content": "four five six seven"}]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


def read(data: Any, tokenizer: Any = None, notes: list[str] | None = None, **options: Any) -> CalibrationTokens:
    extra = {k: options.pop(k) for k in ("held_out", "vocabulary", "max_positions") if k in options}
    found = given(data)
    assert isinstance(found, Given)
    return token_batches(Calibration(**options), tokenizer, notes=notes, given=found, **extra)


IDS = torch.arange(64).reshape(4, 16)


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        IDS.to(torch.int32),
        IDS.numpy(),
        list(IDS),
        list(IDS.split(2)),
        DataLoader(TensorDataset(IDS), batch_size=3),
        DataLoader(IDS, batch_size=3),  # type: ignore[arg-type]
        [{"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}],
        {"input_ids": IDS},
        [{"input_ids": row.tolist()} for row in IDS],
        BatchEncoding({"input_ids": IDS.tolist(), "attention_mask": torch.ones_like(IDS).tolist()}),
        (row for row in IDS),
        IDS.tolist(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_token_ids_stay_as_they_are(data: Any) -> None:
    found = read(data)
    assert found.ids_ST.equal(IDS)
    assert found.ids_ST.dtype == torch.int64
    assert found.held_out_HT is None
    assert len(found.sources[0].sha256) == 64


def test_samples_and_seq_len_apply() -> None:
    assert read(IDS, samples=2, held_out=8).ids_ST.equal(IDS[:2])
    assert read(IDS, seq_len=8).ids_ST.equal(IDS.reshape(8, 8))
    held = read(list(IDS), samples=3, seq_len=16, held_out=8).held_out_HT
    assert held is not None
    assert held.equal(IDS[3:])
    stream = torch.arange(5000)
    assert read(stream).ids_ST.equal(stream[:4096].reshape(2, 2048))
    assert read(stream, max_positions=500).ids_ST.equal(stream.reshape(10, 500))
    assert read(torch.arange(4096).reshape(1, 4096), max_positions=8192).ids_ST.shape == (1, 4096)
    assert read(torch.arange(4096).reshape(1, 4096), max_positions=1024).ids_ST.shape == (4, 1024)
    with pytest.raises(UserError, match="4 of 4 sequences have 8 tokens, 5 are needed; the longest has 16"):
        read(IDS, samples=5)


def test_padding_is_never_calibrated_on() -> None:
    ids = torch.arange(1, 41).reshape(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0  # padded at the left
    mask[1, 12:] = 0  # and at the right
    found = read([{"input_ids": ids, "attention_mask": mask}])
    assert found.ids_ST.tolist() == [ids[0, 8:].tolist(), ids[1, :12].tolist()]
    all_padding = torch.cat([mask, torch.zeros(1, 20, dtype=torch.int64)])
    ids = torch.cat([ids, torch.zeros(1, 20, dtype=torch.int64)])
    assert len(read([{"input_ids": ids, "attention_mask": all_padding}]).ids_ST) == 2
    all_padding[0, 10] = 0
    with pytest.raises(UserError, match=r"attention_mask has zeros between ones.*\nhint: pad at one end"):
        read([{"input_ids": ids, "attention_mask": all_padding}])


def test_ragged_sequences_are_cut_to_what_keeps_most() -> None:
    notes: list[str] = []
    lengths = [30, 10, 32, 31, 30]
    found = read([torch.arange(n) for n in lengths], notes=notes)
    assert found.ids_ST.shape == (4, 30)
    assert "calibration: 1 sequences shorter than 30 tokens were skipped" in notes


def endless(make: Callable[[int], Any]) -> Iterator[Any]:
    return (make(i) for i in itertools.count())


@pytest.mark.parametrize("options", [{}, {"samples": 3}, {"seq_len": 8}, {"samples": 3, "seq_len": 32}], ids=str)
def test_infinite_iterables_are_bounded(tokenizer: Any, options: dict[str, int]) -> None:
    found = read(endless(lambda i: torch.full((2, 32), i % 50)), **options)
    assert found.ids_ST.numel() == (3 * 32 if "samples" in options else 32768)
    found = read(endless(lambda i: f"text number {i} of very many"), tokenizer, max_positions=64, **options)
    assert len(found.ids_ST) == options.get("samples", 32768 // options.get("seq_len", 64))
    with pytest.raises(UserError, match="have 64 tokens"):
        read(endless(lambda i: torch.full((9,), 1)), samples=3, seq_len=64)


def test_texts_and_chats(tokenizer: Any) -> None:
    texts = [f"def function_{i}(): return {i}" for i in range(30)]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    joined = [token for text in texts for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], *end]]
    found = read(texts, tokenizer, samples=4, seq_len=16, seed=None)
    assert found.ids_ST.flatten().tolist() == joined[:64]
    assert found.sources[0].rows == 30
    rows = read([{"text": text} for text in texts], tokenizer, samples=4, seq_len=16, seed=None)
    assert rows.ids_ST.equal(found.ids_ST)
    with pytest.raises(UserError, match="item 0: `messages` need a chat template"):
        read([CHAT] * 9, tokenizer, samples=1, seq_len=8)
    template = tokenizer.chat_template
    try:
        tokenizer.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
        expected = tokenizer("<user>one two three<assistant>", add_special_tokens=False)["input_ids"][:8]
        assert read([CHAT] * 9, tokenizer, samples=1, seq_len=8, seed=None).ids_ST[0].tolist() == expected
    finally:
        tokenizer.chat_template = template


def test_data_sets(tokenizer: Any) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package is optional")
    table = datasets.Dataset.from_dict({"text": [f"row {i} of a table" for i in range(40)]})
    expected = read(list(table["text"]), tokenizer, samples=4, seq_len=16).ids_ST
    for data in (table, table.to_iterable_dataset(), datasets.DatasetDict({"train": table})):
        assert read(data, tokenizer, samples=4, seq_len=16).ids_ST.equal(expected)
    named = datasets.Dataset.from_dict({"body": list(table["text"])})
    assert read(named, tokenizer, samples=4, seq_len=16, column="body").ids_ST.equal(expected)
    with pytest.raises(UserError, match="item 0: has neither `text`"):
        read(named, tokenizer)
    tokens = datasets.Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    assert read(tokens).ids_ST.equal(IDS)


def test_names_and_paths() -> None:
    assert given("c4") == "c4"
    assert given(Path("a") / "b.txt") == "a/b.txt"


WRONG: dict[str, tuple[Any, str]] = {
    "an empty list": ([], "it is empty"),
    "an empty name": ("", "an empty text names nothing"),
    "nothing": (None, "NoneType is no calibration data\nhint: give a path"),
    "a number": (3, "int is no calibration data"),
    "an object": (object(), "object is no calibration data"),
    "a mapping": ({"a": 1}, "dict is no calibration data"),
    "numbers": ([1.5, 2.5], "item 0: float is no calibration data"),
    "floats": (torch.rand(2, 16), r"float32 numbers \[2, 16\], where integer token ids are expected"),
    "floats in a list": ([torch.rand(2, 16)], "item 0: float32 numbers"),
    "a mask": (IDS > 3, "bool numbers"),
    "no tokens": (torch.zeros(0, 16, dtype=torch.int64), "no token ids in it"),
    "a number in a tensor": (torch.tensor(3), r"token ids \[\], where \[seq\] or \[batch, seq\]"),
    "three dimensions": (IDS[None], r"token ids \[1, 4, 16\], where"),
    "too short": (IDS[:, :4], "sequences have 8 tokens"),
    "too ragged": ([torch.arange(3), torch.arange(5)], "sequences have 8 tokens"),
    "outside the vocabulary": (IDS + 1000, "token id 1063, where the model has 0 to 1023"),
    "negative": (IDS - 1, "token id -1, where the model has 0 to 1023"),
    "texts and numbers": (["a text", 3], "item 1: a text like the first one is expected, this is int"),
    "one chat": (CHAT, "one chat, a list of .* where a list of chats is expected\nhint: give .chat."),
    "a dict of another kind later": ([{"input_ids": IDS}, {"text": "x"}], "item 1: no input_ids among text"),
    "a mask of another shape": ([{"input_ids": IDS, "attention_mask": IDS[0]}], "must have the shape of input_ids"),
    "strings in a dict": ([{"input_ids": "text"}], "item 0: str is no calibration data"),
    "a ragged list in a tensor": ([{"input_ids": [[1, "x"]]}], "item 0: list is no calibration data"),
    "an empty tuple": ([()], "item 0: tuple is no calibration data"),
    "nested": ([[[["x"]]]], "item 0: list is no calibration data"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_calibration_data(tokenizer: Any, case: str) -> None:
    data, message = WRONG[case]
    with pytest.raises(UserError, match=message):
        read(data, tokenizer, vocabulary=1024)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(UserError, match="given list is text, and there is no tokenizer\nhint: pass tokenizer="):
        read(["some text"])
