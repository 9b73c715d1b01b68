"""Output that is safe to show, and cut where it has to be."""

from __future__ import annotations

from gruppo.rollout.sandbox.output import CUT, Kept, composed, printable, shortened


def test_controls_are_made_visible() -> None:
    assert printable("a\tb\nä → 🙂 ∫".encode()) == "a\tb\nä → 🙂 ∫"
    assert printable(b"\x00\x1b[1m\x7f\x08\r\n\r") == "\\x00\\x1b[1m\\x7f\\x08\n\\r"
    assert printable("\u202e\u200b\u2028\x85\xa0".encode()) == "\\u202e\\u200b\\u2028\\x85\\xa0"
    assert printable(b"\xed\xa0\x80\xc3") == "\ufffd\ufffd\ufffd\ufffd"


def test_no_letter_and_no_byte_gets_through_that_cannot_be_shown() -> None:
    letters = "".join(chr(each) for each in range(0, 0x110000, 7) if not 0xD800 <= each < 0xE000)
    for data in (letters.encode(), bytes(range(256)) * 2):
        text = printable(data).replace("\n", "").replace("\t", "")
        assert text.isprintable()
        assert text.encode()


def test_no_more_is_kept_than_shows() -> None:
    kept = Kept(10)
    for _ in range(1000):
        kept.add(b"x" * 999)
    assert (len(kept.data), kept.written) == (44, 999_000)
    assert len(printable(("🙂" * 44).encode()[:44])) == 11  # of the largest letters one more, so that it is cut


def test_parts_are_put_together() -> None:
    assert composed("", "", "", "", 100) == ""
    assert composed("", "text", "", "", 100) == "text"
    assert composed("head", "text", "report\n", "note", 100) == "head\ntext\nreport\nnote\n"


def test_text_gives_way_to_what_is_said_about_it() -> None:
    made = composed("head", "t" * 1000, "r" * 30, "note", 100)
    assert len(made) == 100
    assert made == "head\n" + "t" * 40 + "\n[output cut here]\n" + "r" * 30 + "\nnote\n"
    assert len(composed("head", "t" * 1000, "r" * 1000, "note", 10)) == 10


def test_of_an_error_the_last_frame_and_its_kind_are_kept() -> None:
    frames = "Traceback (most recent call last):\n" + "".join(
        f'  File "<block 1>", line {n}, in f\n    g()\n' for n in range(1, 10)
    )
    last = '  File "<block 1>", line 9, in f\n    g()\n'
    assert shortened(f"{frames}\0ValueError: x\n", 1000) == f"{frames}ValueError: x\n"
    assert shortened(f"{frames}\0ValueError: x\n", len(last) + 20) == f"{last}ValueError: x\n"
    made = shortened(f"{frames}\0ValueError: {'x' * 1000}\n", 120)
    assert made == f"{last}ValueError: {'x' * 29}\n[output cut here]\n"
    assert shortened(f"{last}\0ValueError: {'x' * 1000}\n", 200).count("x") == 200 - len(last) - 12 - 19
    assert shortened("no parts " * 100, 50) == "no parts no parts no parts no p\n[output cut here]\n"
    assert composed("", "t" * 1000, "r" * 1000, "", 100) == "t" * 31 + "\n[output cut here]\n" + "r" * 31 + CUT
