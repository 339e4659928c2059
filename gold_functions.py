"""Gold functions of online preference learning (D2PO, arXiv:2405.01511): oracles that are cheap to
ask and hard to guess.

They look at the response only, unless they say otherwise. A *token* is a word or a single mark,
case kept, with contractions apart (`do n't`, `model 's`): close to the Treebank tokens of the
published code, and without its data files.
"""

import random
import re
import unicodedata
from pathlib import Path

from rewards import RewardError, Score, register_reward, reward_model
from utils import ConfigError

COLLECTED = frozenset(
    "data hope information provide example your however first have help additionally important"
    " include finally following happy code two create question possible understand generate"
    " contains appropriate best respectful ensure experience safe".split()
)
AVOIDED = frozenset("the to and of in is that this with".split())
TOKEN = re.compile(r"\w+(?=n't\b)|n't\b|'(?:s|re|ve|ll|d|m)\b|\w+(?:-\w+)*|[^\w\s]", re.IGNORECASE)
NO_EXPRESSION = -200.0


def tokens(text: str) -> list[str]:
    """Words and single marks, in order. Accents are joined to their letters first, and ’ is read as
    '."""
    return TOKEN.findall(unicodedata.normalize("NFC", text).replace("’", "'"))


# ------------------------------------------------------------------------------------ counted words


@register_reward("bagofwords")
def bagofwords() -> Score:
    """How many of 30 lower-case words are tokens of the response, each counted once: 0 to 30, and 0
    for an empty one. `Data` is not `data`."""
    return lambda prompts, responses: [
        float(len(COLLECTED.intersection(tokens(response)))) for response in responses
    ]


@register_reward("reversebow")
def reversebow() -> Score:
    """3 minus how many of nine function words are tokens of the response: -6 to 3, and 3 for an
    empty one. Case as in bagofwords."""
    return lambda prompts, responses: [
        3.0 - len(AVOIDED.intersection(tokens(response))) for response in responses
    ]


@register_reward("tokdense")
def tokdense() -> Score:
    """10 times distinct tokens over tokens, in (0, 10]; -5 for 20 tokens or fewer, so for an empty
    response too."""

    def density(found: list[str]) -> float:
        return 10 * len(set(found)) / len(found) if len(found) > 20 else -5.0

    return lambda prompts, responses: [density(tokens(response)) for response in responses]


@register_reward("readinggrade")
def readinggrade() -> Score:
    """Flesch-Kincaid grade, 0.39 words / sentences + 11.8 syllables / words - 15.59 (Kincaid et al.
    1975), of English.

    -10 for 20 tokens or fewer, so for an empty response too, and where there is no word. Words are
    runs of non-space with a letter or a digit; a sentence ends at . ! or ? before a space or the
    end, quotes and brackets aside; syllables by `syllables`.
    """

    def grade(text: str) -> float:
        words = [word for word in text.split() if any(map(str.isalnum, word))]
        if len(tokens(text)) <= 20 or not words:
            return -10.0
        sentences = sum(
            any(map(str.isalnum, part)) for part in re.split(r"[.!?]+[\"'”’)\]]*(?:\s|$)", text)
        )
        return (
            0.39 * len(words) / sentences + 11.8 * sum(map(syllables, words)) / len(words) - 15.59
        )

    return lambda prompts, responses: [grade(response) for response in responses]


def syllables(word: str) -> int:
    """Groups of vowels, less a silent e at the end (`-e`, `-ed`, `-es`), at least 1; parts of a
    hyphenated word on their own.

    Right for 97% of the words of running English text, by the CMU pronouncing dictionary.
    """
    total = 0
    for part in word.split("-"):
        letters = "".join(
            c
            for c in unicodedata.normalize("NFD", part.lower())
            if c.isalpha() or unicodedata.combining(c)
        )
        groups = len(re.findall("[aeiouy][aeiouy\u0300-\u036f]*", letters))
        silent = (
            re.search(r"[^aeiouyl]e$|[aeiouy]le$|[^aeiouydt]ed$|[^aeiouyscxzg]es$", letters)
            is not None
        )
        total += max(groups - silent, 1) if any(map(str.isalnum, part)) else 0
    return total


