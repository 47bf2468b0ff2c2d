"""The 300 strings on which pre-tokenizers are told apart: every place where one cuts and another does not."""

DIGITS = (
    "7",
    "42",
    "123",
    "2026",
    "31415",
    "271828",
    "1234567",
    "98765432",
    "x1",
    "1x",
    "a12b345c6789",
    "3.14",
    "1,000,000",
)
DIGITS += (
    "-5",
    "+12345",
    "0x1F4A9",
    "12:30:45",
    "2026-10-01",
    "50%",
    "$1234.50",
    "1st 22nd 333rd 4444th",
    " 8 88 888 8888",
)
DIGITS += (
    "1e-10",
    "v2.10.3",
    "#12345",
    "\u00bd \u00b2\u00b3 1\u00bd",
    "\u2167 \u2462",
    "\u0664\u0662\u0661\u0660\u0669",
)
DIGITS += ("\u0967\u0968\u0969\u096a", "\uff11\uff12\uff13\uff14", "12 345 678", "1" * 20, "9\n99\n9999")

CONTRACTIONS = (
    "don't",
    "DON'T",
    "I'm he's we've they'll you'd we're",
    "I'M HE'S WE'VE THEY'LL YOU'D WE'RE",
    "'s",
    "'S",
    "'re",
)
CONTRACTIONS += (
    "'Re",
    "x'llama",
    "X'LLAMA",
    "rock'n'roll",
    "'tis 'twas",
    "O'Neil",
    "it''s",
    "d'accord",
    "'d'D",
    "1's",
    "_'s",
)
CONTRACTIONS += (
    "can't'd",
    "\u2019s don\u2019t",
    "we'Ve a'lL",
    '"he\'s"',
    "'''",
    "l'\u00e9t\u00e9",
    "'\u00e9",
    " 's",
    "'t'm'd",
)
CONTRACTIONS += ("Ankara'da", "Istanbul'dan", "the 90's")

PUNCTUATION = (
    "!",
    "...",
    "?!?!",
    "hello, world!",
    "a.b.c",
    "--",
    "a--b",
    "==",
    "!=",
    "x = y",
    "x=y;",
    "(a)",
    "[b]",
    "{c}",
    "<d>",
)
PUNCTUATION += (
    '"quoted"',
    "`code`",
    "~tilde~",
    "^caret^",
    "a_b_c",
    "__init__",
    "a/b/c",
    "a\\b",
    "http://x.org/?q=1&r=2#z",
)
PUNCTUATION += (
    "me@example.com",
    "#hashtag @user",
    "$HOME/.bashrc",
    "a|b||c",
    "a+b",
    "a*b**c",
    "100%!",
    "------=======",
    "\u2026",
)
PUNCTUATION += (
    "\u201cdouble\u201d \u2018single\u2019",
    "\u2014 dash\u2013en",
    "\u00bfqu\u00e9? \u00a1s\u00ed!",
    "\u00a9\u00ae\u2122",
)
PUNCTUATION += (
    "\u20ac5 \u00a310 \u00a5100",
    "a . b , c",
    "end.\n\nNext",
    "(see [1], [2])",
    "//comment\n",
    "/* c */\n\n",
    "'''\"\"\"```",
)
PUNCTUATION += (
    ".,;:",
    " .,;:",
    "  .,;:",
    "!a",
    "!A",
    "?\u00e9",
    "(\u00e9)",
    ".5",
    "a!\n",
    "a!\r\n\r\n",
    "path/\nnext",
    "\u2190\u2192\u21d2",
)
PUNCTUATION += (
    "\u221a2 \u2264 \u03c0 \u2260 \u221e",
    "\u3001\u3002\uff01\uff1f",
    "\uff08\u62ec\u53f7\uff09",
    "a\u00b7b",
    "\u00a7\u00b6",
)
PUNCTUATION += ("x!/y", "?/\n", "$a", "+b", "<c", "=d", "^e", "|f", "~g", "`h")

SPACES = (
    " ",
    "  ",
    "   ",
    " " * 8,
    " " * 17,
    "a b",
    "a  b",
    "a   b",
    "a    b",
    " a",
    "  a",
    "   a",
    "a ",
    "a  ",
    "\t",
    "\t\t",
    "\ta",
)
SPACES += (
    "a\tb",
    "a\t\tb",
    " \t a",
    "\t x",
    "\n",
    "\n\n",
    "\n\n\n",
    "a\nb",
    "a\n\nb",
    "a\n\n\nb",
    " \n",
    "\n ",
    " \n ",
    "a \n b",
)
SPACES += (
    "a  \n  b",
    "a\n    b\n        c",
    "\r\n",
    "\r",
    "a\r\nb",
    "a\r\n\r\nb",
    "a\rb",
    "\r\n\t",
    "\n\t\n",
    "a \t\n\t b",
    "x\n\n  y",
)
SPACES += (
    "\u00a0",
    "a\u00a0b",
    "\u00a0\u00a0a",
    "a \u00a0b",
    "\u3000",
    "\u4f60\u3000\u597d",
    "a\u2003b",
    "a\u2028b",
    "\u200b",
    "a\u200bb",
)
SPACES += (
    "\ufeffa",
    "a\u0085b",
    "\x0b\x0ca",
    "1 \n2",
    "! \n!",
    "a \n\n\n  b  \n",
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n",
    "a" + " " * 40 + "b",
)

