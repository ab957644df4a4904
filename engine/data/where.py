"""Selects rows by an expression: `[data] where = "source == 'math' and tokens < 4000"`.

The expression has Python's syntax, but is not run as Python: it is parsed, and only comparisons,
`and`, `or`, `not`, `in`, arithmetic, constants and names of columns are translated to an expression
of pyarrow. As in SQL, a comparison with a missing value does not select a row.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

from redi.engine.errors import FaultyRow

TRACE_NAMES = ("tokens", "prompt_tokens", "completion_tokens")
"""Names that are not columns, but numbers of tokens of a trace, of its prompt, of the rest."""

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class Where:
    """A parsed expression.

    Attributes:
        text: the expression.
        columns: names of the columns of a row that it reads.
        needs_tokens: whether it reads one of TRACE_NAMES.
    """

    def __init__(self, text: str) -> None:
        """Parse and check the expression; pyarrow is not needed yet.

        Raises:
            ValueError: it is not an expression of this kind.
        """
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            hint = "; equality is ==, and words are and, or, not, in" if "=" in text else ""
            raise ValueError(f"{text!r} is not an expression: {error.msg}{hint}") from None
        except (ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{text!r} is not an expression: {error}") from None
        self._check(self._tree, condition=True)
        names = {node.id for node in ast.walk(self._tree) if isinstance(node, ast.Name)}
        self.columns = frozenset(names - set(TRACE_NAMES))
        self.needs_tokens = bool(names & set(TRACE_NAMES))
        self._paths = sorted(_paths(self._tree))
        # A CSV cell is text; a column that is used as a number is read as one.
        self._numbers: set[tuple[str, ...]] = set()
        self._texts: set[tuple[str, ...]] = set()
        self._conditions = {_path(self._tree)} if _is_path(self._tree) else set()
        for node in ast.walk(self._tree):
            if isinstance(node, ast.BinOp) or (
                isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub)
            ):
                self._numbers |= _paths(node)
            if isinstance(node, ast.BoolOp):
                self._conditions |= {_path(one) for one in node.values if _is_path(one)}
            if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
                self._conditions |= {_path(one) for one in (node.operand,) if _is_path(one)}
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                for side in filter(_is_list, sides):
                    sides += getattr(side, "elts", [])
                found = set().union(*map(_paths, sides))
                if any(map(_is_number, sides)):
                    self._numbers |= found
                elif any(map(_is_text, sides)):
                    self._texts |= found

    def _check(self, node: ast.expr, condition: bool = False) -> None:
        """Raise ValueError unless the node is supported; `condition`: it must be true or false."""
        if isinstance(node, ast.BoolOp):
            for part in node.values:
                self._check(part, condition=True)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            self._check(node.operand, condition=True)
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            for left, step, right in zip(sides, node.ops, sides[1:], strict=False):
                self._check(left)
                if not _is_list(right):
                    self._check(right)
                if _is_list(right) and not isinstance(step, ast.In | ast.NotIn):
                    raise self._unknown(node)
                if isinstance(step, ast.In | ast.NotIn) and not (_is_list(right) or _is_text(left)):
                    raise self._unknown(node)
                if isinstance(step, ast.Is | ast.IsNot) and not _is_none(right):
                    raise self._unknown(node)
        elif isinstance(node, ast.Attribute):
            self._check(node.value)
        elif isinstance(node, ast.Name) and not (condition and node.id in TRACE_NAMES):
            return
        elif condition:
            raise self._unknown(node)
        elif isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
            self._check(node.left)
            self._check(node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            self._check(node.operand)
        elif not (
            isinstance(node, ast.Constant) and isinstance(node.value, str | int | float | None)
        ):
            raise self._unknown(node)

    def _unknown(self, node: ast.expr) -> ValueError:
        return ValueError(
            f"{ast.unparse(node)!r} in {self.text!r} is not supported: use columns, constants, "
            "==, !=, <, <=, >, >=, in [...], 'text' in column, is None, + - * /, and, or, not"
        )

    def keep(self, rows: Sequence[dict[str, Any]], places: Sequence[str]) -> list[bool | FaultyRow]:
        """Whether each row is selected; an error for a row to which the expression does not apply.

        Args:
            rows: the columns of each row, with TRACE_NAMES if they are needed; a column that a row
                lacks is a missing value.
            places: the place of each row, for messages.
        """
        try:
            return list(self._kept(rows))
        except Exception:  # pyarrow raises several types
            if len(rows) == 1:
                found = dict(_reached(rows[0], path) for path in self._paths)
                values = ", ".join(f"{name} is {value!r:.60}" for name, value in found.items())
                return [
                    FaultyRow(
                        f"{places[0]}: [data] where = {self.text!r} does not apply to this row, "
                        f"whose {values}"
                    )
                ]
        # Columns of several types are compared row by row.
        return [self.keep([row], [place])[0] for row, place in zip(rows, places, strict=True)]

    def _kept(self, rows: Sequence[dict[str, Any]]) -> list[bool]:
        import pyarrow as pa  # imported late: reading a recipe does not need it

        columns = {path: pa.array([self._value(path, row) for row in rows]) for path in self._paths}
        # Not each operation takes a column without a value, which has no type.
        empty = {path for path, values in columns.items() if pa.types.is_null(values.type)}
        for path in empty:
            use = self._use(path)
            # Two such columns cannot be compared; one can, with a column of any type.
            if use is None and all(other in empty for other in columns if not self._use(other)):
                use = "bool"
            columns[path] = columns[path].cast(use or "null")
        named = {".".join(path): values for path, values in columns.items()}
        table = pa.table({**named, _ROW: list(range(len(rows)))})
        kept = set(table.filter(self._expression(self._tree))[_ROW].to_pylist())
        return [number in kept for number in range(len(rows))]

    def _use(self, path: tuple[str, ...]) -> str | None:
        """The type as which the expression uses a column; None if it is only compared with one."""
        if path in self._numbers:
            return "float64"
        if path in self._texts:
            return "string"
        return "bool" if path in self._conditions else None

    def _value(self, path: tuple[str, ...], row: dict[str, Any]) -> Any:
        name, value = _reached(row, path)
        if value is not None and name != ".".join(path):
            raise TypeError(f"{name} is no object")
        if path in self._numbers and isinstance(value, str):
            try:
                return float(value) if value.strip() else None
            except ValueError:
                return value
        return value

    def _expression(self, node: ast.expr) -> Any:
        """The node as an expression of pyarrow, or as a plain value."""
        import pyarrow.compute as pc

        if isinstance(node, ast.BoolOp):
            both = operator.and_ if isinstance(node.op, ast.And) else operator.or_
            return reduce(both, map(self._expression, node.values))
        if isinstance(node, ast.UnaryOp):
            inner = self._expression(node.operand)
            return ~inner if isinstance(node.op, ast.Not) else pc.negate(inner)
        if isinstance(node, ast.BinOp):
            left, right = self._expression(node.left), self._expression(node.right)
            if isinstance(node.op, ast.Div):  # pyarrow divides whole numbers without a remainder
                left = left.cast("float64")
            return _ARITHMETIC[type(node.op)](left, right)
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            steps = zip(sides, node.ops, sides[1:], strict=False)
            return reduce(operator.and_, [self._compared(*step) for step in steps])
        if isinstance(node, ast.Attribute | ast.Name):
            return pc.field(".".join(_path(node)))
        assert isinstance(node, ast.Constant), "`_check` refuses all others"
        return pc.scalar(node.value)

    def _compared(self, left: ast.expr, step: ast.cmpop, right: ast.expr) -> Any:
        import pyarrow.compute as pc

        if _is_none(right):
            missing = self._expression(left).is_null()
            return missing if isinstance(step, ast.Eq | ast.Is) else ~missing
        if isinstance(right, ast.List | ast.Tuple):
            value = self._expression(left)
            listed = [ast.literal_eval(one) for one in right.elts]
            if any(map(_is_number, right.elts)):  # `isin` distinguishes 3 from 3.0
                found = reduce(operator.or_, [value == one for one in listed])
            else:
                found = value.isin(listed)
            return found if isinstance(step, ast.In) else ~found & value.is_valid()
        if isinstance(step, ast.In | ast.NotIn):
            found = pc.match_substring(self._expression(right), ast.literal_eval(left))
            return found if isinstance(step, ast.In) else ~found
        return _COMPARISONS[type(step)](self._expression(left), self._expression(right))


_ROW = "\0row"


def _is_number(node: ast.expr) -> bool:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        node = node.operand
    return isinstance(node, ast.Constant) and type(node.value) in (int, float)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _is_list(node: ast.expr) -> bool:
    """True for a list of constants."""
    return isinstance(node, ast.List | ast.Tuple) and all(
        isinstance(one, ast.Constant) or _is_number(one) for one in node.elts
    )


def _is_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute | ast.Name)


def _paths(node: ast.AST) -> set[tuple[str, ...]]:
    """The columns, and keys of objects, that an expression reads."""
    if _is_path(node):
        return {_path(node)}
    return set().union(*map(_paths, ast.iter_child_nodes(node)))


def _reached(row: dict[str, Any], path: tuple[str, ...]) -> tuple[str, Any]:
    """The value at a path and its name; where an object is missing or is none, that one's."""
    value: Any = row
    for depth, key in enumerate(path):
        if depth and not isinstance(value, dict):
            return ".".join(path[:depth]), value
        value = value.get(key)
    return ".".join(path), value


def _path(node: ast.AST) -> tuple[str, ...]:
    """The names in "meta.level"."""
    if isinstance(node, ast.Attribute):
        return (*_path(node.value), node.attr)
    assert isinstance(node, ast.Name), "`_check` refuses all others"
    return (node.id,)
