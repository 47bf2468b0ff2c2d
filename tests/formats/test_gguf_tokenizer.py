"""The tokenizer's keys of a GGUF file: the pre-tokenizer found by trying, tokens and their kinds, scores, templates."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from quantkit.errors import UserError
from quantkit.formats.gguf.pre_probe import PROBE
from quantkit.formats.gguf.pre_table import PRE_TOKENIZERS, PreTokenizer
from quantkit.formats.gguf.sentencepiece_file import read_sentencepiece
from quantkit.formats.gguf.spm_scores import llama_tokens
from quantkit.formats.gguf.tokenizer import tokenizer_metadata
from quantkit.formats.gguf.vocabulary import token_count
from tests.tiny_tokenizers import (
    JOINED,
    SPACE,
    byte_level,
    piece_list,
    sentencepiece_bpe,
    sentencepiece_bytes,
    splits,
    tokenizer_folder,
)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
UNBUILT = ("zqz", "\u0120zqz")  # a piece in every way of cutting, which no merge makes
# Regexes as models' tokenizer.json has them
CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = LLAMA3.replace("{1,3}", "")
QWEN35 = QWEN2.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
FIRST = r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = rf"{FIRST}{UPPER}*{LOWER}+|{FIRST}{UPPER}+{LOWER}*|\p{{N}}|{REST}"
GPT4O = rf"{FIRST}{UPPER}*{LOWER}+{CONTRACTION}?|{FIRST}{UPPER}+{LOWER}*{CONTRACTION}?|\p{{N}}{{1,3}}|{REST}"
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
CUT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
PLAIN_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def metadata(
    folder: Path, tokenizer: Tokenizer, config: dict[str, Any] | None = None, **options: Any
) -> dict[str, Any]:
    """The values of the tokenizer's keys, without tokenizer.ggml."""
    tokenizer_folder(folder, tokenizer, config)
    size = options.pop("vocab_size", None) or token_count(folder)
    found = tokenizer_metadata(folder, size, **options)
    return {key.removeprefix("tokenizer.ggml."): value for key, (_, value) in found.items()}


def test_probe() -> None:
    assert len(PROBE) == len(set(PROBE)) == 300


# Where two rows cut alike and the flag does not decide, the first of the table stands for both
STANDS_FOR = {"bailingmoe": "qwen2", "minicpm5": "llama-bpe"}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_each_pre_tokenizer_is_found(pre: PreTokenizer, tmp_path: Path) -> None:
    """By its own regexes and by llama.cpp's; a token that merges do not build makes the flag matter."""
    for i, regexes in enumerate((pre.regexes, pre.engine)):
        if regexes is None:
            continue
        tokenizer = byte_level(splits(regexes), ignore_merges=pre.ignore_merges, unbuilt=UNBUILT)
        found = metadata(tmp_path / str(i), tokenizer)["pre"]
        assert found == STANDS_FOR.get(pre.names[0], pre.names[0])


@pytest.mark.parametrize(
    ("cut", "name"),
    [
        (BYTES, "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PLAIN_GPT2), "isolated"), CUT]), "gpt-2"),
        (pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]), "smollm"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), BYTES]), "smollm"),
        (splits([LLAMA3]), "llama-bpe"),
        (pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(LLAMA3), "removed", invert=True), CUT]), "llama-bpe"),
        (splits([QWEN2]), "qwen2"),
        (splits([QWEN35]), "qwen35"),
        (splits([TEKKEN]), "tekken"),
        (splits([GPT4O]), "gpt-4o"),
    ],
)
def test_models_ways_of_cutting(cut: pre_tokenizers.PreTokenizer, name: str, tmp_path: Path) -> None:
    assert metadata(tmp_path, byte_level(cut))["pre"] == name
    assert metadata(tmp_path, byte_level(cut, normalizer=normalizers.NFC()))["pre"] == name


