"""Reading shell scripts without running them: plain variables, arrays, defaults and whole-number arithmetic.

Not shlex, because it drops the difference between 'text' and "text", and only the latter has variables in it. Nothing
is executed: what a command substitution or another program would supply stays unknown.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass

from gruppo.errors import UsageError

# Where an unquoted expansion is split into words; around the number of a reason; a space that splits nothing.
_GAP, _MARK, _SPACE = "\0", "\x01", "\x02"
_MARKS, _MARKED = re.compile(f"{_MARK}(\\d+){_MARK}"), re.compile(f"{_MARK}\\d+{_MARK}")
_OUTSIDE = "what other programs print"

_BRACED = r"\$\{[^{}]*(?:\{[^{}]*\}[^{}]*)*\}"
_COMMAND = r"\$\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)|`[^`]*`"
_QUOTED = r"""(?P<ansi>\$'(?:[^'\\]|\\.)*')|(?P<single>'[^']*')|(?P<double>"(?:[^"\\]|\\.)*")|(?P<escape>\\.)"""
_WORD = rf"""(?:{re.sub("P<[a-z]+>", ":", _QUOTED)}|{_COMMAND}|{_BRACED}|[^\s'"\\;&|()<>`#]|(?<=[^\s;&|(])\#)+"""
_TOKEN = re.compile(
    rf"(?P<blank>(?:[^\S\n]|\\\n)+)|(?P<comment>#[^\n]*)|(?P<redirect>\d*(?:<<<|<<-?|>>|[<>])&?\d*)"
    rf"|(?P<operator>\n|;;|&&|\|\||[;&|()])|(?P<word>{_WORD})",
    re.DOTALL,
)
_PART = re.compile(rf"""{_QUOTED}|(?P<plain>(?:{_BRACED}|{_COMMAND}|[^'"\\])+)""", re.DOTALL)
_EXPANSION = re.compile(
    rf"\$\(\((?P<sum>[^()`]*(?:\([^()`]*\)[^()`]*)*)\)\)|(?P<command>{_COMMAND})"
    r"|\$\{(?P<name>\w+|@)(?:\[[@*]\])?(?P<rest>[^{}]*(?:\{[^{}]*\}[^{}]*)*)\}"
    r"|\$(?P<short>[A-Za-z_]\w*|[0-9@*#?$!-])",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)(\+?)=(.*)", re.DOTALL)
_HEREDOC = re.compile(r"read\s+-r\s+-d\s+''\s+(\w+)\s*<<-?\s*['\"]?(\w+)['\"]?\n(.*?)\n[ \t]*\2\b", re.DOTALL)
_KEYWORDS = {"then", "do", "else", "elif", "if", "while", "until", "!", "time", "exec", "nohup", "{", "}"}
_DECLARING = {"export", "local", "readonly", "declare", "typeset"}
_OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}
_BRANCHES = {"if": 1, "case": 1, "for": 1, "while": 1, "until": 1, "fi": -1, "esac": -1, "done": -1}


class Variables:
    """Variables of a script, each with its words.

    What the script does not say is marked in the words themselves, by the number of the reason between two marks, so
    that it stays with the text into every word that it becomes part of.
    """

    def __init__(self) -> None:
        self.words: dict[str, list[str]] = {"HOME": ["~"], "PWD": ["."]}
        self._reasons: list[str] = []
        self._budget = 1_000_000  # characters that expansions may still produce

    def expand(self, word: str) -> list[str]:
        """A word of a script as words, after the rules of the shell for quotes and plain variables."""
        text, has_text = "", False
        for part in _PART.finditer(word):
            if part["ansi"]:
                text, has_text = text + re.sub(r"\\(.)", _escape, part["ansi"][2:-1]), True
            elif part["single"]:
                text, has_text = text + part["single"][1:-1], True
            elif part["double"]:
                inner = re.sub(r"\\\n", "", part["double"][1:-1])
                inner = re.sub(r'\\([\\"`])', r"\1", self._expand(inner, quoted=True))
                text, has_text = text + inner, has_text or "@" not in part["double"]
            elif part["escape"]:
                text, has_text = text + part["escape"][1:].replace("\n", ""), True
            else:
                text += self._expand(part["plain"], quoted=False)
        words = text.split(_GAP)
        return [one for one in words if one] or ([""] if has_text else [])

    def mark(self, reason: str) -> str:
        """A mark for what the script does not say."""
        if reason not in self._reasons:
            self._reasons.append(reason)
        return f"{_MARK}{self._reasons.index(reason)}{_MARK}"

    def reasons(self, word: str) -> frozenset[str]:
        """What the script does not say about a word."""
        return frozenset(self._reasons[int(number)] for number in _MARKS.findall(word))

    def _expand(self, text: str, quoted: bool) -> str:
        def replace(match: re.Match[str]) -> str:
            if match["sum"] is not None:
                return self._sum(match["sum"], match[0])
            if match["command"]:
                return self._unknown(match["command"])
            value = self._value(match["name"] or match["short"], match["rest"] or "", match[0])
            self._budget -= sum(map(len, value))
            if self._budget < 0:
                raise UsageError("the script's variables expand to more than a million characters; write them out")
            return _GAP.join(value) if not quoted or "@" in match[0] else " ".join(value)

        expanded = _EXPANSION.sub(replace, text)
        if _MARK not in expanded and ("${" in expanded or "$(" in expanded):
            expanded += self.mark(_OUTSIDE)
        return expanded if quoted else re.sub(r"[ \t\n]+", _GAP, expanded)

    def _value(self, name: str, rest: str, whole: str) -> list[str]:
        if name in {"@", "*"}:
            return []
        found = self.words.get(name)
        is_set = bool(found) and found != [""]
        if default := re.fullmatch(r":?[-=](.*)", rest, re.DOTALL):
            return found if found and is_set else self.expand(default[1])
        if rest.startswith(":+"):
            return self.expand(rest[2:]) if is_set else []
        return [self._unknown(whole)] if found is None or rest else found

    def _unknown(self, what: str) -> str:
        return re.sub(r"\s", _SPACE, what) + self.mark(what if re.fullmatch(r"\$\{?\w+\}?", what) else _OUTSIDE)

    def _sum(self, text: str, whole: str) -> str:
        names = re.sub(r"\$?\{?\b([A-Za-z_]\w*)\b\}?", lambda m: " ".join(self.words.get(m[1], [m[1]])), text)
        marks = "".join(_MARKED.findall(names))
        try:
            return str(_whole_number(ast.parse(_MARKED.sub("", names).strip()[:200], mode="eval").body)) + marks
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
            return self._unknown(whole)


