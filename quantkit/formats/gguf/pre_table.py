"""What each `tokenizer.ggml.pre` of llama.cpp does: regexes that cut a text, one after the other, and one flag.

The regexes are facts of llama.cpp (src/llama-vocab.cpp, October 2026) and of the models they come from. llama.cpp has
no classes of case: a letter beyond ASCII is both upper and lower, and a combining mark is often no letter. Where it
differs from the model's own regex, both are written down: `regexes` is the model's, `engine` what llama.cpp runs.
"""

from dataclasses import dataclass

CONTRACTION = "(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"
WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SYMBOLS = r" ?[^\s\p{L}\p{N}]+"
SPACES = r"\s+(?!\S)|\s+"
LINES_AND_SPACES = rf"\s*[\r\n]+|{SPACES}"

GPT2 = (rf"'s|'t|'re|'ve|'m|'ll|'d| ?\p{{L}}+| ?\p{{N}}+|{SYMBOLS}|{SPACES}",)
LLAMA3 = (rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}",)
QWEN2 = (rf"{CONTRACTION}|{WORD}|\p{{N}}|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}",)

UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# llama.cpp's stand-ins: a letter that is no ASCII letter of the other case
ENGINE_UPPER, ENGINE_LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
ENGINE_UPPER_MARK, ENGINE_LOWER_MARK = r"(?:(?=[\p{L}\p{M}])[^a-z])", r"(?:(?=[\p{L}\p{M}])[^A-Z])"
HAN = r"\p{Han}"


