"""Rewards of D2PO that need a tagger or a parser (arXiv:2405.01511)."""

from preflab.rewards.registry import Score, register_reward
from preflab.rewards.text import tokens
from utils import ConfigError

NOUN_TAGS = ("NN", "NNS", "NNP", "NNPS")


@register_reward("nouns")
def nouns() -> Score:
    """The number of nouns in the response, by `find_nouns`; 0 for an empty response."""
    return lambda prompts, responses: [float(len(find_nouns(response))) for response in responses]


@register_reward("unique_nns")
def unique_nns() -> Score:
    """The number of distinct nouns in the response (case matters), by `find_nouns`; 0 for an empty
    response."""

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        return [float(len(set(find_nouns(response)))) for response in responses]

    return score


def find_nouns(text: str) -> list[str]:
    """Tokens with a letter that TextBlob's PatternTagger tags NN, NNS, NNP or NNPS. Its lexicon is
    part of the package; it tags an unknown word as a noun."""
    from textblob.en import tag  # here, so that checking a config stays light

    tagged = tag(" ".join(tokens(text)), tokenize=False)
    return [word for word, label in tagged if label in NOUN_TAGS and any(map(str.isalpha, word))]


@register_reward("treedep")
def treedep(*, model: str) -> Score:
    """The depth of the deepest dependency tree in the response, by `tree_depth`; 0 for an empty
    response.

    model: a spaCy pipeline with a parser, by the name of its package or a path. spaCy is not among
        the requirements.
    """
    try:
        import spacy
    except ImportError as error:
        raise ConfigError(
            "reward=treedep needs spaCy and a model:"
            f" pip install spacy; python -m spacy download {model}"
        ) from error
    try:
        parse = spacy.load(model)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.model={model} is not a spaCy pipeline;"
            f" python -m spacy download {model}, or give the path of one:"
            f" {str(error).splitlines()[0]}"
        ) from error
    if not parse("One word.").has_annotation("DEP"):
        raise ConfigError(
            f"reward.model={model} has no dependency parser ({', '.join(parse.pipe_names)});"
            " en_core_web_sm has one"
        )

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        heads = ([token.head.i for token in parsed] for parsed in parse.pipe(responses))
        return [float(tree_depth(of_response)) for of_response in heads]

    return score


def tree_depth(heads: list[int]) -> int:
    """The largest number of edges from a token to the root above it. heads[i] is the head of token
    i; a root is its own head."""

    def depth(i: int) -> int:
        edges = 0
        while heads[i] != i:
            i, edges = heads[i], edges + 1
        return edges

    return max(map(depth, range(len(heads))), default=0)
