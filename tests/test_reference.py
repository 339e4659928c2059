"""The reference's log-probs on disk: computed once, the same numbers, never used for other weights
or tokens."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import (
    ROOT,
    change,
    cut,
    delete,
    empty,
    final_weights,
    read_rows,
    same_weights,
    save_model,
    scored_rows,
    small_run,
    untimed,
    write_jsonl,
)

from preflab.batching.token_store import store_of
from preflab.distributed.process_group import ALONE
from preflab.modeling import reference_cache
from preflab.modeling.reference_files import ReferenceLogps, _write_at
from preflab.training import reference
from utils import ConfigError, DataError

EXACT = ("model.policy_dtype=float64", "model.reference_dtype=float64", "sample_during_eval=false")


@pytest.fixture
def counted(monkeypatch):
    """Numbers of responses whose log-probs were computed for the cache, and of references that were
    built."""
    counts = {"responses": 0, "built": 0}
    compute, build = reference_cache._compute, reference.build_reference

    def counting(missing, *more):
        counts["responses"] += sum(map(len, missing.values()))
        return compute(missing, *more)

    def building(*arguments, **options):
        counts["built"] += 1
        return build(*arguments, **options)

    monkeypatch.setattr(reference_cache, "_compute", counting)
    monkeypatch.setattr(reference, "build_reference", building)
    return counts


def folders(tmp_path):
    return folders_of(tmp_path / "cache" / "reference")


def folders_of(folder):
    return sorted(path for path in folder.iterdir() if path.is_dir())


@pytest.mark.parametrize(
    "more", [(), ("model.lora.r=4",), ("gradient_accumulation_steps=4", "layout=padded")]
)
def test_a_cached_reference_trains_the_same_policy(run, more):
    cached = run("cached", *EXACT, *more)
    uncached = run("uncached", *EXACT, *more, "reference.cache=false")
    a, b = final_weights(cached), final_weights(uncached)
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-9
    for ours, theirs in zip(
        read_rows(cached / "metrics.jsonl"), read_rows(uncached / "metrics.jsonl"), strict=True
    ):
        assert ours[f"loss/{ours['split']}"] == pytest.approx(
            theirs[f"loss/{theirs['split']}"], rel=1e-9
        )


def test_it_is_computed_once_for_all_runs_and_the_reference_is_never_built(run, counted, tmp_path):
    first = run("first", "sample_during_eval=false")
    assert counted["responses"] > 0 and counted["built"] == 0
    counted["responses"] = 0
    run("other-loss", "sample_during_eval=false", "loss=ipo", "seed=3", "n_epochs=2")
    again = run("again", "sample_during_eval=false")
    assert counted == {"responses": 0, "built": 0}
    assert same_weights(final_weights(first), final_weights(again))
    assert untimed(read_rows(first / "metrics.jsonl")) == untimed(
        read_rows(again / "metrics.jsonl")
    )
    assert len(folders(tmp_path)) == 2  # train and test


def test_only_what_a_run_needs_is_computed(run, counted):
    run("short", "sample_during_eval=false", "n_examples=8", "n_eval_examples=4")
    short = counted["responses"]
    assert 0 < short <= 2 * (8 + 4)
    run("long", "sample_during_eval=false")
    assert counted["responses"] > short


def test_other_weights_dtypes_and_tokens_get_other_folders(
    run, counted, llama_folder, imdb_dir, tmp_path
):
    base = ("sample_during_eval=false", "n_examples=8")
    start = run("start", *base)
    n = len(folders(tmp_path))
    other, third = (save_model(tmp_path / f"other{seed}", seed=seed) for seed in (5, 6))
    for name, more in {
        "weights": (f"model.name_or_path={other}",),
        "archive": (f"model.archive={start / 'LATEST' / 'policy.pt'}",),
        "reference": (f"model.reference_archive={third}",),
        "dtype": ("model.reference_dtype=float64",),
        "half": ("model.fsdp_policy_mp=bfloat16",),
        # With LoRA the reference has the policy's weights.
        "adapted": ("model.lora.r=4", "model.policy_dtype=bfloat16"),
        "length": ("max_length=60",),
    }.items():
        before = counted["responses"]
        run(name, *base, *more)
        assert counted["responses"] > before, name
        assert len(folders(tmp_path)) == n + 2, name
        n += 2
    before = counted["responses"]
    # The weights of "archive" under another name
    run("same", *base, f"model.reference_archive={start / 'LATEST'}")
    assert counted["responses"] == before
    write_jsonl(imdb_dir / "imdb-sft-train.jsonl", scored_rows(23))
    before = counted["responses"]
    run("tokens", *base)
    assert counted["responses"] > before
    assert len(folders(tmp_path)) == n + 1  # the test split has not changed


def test_other_log_probs_are_refused(run, tmp_path, monkeypatch):
    write = reference_cache.ReferenceLogps.write

    def other(self, logps):  # as of another program: the checksums are theirs
        write(self, {response: values * 1.01 for response, values in logps.items()})

    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.ReferenceLogps, "write", other)
        run("first", "sample_during_eval=false")
    with pytest.raises(DataError, match=r"are off by.*delete that folder"):
        run("second", "sample_during_eval=false")


def test_damaged_log_probs_are_computed_again(run, counted, tmp_path, capsys):
    first = run("first", "sample_during_eval=false", "microbatch_tokens=64")
    total, counted["responses"] = counted["responses"], 0
    for folder in folders(tmp_path):
        with open(folder / "logps", "r+b") as f:
            f.truncate(f.seek(0, 2) // 2)
    second = run("second", "sample_during_eval=false", "microbatch_tokens=64")
    assert 0 < counted["responses"] < total
    said = "".join(capsys.readouterr())
    assert said.count("computed again") == 2, said  # train and test
    assert same_weights(final_weights(first), final_weights(second))


@pytest.fixture
def cache(tmp_path):
    """Opens a cache of three responses of a store, as a run does: (those on disk, those that are
    not), after which all are on disk."""
    store = store_of(
        "data", [([1, 2], [[3, 4], [5]]), ([6], [[7, 8, 9], [3, 3]])], [[0, 0]] * 2, [(0, 1)] * 2
    )
    store.key = "key"
    needed = np.arange(1, 4)
    values = {r: -np.arange(1.0, 1 + np.diff(store.responses[r])[0]) - r for r in range(4)}

    def open_cache():
        cache = reference_cache._Cache(tmp_path, "reference", {"key": store}, "float32")
        with cache.locked(ALONE):
            on_disk, missing = cache.split_by_known({"key": needed})
        files = cache.open(store, "r+b")
        for response in on_disk["key"].tolist():
            assert files.logps(response).tolist() == values[response].tolist()
        for response in missing["key"].tolist():
            with pytest.raises(DataError, match=f"response {response} in"):
                files.logps(response)
        files.write({response: values[response] for response in missing["key"].tolist()})
        return on_disk["key"].tolist(), missing["key"].tolist()

    return open_cache


def grow(path):
    path.write_bytes(path.read_bytes() + b"\0\1\2\3")


def zero(path):
    path.write_bytes(bytes(path.stat().st_size))


def shift(path):
    path.write_bytes(path.read_bytes()[4:] + b"\0\0\0\0")


@pytest.mark.parametrize("file", ["logps", "checksums"])
@pytest.mark.parametrize(
    "damage, lost",
    [
        (cut, [3]),
        (change, [3]),
        (grow, []),
        *((d, [1, 2, 3]) for d in (empty, delete, zero, shift)),
    ],
)
def test_every_damage_of_the_cache_is_found_and_only_the_damaged_part_is_lost(
    cache, tmp_path, caplog, file, damage, lost
):
    assert cache() == ([], [1, 2, 3]) and cache() == ([1, 2, 3], []) and not caplog.text
    [folder] = folders_of(tmp_path)
    damage(folder / file)
    on_disk, missing = cache()
    assert missing == lost and sorted(on_disk + missing) == [1, 2, 3]
    assert cache() == ([1, 2, 3], [])
    # Checksums of zero are those of a run that was killed early.
    said = [] if (file, damage) == ("checksums", zero) else [str(folder)]
    assert [record.getMessage().split(":")[0] for record in caplog.records] == said


def test_a_cache_without_checksums_or_of_another_reference_is_not_read(cache, tmp_path):
    cache()
    [folder] = folders_of(tmp_path)
    (folder / "checksums").rename(folder / "known")
    assert cache() == ([], [1, 2, 3])  # as an earlier version wrote it
    other = folder.with_name("other")
    shutil.copytree(folder, other)
    store = store_of("data", [([1, 2], [[3, 4], [5]])], [[0, 0]], [(0, 1)])
    assert ReferenceLogps(folder, store, "float32").intact(np.array([1])).all()
    assert not ReferenceLogps(other, store, "float32").intact(np.array([1])).any()


def test_a_resumed_run_reads_the_cache_too(run, counted):
    run("run", "sample_during_eval=false", "n_examples=16")
    before = dict(counted)
    run("run", "sample_during_eval=false", "n_examples=24")
    # The spot check needs a reference: the policy has been trained.
    assert counted["built"] == before["built"] + 1
    whole = run("whole", "sample_during_eval=false", "n_examples=24")
    assert same_weights(final_weights(whole), final_weights(whole.parent / "run"))


@pytest.mark.parametrize(
    "more, reason",
    [(("loss=tdpo2",), "whole distribution"), (("model.from_scratch=true",), "draws new weights")],
)
def test_a_reference_that_cannot_be_cached_runs_in_every_step(run, capsys, more, reason):
    run("auto", "n_examples=8", *more)
    assert "runs in every step" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=rf"reference\.cache=true.*{reason}"):
        run("asked", "n_examples=8", *more, "reference.cache=true")


def test_a_loss_that_reads_no_reference_caches_nothing(run, tmp_path):
    run("sft", "loss=sft")
    assert not (tmp_path / "cache" / "reference").exists()


def test_a_loss_that_reads_no_reference_can_be_compared_with_it(run):
    """Evaluations then have its samples and the KL; training stays what it is."""
    more = ("loss=cpo", "sample_during_eval=true", "n_eval_model_samples=8")
    alone, compared = run("alone", *more), run("compared", *more, "reference.compare=true")
    assert same_weights(final_weights(alone), final_weights(compared))
    rows = [read_rows(folder / "metrics.jsonl") for folder in (alone, compared)]
    ends = [next(row for row in reversed(of) if row["split"] == "eval") for of in rows]
    assert "samples_eval/kl" not in ends[0] and ends[1]["samples_eval/kl"] > 0
    assert ends[0]["samples_eval/policy_reward"] == ends[1]["samples_eval/policy_reward"]
    assert not any(key.startswith("logratios") for key in ends[1])


def test_log_probs_half_written_by_a_killed_run_are_computed_again(
    run, counted, monkeypatch, tmp_path
):
    write, calls = reference_cache.ReferenceLogps.write, []

    def killed(self, logps):
        calls.append(1)
        if len(calls) > 1:
            for begin, end in self.spans[list(logps)]:
                content = np.full(end - begin, -7.0, dtype=self.dtype).tobytes()
                _write_at(self._logps, int(begin) * self.dtype.itemsize, content)
            raise KeyboardInterrupt
        write(self, logps)

    tiny = ("sample_during_eval=false", "microbatch_tokens=64")
    with monkeypatch.context() as patch:
        patch.setattr(reference_cache.ReferenceLogps, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run("killed", *tiny)
    known = sum(
        int((np.fromfile(folder / "checksums", dtype=np.uint32) != 0).sum())
        for folder in folders(tmp_path)
    )
    total, counted["responses"] = counted["responses"], 0
    after = run("after", *tiny)
    assert known > 0 and counted["responses"] == total - known
    a, b = final_weights(after), final_weights(run("clean", *tiny, "reference.cache=false"))
    assert max((a[key] - b[key]).abs().max().item() for key in a) < 1e-4


def test_runs_that_start_together_wait_for_the_one_that_computes(imdb_dir, llama_folder, tmp_path):
    commands = [
        small_run(llama_folder, imdb_dir, tmp_path / name, "sample_during_eval=false")
        for name in ("a", "b")
    ]
    started = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, command)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    lines = []
    for process in started:
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        lines += [line for line in out.splitlines() if line.startswith("reference:")]
    on_disk = sorted(
        int(line.split(" responses, ")[1].split()[0].replace(",", "")) for line in lines
    )
    assert len(on_disk) == 2
    assert on_disk[0] == 0 and on_disk[1] > 0  # one run computed all, the other none
    assert same_weights(final_weights(tmp_path / "a"), final_weights(tmp_path / "b"))


def test_a_loss_reads_the_reference_token_by_token(run, tmp_path):
    """From the cache or from the model, in padded and in packed rows: the same training. SGD, for
    RMSprop makes steps of gradients that are all rounding."""
    loss = tmp_path / "token_loss.py"
    loss.write_text(
        "import torch.nn.functional as F\n"
        "from losses import LossOutput, register_loss\n"
        '@register_loss("by_token", reads={"token_logps", "reference_token_logps"})\n'
        "def by_token(pair):\n"
        "    h = [(side.token_logps - side.reference_token_logps).clamp(-2, 2).sum(-1)\n"
        "         for side in (pair.chosen, pair.rejected)]\n"
        "    assert pair.reference_chosen_token_logps is pair.chosen.reference_token_logps\n"
        "    return LossOutput(-F.logsigmoid(0.1 * (h[0] - h[1])), *h)\n"
    )
    more = (*EXACT, "optimizer=SGD", "~loss.beta", "~loss.label_smoothing", "~loss.reference_free")
    more = (*more, "loss.name=by_token", f"loss.module={loss}", "n_examples=16", "pairing=all")
    weights = [
        final_weights(
            run(f"{layout} {cache}", *more, f"layout={layout}", f"reference.cache={cache}")
        )
        for layout in ("padded", "prefix_shared")
        for cache in ("true", "false")
    ]
    assert not same_weights(weights[0], final_weights(run("start", *more, "lr=1e-30")))
    for other in weights[1:]:
        assert max((weights[0][key] - other[key]).abs().max().item() for key in other) < 1e-9