def test_flag_of_merges(tmp_path: Path) -> None:
    """Whether pieces that are tokens are looked up matters where merges do not build them: never by name alone."""
    assert metadata(tmp_path, byte_level(splits([LLAMA3])))["pre"] == "llama-bpe"
    assert metadata(tmp_path, byte_level(splits([LLAMA3]), unbuilt=UNBUILT))["pre"] == "smaug-bpe"
    assert metadata(tmp_path, byte_level(splits([GPT4O]), ignore_merges=True))["pre"] == "gpt-4o"
    with pytest.raises(UserError, match=r"`qwen2`.*looks up.*llama.cpp builds") as error:
        metadata(tmp_path, byte_level(splits([QWEN2]), ignore_merges=True, unbuilt=UNBUILT))
    assert "2 tokens" in str(error.value)
    assert "hint: --pre qwen2" in str(error.value)
    special = byte_level(splits([LLAMA3]), unbuilt=("<x>",))  # no piece by itself
    assert metadata(tmp_path, special)["pre"] == "llama-bpe"
    added = byte_level(splits([LLAMA3]), unbuilt=("zqz",), special=("zqz",))  # found before anything is cut
    assert metadata(tmp_path, added)["pre"] == "llama-bpe"


@pytest.mark.parametrize(
    "cut",
    [
        pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), CUT]),
        splits([r"\p{L}+|\p{N}{1,4}|\s+"]),
        splits([LLAMA3.replace("{1,3}", "{1,2}")]),
        splits([QWEN2, "e"]),
    ],
)
def test_unknown_ways_of_cutting_are_refused(cut: pre_tokenizers.PreTokenizer, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        metadata(tmp_path, byte_level(cut))
    message = str(error.value)
    assert "of 300 strings differ" in message or "changes texts" in message
    assert message.splitlines()[-1].startswith("hint: --pre ")
    assert metadata(tmp_path, byte_level(cut), pre="qwen2")["pre"] == "qwen2"


def test_refusal_lists_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        metadata(tmp_path, byte_level(splits([LLAMA3.replace("{1,3}", "{1,4}")])))
    lines = str(error.value).splitlines()
    assert lines[1].strip().startswith("llama-bpe: ")
    assert lines[-1] == "hint: --pre llama-bpe writes the nearest name all the same"


@pytest.mark.parametrize(("given", "meant"), [("llama_bpe", "llama-bpe"), ("qwen-2", "qwen2"), ("gpt2", "gpt-2")])
def test_unknown_names(given: str, meant: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"did you mean `{meant}`") as error:
        metadata(tmp_path, byte_level(), pre=given)
    assert given in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": normalizers.Lowercase()},
        {"normalizer": normalizers.NFKC()},
        {"normalizer": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()])},
        {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    ],
)
def test_texts_that_are_changed_first(change: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="changes texts before it cuts them"):
        metadata(tmp_path, byte_level(**change))


@pytest.mark.parametrize("cut", [BYTES, splits([LLAMA3]), splits([QWEN2]), splits([GPT4O])])
def test_fine_tunes_keep_their_pre_tokenizer(cut: pre_tokenizers.PreTokenizer, tmp_path: Path) -> None:
    """Tokens added, special ones changed, another template, another vocabulary: the cuts are the same."""
    before = metadata(tmp_path / "base", byte_level(cut))["pre"]
    tuned = byte_level(cut, size=350, special=("<|im_start|>", "<|im_end|>", "[PAD]"))
    tuned.add_tokens(["<tool>", "</tool>", AddedToken("quant kit", normalized=True)])
    config = {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "chat_template": "{{ messages }}<|im_end|>"}
    after = metadata(tmp_path / "tuned", tuned, config)
    assert after["pre"] == before
    assert after["tokens"][after["eos_token_id"]] == "<|im_end|>"
    assert after["eot_token_id"] == after["eos_token_id"]
    assert after["padding_token_id"] == after["tokens"].index("[PAD]")
    kinds = dict(zip(after["tokens"], after["token_type"], strict=True))
    assert kinds["<|im_start|>"] == CONTROL
    assert kinds["<tool>"] == kinds["quant kit"] == USER_DEFINED


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0), "Unigram"),
        (models.WordPiece({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordPiece"),
        (models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"), "WordLevel"),
    ],
)
def test_other_kinds_are_refused_by_name(model: models.Model, name: str, tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, Tokenizer(model))
    with pytest.raises(UserError, match=name):
        tokenizer_metadata(tmp_path, 8)
    with pytest.raises(UserError, match=name):
        token_count(tmp_path)


def test_bpe_of_neither_kind(tmp_path: Path) -> None:
    plain = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, " ": 2}, merges=[]))
    with pytest.raises(UserError, match="neither byte-level nor sentencepiece"):
        metadata(tmp_path, plain)
    marked = Tokenizer(models.BPE(vocab={"a": 0, "a</w>": 1}, merges=[], end_of_word_suffix="</w>"))
    marked.pre_tokenizer = CUT
    with pytest.raises(UserError, match="end_of_word_suffix '</w>'"):
        metadata(tmp_path, marked)


