"""What token_batches makes of auto amounts, BOS, several sources, held-out windows and rows of every shape."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from quantkit.errors import UserError
from quantkit.quantization.calibration.amount import amount
from quantkit.quantization.calibration.bos import starts_with_bos
from quantkit.quantization.calibration.choice import apportioned
from quantkit.quantization.calibration.data import CalibrationTokens, token_batches
from quantkit.recipe.sections import Calibration

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
WORDS = ["one", " two", " three", " four,", " five.", "\nsix", " seven", " eight"]


def words(count: int, seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(WORDS, k=count))


def make_tokenizer(*, adds_bos: bool, template: str | None = None) -> Any:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([words(500)], trainer)
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


@pytest.fixture(scope="module")
def llama() -> Any:
    """Puts <s> before a text, as Llama's and Gemma's do."""
    return make_tokenizer(adds_bos=True)


@pytest.fixture(scope="module")
def qwen() -> Any:
    """Has a BOS token and does not use it."""
    return make_tokenizer(adds_bos=False)


@pytest.fixture(scope="module")
def chatty() -> Any:
    return make_tokenizer(adds_bos=True, template=TEMPLATE)


def plain(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def rows_file(folder: Path, *rows: Any, name: str = "t.jsonl") -> str:
    (folder / name).write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(folder / name)


def text_file(folder: Path, text: str, name: str = "t.txt") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def read(tokenizer: Any, data: Any, notes: list[str] | None = None, **options: Any) -> CalibrationTokens:
    extra = {k: options.pop(k) for k in ("widest", "max_positions", "held_out", "vocabulary") if k in options}
    return token_batches(Calibration(data=data, **options), tokenizer, notes=notes, **extra)


def text_of(tokenizer: Any, data: str, **options: Any) -> str:
    """All tokens of the data as text, with those that are special but the end's."""
    ids = read(tokenizer, data, samples=1, seed=None, **options).ids_ST[0]
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False).removesuffix("</s>")


# how much


@pytest.mark.parametrize(
    ("given", "widest", "context", "expected"),
    [
        ({}, 576, 8192, (16, 2048)),  # at least 32k
        ({}, 4096, 8192, (64, 2048)),
        ({}, 14336, 131072, (224, 2048)),
        ({}, 53248, 131072, (512, 2048)),  # at most 1M
        ({}, 576, 512, (64, 512)),
        ({}, 576, None, (16, 2048)),
        ({}, 1025, 1000, (33, 1000)),  # rounded up
        ({"samples": 128}, 14336, 8192, (128, 2048)),
        ({"seq_len": 512}, 4096, 8192, (256, 512)),
        ({"samples": 3, "seq_len": 9}, 4096, 8192, (3, 9)),
    ],
    ids=str,
)
def test_auto_amounts(given: dict[str, int], widest: int, context: int | None, expected: tuple[int, int]) -> None:
    found = amount(Calibration(**given), widest=widest, max_positions=context)
    assert (found.samples, found.seq_len) == expected


def test_a_given_length_above_the_models() -> None:
    with pytest.raises(UserError, match="seq_len 1024 is above the model's longest sequence: at most 512"):
        amount(Calibration(seq_len=1024), widest=64, max_positions=512)