def _cased(upper: str, lower: str, contraction: str, digits: str) -> str:
    """The regex that also cuts between lower and upper case (o200k and its kin)."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{upper}*{lower}+{contraction}|{first}{upper}+{lower}*{contraction}"
    return rf"{words}|{digits}|{SYMBOLS}[\r\n/]*|{LINES_AND_SPACES}"


GPT4O = _cased(UPPER, LOWER, f"{CONTRACTION}?", r"\p{N}{1,3}")
# where classes of case stand beside \p{M}, llama.cpp reads \\p{L}
ENGINE_CASELESS = _cased(r"[\p{L}\p{M}]", r"[\p{L}\p{M}]", f"{CONTRACTION}?", r"\p{N}{1,3}")
THREES_FROM_RIGHT = r"\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"
KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
PUNCTUATED = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
DEEPSEEK3 = (r"\p{N}{1,3}", KANA, rf"{PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES_AND_SPACES}")
BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
# All letters that have a case, as DeepSeek's first tokenizers list them
CASED = (
    "\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376"
    "\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d"
    "\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb"
    "\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4"
    "\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf"
    "\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
WIDE_PUNCTUATION = r"[!-/:-~" + "\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
ASIAN = (
    "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f"
    "\u0e80-\u0eff\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
YOUTU = (
    "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f"
    "\ufe30-\ufe4f]+|[\u3105-\u312f]+|" + KANA
)


@dataclass(frozen=True)
class PreTokenizer:
    """One behaviour of llama.cpp's byte-level BPE: `names[0]` stands for it, the others do the same to any text.

    `ignore_merges`: a piece that is a token is looked up, not built from merges. `engine`: llama.cpp's own regexes
    where they are not quite the model's.
    """

    names: tuple[str, ...]
    regexes: tuple[str, ...]
    ignore_merges: bool = False
    engine: tuple[str, ...] | None = None


# In the order in which equals are preferred
PRE_TOKENIZERS = (
    PreTokenizer(
        (
            "gpt-2",
            "phi-2",
            "exaone4",
            "mpt",
            "olmo",
            "jais",
            "trillion",
            "granite-docling",
            "gigachat",
            "mellum",
            "modern-bert",
            "a.x-4.0",
            "jina-es",
            "jina-de",
            "jina-v1-en",
            "jina-v2-es",
            "jina-v2-de",
            "jina-v2-code",
            "roberta-bpe",
        ),
        GPT2,
    ),
    PreTokenizer(
        (
            "llama-bpe",
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
            "jina-v5-nano",
            "glm4",
            "glm5",
        ),
        LLAMA3,
        ignore_merges=True,
    ),
    PreTokenizer(("smaug-bpe", "dbrx", "chatglm-bpe"), LLAMA3),
    PreTokenizer(
        ("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "solar-open", "grok-2", "kormo", "f2llmv2"),
        QWEN2,
    ),
    PreTokenizer(
        ("qwen35",),
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*"
            rf"|{LINES_AND_SPACES}",
        ),
    ),
    PreTokenizer(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
        (r"\p{N}", *GPT2),
    ),
    PreTokenizer(
        ("tekken",),
        (_cased(UPPER, LOWER, "", r"\p{N}"),),
        ignore_merges=True,
        engine=(_cased(ENGINE_UPPER, ENGINE_LOWER, "", r"\p{N}"),),
    ),
    PreTokenizer(
        ("gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
        (GPT4O,),
        engine=(_cased(ENGINE_UPPER, ENGINE_LOWER, f"{CONTRACTION}?", r"\p{N}{1,3}"),),
    ),
    PreTokenizer(("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4"), DEEPSEEK3),
    PreTokenizer(
        ("deepseek-llm",),
        (r"[\r\n]", rf"\s?[A-Za-z{CASED}]+", rf"\s?{WIDE_PUNCTUATION}", r"\s+$", CJK, r"\p{N}+"),
    ),
    PreTokenizer(("deepseek-coder",), (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CJK, r"\p{N}")),
    PreTokenizer(("falcon",), (r"[\p{P}\$\+<=>\^~\|`]+", *GPT2, "[0-9][0-9][0-9]")),
    PreTokenizer(("bloom", "poro-chat", "gpt3-finnish"), (BLOOM,)),
    PreTokenizer(("viking",), (BLOOM, r"\p{N}")),
    PreTokenizer(
        ("granite-embed-multi-97m",),
        (GPT4O,),
        ignore_merges=True,
        engine=(_cased(ENGINE_UPPER_MARK, ENGINE_LOWER_MARK, f"{CONTRACTION}?", r"\p{N}{1,3}"),),
    ),
    PreTokenizer(
        ("tiny_aya", "cohere2moe"),
        (r"\d{1,3}(?=(?:\d{3})*\b)", GPT4O),
        engine=(THREES_FROM_RIGHT, ENGINE_CASELESS),
    ),
    PreTokenizer(
        ("jais-2",),
        (
            rf"{CONTRACTION}|{WORD}|\p{{N}}{{1,3}}|{SYMBOLS}[\r\n]*|\s*[\r\n]+|"
            + "".join(rf"\s{{{n}}}(?!\S)|" for n in (512, 256, 128, 64, 32, 16, 8, 4))
            + r"\s{1,2}(?!\S)|\s{1}",
        ),
    ),
    PreTokenizer(("seed-coder",), (rf"{CONTRACTION}|{WORD}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|{LINES_AND_SPACES}",)),
    PreTokenizer(
        ("bailingmoe", "bailingmoe2", "llada-moe"),
        (rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?+\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]++[\r\n]*|\s*[\r\n]|{SPACES}",),
        engine=(rf"{CONTRACTION}|{WORD}|\p{{N}}|{SYMBOLS}[\r\n]*|\s*[\r\n]|{SPACES}",),
    ),
    PreTokenizer(("ufakzeka",), (rf"{WORD}|\p{{N}}|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}",)),
    PreTokenizer(("laguna",), (r"[^\n]+|[\n]+", *QWEN2)),
    PreTokenizer(
        ("minicpm5",),
        (r"\p{N}{1,3}", rf"{CONTRACTION}|{WORD}|\p{{N}}+|{SYMBOLS}[\r\n]*|{LINES_AND_SPACES}"),
        ignore_merges=True,
    ),
    PreTokenizer(
        ("exaone-moe",),
        (
            rf"{CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
            rf"|{SYMBOLS}[\r\n/]?|\s*[\r\n]|{SPACES}",
        ),
    ),
    PreTokenizer(("superbpe",), (r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    PreTokenizer(
        ("youtu",),
        (YOUTU, _cased(UPPER, LOWER, f"{CONTRACTION}?", r"\p{N}")),
        ignore_merges=True,
        engine=(YOUTU, ENGINE_CASELESS.replace(r"\p{N}{1,3}", r"\p{N}")),
    ),
    PreTokenizer(
        ("afmoe",),
        (
            THREES_FROM_RIGHT,
            ASIAN,
            rf"{PUNCTUATED}| ?[\p{{P}}\p{{S}}]+[\r\n]*|{LINES_AND_SPACES}",
        ),
    ),
    PreTokenizer(
        ("spark2_5",),
        (r"\p{N}{1,3}", KANA, rf"{PUNCTUATED}| ?[\p{{P}}\p{{S}}]+|[\r\n]|{SPACES}", r"\p{N}"),
    ),
    PreTokenizer(
        ("kimi-k2",),
        (
            rf"{HAN}+|"
            + _cased(
                f"[{UPPER[1:-1]}&&[^{HAN}]]", f"[{LOWER[1:-1]}&&[^{HAN}]]", f"{CONTRACTION}?", r"\p{N}{1,3}"
            ).replace(r"[\r\n/]*", r"[\r\n]*"),
        ),
        engine=(
            rf"{HAN}+|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}&&[^{HAN}]]+{CONTRACTION}?|\p{{N}}{{1,3}}|{SYMBOLS}[\r\n]*"
            rf"|{LINES_AND_SPACES}",
        ),
    ),
    PreTokenizer(
        ("chameleon",),
        (
            "<sentinel:[0-9]+>",
            "(?:IMGIMG)(?:(?:A|B|C|D|E|F|G|H|I){1,4})Z",
            r"(?:[\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            *GPT2,
        ),
    ),
)
# Known to llama.cpp, never found by trying: no byte-level BPE, or the choice for want of one
OTHER_NAMES = ("default", "gemma4", "granite-embed-multi-311m", "sarvam-moe", "whitespace")
PRE_NAMES = tuple(sorted([name for pre in PRE_TOKENIZERS for name in pre.names] + list(OTHER_NAMES)))
