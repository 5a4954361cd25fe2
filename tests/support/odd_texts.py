"""Texts that are difficult for tokenizers."""

PLAIN = [
    "hello world",
    "The quick brown fox jumps over the lazy dog.",
    "Hello, World! It's 3.14 -- isn't it?",
    "don 't , stop . now ! x ' y we 're they 've I 'm he 's",
]
SPACES = [
    "",
    " ",
    "  ",
    "     ",
    "\t",
    "\n",
    " \n ",
    " leading",
    "  two",
    "trailing ",
    "a  b   c",
    "\u00a0a\u3000b\u2003c",
]
SCRIPTS = [
    "Größe naïve Ångström Straße ﬁ ² ½",
    "東京タワー 中文字符，標點。한국어 텍스트",
    "สวัสดีชาวโลก ภาษาไทย",
    "नमस्ते क्षत्रिय हिन्दी",
    "שָׁלוֹם עוֹלָם",
    "مرحبا\u200f بالعالم \u202bRTL\u202c end",
    "Привет мир",
    "አማርኛ ሰላም ለዓለም",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈",
]
EMOJI = ["🙂", "a🙂b", "👩‍👩‍👧‍👦 family", "🏳️‍🌈", "🇯🇵🇩🇪", "👍🏽👍🏿", "🙂" * 20, "#️⃣ 1️⃣"]
FORMS = ["café", "cafe\u0301", "Å \u212b A\u030a", "가 \u1100\u1161", "e" + "\u0301" * 20]
CONTROLS = ["\0", "a\0b", "\x07\x08\x1b[0m", "a\r\nb\rc", "\u200b\u200c\u200d", "\ufeffBOM", "\x7f\x85", "tab\tend\t"]
NO_CHARACTERS = ["\ufffd itself", "\ufffe\uffff", "\U0010ffff", "\ue000 private"]
CODE = [
    "def f(x):\n    return x + 1\n\n\nclass A:\n\tpass  # tab",
    "https://example.com/a?b=c&d=%20#e user@example.com",
    "1234567890 12,345.67 1e-9 0x1F 1/2",
    '{"key": ["value", null, 1.0]}',
]
LITERAL = [
    "<|im_start|>user\nhi<|im_end|>",
    "[CLS] a [SEP] b [MASK][PAD]",
    "<s>a</s> <s> b </s><unk><pad>",
    "x<|endoftext|>y  <|endoftext|> z",
    "<0x41><0xE2><0x96>",
    "▁under▁score Ġbyte ##piece @@ </w>",
    "a<extra>b <extra> c  <extra>  d",
    "extra extraordinary Extra EXTRA",
]
LONG = ["a" * 2000, "ab" * 1000, "word" * 500, "x " * 500]

TEXTS = [*PLAIN, *SPACES, *SCRIPTS, *EMOJI, *FORMS, *CONTROLS, *NO_CHARACTERS, *CODE, *LITERAL, *LONG]
NOT_TEXT = ["\ud800", "a\udc00b"]  # lone surrogates: Python's str may hold them, UTF-8 may not
VERY_LONG_WORD = "supercalifragilistic" * 1000