def test_auto_takes_what_there_is(qwen: Any, tmp_path: Path) -> None:
    data = text_file(tmp_path, words(4000))
    have = len(plain(qwen, words(4000)))
    notes: list[str] = []
    found = read(qwen, data, notes, max_positions=64)
    windows = have // 64
    assert found.ids_ST.shape == (windows - windows // 16, 64)  # some are left for the check on unseen text
    kept = windows - windows // 16
    assert notes[0].startswith(f"calibration: {kept} x 64 tokens are all that {data} can fill; 512 x 64")
    assert read(qwen, data, samples=5).ids_ST.shape == (5, have // 5)  # 5 windows of 2048 there are not
    assert read(qwen, text_file(tmp_path, words(60))).ids_ST.shape == (1, len(plain(qwen, words(60))))


def test_given_numbers_are_held_to(qwen: Any, tmp_path: Path) -> None:
    data = text_file(tmp_path, words(100))
    have = len(plain(qwen, words(100)))
    with pytest.raises(
        UserError, match=f"{have} tokens, 1 x 512 = 512 are needed; seq_len: {have} would fit\nhint: lower"
    ):
        read(qwen, data, seq_len=512)
    with pytest.raises(
        UserError, match=f"{have} tokens, 900 x 8 = 7200 are needed; samples: .* would fit|give a longer"
    ):
        read(qwen, data, samples=900)
    with pytest.raises(UserError, match="1 tokens, 1 x 8 = 8 are needed; give a longer text"):
        read(qwen, text_file(tmp_path, "x"))


# BOS


def test_where_the_model_was_trained_with_bos(llama: Any, qwen: Any) -> None:
    assert [starts_with_bos(one, how) for one in (llama, qwen) for how in ("auto", True, False)] == [
        0, 0, None, None, 0, None,
    ]  # fmt: skip
    without = make_tokenizer(adds_bos=False)
    without.bos_token = None
    assert starts_with_bos(without) is None
    with pytest.raises(UserError, match="bos: true, but the model's tokenizer has no BOS token\nhint: "):
        starts_with_bos(without, True)


def test_windows_of_a_stream_start_with_bos(llama: Any, qwen: Any, tmp_path: Path) -> None:
    stream = plain(llama, words(300))
    data = text_file(tmp_path, words(300))
    found = read(llama, data, samples=4, seq_len=16, seed=None)
    assert found.ids_ST.tolist() == [[0, *stream[15 * i : 15 * i + 15]] for i in range(4)]
    assert found.bos
    for tokenizer, bos in ((llama, False), (qwen, "auto")):
        plainly = read(tokenizer, data, samples=4, seq_len=16, seed=None, bos=bos)
        assert plainly.ids_ST.flatten().tolist() == stream[:64]
        assert not plainly.bos
    assert read(qwen, data, samples=4, seq_len=16, seed=None, bos=True).ids_ST.equal(found.ids_ST)


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_never_two_of_them(chatty: Any, tmp_path: Path, packing: Any) -> None:
    chat = {"messages": [{"role": "user", "content": words(30)}]}
    data = rows_file(tmp_path, chat, {"text": words(40)}, chat)
    for bos, first in (("auto", 0), (True, 0), (False, plain(chatty, "<user>")[0])):
        ids = read(chatty, data, samples=1, seq_len=16, seed=None, packing=packing, bos=bos).ids_ST[0].tolist()
        assert (ids[0], ids.count(0)) == (first, 1 if first == 0 else 0)


def test_forced_bos_of_documents(llama: Any, qwen: Any, tmp_path: Path) -> None:
    data = rows_file(tmp_path, {"text": words(40)})
    body = plain(llama, words(40))
    for tokenizer, bos, expected in (
        (llama, "auto", [0, *body]), (llama, False, body), (qwen, "auto", body), (qwen, True, [0, *body]),
    ):  # fmt: skip
        ids = read(tokenizer, data, samples=1, seq_len=16, packing="document", bos=bos).ids_ST[0].tolist()
        assert ids == expected[:16]


# rows


@pytest.mark.parametrize(
    ("row", "plainly", "templated"),
    [
        ({"text": "a zebra"}, "a zebra", None),
        ({"prompt": "one?", "completion": " a zebra"}, "one? a zebra", "<s><user>one?<assistant> a zebra"),
        ({"prompt": "one?", "completion": "a zebra"}, "one?\na zebra", "<s><user>one?<assistant>a zebra"),
        ({"prompt": "", "completion": "a zebra"}, "a zebra", None),
        ({"instruction": "add", "output": "a zebra"}, "add\n\na zebra", "<s><user>add<assistant>a zebra"),
        (
            {"instruction": "add", "input": "3", "output": "a zebra"},
            "add\n\n3\n\na zebra",
            "<s><user>add\n\n3<assistant>a zebra",
        ),
        ({"instruction": "add", "input": None, "output": "zebra"}, "add\n\nzebra", "<s><user>add<assistant>zebra"),
        ({"conversations": [{"from": "human", "value": "a zebra"}]}, "", "<s><user>a zebra"),
        (
            {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "ok"}]},
            "",
            "<s><user>a<assistant>ok",
        ),
        ({"text": "a zebra", "prompt": "x", "completion": "y"}, "a zebra", None),  # the first shape counts
        ({"text": None, "prompt": "one?", "completion": " zebra"}, "one? zebra", "<s><user>one?<assistant> zebra"),
    ],
    ids=str,
)
def test_rows(qwen: Any, chatty: Any, tmp_path: Path, row: dict[str, Any], plainly: str, templated: str | None) -> None:
    data = rows_file(tmp_path, row)
    if plainly:
        assert text_of(qwen, data) == plainly
    else:
        with pytest.raises(UserError, match="need a chat template, and the model's tokenizer has none"):
            text_of(qwen, data)
    assert text_of(chatty, data) == (templated or f"<s>{plainly}")


