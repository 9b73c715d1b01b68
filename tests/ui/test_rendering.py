"""Markdown and mathematics of completions: what is rendered, and that nothing else gets through."""

from __future__ import annotations

import multiprocessing
import resource
from html.parser import HTMLParser

import pytest

from gruppo.ui.rendering import LONGEST_FORMULA, MOST_CHARACTERS, MOST_FORMULAS, markdown, mathematics, visible

ELEMENTS = """p br hr em strong s code pre blockquote ul ol li table thead tbody tr td span math mrow mi mn mo mtext
    mspace mstyle mpadded mphantom menclose mfrac msqrt mroot msub msup msubsup munder mover munderover mtable mtr mtd
    mmultiscripts mprescripts none"""
ATTRIBUTES = """class start title style display mathvariant stretchy fence separator accent accentunder largeop
    movablelimits displaystyle symmetric form scriptlevel linethickness width height depth lspace rspace voffset minsize
    maxsize columnalign rowalign rowlines columnlines notation columnspacing rowspacing"""
SECONDS = 3  # of a processor, which a text may take


class Inspector(HTMLParser):
    """The elements and attributes of HTML, and its text; fails if elements are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open, self.wrong = "", list[str](), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong = f"</{tag}>"

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.wrong = f"<!--{data}-->"

    handle_decl = handle_pi = unknown_decl = handle_comment


def inspected(text: str) -> Inspector:
    """The HTML of a text, of which every element and attribute is allowed."""
    found = Inspector(str(markdown(text)))
    assert not found.wrong, found.wrong
    assert not found.open
    assert {tag for tag, _ in found.found} <= set(ELEMENTS.split())
    assert {name for _, attributes in found.found for name in attributes} <= set(ATTRIBUTES.split())
    for _, attributes in found.found:
        assert attributes.get("style", "text-align:left") in {
            f"text-align:{side}" for side in ("left", "right", "center")
        }
        for name in ("class", "style", "start"):
            assert not set("<>\"'") & set(attributes.get(name) or "")
    return found


ATTACKS = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<svg/onload=alert(1)>",
    "<iframe srcdoc='<script>alert(1)</script>'>",
    "<style>@import 'https://evil.example'</style>",
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)>",
    "<!--><img src=x onerror=alert(1)>-->",
    "<a href='javascript:alert(1)'>x</a>",
    "[x](javascript:alert(1))",
    "[x](JaVaScRiPt:alert(1))",
    "[x](data:text/html;base64,PHNjcmlwdD4=)",
    "[x](https://evil.example/?q=1 \"onmouseover=alert(1)\")",
    "![x](https://evil.example/pixel.png)",
    "![x\" onerror=\"alert(1)](x)",
    "[![x](https://evil.example/a.png)](javascript:alert(1))",
    "<https://evil.example>",
    "<javascript:alert(1)>",
    "https://evil.example",
    "[x]: javascript:alert(1)\n\n[x]",
    "![x][y]\n\n[y]: https://evil.example/a.png",
    "`<script>alert(1)</script>`",
    "```html\" onload=\"alert(1)\n<script>alert(1)</script>\n```",
    "```<img src=x onerror=alert(1)>\nx\n```",
    "# <script>alert(1)</script>",
    "| a | b |\n|:-:|---|\n| <script>alert(1)</script> | x |",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "&#60;script&#62;",
    "$<script>alert(1)</script>$",
    r"$\text{<img src=x onerror=alert(1)>}$",
    r"$\href{javascript:alert(1)}{x}$",
    r"$\url{https://evil.example}$",
    r"$\includegraphics{https://evil.example/a.png}$",
    r"$\style{position:fixed;inset:0}{x}$",
    r"$\class{card}{x}$",
    r"$\color{red;position:fixed}{x}$",
    r"$\unicode{x3c}script\unicode{x3e}$",
    "$&#x3C;script&#x3E;$",
    r"$\begin{array}{c'onclick='alert(1)'}x\end{array}$",
    r"$\hspace{1em' onclick='alert(1)}$",
    "\\[</math><script>alert(1)</script>\\]",
    "1\x00<script\x00>alert(1)</script>",
    "<scr\u200bipt>alert(1)</script>",
    "\ud800<script>alert(1)</script>",
]  # fmt: skip


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_text(attack: str) -> None:
    found = inspected(f"before {attack} after\n\n{attack}")
    assert "before" in found.text


@pytest.mark.parametrize("attack", ["<script>alert(1)</script>", "<b>bold</b>", "<!-- x -->", "</p></div>"])
def test_html_is_shown_as_it_was_written(attack: str) -> None:
    assert attack in inspected(f"a {attack} b").text


def test_links_and_images_are_their_text_and_address() -> None:
    found = inspected(
        "see [the page](https://a.example/?x=1&y=2) and ![a cat](https://a.example/cat.png) [**b** [c](d)](e)"
    )
    assert "the page (https://a.example/?x=1&y=2)" in found.text
    assert "a cat (https://a.example/cat.png)" in found.text
    assert {tag for tag, _ in found.found} == {"p", "span", "strong"}


def test_a_reference_does_not_vanish() -> None:
    assert "[x]: https://a.example" in inspected("[x]: https://a.example\n\ntext").text


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("**a** *b* ~~c~~", "<p><strong>a</strong> <em>b</em> <s>c</s></p>"),
        ("a\nb", "<p>a<br />\nb</p>"),
        ("# Title\nx", '<p class="md-heading md-h1">Title</p><p>x</p>'),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("> q", "<blockquote><p>q</p></blockquote>"),
        ("```python\na < b\n```", "<pre><code>a &lt; b\n</code></pre>"),
        ("- `x`", "<ul><li><code>x</code></li></ul>"),
        ("", ""),
    ],
)
def test_markdown(text: str, html: str) -> None:
    assert str(markdown(text)) == html


def test_a_call_of_a_tool_keeps_its_signs() -> None:
    call = '<tool_call>{"code": "2*3*4 < $x$"}</tool_call>'
    found = inspected(f"I compute **it**. {call} *so*\n<tool_call>*cut* off")
    assert call in found.text
    assert [tag for tag, _ in found.found] == ["p", "strong", "code", "em", "br", "em"]


def test_a_table_has_no_header_cells_of_the_page() -> None:
    html = str(markdown("| a | b |\n|:-:|---|\n| 1 | 2 |"))
    assert '<td class="md-head" style="text-align:center">a</td>' in html
    assert "<th" not in html.replace("<thead", "")


@pytest.mark.parametrize(
    ("text", "count", "block"),
    [
        ("so $x^2$.", 1, False),
        (r"so \(x^2\).", 1, False),
        ("so $$x^2$$.", 1, True),
        (r"so \[x^2\].", 1, True),
        ("$$\nx^2\n\n+ 1\n$$", 1, True),
        ("text\n\\[\n\\frac{1}{2}\n\\]\nmore", 1, True),
        ("$a$ and $b$", 2, False),
        (r"$\$5$", 1, False),
    ],
)
def test_formulas_become_mathml(text: str, count: int, block: bool) -> None:
    found = inspected(text)
    maths = [attributes for tag, attributes in found.found if tag == "math"]
    assert [attributes.get("display") for attributes in maths] == ["block" if block else "inline"] * count


@pytest.mark.parametrize(
    "text", ["$5 and $10", "it costs $5", "$ x $", "a $ b", "`$x$`", "```\n$x$\n```", r"\$x\$", "$$", "$$$$", r"\(\)"]
)
def test_what_is_no_formula(text: str) -> None:
    assert "math" not in {tag for tag, _ in inspected(text).found}


def test_an_exponent_is_an_exponent() -> None:
    assert str(mathematics("x^{2}")) == (
        '<math display="inline"><mrow><msup><mi>x</mi><mrow><mn>2</mn></mrow></msup></mrow></math>'
    )


@pytest.mark.parametrize(
    "source",
    [
        r"\frac",
        "}{",
        r"\begin{nothing}x\end{nothing",
        r"\left( x",
        "^",
        "x^1^2",
        r"\newcommand{\a}{\a\a}\a",
        r"\def\a{\a\a}\a",
        r"\sideset{_1}{_2}{x}",
        "x" * (LONGEST_FORMULA + 1),
    ],
)
def test_a_formula_that_fails_is_shown_as_its_source(source: str) -> None:
    found = Inspector(str(mathematics(source)))
    assert found.found[0][0] == "code"
    assert found.found[0][1]["class"] == "math-error"
    assert str(found.found[0][1]["title"]).startswith("not rendered")
    assert found.text == source


def test_a_failed_formula_does_not_take_its_text_along() -> None:
    found = inspected(r"before $\frac{1}{$ **after**")
    assert "before" in found.text
    assert r"\frac{1}{" in found.text
    assert "strong" in {tag for tag, _ in found.found}


def test_long_texts_and_many_formulas_are_limited() -> None:
    long = markdown("x" * (MOST_CHARACTERS + 1_500))
    assert "1,500 more characters are not rendered" in long
    many = inspected("$x$ " * (MOST_FORMULAS + 7))
    assert [tag for tag, _ in many.found].count("math") == MOST_FORMULAS
    assert [tag for tag, _ in many.found].count("code") == 7


@pytest.mark.parametrize("character", ["\u202e", "\u2066", "\x1b", "\x00", "\u200b", "\u2028", "\ud800", "\U000e0041"])
def test_characters_that_change_others_are_spelled_out(character: str) -> None:
    code = f"⟨U+{ord(character):04X}⟩"
    assert visible(f"a{character}b") == f"a{code}b"
    for text in (f"a{character}b", f"`a{character}b`", f"$\\text{{a{character}b}}$", f"[a{character}b](c{character}d)"):
        html = str(markdown(text))
        assert character not in html
        assert html.count("U+") >= 1


def test_text_of_other_scripts_stays() -> None:
    text = "שלום مرحبا 你好 👩\u200d🔬 é"
    assert inspected(text).text.strip() == text


# Each of these took long, or did not end, in some version of a Markdown or LaTeX library.
SLOW = {
    "emphasis": "*a **a " * 10_000,
    "brackets": "[" * 20_000,
    "links": "[a](" * 5_000,
    "images": "![" * 10_000,
    "quotes": ">" * 20_000,
    "lists": "- " * 10_000,
    "deep lists": "".join(" " * number + "- a\n" for number in range(190)),
    "backticks": "".join("`" * number + " " for number in range(1, 190)),
    "code": "``" + "`a" * 9_000,
    "table": "|" * 20_000 + "\n" + "|-" * 10_000,
    "wide table": "a|" * 300 + "\n" + "-|" * 300 + "\n" + "|\n" * 9_000,
    "entities": "&" * 20_000,
    "dollars": "$" * 20_000,
    "dollar pairs": "$a" * 10_000,
    "unclosed": r"\(" * 10_000,
    "unclosed blocks": "$$\na\n" * 4_000,
    "blocks": "\\[\n" * 6_000,
    "strikes": "~~a" * 6_000,
    "calls": "<tool_call>" * 1_800,
    "html": "<a " * 6_000,
    "comments": "<!--" * 5_000,
    "autolinks": "<" * 20_000,
    "braces": "$" + "{" * 900 + "}" * 900 + "$",
    "roots": "$" + r"\sqrt{" * 280 + "x" + "}" * 280 + "$",
    "fractions": "$" + r"\frac{1}{" * 200 + "x" + "}" * 200 + "$",
    "powers": "$" + "x^{" * 400 + "x" + "}" * 400 + "$",
    "primes": "$x" + "'" * 1_900 + "$",
    "left": "$" + r"\left(" * 300 + "$",
    "environments": "$" + r"\begin{matrix}" * 120 + "$",
    "overs": "$" + r"\overset{a}{" * 150 + "x" + "}" * 150 + "$",
    "substacks": "$" + r"\substack{" * 190 + "x" + "}" * 190 + "$",
    "many formulas": "$x^2$ " * 3_000,
    "limits": "$" + r"\sum\limits_" * 160 + "$",
    "text": "$" + r"\text{" * 300 + "x" + "}" * 300 + "$",
}


@pytest.mark.parametrize("name", SLOW)
def test_no_text_takes_long(name: str) -> None:
    """In processor seconds of a process of its own, so that a busy machine does not matter, nor a text without end."""
    process = multiprocessing.get_context("fork").Process(target=_within_limit, args=(SLOW[name],))
    process.start()
    process.join()
    assert process.exitcode == 0, f"{name}: takes more than {SECONDS} processor seconds"


def _within_limit(text: str) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    markdown(text)
