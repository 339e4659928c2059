"""Rewards of arithmetic expressions that are solved step by step."""

import random

from preflab.rewards.registry import Score, register_reward

NO_EXPRESSION = -200.0  # the score where the prompt holds no expression


@register_reward("math")
def math_steps() -> Score:
    """The distance of the response to the gold solution of the prompt, negated: 0 at best. The
    prompt `((3+2)*(1+4)) = ` has the solution `(5*(1+4)) = (5*5) = 25`.

    Each gold step after the expression itself is compared with the response's step at the same
    position; the score is minus the sum of the Levenshtein distances. Steps are joined by `=`,
    white space is ignored, a missing step is empty (so an empty response scores minus the
    characters of the solution), further steps are ignored. The score is -200 where
    `parse_expression` rejects the prompt.
    """
    return lambda prompts, responses: [
        _solution_score(prompt, response)
        for prompt, response in zip(prompts, responses, strict=True)
    ]


def _solution_score(prompt: str, response: str) -> float:
    expression, equals, first_step = prompt.partition("=")
    gold = solution(expression)
    if gold is None:
        return NO_EXPRESSION
    answer = "".join((first_step + response).split())
    steps = (answer if equals else answer.removeprefix("=")).split("=")
    steps += [""] * len(gold)
    distances = [levenshtein(a, b) for a, b in zip(gold[1:], steps, strict=False)]
    return float(-sum(distances))


def solution(expression: str) -> list[str] | None:
    """The expression, followed by its form after each step: one innermost bracket is evaluated per
    step, from left to right. None where `parse_expression` rejects it."""
    tree = parse_expression(expression)
    if tree is None:
        return None
    steps = [_written(tree)]
    while isinstance(tree, tuple):
        tree = _reduced(tree)
        steps.append(_written(tree))
    return steps


def parse_expression(text: str, depth: int = 2) -> tuple | None:
    """(left, operator, right) of a bracket such as `(3+(2*4))`, whose sides are 1 to 9 or brackets
    and whose operators are + - *; None for anything else.

    depth: how deep brackets may be nested. White space is ignored.
    """
    rest = list("".join(text.split()))[::-1]

    def take(accepted: str) -> str:
        if not rest or rest[-1] not in accepted:
            raise ValueError
        return rest.pop()

    def bracket(depth: int) -> tuple:
        take("(")
        tree = side(depth), take("+-*"), side(depth)
        take(")")
        return tree

    def side(depth: int):
        if depth > 1 and rest[-1:] == ["("]:
            return bracket(depth - 1)
        return int(take("123456789"))

    try:
        tree = bracket(depth)
    except ValueError:
        return None
    return None if rest else tree


def _reduced(tree: tuple):
    """The tree with its leftmost innermost bracket evaluated."""
    a, operator, b = tree
    if isinstance(a, tuple):
        return _reduced(a), operator, b
    if isinstance(b, tuple):
        return a, operator, _reduced(b)
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def _written(tree) -> str:
    if not isinstance(tree, tuple):
        return str(tree)
    left, operator, right = tree
    return f"({_written(left)}{operator}{_written(right)})"


def levenshtein(a: str, b: str) -> int:
    """The smallest number of insertions, deletions and replacements of a character that turn a into
    b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i  # the entry above and to the left
        for j, y in enumerate(b, 1):
            cost = min(diagonal + (x != y), row[j] + 1, row[j - 1] + 1)
            diagonal, row[j] = row[j], cost
    return row[-1]


def math_prompts(n: int, seed: int) -> list[str]:
    """`n` prompts for reward=math, with a nested bracket on the left, on the right or on both
    sides. Duplicates are possible."""
    rng = random.Random(seed)

    def bracket(*sides) -> str:
        a, b = sides or (rng.randint(1, 9), rng.randint(1, 9))
        return f"({a}{rng.choice('+-*')}{b})"

    shapes = (
        lambda: (bracket(), rng.randint(1, 9)),
        lambda: (rng.randint(1, 9), bracket()),
        lambda: (bracket(), bracket()),
    )
    return [f"{bracket(*rng.choice(shapes)())} = " for _ in range(n)]
