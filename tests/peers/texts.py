"""Strings that try a tokenizer: the same ones for the same count and seed.

Half are put together from pieces of one kind or several (words, code, digits, runs of white space,
scripts, emoji, combining marks); the rest are drawn character by character from ranges of Unicode.
None holds a special token's text: there Nibble and `tokenizers` differ on purpose (DESIGN: plain
text never becomes a control token).
"""
import random

PIECES = [
    "the", " The", "don't", " we'll", "I'VE", "it's", "'s", "O'Reilly", "Straße", "naïve", "ﬁ",
    "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n", "def f(x):\n    return x**2\n", "!=",
    "->", "SELECT * FROM t WHERE a >= 1.50;", "</div>\n", "{\"k\": [1, 2, null]}",
    "#include <vector>\n", "\\n", "%d", "_", "__init__", "....", "?!", "\x00", "\x7f",
    "0", "7", "12", "2024-01-31", "3.14159", "1,000,000", "0x1F", "१२३", "٤٥", "Ⅷ", "½", "²", "①",
    " ", "  ", "   ", " " * 7, " " * 16, "\t", "\t\t", "\n", "\n\n", "\n\n\n", "\r\n", " \n ",
    "\u00a0", "\u3000", "\u2003", "\u0085", "\u200b", "\ufeff", "\u2028",
    "Привет", " мир", "東京", "こんにちは", "안녕", "שלום", "مرحبا", "ไทย", "हिन्दी", "é", "e\u0301",
    "🙂", "👩‍👩‍👧", "🇩🇪", "…", "—", "“q”", "€", "$",
]
RANGES = [(0x20, 0x7E), (0x09, 0x0D), (0x30, 0x39), (0xA0, 0x17F), (0x370, 0x52F), (0x600, 0x6FF),
          (0x900, 0x97F), (0x2000, 0x206F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x9FFF),
          (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0x10000, 0x100FF), (0x1D7CE, 0x1D7FF),
          (0x1F300, 0x1F64F)]


def varied_texts(count, seed=0):
    """`count` strings, none empty."""
    draw = random.Random(seed)
    texts = PIECES[:count]
    while len(texts) < count:
        if len(texts) % 2 == 0:
            texts.append("".join(draw.choice(PIECES) for _ in range(draw.randint(2, 12))))
        else:
            ranges = [draw.choice(RANGES) for _ in range(draw.randint(1, 4))]
            texts.append("".join(chr(draw.randint(*draw.choice(ranges)))
                                 for _ in range(draw.randint(1, 40))))
    return texts