def test_rows_without_tokens(tmp_path: Path) -> None:
    """Padding is unused; a name that is taken is not given twice, or llama.cpp stops."""
    tokenizer = byte_level(special=("<|end|>", "[PAD402]"))
    found = metadata(tmp_path, tokenizer, vocab_size=405)
    assert token_count(tmp_path) == 402
    assert found["tokens"][400:] == ["<|end|>", "[PAD402]", "[PAD402]_", "[PAD403]", "[PAD404]"]
    assert found["token_type"][400:] == [CONTROL, CONTROL, UNUSED, UNUSED, UNUSED]
    assert len(found["tokens"]) == len(set(found["tokens"])) == 405


def test_tokens_without_rows(tmp_path: Path) -> None:
    """An added token that the model has no row for is left out; a token of the vocabulary itself is not."""
    found = metadata(tmp_path, byte_level(), {"eos_token": "<|end|>"}, vocab_size=400)
    assert len(found["tokens"]) == 400
    assert "eos_token_id" not in found
    with pytest.raises(UserError, match=r"id 399, the model 390 rows"):
        metadata(tmp_path, byte_level(), vocab_size=390)


def test_what_is_put_around_a_text(tmp_path: Path) -> None:
    def around(template: str, *special: str, **config: str) -> dict[str, Any]:
        tokenizer = byte_level(special=("<|end|>", "<bos>", "<sop>"))
        pairs = [(token, tokenizer.token_to_id(token)) for token in special]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
        return metadata(tmp_path, tokenizer, config)

    neither = metadata(tmp_path, byte_level(), {"bos_token": "<|end|>", "add_bos_token": False})
    assert (neither["add_bos_token"], neither["add_eos_token"]) == (False, False)
    assert neither["bos_token_id"] == 400
    both = around("<bos> $A <|end|>", "<bos>", "<|end|>", bos_token="<bos>", eos_token="<|end|>")
    assert (both["add_bos_token"], both["add_eos_token"]) == (True, True)
    assert (both["bos_token_id"], both["eos_token_id"]) == (401, 400)
    undeclared = around("<bos> $A", "<bos>")
    assert (undeclared["add_bos_token"], undeclared["bos_token_id"]) == (True, 401)
    with pytest.raises(UserError, match="<bos> <sop> around every text"):
        around("<bos> <sop> $A", "<bos>", "<sop>")


def test_ids_of_the_configuration(tmp_path: Path) -> None:
    """bos and eos of config.json where the tokenizer has none; the end of a turn by what the template writes."""
    tokenizer = byte_level(special=("<|end|>", "<|turn|>"))
    tmp_path.joinpath("config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": [400, 401]}))
    found = metadata(tmp_path, tokenizer)
    assert (found["bos_token_id"], found["eos_token_id"]) == (7, 400)
    assert "eot_token_id" not in found
    tmp_path.joinpath("generation_config.json").write_text(json.dumps({"eos_token_id": [400, 401]}))
    found = metadata(tmp_path, tokenizer, {"eos_token": "<|end|>", "chat_template": "{{ messages }}<|turn|>"})
    assert (found["eos_token_id"], found["eot_token_id"]) == (400, 401)


