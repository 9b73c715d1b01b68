"""Markdown and mathematics of completions as safe HTML: no scripts, no links, no images, nothing that loads anything.

Completions are hostile text. HTML in them is text, like everything that is not Markdown. A link is its text and its
address, an image its description and its address. Characters that change how others are shown, and control characters,
are spelled out. What reaches the page is built here, from lists of allowed elements and attributes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any
from xml.etree.ElementTree import Element

from latex2mathml.converter import convert_to_element
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.rules_block import StateBlock, table
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token
from markupsafe import Markup, escape

MOST_CHARACTERS = 20_000  # of a text that is rendered
MOST_FORMULAS = 300  # of a text
LONGEST_FORMULA = 2_000  # characters
_DEEPEST, _MOST_ELEMENTS = 40, 3_000  # of the MathML of a formula
_NESTING = 20  # of Markdown
_MOST_CELLS = 5_000  # of a table, if every line below its head is a row

# Bidirectional controls, which reorder what stands around them; control characters except tab and line feed; line
# separators; surrogates; tags and interlinear marks, which are not drawn.
_DANGEROUS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
# latex2mathml's own definitions, which can expand without bound, and a command whose argument it converts twice.
_REFUSED = re.compile(r"\\(?:newcommand|renewcommand|providecommand|def|newenvironment|DeclareMathOperator|sideset)")
_REFERENCE = re.compile(r"&#x([0-9A-Fa-f]{1,6});")

_ELEMENTS = frozenset(
    {
        *("math", "mrow", "mi", "mn", "mo", "mtext", "mspace", "mstyle", "mpadded", "mphantom", "menclose"),
        *("mfrac", "msqrt", "mroot", "msub", "msup", "msubsup", "munder", "mover", "munderover"),
        *("mtable", "mtr", "mtd", "mmultiscripts", "mprescripts", "none"),
    }
)
_FLAG, _LENGTH = r"true|false", r"[+-]?\d?(?:\.\d{1,4})?(?:em|ex|px|pt|mu)?"
_WORDS = r"[a-z]+(?: [a-z]+){0,31}"
_ATTRIBUTES = {
    name: re.compile(values)
    for names, values in (
        ("display", "block|inline"),
        ("mathvariant", "[a-z-]{1,24}"),
        ("stretchy fence separator accent accentunder largeop movablelimits displaystyle symmetric", _FLAG),
        ("form", "prefix|infix|postfix"),
        ("scriptlevel", r"[+-]?\d"),
        ("linethickness width height depth lspace rspace voffset minsize maxsize", _LENGTH),
        ("columnalign rowalign rowlines columnlines notation", _WORDS),
        ("columnspacing rowspacing", rf"{_LENGTH}(?: {_LENGTH}){{0,31}}"),
    )
    for name in names.split()
}


class FormulaError(ValueError):
    """A formula that is not rendered; its source is shown instead."""


def visible(text: str) -> str:
    """The text with dangerous characters spelled out, e.g. ⟨U+202E⟩."""
    return _DANGEROUS.sub(lambda found: f"⟨U+{ord(found[0]):04X}⟩", text)


def markdown(text: str) -> Markup:
    """A completion as HTML: Markdown, with mathematics between \\( \\), \\[ \\], $ $ and $$ $$ as MathML.

    At most MOST_CHARACTERS are rendered; a note says how many are left out. Never raises, whatever the text is. The
    HTML has no attributes but class, start, title, style (the alignment of a cell) and a list of those of MathML.
    """
    shown = text[:MOST_CHARACTERS]
    environment: dict[str, Any] = {"formulas": 0}
    try:
        parser = _parser()
        tokens = parser.parse(visible(shown.replace("\r\n", "\n")), environment)
        if any(token.level >= _NESTING - 1 for token in tokens):
            raise ValueError("the parser leaves out what is nested more deeply")
        html = parser.renderer.render(tokens, parser.options, environment)
    except Exception:  # noqa: BLE001  an error of the parser must not hide the completion
        html = f'<pre class="md-plain">{escape(visible(shown))}</pre>'
    if len(text) > len(shown):
        html += f'<p class="md-note">{len(text) - len(shown):,} more characters are not rendered: see the tokens.</p>'
    return Markup(html)


@lru_cache(maxsize=500)
def mathematics(source: str, block: bool = False) -> Markup:
    """A formula as MathML. The source itself, marked, if it is not LaTeX that can be rendered within the limits."""
    try:
        return Markup(_mathml(source, block))
    except Exception as error:  # noqa: BLE001  the library raises whatever its lists and numbers raise
        why = str(error) if isinstance(error, FormulaError) else "not rendered: not a formula that is understood"
        return Markup('<code class="math-error" title="{}">{}</code>').format(why, visible(source))


def _mathml(source: str, block: bool) -> str:
    if len(source) > LONGEST_FORMULA:
        raise FormulaError(f"not rendered: longer than {LONGEST_FORMULA:,} characters")
    if _REFUSED.search(source):
        raise FormulaError("not rendered: it defines commands, or uses \\sideset")
    tree = convert_to_element(source, display="block" if block else "inline")
    parts: list[str] = []
    _write(tree, parts, 0)
    return "".join(parts)


def _write(element: Element, parts: list[str], depth: int) -> None:
    """Append an element with its allowed attributes. Elements that are not allowed become rows."""
    if depth > _DEEPEST or len(parts) > 3 * _MOST_ELEMENTS:
        raise FormulaError("not rendered: nested too deeply, or too large")
    tag = element.tag if element.tag in _ELEMENTS else "mrow"
    attributes = "".join(
        f' {name}="{escape(value)}"'
        for name, value in element.attrib.items()
        if name in _ATTRIBUTES and _ATTRIBUTES[name].fullmatch(value)
    )
    parts.append(f"<{tag}{attributes}>")
    if element.text:
        parts.append(str(escape(visible(_REFERENCE.sub(_character, element.text)))))
    for child in element:
        _write(child, parts, depth + 1)
    parts.append(f"</{tag}>")


def _character(reference: re.Match[str]) -> str:
    number = int(reference[1], 16)
    return chr(number) if number <= 0x10FFFF else "\ufffd"


@cache
def _parser() -> MarkdownIt:
    options = {"html": False, "linkify": False, "breaks": True, "maxNesting": _NESTING}
    parser = MarkdownIt("commonmark", options, renderer_cls=_Renderer).enable(["table", "strikethrough"])
    parser.disable(["html_block", "html_inline", "reference"])  # a reference would vanish from the text
    parser.inline.ruler.before("escape", "math", _inline_formula)
    parser.inline.ruler.before("escape", "call", _inline_call)
    parser.block.ruler.at("table", _table, {"alt": ["paragraph", "reference"]})
    parser.block.ruler.before("fence", "math", _block_formula, {"alt": ["paragraph", "blockquote", "list"]})
    return parser


def _inline_call(state: StateInline, silent: bool) -> bool:
    """A call of a tool, which is code: Markdown would take signs out of its arguments."""
    if not state.src.startswith("<tool_call>", state.pos):
        return False
    end = state.src.find("</tool_call>", state.pos, state.posMax)
    if end < 0:
        return False
    end += len("</tool_call>")
    if not silent:
        state.push("code_inline", "code", 0).content = state.src[state.pos : end]
    state.pos = end
    return True


def _table(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A table, unless it could have too many cells: the parser adds those that its rows lack."""
    columns = state.getLines(start, min(start + 1, end), 0, False).count("|") + 1
    return columns * (end - start) <= _MOST_CELLS and table(state, start, end, silent)