def test_a_named_column(qwen: Any, chatty: Any, tmp_path: Path) -> None:
    row = {"text": "not this one at all, no", "body": "five zebras"}
    csv = text_file(tmp_path, 'text,body\n"not this one at all, no","five zebras"\n', "t.csv")
    for data in (rows_file(tmp_path, row), csv):
        assert text_of(qwen, data, column="body") == "five zebras"
        with pytest.raises(UserError, match="no column `bdy`, only: text, body\nhint: did you mean 'body'"):
            text_of(qwen, data, column="bdy")
    chat = rows_file(tmp_path, {"text": "no", "turns": [{"role": "user", "content": "zebra"}]})
    assert text_of(chatty, chat, column="turns") == "<s><user>zebra"
    with pytest.raises(UserError, match="`n` must be text or a list of messages, this is a int"):
        text_of(qwen, rows_file(tmp_path, {"n": 3}), column="n")


def test_columns_of_tables(qwen: Any, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is optional")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(
        pyarrow.table({"prompt": ["one?"], "completion": [" a zebra"], "n": [1]}), tmp_path / "t.parquet"
    )
    assert text_of(qwen, str(tmp_path / "t.parquet")) == "one? a zebra"
    csv = text_file(tmp_path, "instruction;input;output\nadd;3;a zebra\n", "t.csv")
    assert text_of(qwen, csv) == "add\n\n3\n\na zebra"


def test_skipped_rows_are_remarked_on(qwen: Any, tmp_path: Path) -> None:
    notes: list[str] = []
    data = rows_file(tmp_path, {"text": None}, {"text": " "}, {"text": words(2000)}, {"text": ""})
    read(qwen, data, notes, samples=2, seq_len=16)
    assert f"calibration: 3 rows of {data} hold no text and were skipped" in notes


# several sources


def test_shares() -> None:
    assert apportioned(10, [1, 1]) == [5, 5]
    assert apportioned(16, [1, 2, 1]) == [4, 8, 4]
    assert apportioned(10, [1, 1, 1]) == [4, 3, 3]
    assert apportioned(5, [1000, 1, 1]) == [3, 1, 1]
    for samples in range(3, 60):
        shares = apportioned(samples, [0.3, 5, 2.2])
        assert sum(shares) == samples
        assert min(shares) >= 1
    with pytest.raises(UserError, match="1 samples for 2 sources"):
        apportioned(1, [1, 1])


def test_sources_are_mixed_by_weight(qwen: Any, tmp_path: Path) -> None:
    sources = [
        {"data": text_file(tmp_path, letter * 4000, f"{letter}.txt"), "weight": w} for letter, w in (("q", 3), ("z", 1))
    ]
    found = read(qwen, sources, samples=16, seq_len=8)
    of_q = (found.ids_ST[:, 0] == plain(qwen, "q")[0]).tolist()
    assert (sum(of_q), len(of_q)) == (12, 16)
    assert sum(of_q[:8]) == 6  # mixed from the start
    assert [source.name for source in found.sources] == [source["data"] for source in sources]
    assert read(qwen, sources, samples=16, seq_len=8).ids_ST.equal(found.ids_ST)


