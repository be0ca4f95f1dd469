"""Arithmetic that a model wrote, worked out exactly and without executing it. Next: `countdown.py`.

One idea: two stacks in place of recursion (Dijkstra's shunting yard), and fractions in place of floats. Any text is either
worked out or refused in time linear in its length: numbers are limited in size and count, and there are no powers.
"""

import re
from fractions import Fraction

MOST_CHARACTERS, MOST_NUMBERS, MOST_DIGITS = 50_000, 64, 12
_TOKEN = re.compile(r" *(?:([0-9]+)|([-+*/()]))")
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "plus": 3, "minus": 3}


class ExpressionError(ValueError):
    """Why a text is no expression."""


def evaluate(text: str) -> tuple[Fraction, list[int]]:
    """The value of an expression, and the numbers in it in their order.

    An expression is made of whole numbers in ASCII digits without leading zeros, `+ - * /`, parentheses and spaces. The usual
    precedence holds, from left to right. A sign may stand before a number or a parenthesis, also several (`2 * --3`).

    Raises:
        ExpressionError: anything else (so no `**`, no `//`, no decimal point), a division by zero, or more than
            MOST_CHARACTERS characters, MOST_NUMBERS numbers, or MOST_DIGITS digits of a number.
    """
    if len(text) > MOST_CHARACTERS:
        raise ExpressionError("too long")
    values: list[Fraction] = []
    operators: list[str] = []
    numbers: list[int] = []
    operand_next = True
    for token in _tokens(text):
        if token.isdigit():
            if not operand_next or len(numbers) == MOST_NUMBERS:
                raise ExpressionError(f"{token} follows a value, or is one number too many")
            numbers.append(int(token))
            values.append(Fraction(numbers[-1]))
            operand_next = False
        elif token == "(":
            if not operand_next:
                raise ExpressionError("a parenthesis follows a value")
            operators.append(token)
        elif operand_next:
            if token not in "+-":
                raise ExpressionError(f"{token} where a value is needed")
            operators.append("plus" if token == "+" else "minus")
        elif token == ")":
            _close(values, operators)
        else:
            _reduce(values, operators, _BINDING[token])
            operators.append(token)
            operand_next = True
    if operand_next:
        raise ExpressionError("it ends where a value is needed")
    _reduce(values, operators, 0)
    if operators:
        raise ExpressionError("a parenthesis is not closed")
    return values[0], numbers


def _tokens(text: str) -> list[str]:
    tokens, place, end = [], 0, len(text.rstrip(" "))
    while place < end:
        match = _TOKEN.match(text, place)
        if match is None:
            raise ExpressionError(f"{text[place : place + 10]!r} is neither a number nor + - * / ( )")
        number = match[1]
        if number and (len(number) > MOST_DIGITS or (number[0] == "0" and number != "0")):
            raise ExpressionError("a number has too many digits, or a leading zero")
        tokens.append(number or match[2])
        place = match.end()
    return tokens


def _close(values: list[Fraction], operators: list[str]) -> None:
    _reduce(values, operators, 0)
    if not operators:
        raise ExpressionError("a parenthesis closes nothing")
    operators.pop()


def _reduce(values: list[Fraction], operators: list[str], binding: int) -> None:
    """Work out the operators on top, down to a parenthesis or one that binds less."""
    while operators and operators[-1] != "(" and _BINDING[operators[-1]] >= binding:
        match operators.pop():
            case "plus":
                pass
            case "minus":
                values[-1] = -values[-1]
            case operator:
                right = values.pop()
                values[-1] = _apply(operator, values[-1], right)


def _apply(operator: str, left: Fraction, right: Fraction) -> Fraction:
    match operator:
        case "+":
            return left + right
        case "-":
            return left - right
        case "*":
            return left * right
        case _:
            if right == 0:
                raise ExpressionError("a division by zero")
            return left / right