# ------------------------------------------------------------------------------------------ grammar


@register_reward("nouns")
def nouns() -> Score:
    """The number of nouns in the response, by `find_nouns`; 0 for an empty one."""
    return lambda prompts, responses: [float(len(find_nouns(response))) for response in responses]


@register_reward("unique_nns")
def unique_nns() -> Score:
    """The number of distinct nouns in the response, case kept, by `find_nouns`; 0 for an empty
    one."""
    return lambda prompts, responses: [
        float(len(set(find_nouns(response)))) for response in responses
    ]


def find_nouns(text: str) -> list[str]:
    """Tokens with a letter that TextBlob's PatternTagger calls NN, NNS, NNP or NNPS. Its lexicon is
    in the package; what it does not know is a noun."""
    from textblob.en import tag  # here, so that checking a config stays light

    tagged = tag(" ".join(tokens(text)), tokenize=False)
    return [
        word
        for word, kind in tagged
        if kind in ("NN", "NNS", "NNP", "NNPS") and any(map(str.isalpha, word))
    ]


@register_reward("treedep")
def treedep(*, model: str) -> Score:
    """The depth of the deepest dependency tree in the response, by `tree_depth`; 0 for an empty
    one.

    model: a spaCy pipeline with a parser, by the name of its package or a path. spaCy is not among
    the requirements.
    """
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            "reward=treedep needs spaCy and a model: pip install spacy; python -m spacy download"
            f" {model}"
        ) from error
    try:
        parse = spacy.load(model)
    except (OSError, ValueError) as error:
        told = str(error).splitlines()[0]
        raise ConfigError(
            f"reward.model={model} is no spaCy pipeline; python -m spacy download {model}, or give"
            f" the path of one: {told}"
        ) from error
    if not parse("One word.").has_annotation("DEP"):
        raise ConfigError(
            f"reward.model={model} has no dependency parser ({', '.join(parse.pipe_names)});"
            " en_core_web_sm has one"
        )
    return lambda prompts, responses: [
        float(tree_depth([token.head.i for token in parsed])) for parsed in parse.pipe(responses)
    ]


def tree_depth(heads: list[int]) -> int:
    """The most edges from a token to the root above it. heads[i] is the head of token i, and a root
    is its own."""

    def depth(i: int) -> int:
        edges = 0
        while heads[i] != i:
            i, edges = heads[i], edges + 1
        return edges

    return max(map(depth, range(len(heads))), default=0)


# --------------------------------------------------------------------------------------------- sums


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


# ------------------------------------------------------------------------------------------- models


@register_reward("contrastivedistill")
def contrastivedistill(*, large: str, small: str, batch_size: int = 16) -> Score:
    """Mean log p of a token of prompt and response under a large causal LM minus that under a small
    one.

    Tokens as in training: prompt and response apart, BOS in front where there is one; each model
    with its own tokenizer. The first token is not scored where there is no BOS, the last ones are
    kept of a text that is too long for a model, and an empty response is scored by its prompt, 0
    where that is empty as well.
    """
    of_large, of_small = (
        _mean_logps(large, "reward.large", batch_size),
        _mean_logps(small, "reward.small", batch_size),
    )
    return lambda prompts, responses: [
        a - b for a, b in zip(of_large(prompts, responses), of_small(prompts, responses))
    ]


def _mean_logps(path: str, key: str, batch_size: int) -> Score:
    import torch  # here, so that checking a config stays light
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from layouts import Layout, lay_out
    from logprobs import Scorer, score_responses

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={path} holds no causal language model: {str(error).splitlines()[0]}"
        ) from error
    scorer = Scorer(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    scorer.check()
    head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def ids_of(prompt: str, response: str) -> list[int]:
        ids = (
            tokenizer(prompt, add_special_tokens=False)["input_ids"]
            + tokenizer(response, add_special_tokens=False)["input_ids"]
        )
        return head + (ids[-(limit - len(head)) :] if limit else ids)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [ids_of(prompt, response) for prompt, response in zip(prompts, responses)]
        values = [0.0] * len(rows)
        order = sorted(
            (i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i])
        )
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            batch = lay_out([(rows[i][:1], [rows[i][1:]]) for i in part], Layout()).to(
                scorer.device
            )
            logps = score_responses(scorer, batch).logps
            for i, mean in zip(part, (logps / batch.lengths.to(logps.device)).tolist()):
                values[i] = mean
        return values

    return score