_PAIRS = (("$$", "$$", True), ("\\[", "\\]", True), ("\\(", "\\)", False), ("$", "$", False))


def _inline_formula(state: StateInline, silent: bool) -> bool:
    """A formula inside of a line, or over several lines of a paragraph."""
    source, start = state.src, state.pos
    if source[start] not in "$\\":
        return False
    for opening, closing, block in _PAIRS:
        if source.startswith(opening, start):
            first = start + len(opening)
            end = _end(source, first, closing, state.posMax)
            if end is None:
                return False
            if not silent:
                state.push("formula", "", 0).meta.update(source=source[first:end], block=block)
                state.tokens[-1].content = source[start : end + len(closing)]
            state.pos = end + len(closing)
            return True
    return False


def _end(source: str, first: int, closing: str, limit: int) -> int | None:
    """Where a formula ends that begins at `first`, or None. "$5 and $10" is not one: a space precedes its end."""
    limit = min(limit, first + LONGEST_FORMULA + len(closing))
    end = source.find(closing, first, limit)
    while end > first and source[end - 1] == "\\" and closing.startswith("$"):
        end = source.find(closing, end + 1, limit)
    if end < 0 or not source[first:end].strip():
        return None
    money = source[first].isspace() or source[end - 1].isspace() or source[end + 1 : end + 2].isdigit()
    return None if closing == "$" and money else end