def test_chat_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "D{{ messages }}"}, {"name": "tool_use", "template": "T"}]
    tokenizer_folder(tmp_path, byte_level(), {"chat_template": named})
    found = tokenizer_metadata(tmp_path, 401)
    assert found["tokenizer.chat_template"] == ("string", "D{{ messages }}")
    assert found["tokenizer.chat_templates"] == ("string[]", ["tool_use"])
    assert found["tokenizer.chat_template.tool_use"] == ("string", "T")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "chat_template.jinja").write_text("{{ messages }}")
    assert "chat_template" not in metadata(tmp_path / "two", byte_level())
    tokenizer_folder(tmp_path / "one", byte_level())
    assert tokenizer_metadata(tmp_path / "one", 401)["tokenizer.chat_template"] == ("string", "{{ messages }}")


def test_byte_level_keys(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, byte_level())
    found = tokenizer_metadata(tmp_path, 401)
    assert found["tokenizer.ggml.model"] == ("string", "gpt2")
    kinds = {key.removeprefix("tokenizer.ggml."): kind for key, (kind, _) in found.items()}
    assert kinds["tokens"] == kinds["merges"] == "string[]"
    assert kinds["token_type"] == "i32[]"
    assert kinds["add_bos_token"] == "bool"
    vocab = json.loads((tmp_path / "tokenizer.json").read_text())["model"]
    assert found["tokenizer.ggml.merges"][1] == [" ".join(pair) for pair in vocab["merges"]]
    assert found["tokenizer.ggml.tokens"][1][:400] == sorted(vocab["vocab"], key=vocab["vocab"].get)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole["model"]["merges"] = [" ".join(pair) for pair in vocab["merges"]]  # as older files have them
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert tokenizer_metadata(tmp_path, 401) == found


def test_bundled_model() -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny-llama"
    found = tokenizer_metadata(folder, 4096)
    assert token_count(folder) == 4096
    assert found["tokenizer.ggml.pre"] == ("string", "gpt-2")
    assert found["tokenizer.ggml.bos_token_id"] == ("u32", 0)
    assert found["tokenizer.ggml.add_bos_token"] == ("bool", False)
    assert found["tokenizer.ggml.token_type"][1].count(CONTROL) == 1


TEXTS = ["the quick brown fox", "  the  and an", "thing\nand\n\nother", "", "x", "caf\u00e9 \u4f60", "<s>the", "a" * 9]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_of_tokenizer_json(prefix: bool, tmp_path: Path) -> None:
    """Scores in the order of the merges make llama.cpp's algorithm merge as the tokenizer does."""
    tokenizer = sentencepiece_bpe(prefix=prefix)
    tokenizer.add_tokens([AddedToken("<code>", normalized=False), AddedToken(SPACE * 2, normalized=False)])
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    found = metadata(tmp_path, tokenizer, config, vocab_size=320)
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", prefix)
    assert "merges" not in found
    kinds = dict(zip(found["tokens"], found["token_type"], strict=True))
    expected = [UNKNOWN, CONTROL, BYTE, NORMAL, USER_DEFINED]
    assert [kinds[token] for token in ("<unk>", "<s>", "<0x0A>", "the", "<code>")] == expected
    assert kinds[SPACE * 2] == NORMAL  # merges make it of spaces: printed as spaces, found in texts
    scores = dict(zip(found["tokens"], found["scores"], strict=True))
    assert [scores[token] for token in JOINED] == sorted((scores[t] for t in JOINED), reverse=True)
    ids = {token: i for i, token in enumerate(found["tokens"]) if found["token_type"][i] != CONTROL}
    for text in [*TEXTS, *PROBE]:
        if "<s>" in text or "<code>" in text or SPACE in text:
            continue
        theirs = llama_tokens((SPACE if prefix and text else "") + text.replace(" ", SPACE), ids, found["scores"])
        assert theirs == tokenizer.encode(text, add_special_tokens=False).ids, text


