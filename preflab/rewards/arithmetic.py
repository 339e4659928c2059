"""Rewards of arithmetic expressions that are solved step by step."""

import random

from preflab.rewards.registry import Score, register_reward

NO_EXPRESSION = -200.0


@register_reward("math")
def math_steps() -> Score:
    """How far the response is from the gold solution of the prompt, such as `((3+2)*(1+4)) = ` with
    `(5*(1+4)) = (5*5) = 25`.

    Minus the Levenshtein distance of each gold step after the expression itself to the response's
    step in its place, summed: 0 at best. Steps are joined by `=`, white space is ignored, a missing
    step is empty (so an empty response scores minus the characters of the solution), further steps
    are ignored. -200 where `parse_expression` finds none in the prompt.
    """

    def distance(prompt: str, response: str) -> float:
        expression, equals, begun = prompt.partition("=")
        gold = solution(expression)
        if gold is None:
            return NO_EXPRESSION
        answer = "".join((begun + response).split())
        steps = (answer if equals else answer.removeprefix("=")).split("=")
        steps += [""] * len(gold)
        return float(-sum(levenshtein(*pair) for pair in zip(gold[1:], steps)))

    return lambda prompts, responses: [
        distance(prompt, response) for prompt, response in zip(prompts, responses)
    ]


def solution(expression: str) -> list[str] | None:
    """The expression, and what it becomes as its innermost brackets are worked out, left to right,
    one a step; None if it is none."""
    tree = parse_expression(expression)
    if tree is None:
        return None
    steps = [_written(tree)]
    while isinstance(tree, tuple):
        tree = _reduced(tree)
        steps.append(_written(tree))
    return steps


def parse_expression(text: str, depth: int = 2) -> tuple | None:
    """(left, operator, right) of a bracket such as `(3+(2*4))`, sides 1 to 9 or brackets, operators
    + - *; None for anything else.

    depth: brackets within one another, at most. White space is ignored.
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
        return bracket(depth - 1) if depth > 1 and rest[-1:] == ["("] else int(take("123456789"))

    try:
        tree = bracket(depth)
    except ValueError:
        return None
    return None if rest else tree


def _reduced(tree: tuple):
    a, operator, b = tree
    if isinstance(a, tuple):
        return _reduced(a), operator, b
    if isinstance(b, tuple):
        return a, operator, _reduced(b)
    return {"+": a + b, "-": a - b, "*": a * b}[operator]


def _written(tree) -> str:
    return (
        f"({_written(tree[0])}{tree[1]}{_written(tree[2])})"
        if isinstance(tree, tuple)
        else str(tree)
    )


def levenshtein(a: str, b: str) -> int:
    """The fewest insertions, deletions and replacements of a character that make b of a
    (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i  # `before` is the place above and to the left
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(before + (x != y), row[j] + 1, row[j - 1] + 1)
    return row[-1]


def math_prompts(n: int, seed: int) -> list[str]:
    """`n` prompts for reward=math, with brackets two deep on the left, on the right or on both
    sides; some may be equal."""
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