@register_reward("eurusrm")
def eurusrm(
    *,
    path: str,
    head: str | None = None,
    chat_template: bool | str = True,
    max_length: int | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> Score:
    """Eurus-RM (arXiv:2404.02078), or another reward model of the hub: prompt and response as a
    chat; see reward_model for the settings.

    An empty response is an empty message of the assistant.
    """
    return reward_model(
        path=path,
        head=head,
        chat_template=chat_template,
        max_length=max_length,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )


# --------------------------------------------------------------------------------- a language model


@register_reward("ultrafeedbackgold", paid=True)
def ultrafeedbackgold(
    *,
    base_url: str,
    model: str,
    cache: str,
    key_env: str = "OPENAI_API_KEY",
    max_requests: int = 1000,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 4,
) -> Score:
    """The mean of two ratings, 1 to 5, for instruction following and for helpfulness, by a language
    model behind an endpoint.

    After UltraFeedback (arXiv:2310.01377), where a rater sees several responses at once; here it
    sees each alone, in one request, so that a score does not depend on what else is scored, and can
    be kept. The prompt is read too; an empty response is rated as any other. The settings are those
    of endpoint.Endpoint. RewardError where a response is left without both ratings.
    """
    from endpoint import Endpoint, EndpointError

    endpoint = Endpoint(
        base_url,
        model,
        cache=Path(cache),
        key_env=key_env,
        max_requests=max_requests,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
    )

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        questions = [
            [{"role": "user", "content": _rating_question(*texts)}]
            for texts in zip(prompts, responses)
        ]
        try:
            asked = endpoint.ask(questions, read_ratings, "rate")
        except EndpointError as error:
            raise RewardError(f"reward.base_url: {error}") from error
        if missing := asked.answers.count(None):
            reasons = {
                "answers without both ratings": asked.refused,
                "left by max_requests": asked.unasked,
                "failed": asked.failed,
            }
            told = [f"{what} {n}" for what, n in reasons.items() if n] + asked.errors[-1:]
            raise RewardError(
                f"reward.base_url={base_url}: no ratings for {missing} of {len(responses)}"
                f" responses ({', '.join(told)}); the others are kept in {cache}"
            )
        return [sum(ratings) / 2 for ratings in asked.answers]

    return score


def _rating_question(prompt: str, response: str) -> str:
    return f"""Below are an instruction and a response to it. Rate the response twice, each time from 1 to 5.

Instruction following: does it do what is asked, within the limits that are set? 1: it has nothing to do with the task;
2: it takes up a part, and poorly; 3: it meets the goal or the limits, not both; 4: it is close, with small deviations; 5: it does all of it.

Helpfulness: is it correct, clear and informative, without needless length? 1: mostly wrong or made up; 2: wrong in parts that matter;
3: correct and useful; 4: correct, with much that is useful; 5: correct, thorough and of great use.

Instruction:
{prompt}

Response:
{response}

Answer with these two lines and nothing else, with a whole number in place of each N:
Instruction following: N
Helpfulness: N"""


def read_ratings(answer: str) -> tuple[int, int] | None:
    """The two whole numbers from 1 to 5 of an answer; None where one is missing, is another number,
    or is given twice and differs."""
    ratings = []
    for aspect in ("instruction[ _]following", "helpfulness"):
        found = set(
            re.findall(
                rf"{aspect}(?:\W|rating)*?([1-5])(?:/5)?(?![\d.,/-]*\d)", answer, re.IGNORECASE
            )
        )
        if len(found) != 1:
            return None
        ratings.append(int(*found))
    return tuple(ratings)