LETTERS = (
    "word",
    "Word",
    "WORD",
    "wORD",
    "camelCase",
    "PascalCase",
    "HTTPServer",
    "parseHTTPResponse",
    "iPhone",
    "McDonald",
)
LETTERS += (
    "ABCdefGHI",
    "aB",
    "Ab",
    "aBC",
    "ABc",
    "snake_case",
    "SCREAMING_CASE",
    "kebab-case",
    "\u00e9t\u00e9",
    "\u00c9T\u00c9",
)
LETTERS += (
    "\u00c9t\u00e9",
    "na\u00efve caf\u00e9",
    "Stra\u00dfe",
    "STRASSE",
    "\u0130stanbul",
    "\u00f1and\u00fa",
    "\u0141\u00f3d\u017a",
)
LETTERS += (
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u043c\u0438\u0440",
    "\u041f\u0420\u0418\u0412\u0415\u0422",
    "\u03ba\u03cc\u03c3\u03bc\u03b5",
)
LETTERS += (
    "\u039a\u039f\u03a3\u039c\u039f\u03a3",
    "\u01c5",
    "\u02b0a",
    "\u00aaa",
    "\u0561\u0580\u0587",
    "\u10d2\u10d0\u10db\u10d0\u10e0",
)

SCRIPTS = (
    "\u4f60\u597d\u4e16\u754c",
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314151\u5929\uff5e",
    "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u3002",
)
SCRIPTS += (
    "\u30ab\u30bf\u30ab\u30ca",
    "\u3072\u3089\u304c\u306aABC",
    "\u6f22\u5b57kana\u304b\u306a123",
    "\u4e2d\u6587\uff0c\u6807\u70b9\u3002",
)
SCRIPTS += (
    "\uc548\ub155\ud558\uc138\uc694 \uc138\uacc4",
    "\ud55c\uad6d\uc5b4abc",
    "\u3131\u314f",
    "\u0645\u0631\u062d\u0628\u0627 \u0628\u0643",
)
SCRIPTS += (
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629\u060c \u0646\u0639\u0645\u061f",
    "\u0645\u064f\u062d\u064e\u0645\u0651\u064e\u062f",
)
SCRIPTS += (
    "\u05e9\u05dc\u05d5\u05dd",
    "\u05e9\u05b8\u05c1\u05dc\u05d5\u05b9\u05dd",
    "\u0939\u093f\u0928\u094d\u0926\u0940",
    "\u0930\u093e\u092e \u0964",
)
SCRIPTS += (
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 2026",
    "\u09ac\u09be\u0982\u09b2\u09be",
    "\u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
)
SCRIPTS += (
    "\u1780\u17b6\u1793\u17cb\u178f\u17c2\u1796\u17b7\u179f\u17c1\u179f",
    "\u1019\u103c\u1014\u103a\u1019\u102c",
    "\u0e9e\u0eb2\u0eaa\u0eb2",
)
SCRIPTS += (
    "\u12a0\u121b\u122d\u129b",
    "e\u0301te\u0301",
    "a\u0308\u0301",
    "\u0301",
    "x\u20d7",
    "\U0001d4d0\U0001d4d1",
    "\u3105\u3106",
    "\u3400\u3401",
)
SCRIPTS += (
    "\U00020000\U00020001",
    "\u2f00\u4e00",
    "\uff21\uff22\uff41\uff42",
    "\uff76\uff85",
    "\u4e00a\u4e00",
    "A\u4e00a",
    "\u4e00'\u0073",
)

EMOJI = (
    "\U0001f600",
    "\U0001f600\U0001f601",
    "a\U0001f600b",
    " \U0001f600",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "\u2705 ok",
)
EMOJI += (
    "\U0001f44d\U0001f3fd",
    "\U0001f636\u200d\U0001f32b\ufe0f",
    "\u2764\ufe0f",
    "\U0001f1e9\U0001f1ea",
    "1\ufe0f\u20e3",
    "!\U0001f680!",
)

CODE = (
    "def f(x):\n    return x + 1\n",
    "if (a && b) {\n\tc();\n}\r\n",
    "for i in range(10):\n\n        pass",
    "x[0] += y[-1]  # note",
)
CODE += (
    "SELECT * FROM t WHERE id=42;",
    '<div class="a">text</div>',
    '{"key": [1, 2.5, null]}',
    "#include <stdio.h>\n",
    "a->b::c<D>&",
)
CODE += (
    "\\alpha_{i}^{2}",
    "print('it\\'s')",
    'f"{x!r:>10}"',
    "--flag=value -x",
    "i++;\n\n\n}",
    "    'a': 'b',\n    'c'",
    "@decorator\n",
)
CODE += ("\t\t\tif\t", "IMGIMGABCZ", "<sentinel:12>")

PROBE = DIGITS + CONTRACTIONS + PUNCTUATION + SPACES + LETTERS + SCRIPTS + EMOJI + CODE