def test_the_source_that_runs_out_limits_the_mixture(qwen: Any, tmp_path: Path) -> None:
    sources = [
        text_file(tmp_path, "q" * 4000, "q.txt"),
        {"data": text_file(tmp_path, "z" * 80, "z.txt"), "weight": 0.5},
    ]
    found = read(qwen, sources, seq_len=8)
    of_z = int((found.ids_ST[:, 0] == plain(qwen, "z")[0]).sum())
    assert of_z >= 8
    assert 2 <= found.ids_ST.shape[0] / of_z <= 3.5
    with pytest.raises(UserError, match=r"z\.txt: \d+ tokens, 20 x 8 = 160 are needed"):
        read(qwen, sources, samples=60, seq_len=8)


# windows the run does not see


@pytest.mark.parametrize("seed", [0, 3, None])
def test_held_out_windows(qwen: Any, tmp_path: Path, seed: int | None) -> None:
    data = text_file(tmp_path, words(3000))
    alone = read(qwen, data, samples=8, seq_len=16, seed=seed)
    assert alone.held_out_HT is None
    asked: list[tuple[int, int]] = []
    for held_out in (4, lambda samples, seq_len: asked.append((samples, seq_len)) or 4):
        found = read(qwen, data, samples=8, seq_len=16, seed=seed, held_out=held_out)
        assert found.ids_ST.equal(alone.ids_ST)
        assert found.held_out_HT is not None
        assert found.held_out_HT.shape == (4, 16)
        assert found.held_out_HT.dtype == torch.int64
        stream = [tuple(w.tolist()) for w in torch.tensor(plain(qwen, words(3000))).split(16)]
        places = [{stream.index(tuple(row)) for row in rows.tolist()} for rows in (found.ids_ST, found.held_out_HT)]
        assert not places[0] & places[1]
    assert asked[-1] == (8, 16)
    short = text_file(tmp_path, words(20))
    assert read(qwen, short, samples=1, seed=seed, held_out=4).held_out_HT is None


def test_sources_are_recorded(qwen: Any, tmp_path: Path) -> None:
    import hashlib

    data = text_file(tmp_path, words(500))
    (source,) = read(qwen, data, samples=2, seq_len=16).sources
    assert (source.name, source.rows, source.bytes) == (data, None, len(words(500)))
    assert source.sha256 == hashlib.sha256(words(500).encode()).hexdigest()
    data = rows_file(tmp_path, *({"text": words(50, i)} for i in range(20)))
    (source,) = read(qwen, data, samples=2, seq_len=16).sources
    assert (source.rows, source.bytes) == (20, Path(data).stat().st_size)


# names


def test_a_known_name_is_the_data_set_and_a_path_is_the_file(
    qwen: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text_file(tmp_path, words(500), "general")
    of_file = read(qwen, "./general", samples=2, seq_len=16)
    assert of_file.sources[0].bytes is not None
    rows = [{"kind": "chat", "messages": [{"role": "user", "content": words(400)}]}]
    monkeypatch.setattr("quantkit.quantization.calibration.sources.general", lambda part: iter(rows))
    found = read(qwen, "general", samples=2, seq_len=16, seed=None)
    assert found.sources[0].name == "general"
    assert found.ids_ST.flatten().tolist() == plain(qwen, f"User: {words(400)}")[:32]  # there is no chat template
    with pytest.raises(UserError, match="general has no subsets"):
        read(qwen, "general:en", samples=2)


def test_the_set_in_the_wheel_fills_the_default(qwen: Any) -> None:
    found = read(qwen, "general", widest=64, max_positions=256, held_out=8)
    assert found.ids_ST.shape == (128, 256)
    assert found.held_out_HT is not None
    assert len(found.held_out_HT) == 8


def test_ids_that_the_model_does_not_have(qwen: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"token id [0-9]+, where the model has 0 to 99\nhint: use the model's own"):
        read(qwen, text_file(tmp_path, words(500)), samples=2, seq_len=16, vocabulary=100)
