"""What is in preference data, what a tokenizer makes of them, and what of it would spoil training;
no model is loaded.

    python scripts/inspect_data.py PATH_OR_NAME --model tiny --max_length 96 --max_prompt_length 32
    --n 3

What stands behind the options is a command line of train.py: `pairing=all`,
`dataset_columns.prompt=question`. The numbers are of the train and the test split as training would
read, tokenise and cut them. A finding is an error where it spoils training or evaluation, else a
warning. The exit code is 0, or 1 with an error, or 2 where the data cannot be read. Examples are
shown token by token, what the loss counts in colour, or in brackets where there is no terminal or
NO_COLOR is set.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import sys
from array import array
from collections import Counter
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses  # noqa: F401  registers the losses
import preference_datasets  # noqa: F401  registers the datasets
import trainers  # noqa: F401  registers the trainers
from preflab.batching.summary import histogram  # noqa: E402
from preflab.batching.token_store import CHUNK, render_prompt, tokenise, truncate  # noqa: E402
from preflab.checks import check_config
from preflab.evaluation.win_rates import wilson  # noqa: E402
from preflab.modeling.loading import check_model, load_tokenizer  # noqa: E402
from preflab.readers.records import Source  # noqa: E402
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.overrides import check_overrides, fail, model_overrides
from preflab.settings.run_folder import register_resolvers
from preflab.training.registry import find_trainer  # noqa: E402
from utils import ConfigError, PrefLabError, atomic_write  # noqa: E402

ANY, HALF = 0.0, 0.5
# What is counted: out of what, the share beyond which it is an error (None: never; "tolerate":
# --tolerate), and what it means.
CHECKS = {
    "contradictory_pairs": (
        "pairs",
        "tolerate",
        "their opposite is there as well, and undoes them",
    ),
    "leaked_prompts": (
        "prompts",
        "tolerate",
        "they are prompts of the train split too, so the evaluation is not on unseen ones",
    ),
    "same_after_cut": (
        "pairs",
        "tolerate",
        "the same tokens on both sides once they are cut to max_length, so nothing to learn",
    ),
    "eos_in_responses": (
        "responses",
        ANY,
        "BOS or EOS in the text, which the tokenizer takes for the token itself",
    ),
    "eos_doubled": ("responses", ANY, "the text ends with EOS, and another one is appended"),
    "eos_in_prompts": (
        "prompts",
        ANY,
        "BOS or EOS in the text, which the tokenizer takes for the token itself",
    ),
    "bos_doubled": ("prompts", ANY, "the text starts with BOS, and another one is put in front"),
    "prompt_repeated": (
        "responses",
        HALF,
        "they begin with their prompt, which they follow anyway",
    ),
    "truncated_responses": ("responses", HALF, "cut to max_length, so without an EOS to learn"),
    "truncated_prompts": ("prompts", None, "cut to max_prompt_length"),
    "identical_pairs": ("pairs", None, "the same text on both sides, with different scores"),
    "duplicate_pairs": ("pairs", None, "they repeat an earlier pair"),
    "empty_responses": ("responses", None, "empty, so EOS alone"),
    "merged_boundaries": (
        "responses",
        None,
        (
            "tokenised together with the prompt they are other tokens; training and sampling keep"
            " the two apart"
        ),
    ),
    "messages_as_text": (
        "prompts",
        None,
        "they look like chat messages written as text; save the data as JSON or parquet",
    ),
}
COUNTED = ("rows", "prompts", "responses", "pairs")
LENGTH_BIAS = (0.4, 0.6)  # how often the longer response may be the chosen one without a warning


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "data",
        metavar="PATH_OR_NAME",
        help="as in datasets=[...]; after --, at the end, where it begins with a dash",
    )
    parser.add_argument(
        "--model",
        required=True,
        help=(
            "a name in config/model/, a folder or a hub name; only its tokenizer and sizes are read"
        ),
    )
    parser.add_argument(
        "--max_length",
        help="tokens of prompt and response together; default: that of the model's settings",
    )
    parser.add_argument(
        "--max_prompt_length",
        help="tokens a prompt keeps when both do not fit; default: that of the model's settings",
    )
    parser.add_argument("--n", type=int, default=3, help="examples to show")
    parser.add_argument(
        "--tolerate",
        type=float,
        default=0.01,
        help="share of the pairs or prompts up to which contradictions and the like are warnings",
    )
    parser.add_argument("--json", type=Path, help="a file for the numbers and the findings")
    arguments, overrides = parser.parse_known_args()
    register_resolvers()
    try:
        found, examples, tokenizer = inspect(arguments, overrides)
        findings = findings_of(found, arguments.tolerate)
        if arguments.json:
            with atomic_write(arguments.json) as f:
                json.dump({**found, "findings": findings}, f, indent=1)
    except (PrefLabError, OSError) as error:
        fail(error)
    sys.stdout.reconfigure(errors="backslashreplace")
    print(table(found))
    for level in ("error", "warning"):
        for finding in findings:
            if finding["level"] == level:
                print(f"{level}: {finding['text']}")
    show(examples, tokenizer, colours=sys.stdout.isatty() and not os.environ.get("NO_COLOR"))
    raise SystemExit(int(any(finding["level"] == "error" for finding in findings)))


def inspect(arguments, overrides: list[str]) -> tuple[dict, list, object]:
    """The numbers of both splits, some examples of the train split, and the tokenizer; raises
    PrefLabError."""
    if arguments.n < 0 or not 0 <= arguments.tolerate <= 1:
        raise ConfigError(
            f"--n {arguments.n} must be at least 0, and --tolerate {arguments.tolerate} a share"
            " between 0 and 1"
        )
    lengths = [
        f"{key}={value}"
        for key in ("max_length", "max_prompt_length")
        if (value := getattr(arguments, key)) is not None
    ]
    # loss=sft, for it takes data of any kind.
    overrides = ["loss=sft", *model_overrides(arguments.model), *lengths, *overrides]
    check_overrides(overrides)
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", overrides=overrides)
    config.datasets = [arguments.data]
    sources = {split: several[0] for split, several in check_config(config)[1].items()}
    check_model(config, find_trainer(config.trainer))
    tokenizer = load_tokenizer(config.model)
    looks = {
        split: Look(
            tokenizer, config.max_length, config.max_prompt_length, arguments.n, config.seed
        )
        for split in sources
    }
    for split, source in sources.items():
        looks[split].read(source)
    looks["test"].counts["leaked_prompts"] = len(looks["test"].prompts & looks["train"].prompts)
    found = {
        "data": arguments.data,
        "model": config.model.name_or_path,
        "max_length": config.max_length,
        "max_prompt_length": config.max_prompt_length,
    }
    return (
        found | {"splits": {split: look.numbers() for split, look in looks.items()}},
        looks["train"].examples,
        tokenizer,
    )


class Look:
    """Counts over the records of a split, which pass by in chunks; memory holds a few numbers a
    prompt."""

    def __init__(
        self, tokenizer, max_length: int, max_prompt_length: int, n_examples: int, seed: int
    ):
        self.tokenizer, self.lengths = tokenizer, (max_length, max_prompt_length)
        self.special = {tokenizer.bos_token_id, tokenizer.eos_token_id}
        self.counts, self.first, self.boundary = (
            Counter(),
            {},
            None,
        )  # the first place, and the first boundary, where it is so
        self.prompts: set[bytes] = set()
        self.prompt_tokens, self.response_tokens, self.gaps = array("i"), array("i"), array("d")
        self.longer = (
            Counter()
        )  # pairs whose chosen response has more (1), as many (0) or fewer (-1) tokens
        self.prompts_with_pairs = 0
        self.examples, self.n_examples, self.draw = [], n_examples, random.Random(seed)

    def read(self, source: Source) -> None:
        self.has_pairs, self.truncation = "pairs" in source.provides, source.truncation
        records, bar = (
            source.records(),
            tqdm(desc=f"{source.name} {source.split}", unit=" prompts", mininterval=1.0, delay=2.0),
        )
        for chunk in iter(lambda: list(itertools.islice(records, CHUNK)), []):
            prompts = [render_prompt(record, self.tokenizer) for record in chunk]
            together = [
                prompt + response
                for prompt, record in zip(prompts, chunk)
                for response in record.responses
            ]
            together = iter(
                self.tokenizer(together, add_special_tokens=False, verbose=False)["input_ids"]
            )
            for record, prompt, prompt_tokens, responses in zip(
                chunk, prompts, *tokenise(chunk, self.tokenizer)
            ):
                self._prompt(record, prompt, prompt_tokens)
                for text, tokens in zip(record.responses, responses):
                    self._response(record, prompt, text, prompt_tokens, tokens, next(together))
                cut = truncate(
                    prompt_tokens, responses, self.tokenizer, self.truncation, *self.lengths
                )
                self._pairs(record, responses, cut)
                self._keep_example(record, cut)
            bar.update(len(chunk))
        bar.close()
        self.counts.update({key: source.counts[key] for key in (*COUNTED, "empty_responses")})
        self.skipped, self.note = source.counts["skipped"], source.counts.get("note")

    def _count(self, key: str, record, n: int = 1) -> None:
        if n:
            self.counts[key] += n
            self.first.setdefault(key, record.source)

    def _prompt(self, record, prompt: str, tokens: list[int]) -> None:
        self.prompts.add(hashlib.blake2b(prompt.encode(), digest_size=16).digest())
        self.prompt_tokens.append(len(tokens))
        if tokens[:1] == [self.tokenizer.bos_token_id]:
            self._count("bos_doubled", record)
        elif self._names_special(record.prompt, tokens):
            self._count("eos_in_prompts", record)
        self._count(
            "messages_as_text",
            record,
            isinstance(record.prompt, str) and record.prompt.lstrip().startswith(('[{"', "[{'")),
        )

    def _names_special(self, prompt, tokens: list[int]) -> bool:
        """Whether BOS or EOS come from the text itself, and not from a chat template."""
        if isinstance(prompt, str):
            return not self.special.isdisjoint(tokens)
        names = [name for name in (self.tokenizer.bos_token, self.tokenizer.eos_token) if name]
        return any(name in message["content"] for message in prompt for name in names)

    def _response(
        self,
        record,
        prompt: str,
        text: str,
        prompt_tokens: list[int],
        tokens: list[int],
        together: list[int],
    ) -> None:
        self.response_tokens.append(len(tokens))
        if tokens[-1:] == [self.tokenizer.eos_token_id]:
            self._count("eos_doubled", record)
        elif not self.special.isdisjoint(tokens):
            self._count("eos_in_responses", record)
        self._count("prompt_repeated", record, text.startswith(prompt))
        if together != prompt_tokens + tokens:
            self._count("merged_boundaries", record)
            self.boundary = self.boundary or f"{prompt[-12:]!r} and {text[:12]!r}"

    def _pairs(self, record, responses: list[list[int]], cut: tuple) -> None:
        _, cut_responses, (prompt_cut, cuts) = cut
        self._count("truncated_prompts", record, prompt_cut)
        self._count("truncated_responses", record, sum(cuts))
        texts = [(record.responses[a], record.responses[b]) for a, b in record.pairs]
        different = set(texts)
        self._count("duplicate_pairs", record, len(texts) - len(different))
        self._count("identical_pairs", record, sum(a == b for a, b in texts))
        self._count(
            "contradictory_pairs", record, sum(a != b and (b, a) in different for a, b in texts)
        )
        self._count(
            "same_after_cut",
            record,
            sum(
                record.responses[a] != record.responses[b] and cut_responses[a] == cut_responses[b]
                for a, b in record.pairs
            ),
        )
        self.longer.update(
            int(np.sign(len(responses[a]) - len(responses[b]))) for a, b in record.pairs
        )
        self.prompts_with_pairs += bool(record.pairs)
        if record.scores is not None:
            self.gaps.extend(record.scores[a] - record.scores[b] for a, b in record.pairs)

    def _keep_example(self, record, cut: tuple) -> None:
        """Each record with a pair, or a target, is as likely as any other to be among those that
        are kept."""
        if self.has_pairs and not record.pairs:
            return
        self.counts["candidates"] += 1
        place = (
            len(self.examples)
            if len(self.examples) < self.n_examples
            else self.draw.randrange(self.counts["candidates"])
        )
        if place < self.n_examples:
            self.examples[place : place + 1] = [
                (
                    record,
                    cut,
                    self.draw.choice(record.pairs) if self.has_pairs else (record.sft_target,),
                )
            ]

    def numbers(self) -> dict:
        """All of it as plain numbers."""
        found = {
            "has_pairs": self.has_pairs,
            "note": self.note,
            **{key: self.counts[key] for key in (*COUNTED, *CHECKS)},
        }
        found |= {"skipped": self.skipped, "first": self.first, "boundary": self.boundary}
        found |= {
            "prompt_tokens": quantiles(self.prompt_tokens),
            "response_tokens": quantiles(self.response_tokens),
        }
        found |= {"longer_wins": None, "score_gap": None}
        if decided := self.longer[1] + self.longer[-1]:
            share = self.longer[1] / decided
            # Pairs of a prompt are no independent trials, so there are as many trials as prompts.
            found["longer_wins"] = {
                "share": share,
                "interval": wilson(share, min(decided, self.prompts_with_pairs)),
                "pairs": decided,
            }
        if self.gaps:
            found["score_gap"] = quantiles(self.gaps) | {
                "histogram": histogram(np.asarray(self.gaps), whole=False)
            }
        return found


def quantiles(values: array) -> dict[str, float]:
    names = {"min": 0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1}
    return (
        {
            name: float(q)
            for name, q in zip(names, np.quantile(np.asarray(values), list(names.values())))
        }
        if len(values)
        else {}
    )


# ----------------------------------------------------------------------------------------- findings


def findings_of(found: dict, tolerate: float) -> list[dict]:
    """Errors and warnings: {level, split, what, count, of, text}."""
    findings = []

    def tell(level: str, split: str, what: str, count: int, of: int, text: str) -> None:
        findings.append(
            {
                "level": level,
                "split": split,
                "what": what,
                "count": count,
                "of": of,
                "text": f"{split}: {text}",
            }
        )

    for split, n in found["splits"].items():
        if not n["prompts"]:
            tell("error", split, "no_prompts", 0, n["rows"], "no usable prompt")
        elif not n["has_pairs"]:
            tell(
                "warning",
                split,
                "no_pairs",
                0,
                n["prompts"],
                "responses to imitate (loss=sft), no pairs",
            )
        elif not n["pairs"]:
            tell("error", split, "no_pairs", 0, n["prompts"], "no pair in it")
        for what, (of, limit, text) in CHECKS.items():
            if n[what]:
                limit = {"tolerate": tolerate, None: 1.0}.get(limit, limit)
                share = n[what] / n[of]
                places = [f"such as {n['boundary']}"] if what == "merged_boundaries" else []
                places += [f"first at {n['first'][what]}"] if what in n["first"] else []
                told = "; ".join([f"{n[what]:,} of {n[of]:,} {of} ({share:.2%}): {text}", *places])
                tell("error" if share > limit else "warning", split, what, n[what], n[of], told)
        for why, count in n["skipped"].items():
            tell("warning", split, "skipped", count, n["rows"], f"{count:,} left out: {why}")
        if n["longer_wins"] and (
            n["longer_wins"]["interval"][0] > LENGTH_BIAS[1]
            or n["longer_wins"]["interval"][1] < LENGTH_BIAS[0]
        ):
            share, pairs = n["longer_wins"]["share"], n["longer_wins"]["pairs"]
            told = (
                f"the longer response is chosen in {share:.1%} of the pairs: length alone predicts"
                " much"
            )
            tell("warning", split, "length_bias", round(share * pairs), pairs, told)
    return findings


# --------------------------------------------------------------------------------- for the terminal


def table(found: dict) -> str:
    """The numbers of both splits side by side."""
    splits = found["splits"]
    rows = [("", list(splits))]
    rows += [(what, [f"{n[what]:,}" for n in splits.values()]) for what in COUNTED]
    for why in dict.fromkeys(why for n in splits.values() for why in n["skipped"]):
        rows.append(
            (f"left out: {why}", [f"{n['skipped'].get(why, 0):,}" for n in splits.values()])
        )
    there = [what for what in CHECKS if any(n[what] for n in splits.values())]
    rows += [(named(what), [f"{n[what]:,}" for n in splits.values()]) for what in there]
    for what in ("prompt_tokens", "response_tokens", "score_gap"):
        if any(n[what] for n in splits.values()):
            told = [
                (
                    ", ".join(f"{n[what][q]:.4g}" for q in ("5%", "median", "95%", "max"))
                    if n[what]
                    else "-"
                )
                for n in splits.values()
            ]
            rows.append((f"{named(what)}: 5%, median, 95%, max", told))
    told = [
        (
            "{share:.3f} [{interval[0]:.3f}, {interval[1]:.3f}]".format(**n["longer_wins"])
            if n["longer_wins"]
            else "-"
        )
        for n in splits.values()
    ]
    rows.append(("longer response chosen, 95% interval", told))
    widths = [max(len(row[1][i]) for row in rows) for i in range(len(splits))]
    name = max(len(row[0]) for row in rows)
    lines = [
        f"{found['data']}, tokens of {found['model']}, max_length {found['max_length']},"
        f" max_prompt_length {found['max_prompt_length']}"
    ]
    lines += [
        row[0].ljust(name) + "".join(value.rjust(width + 3) for value, width in zip(row[1], widths))
        for row in rows
    ]
    lines.append("none: " + ", ".join(named(what) for what in CHECKS if what not in there))
    return "\n".join(lines + [n["note"] for n in splits.values() if n["note"]][:1])


def named(what: str) -> str:
    return what.replace("_", " ").replace("eos", "EOS").replace("bos", "BOS")


def show(examples: list, tokenizer, colours: bool) -> None:
    """Print examples as training sees them."""
    if examples:
        print(
            f"\nexamples of the train split; {'in colour' if colours else 'in brackets'}: tokens"
            " that the loss counts"
        )
    for record, (prompt, responses, (prompt_cut, cuts)), members in examples:
        print(f"\n{record.source}{' (prompt cut)' if prompt_cut else ''}")
        print("  prompt: " + painted(prompt, tokenizer, "plain", colours))
        for role, member in zip(
            ("chosen", "rejected") if len(members) == 2 else ("target",), members
        ):
            score = f", score {record.scores[member]:.4g}" if record.scores else ""
            ending = " (cut, so without EOS)" if cuts[member] else ""
            print(
                f"  {role}{score}: {painted(responses[member], tokenizer, role, colours)}{ending}"
            )


PAINT = {
    "plain": ("2", "2"),
    "chosen": ("32", "92"),
    "target": ("32", "92"),
    "rejected": ("33", "93"),
    "special": ("7", "7"),
}


def painted(
    tokens: list[int], tokenizer, role: str, colours: bool, head: int = 40, tail: int = 40
) -> str:
    """The text of each token, neighbours in two shades or each in brackets, with the middle of a
    long list left out."""
    shown = []
    for i, token in enumerate(tokens):
        if head <= i < len(tokens) - tail:
            shown += [f" … {len(tokens) - head - tail} tokens … "] if i == head else []
            continue
        # What is not printable is escaped, lest a text command the terminal.
        text = "".join(
            c if c.isprintable() else c.encode("unicode_escape").decode()
            for c in tokenizer.decode([token])
        )
        if colours:
            shown.append(
                f"\033[{PAINT['special' if token in tokenizer.all_special_ids else role][i % 2]}m{text}\033[0m"
            )
        else:
            shown.append(text if role == "plain" else f"[{text}]")
    return "".join(shown)


if __name__ == "__main__":
    main()
