"""Calibration text to token batches: the exact stream, the same choice every time, and clear refusals."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from quantkit.errors import UserError
from quantkit.quantization.calibration import data, files, windows
from quantkit.quantization.calibration.data import data_fingerprint, token_batches
from quantkit.recipe.sections import Calibration

ROOT = Path(__file__).resolve().parents[2]
SHARED = Path(os.environ.get("QUANTKIT_SHARED", ROOT.parent / "shared"))
WORDS = [
    "the",
    " small",
    " cat",
    " saw",
    " a",
    " dog, then",
    " it ran\nhome",
    "  to",
    "\n\nall day.",
    " Ünïcode too: 日本",
    " \t tabs",
]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def words(count: int, start: int = 0) -> str:
    return "".join(WORDS[(i * i + start) % len(WORDS)] + (str(i) if i % 7 == 0 else "") for i in range(count))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A byte-level BPE with <s> put at a document's start and </s> as its end."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([words(2000)], trainer)
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def batches(tokenizer: Any, path: Path | str, samples: int = 4, seq_len: int = 16, **options: Any) -> torch.Tensor:
    extra = {key: options.pop(key) for key in ("max_positions", "notes") if key in options}
    calibration = Calibration(data=str(path), samples=samples, seq_len=seq_len, **{"bos": False} | options)
    return token_batches(calibration, tokenizer, **extra).ids_ST


def text_file(folder: Path, text: str, name: str = "t.txt") -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def jsonl(folder: Path, *rows: Any) -> Path:
    return text_file(folder, "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), "t.jsonl")


def test_a_text_file_is_one_stream_of_tokens(tokenizer: Any, tmp_path: Path) -> None:
    text = words(300) + "\r\n<|endoftext|>\r\n" + words(300, 5)
    path = tmp_path / "t.txt"
    path.write_bytes(text.encode())
    expected = plain(tokenizer, path.read_text(encoding="utf-8"))[: 4 * 16]
    tokens = batches(tokenizer, path, seed=None)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == torch.tensor(expected).reshape(4, 16).tolist()


def test_reading_only_what_is_needed_changes_nothing(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = text_file(tmp_path, words(6000))
    whole = plain(tokenizer, path.read_text(encoding="utf-8"))
    asked: list[int] = []
    read = files.read_text
    monkeypatch.setattr(files, "read_text", lambda path, n=-1: (asked.append(n), read(path, n))[1])
    for guess in (1, 2, 3, 6):  # the text is cut before, in and after the last token that is kept
        monkeypatch.setattr(windows, "GUESS", guess)
        for need in range(500, 2500, 37):
            assert windows.stream_ids(path, tokenizer, need)[:need] == whole[:need]
    assert max(asked) < 6 * (2500 + windows.TAIL) < path.stat().st_size


def test_a_token_that_the_cut_would_change_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def word_lengths(text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}

    monkeypatch.setattr(windows, "GUESS", 4)
    text = "abcdef " + "cat " * 4000  # its first 4000 characters are 1000 tokens, the last one the "c" of a cut "cat"
    assert word_lengths(text[:4000])["input_ids"][999:] == [1]
    assert windows.stream_ids(text_file(tmp_path, text), word_lengths, 1000)[:1000] == [6] + [3] * 999


def test_many_tokens_per_character_and_the_reverse(tokenizer: Any, tmp_path: Path) -> None:
    for text in ("日本語" * 4000, "a" + " " * 30_000 + "b"):
        path = text_file(tmp_path, text)
        whole = plain(tokenizer, text)
        for need in (100, len(whole) - 1, len(whole)):
            assert windows.stream_ids(path, tokenizer, need)[:need] == whole[:need]


def test_the_seed_chooses_windows_in_their_order(tokenizer: Any, tmp_path: Path) -> None:
    path = text_file(tmp_path, words(2000))
    windows = torch.tensor(plain(tokenizer, path.read_text(encoding="utf-8"))).split(16)
    where = {tuple(window.tolist()): i for i, window in reversed(list(enumerate(windows)))}
    first, again, other = (batches(tokenizer, path, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    chosen = [where[tuple(row)] for row in first.tolist()]
    assert chosen == sorted(set(chosen))
    assert max(chosen) < 4 * data.POOL
    assert chosen != [0, 1, 2, 3]
    assert torch.equal(batches(tokenizer, path, samples=len(windows) - 1), torch.stack(windows[:-1]))  # all of them


def test_only_the_first_part_of_much_text_is_drawn_from(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": words(3000)})
    windows = [tuple(w.tolist()) for w in torch.tensor(plain(tokenizer, words(3000))).split(16)]
    chosen = {windows.index(tuple(batches(tokenizer, path, samples=1, seed=seed)[0].tolist())) for seed in range(30)}
    assert len(chosen) > 8
    assert max(chosen) < data.POOL


def test_jsonl_documents_are_joined_by_the_end_token(tokenizer: Any, tmp_path: Path) -> None:
    documents = [words(20 + i, i) for i in range(150)]
    path = jsonl(tmp_path, *({"text": text, "id": 3} for text in documents), "", {"text": "  "})
    joined = [token for text in documents for token in [*plain(tokenizer, text), 1]]
    assert batches(tokenizer, path, seed=None).flatten().tolist() == joined[:64]
    count = len(joined) // 16
    assert batches(tokenizer, path, samples=count).flatten().tolist() == joined[: count * 16]


def test_messages_go_through_the_chat_template(tokenizer: Any, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": words(30)}, {"role": "assistant", "content": words(40, 3)}]
    path = jsonl(tmp_path, {"messages": messages})
    with pytest.raises(UserError, match=r"t\.jsonl:1: `messages` need a chat template"):
        batches(tokenizer, path, samples=1)
    tokenizer.chat_template = TEMPLATE
    try:
        text = f"<s><user>{words(30)}<assistant>{words(40, 3)}"
        expected = plain(tokenizer, text)[:32]
        for packing in ("concat", "document"):  # the template writes <s> itself: never twice
            options: dict[str, Any] = {"seed": None, "packing": packing, "bos": "auto"}
            assert batches(tokenizer, path, samples=1, seq_len=32, **options).tolist() == [expected]
        rows = [{"text": words(60)}, {"messages": messages}, {"text": words(60, 2)}]
        mixed = batches(tokenizer, jsonl(tmp_path, *rows), samples=3, packing="document", seed=None, bos="auto")
        texts = [f"<s>{words(60)}", text, f"<s>{words(60, 2)}"]
        assert mixed.tolist() == [plain(tokenizer, each)[:16] for each in texts]
        path = jsonl(tmp_path, {"messages": messages})
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        with pytest.raises(UserError, match=r"t\.jsonl:1: the chat template refuses .*roles must alternate"):
            batches(tokenizer, path, samples=1)
    finally:
        tokenizer.chat_template = None


def test_document_packing_takes_the_start_of_each(tokenizer: Any, tmp_path: Path) -> None:
    texts = [words(3), words(60, 1), words(2), words(60, 2), words(60, 3)]
    notes: list[str] = []
    for path in (
        jsonl(tmp_path, *({"text": text} for text in texts)),
        text_file(tmp_path, "\n<|endoftext|>\n".join(texts)),
    ):
        tokens = batches(tokenizer, path, samples=2, packing="document", seed=None, bos="auto", notes=notes)
        assert tokens.tolist() == [[0, *plain(tokenizer, texts[i])[:15]] for i in (1, 3)]
        assert notes[0] == "calibration: 2 documents shorter than 16 tokens were skipped"
        assert notes[1].startswith("calibration: only 32 tokens (2 x 16)")
        notes.clear()
    with pytest.raises(UserError, match="3 of 5 documents have 16 tokens, 4 are needed; the longest has"):
        batches(tokenizer, path, samples=4, packing="document")


def test_a_saved_data_set(tokenizer: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package is optional")
    texts = [words(30, i) for i in range(20)]
    table = datasets.Dataset.from_dict({"text": texts})
    table.save_to_disk(str(tmp_path / "one"))
    splits = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["x"]}), "train": table})
    splits.save_to_disk(str(tmp_path / "splits"))
    expected = batches(tokenizer, jsonl(tmp_path, *({"text": text} for text in texts)))
    for name in ("one", "splits"):
        assert torch.equal(batches(tokenizer, tmp_path / name), expected)
    datasets.Dataset.from_dict({"body": texts}).save_to_disk(str(tmp_path / "body"))
    with pytest.raises(UserError, match=r"body row 0: has neither `text` .*, only: body"):
        batches(tokenizer, tmp_path / "body")


def test_a_hub_data_set(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets package is optional")
    asked: list[Any] = []
    texts = [words(30, i) for i in range(20)]

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, config, split, streaming))
        return iter([{"text": text} for text in texts])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    tokens = batches(tokenizer, "some/texts:small:test")
    assert torch.equal(tokens, batches(tokenizer, jsonl(tmp_path, *({"text": text} for text in texts))))
    batches(tokenizer, "texts")
    assert asked == [("some/texts", "small", "test", True), ("texts", None, "train", True)]

    def offline(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(UserError, match=r"'some/texts': no file .* the Hub cannot be reached"):
        batches(tokenizer, "some/texts")


def test_without_the_datasets_package(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"hint: pip install datasets"):
        batches(tokenizer, "some/texts")


REFUSED = {
    "empty": (b"", "there is no text in it"),
    "blank": (b" \n\t\n", "there is no text in it"),
    "not utf-8": (b"abc\xffdef" * 100, "not UTF-8 text: byte 0xff at offset 3"),
    "cut off": ("ab é".encode()[:-1], "not UTF-8 text: the last character is cut off at offset 4"),
    "too short": (b"one two three " * 3, r"\d+ tokens, 4 x 16 = 64 are needed; samples: 2 or seq_len: 9 would fit"),
    "far too short": (b"x", r"1 tokens, 4 x 16 = 64 are needed; give a longer text, or lower"),
}


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_text_that_cannot_serve(tokenizer: Any, tmp_path: Path, case: str) -> None:
    raw, message = REFUSED[case]
    (tmp_path / "t.txt").write_bytes(raw)
    with pytest.raises(UserError, match=message) as caught:
        batches(tokenizer, tmp_path / "t.txt")
    assert str(tmp_path / "t.txt") in str(caught.value)


def test_too_short_says_what_would_fit(tokenizer: Any, tmp_path: Path) -> None:
    path = text_file(tmp_path, words(400))
    have = len(plain(tokenizer, path.read_text(encoding="utf-8")))
    samples, seq_len = have // 100, have // 32
    hint = f"{have} tokens, 32 x 100 = 3200 are needed; samples: {samples} or seq_len: {seq_len} would fit"
    with pytest.raises(UserError, match=hint):
        batches(tokenizer, path, samples=32, seq_len=100)
    assert batches(tokenizer, path, samples=samples, seq_len=100).shape == (samples, 100)
    assert batches(tokenizer, path, samples=32, seq_len=seq_len).shape == (32, seq_len)


def test_the_offset_of_a_bad_byte_far_into_the_file(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("é".encode() * 700_000 + b"\x80")  # characters across the edges of what is read at once
    with pytest.raises(UserError, match="byte 0x80 at offset 1400000"):
        batches(tokenizer, path, samples=100_000)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{broken", r"t\.jsonl:2: not JSON: "),
        ("[1]", r"t\.jsonl:2: must be an object"),
        ({"body": "x", "id": 1}, r"t\.jsonl:2: has neither `text` \(text\) nor `messages` \(a list\), only: body, id"),
        ({"text": 3}, r"t\.jsonl:2: has neither"),
        ({"messages": "x"}, r"t\.jsonl:2: has neither"),
    ],
    ids=str,
)
def test_bad_lines_are_named(tokenizer: Any, tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        batches(tokenizer, jsonl(tmp_path, {"text": "fine"}, row))


def test_data_that_is_not_there(tokenizer: Any, tmp_path: Path) -> None:
    text_file(tmp_path, "x", "calibration.txt")
    with pytest.raises(UserError, match=r"no file '.*calibratoin\.txt'; near by: calibration\.txt"):
        batches(tokenizer, tmp_path / "calibratoin.txt")
    with pytest.raises(UserError, match="does not exist"):
        batches(tokenizer, tmp_path / "nowhere" / "x.txt")
    with pytest.raises(UserError, match=r"not saved by datasets' save_to_disk; it holds calibration\.txt"):
        batches(tokenizer, tmp_path)
    with pytest.raises(UserError, match="there is no text in it"):
        batches(tokenizer, jsonl(tmp_path, ""))


def test_sequences_longer_than_the_model_takes(tokenizer: Any, tmp_path: Path) -> None:
    path = text_file(tmp_path, words(500))
    assert batches(tokenizer, path, seq_len=64, max_positions=64).shape == (4, 64)
    with pytest.raises(UserError, match="seq_len 65 is above the model's longest sequence: at most 64"):
        batches(tokenizer, path, seq_len=65, max_positions=64)


def test_fingerprint_is_of_the_tokens(tokenizer: Any, tmp_path: Path) -> None:
    tokens = batches(tokenizer, text_file(tmp_path, words(500)))
    assert data_fingerprint(tokens) == data_fingerprint(tokens.t().contiguous().t())
    assert data_fingerprint(tokens) != data_fingerprint(tokens.reshape(8, 8))
    changed = tokens.clone()
    changed[-1, -1] += 1
    assert data_fingerprint(tokens) != data_fingerprint(changed)
    expected = hashlib.sha256(b"(4, 16)" + tokens.numpy().tobytes()).hexdigest()
    assert data_fingerprint(tokens) == expected


def test_the_bundled_model_and_text() -> None:
    folder = ROOT / "examples" / "tiny-llama"
    if not (folder / "calibration.txt").is_file():
        pytest.skip("examples/tiny-llama is not there")
    bundled = AutoTokenizer.from_pretrained(folder)
    text = (folder / "calibration.txt").read_text(encoding="utf-8")[:200_000]
    tokens = batches(bundled, folder / "calibration.txt", samples=128, seq_len=256, seed=None)
    expected = plain(bundled, text)[:-50]  # the cut may have changed the last ones
    assert tokens.flatten().tolist()[: len(expected)] == expected[: 128 * 256]


@pytest.mark.parametrize(
    ("model", "name", "need"),
    [
        ("TinyStories-656K-bf16", "tinystories", 32768),
        ("pycode-6m", "pycode", 32768),
        ("stories260K-llama", "tinystories", 9000),
    ],
    ids=["stories", "code", "small"],
)
def test_the_stream_that_peers_were_measured_on(model: str, name: str, need: int) -> None:
    file = SHARED / "text" / f"{name}-calibration.txt"
    if not file.is_file():
        pytest.skip(f"no {file}: set QUANTKIT_SHARED to the folder with models/ and text/")
    peers = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    expected = peers(file.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][:need]
    tokens = batches(peers, file, samples=need // 100, seq_len=100, seed=None)
    assert tokens.flatten().tolist() == expected[: tokens.numel()]