def test_sentencepiece_file(tmp_path: Path) -> None:
    """A folder with tokenizer.model alone: pieces, scores and settings are its own."""
    data = sentencepiece_bytes(piece_list(), dummy_prefix=False)
    (tmp_path / "tokenizer.model").write_bytes(data)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}, "chat_template": "T"})
    )
    read = read_sentencepiece(tmp_path / "tokenizer.model")
    assert read.pieces == piece_list()
    assert (read.model_type, read.add_dummy_prefix, read.special_ids["pad"]) == ("BPE", False, -1)
    count = token_count(tmp_path)
    found = {key.removeprefix("tokenizer.ggml."): v for key, (_, v) in tokenizer_metadata(tmp_path, count).items()}
    assert found["tokens"][: len(read.pieces)] == [text for text, _, _ in read.pieces]
    assert found["token_type"][: len(read.pieces)] == [kind for _, _, kind in read.pieces]
    assert found["tokens"][len(read.pieces) :] == ["<x>"]
    joined = [found["scores"][found["tokens"].index(text)] for text in JOINED]
    assert joined == [-float(i) for i in range(len(JOINED))]
    assert (found["add_space_prefix"], found["add_bos_token"], found["bos_token_id"]) == (False, True, 1)
    assert found["tokenizer.chat_template"] == "T"


def test_scores_of_the_sentencepiece_file_beside_tokenizer_json(tmp_path: Path) -> None:
    scaled = [(text, score * 3 - 5 if kind == NORMAL else score, kind) for text, score, kind in piece_list()]
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(scaled))
    found = metadata(tmp_path, sentencepiece_bpe())
    assert found["scores"][found["tokens"].index("the")] == JOINED.index("the") * -3.0 - 5
    shuffled = [*scaled[:-2], scaled[-1], scaled[-2]]  # of another model: not believed
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(shuffled))
    found = metadata(tmp_path, sentencepiece_bpe())
    assert found["scores"][found["tokens"].index("the")] == -float(JOINED.index("the"))


def test_merges_that_scores_cannot_say(tmp_path: Path) -> None:
    """`wo` + `rd` are not merged here, but llama.cpp joins any two neighbours that make a token."""
    merges = [("w", "o"), ("o", "r"), ("r", "d"), ("wo", "r"), ("wor", "d")]
    with pytest.raises(UserError, match=r"makes other tokens of \d+ of 300 strings") as error:
        metadata(tmp_path, sentencepiece_bpe(merges=merges))
    assert "hint: --pre default" in str(error.value)
    assert metadata(tmp_path, sentencepiece_bpe(merges=merges), pre="default")["model"] == "llama"


@pytest.mark.parametrize("model_type", [1, 3, 4])
def test_sentencepiece_of_another_kind(model_type: int, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(piece_list(), model_type=model_type))
    with pytest.raises(UserError, match={1: "unigram", 3: "word", 4: "char"}[model_type]):
        tokenizer_metadata(tmp_path, 400)


def test_sentencepiece_that_changes_spaces(tmp_path: Path) -> None:
    """Runs of spaces that become one: llama.cpp keeps them."""
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_bytes(piece_list(), one_space=True))
    with pytest.raises(UserError, match=r"makes other tokens of \d+ of 300 strings"):
        tokenizer_metadata(tmp_path, 400)


def test_damaged_files(tmp_path: Path) -> None:
    data = sentencepiece_bytes(piece_list())
    for damaged in (b"", b"not a model", data[:-7], data[:100], b"\xff" * 40):
        (tmp_path / "tokenizer.model").write_bytes(damaged)
        with pytest.raises(UserError, match="hint: "):
            tokenizer_metadata(tmp_path, 400)
    for damaged in ("{", "{}", "[]", '{"model": {"type": "BPE"}}', '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(damaged)
        with pytest.raises(UserError, match="hint: "):
            tokenizer_metadata(tmp_path, 400)
        with pytest.raises(UserError, match="hint: "):
            token_count(tmp_path)
    with pytest.raises(UserError, match="no tokenizer"):
        tokenizer_metadata(tmp_path / "nothing", 400)