def _escape(match: re.Match[str]) -> str:
    return {"n": "\n", "t": "\t"}.get(match[1], match[1])


def _whole_number(node: ast.expr) -> int:
    """The value of a sum of whole numbers. Raises ValueError for anything else."""
    if isinstance(node, ast.Constant) and type(node.value) is int and abs(node.value) < 2**63:
        return node.value
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        result: int = _OPERATORS[type(node.op)](_whole_number(node.left), _whole_number(node.right))
        if abs(result) < 2**63:
            return result
    raise ValueError("not a sum of whole numbers")


@dataclass(frozen=True)
class Command:
    """A command of a script: its words, and for each of them what the script does not say about it."""

    words: tuple[str, ...]
    missing: tuple[frozenset[str], ...]


def commands(script: str, where: str) -> list[Command]:
    """The commands of a shell script, with variables expanded as far as the script itself sets them.

    Raises UsageError if a quote is not closed.
    """
    variables, found, depth = Variables(), [], 0
    for statement in _statements(_HEREDOC.sub(_as_assignment, script), where):
        words = list(statement)
        while (
            words
            and isinstance(words[0], str)
            and (words[0] in _KEYWORDS or words[0] in _DECLARING or words[0] in _BRANCHES)
        ):
            depth = max(0, depth + _BRANCHES.get(str(words.pop(0)), 0))
        names = [word for word in words if isinstance(word, str)]
        if words and all(isinstance(word, tuple) or _ASSIGNMENT.fullmatch(word) for word in words):
            _assign(words, variables, depth > 0)
        elif names:
            found.append(_command(names, variables))
    return found


def _as_assignment(heredoc: re.Match[str]) -> str:
    body = heredoc[3].replace('"', '\\"')
    return f'{heredoc[1]}="{body}"'


# A word of a statement, or the name, the sign and the words of an array: NAME=(…).
_Item = str | tuple[str, str, list[str]]


def _statements(script: str, where: str) -> Iterator[list[_Item]]:
    words: list[_Item] = []
    array: tuple[str, str, list[str]] | None = None
    position = 0
    while position < len(script):
        token = _TOKEN.match(script, position)
        if token is None:
            line = script.count("\n", 0, position) + 1
            raise UsageError(f"{where}: line {line}: a quote or bracket is not closed; close it")
        position = token.end()
        if array is not None:
            if token["word"]:
                array[2].append(token["word"])
            elif token["operator"] == ")":
                words.append(array)
                array = None
        elif token["word"]:
            words.append(token["word"])
        elif token["operator"] == "(" and words and isinstance(words[-1], str) and words[-1].endswith("="):
            name = words.pop()
            assert isinstance(name, str)
            array = (name.rstrip("+="), "+" if name.endswith("+=") else "", [])
        elif token["redirect"]:
            words.append(">")
        elif token["operator"]:
            yield words
            words = []
    yield words


def _assign(words: list[_Item], variables: Variables, conditional: bool) -> None:
    for word in words:
        if isinstance(word, tuple):
            name, sign, items = word
            value = [one for item in items for one in variables.expand(item)]
        else:
            parts = _ASSIGNMENT.fullmatch(word)
            assert parts is not None
            name, sign = parts[1], parts[2]
            value = [" ".join(variables.expand(parts[3]))]
        before = variables.words.get(name, [])
        if sign:
            value = before + value if isinstance(word, tuple) else ["".join([*before, *value])]
        mark = variables.mark(f"{name}, which the script sets under a condition") if conditional else ""
        variables.words[name] = [one + mark for one in value]


def _command(names: list[str], variables: Variables) -> Command:
    """A command up to its first redirection."""
    words: list[str] = []
    missing: list[frozenset[str]] = []
    for name in names:
        if name == ">":
            break
        expanded = variables.expand(name)
        words += [_MARKED.sub("", word).replace(_SPACE, " ") for word in expanded]
        missing += [variables.reasons(word) for word in expanded]
    return Command(tuple(words), tuple(missing))