def _block_formula(state: StateBlock, start: int, end: int, silent: bool) -> bool:
    """A formula between lines that begin with $$ or \\[ and end with $$ or \\]; Markdown has no say between them."""
    if state.is_code_block(start):
        return False
    begin = state.bMarks[start] + state.tShift[start]
    opening = state.src[begin : begin + 2]
    closing = {"$$": "$$", "\\[": "\\]"}.get(opening)
    if closing is None:
        return False
    limit = min(state.eMarks[end - 1], begin + LONGEST_FORMULA)
    stop = state.src.find(closing, begin + 2, limit)
    if stop < 0 or not state.src[begin + 2 : stop].strip():
        return False
    last = next(line for line in range(start, end) if state.eMarks[line] >= stop)
    if state.src[stop + 2 : state.eMarks[last]].strip(" \t.,;"):
        return False  # text follows, which belongs to the paragraph
    if not silent:
        token = state.push("formula", "", 0)
        token.block, token.meta = True, {"source": state.src[begin + 2 : stop], "block": True}
        token.content = state.src[begin : state.eMarks[last]]
        state.line = last + 1
    return True


class _Renderer(RendererHTML):
    """HTML of Markdown tokens. What stands in the text reaches the page through `escape` alone."""

    def text(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        return str(escape(visible(tokens[place].content)))

    text_special = text

    def code_inline(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        return f"<code>{self.text(tokens, place, options, env)}</code>"

    def code_block(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        return f"<pre><code>{self.text(tokens, place, options, env)}</code></pre>"

    def fence(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        return self.code_block(tokens, place, options, env)

    def formula(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        token = tokens[place]
        env["formulas"] += 1
        if env["formulas"] > MOST_FORMULAS:
            return f"<code>{self.text(tokens, place, options, env)}</code>"
        html = mathematics(token.meta["source"], token.meta["block"])
        return f'<p class="md-math">{html}</p>' if token.block else html

    def link_open(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        return '<span class="md-link">'

    def link_close(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        depth = 0
        for token in reversed(tokens[: place + 1]):
            depth += {"link_close": 1, "link_open": -1}.get(token.type, 0)
            if depth == 0:
                return f"</span>{self._address(token.attrs, 'href')}"
        return "</span>"

    def image(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:
        token = tokens[place]
        words = escape(visible(token.content)) or "image"
        return f'<span class="md-link">{words}</span>{self._address(token.attrs, "src")}'

    def _address(self, attributes: Mapping[str, Any], name: str) -> str:
        return f' <span class="md-address">({escape(visible(str(attributes.get(name, ""))))})</span>'

    def renderToken(self, tokens: Sequence[Token], place: int, options: Any, env: Any) -> str:  # noqa: N802
        """An element without text of the run: no headings and header cells, which would join those of the page."""
        token = tokens[place]
        if token.hidden:
            return ""
        words = "md-head" if token.tag == "th" else f"md-heading md-{token.tag}" if token.type[:7] == "heading" else ""
        tag = "td" if token.tag == "th" else "p" if token.type.startswith("heading") else token.tag
        if token.nesting < 0:
            return f"</{tag}>"
        attributes = f' class="{words}"' if words else ""
        if token.tag == "ol" and re.fullmatch(r"\d{1,9}", str(token.attrs.get("start", ""))):
            attributes += f' start="{token.attrs["start"]}"'
        if re.fullmatch(r"text-align:(?:left|right|center)", str(token.attrs.get("style", ""))):
            attributes += f' style="{token.attrs["style"]}"'
        return f"<{tag}{attributes}>"
