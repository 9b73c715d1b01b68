"""Output that is safe to show and truncated to its limit."""

from __future__ import annotations

import unicodedata

import regex

from gruppo.errors import escaped, is_visible, one_line
from gruppo.preflight.findings import Finding
from gruppo.rollout.sandbox.output import CUT, Kept, composed, printable, shortened


def test_control_characters_are_escaped() -> None:
    assert printable("a\tb\nä → 🙂 ∫".encode()) == "a\tb\nä → 🙂 ∫"
    assert printable(b"\x00\x1b[1m\x7f\x08\r\n\r") == "\\x00\\x1b[1m\\x7f\\x08\n\\r"
    assert printable("\u202e\u200b\u2028\x85\xa0".encode()) == "\\u202e\\u200b\\u2028\\x85\\xa0"
    assert printable(b"\xed\xa0\x80\xc3") == "\ufffd\ufffd\ufffd\ufffd"


def test_no_unprintable_character_or_byte_gets_through() -> None:
    letters = "".join(chr(code) for code in range(0, 0x110000, 7) if not 0xD800 <= code < 0xE000)
    for data in (letters.encode(), bytes(range(256)) * 2):
        text = printable(data).replace("\n", "").replace("\t", "")
        assert text.isprintable()
        assert text.encode()


# Letters, marks and symbols with a blank glyph, which no Unicode property names.
BLANK = "\u2800\U00013441\U00013442\U00016fe4\U0001d159"


def test_every_invisible_character_of_unicode_is_escaped() -> None:
    """Control, format, private, unassigned, surrogate; spaces and separators; default ignorable; blank glyphs."""
    everything = [chr(code) for code in range(0x110000)]
    ignorable = set(regex.findall(r"\p{Default_Ignorable_Code_Point}", "".join(everything)))
    assert len(ignorable) > 4000
    hidden = {
        character
        for character in everything
        if unicodedata.category(character)[0] in "CZ" or character in ignorable or character in BLANK
    } - {" "}
    assert {character for character in everything if not is_visible(character)} == hidden
    for character in sorted(hidden):
        assert escaped(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"
        assert escaped(f"a{character}b", keep=character) == f"a{character}b"


def test_invisible_characters_are_shown_everywhere() -> None:
    for character in "\u3164\u2800\ufe0f\u034f\U000e0101\u115f\u17b4":
        code = character.encode("unicode_escape").decode()
        assert printable(f"a{character}\n\t".encode()) == f"a{code}\n\t"
        assert one_line(f"answer = '{character}'") == f"answer = '{code}'"
        assert character not in "".join(Finding("note", "reward", f"a{character}b").lines())


def test_no_more_is_kept_than_is_shown() -> None:
    kept = Kept(10)
    for _ in range(1000):
        kept.add(b"x" * 999)
    assert (len(kept.data), kept.written) == (44, 999_000)
    # With characters of the largest size, one more than the limit is kept, so that it is truncated.
    assert len(printable(("🙂" * 44).encode()[:44])) == 11


def test_parts_are_joined() -> None:
    assert composed("", "", "", "", 100) == ""
    assert composed("", "text", "", "", 100) == "text"
    assert composed("head", "text", "report\n", "note", 100) == "head\ntext\nreport\nnote\n"


def test_text_is_truncated_before_the_report_and_note() -> None:
    output = composed("head", "t" * 1000, "r" * 30, "note", 100)
    assert len(output) == 100
    assert output == "head\n" + "t" * 40 + "\n[output cut here]\n" + "r" * 30 + "\nnote\n"
    assert len(composed("head", "t" * 1000, "r" * 1000, "note", 10)) == 10


def test_truncated_error_keeps_the_last_frame_and_its_type() -> None:
    frames = "Traceback (most recent call last):\n" + "".join(
        f'  File "<block 1>", line {n}, in f\n    g()\n' for n in range(1, 10)
    )
    last = '  File "<block 1>", line 9, in f\n    g()\n'
    assert shortened(f"{frames}\0ValueError: x\n", 1000) == f"{frames}ValueError: x\n"
    assert shortened(f"{frames}\0ValueError: x\n", len(last) + 20) == f"{last}ValueError: x\n"
    output = shortened(f"{frames}\0ValueError: {'x' * 1000}\n", 120)
    assert output == f"{last}ValueError: {'x' * 29}\n[output cut here]\n"
    assert shortened(f"{last}\0ValueError: {'x' * 1000}\n", 200).count("x") == 200 - len(last) - 12 - 19
    assert shortened("no parts " * 100, 50) == "no parts no parts no parts no p\n[output cut here]\n"
    assert composed("", "t" * 1000, "r" * 1000, "", 100) == "t" * 31 + "\n[output cut here]\n" + "r" * 31 + CUT
