"""The training loop. No loss has a name here, and a trainer differs from another only in where its models live."""

import json
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from batching import Loader, PreferenceData, collate
from checkpoints import (
    Counters,
    latest_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from evaluation import append_samples, evaluate_loss, sample_and_measure
from losses import BoundLoss
from metrics import MetricLog, Sums, rewind
from models import (
    archive_state,
    build_policy,
    build_reference,
    full_model,
    load_archive,
)
from objective import compute_loss
from rewards import build_reward
from utils import PrefLabError, atomic_write, seed_everything


class NonFiniteLoss(PrefLabError):
    """The loss or its gradient is no number; the weights of the last good step are saved."""


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and the same command continues it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class BasicTrainer:
    """Trains in one process: on a CPU, on a GPU, or with the model's layers spread over several."""

    def __init__(self, config, run_dir: Path, loss: BoundLoss, tokenizer, data: dict[str, PreferenceData], wandb_run=None):
        seed_everything(config.seed)
        self.config, self.run_dir, self.loss, self.tokenizer, self.data = config, run_dir, loss, tokenizer, data
        self.log = MetricLog(run_dir, wandb_run, config.minimum_log_interval_secs)
        self.counters = Counters()
        self.last_eval: dict | None = None
        self.stop_signal: int | None = None
        self.build_models()

    def build_models(self) -> None:
        scalar = "scalar_head" in self.loss.reads  # such a model has no text to sample
        self.reward = None if scalar else build_reward(self.config.reward)
        self.policy = build_policy(self.config.model, scalar_head=scalar, trainable=self.config.function == "train")
        wanted = "reference" in self.loss.reads or (self.config.function == "eval" and not scalar)
        self.reference = build_reference(self.config.model, self.policy, function=self.config.function) if wanted else None

    # -------------------------------------------------------------------------------------------------- the loop

    def train(self) -> dict:
        """Train to the end of the data, evaluating and saving on the way; returns the summary."""
        self._prepare_training()
        self.resume()
        started = time.perf_counter() - self.counters.seconds
        if self.counters.steps == 0 and self.last_eval is None and self.config.do_first_eval:
            self.evaluate()
        bar = self._progress_bar()
        for examples in self.loader:
            self.train_step(examples, bar)
            if self._crossed(self.config.eval_every, len(examples)) or self.counters.examples == self.loader.total:
                self.evaluate()
            self.counters.seconds = time.perf_counter() - started
            if self._crossed(self.config.save_every or self.config.eval_every, len(examples)):
                self.save()
            if self.stop_signal is not None:
                self.save()
                raise Stopped(self.stop_signal)
        bar.close()
        self.save()
        return self.summarize()

    def _progress_bar(self) -> tqdm:
        interval = self.config.minimum_log_interval_secs
        if not sys.stderr.isatty():  # a log file keeps every line
            interval = max(interval, 10.0)
        unit = f" {self.loss.examples}"
        return tqdm(total=self.loader.total, initial=self.counters.examples, unit=unit, desc="train", mininterval=interval)

    def train_step(self, examples, bar: tqdm) -> None:
        """One optimizer step: the gradient of the mean loss over `examples`, however they are split into microbatches."""
        begun = time.perf_counter()
        sums, n_tokens, losses = Sums(), 0, []
        self._set_learning_rate()
        for part in self._microbatches(examples):
            batch = collate(self.data["train"], part, self.tokenizer.pad_token_id).to(self.policy.device)
            output, metrics = compute_loss(self.loss, self.policy, self.reference, batch, self.data["train"], "train")
            (output.losses.sum() / len(examples)).backward()
            sums.add(metrics)
            losses.append(output.losses.detach())
            n_tokens += batch.n_tokens
        grad_norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()
        if not math.isfinite(grad_norm) or not bool(torch.isfinite(torch.cat(losses)).all()):
            self._stop_at_non_finite(examples, torch.cat(losses))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.steps += 1
        self.counters.examples += len(examples)
        self._log_step(sums, begun, len(examples), n_tokens, grad_norm, bar)

    def _microbatches(self, examples) -> list:
        size = math.ceil(len(examples) / self.config.gradient_accumulation_steps)
        return [examples[begin : begin + size] for begin in range(0, len(examples), size)]

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then constant: a function of the step, so there is no scheduler state to lose."""
        self.lr = self.config.lr * min(1.0, (self.counters.steps + 1) / (self.config.warmup_steps + 1))
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def _log_step(self, sums: Sums, begun: float, n: int, n_tokens: int, grad_norm: float, bar: tqdm) -> None:
        means = sums.flush()  # the one read-back of a step: from here on its time is known
        seconds = time.perf_counter() - begun
        self.counters.train_seconds += seconds
        rates = {"examples_per_second": n / seconds, "tokens_per_second": n_tokens / seconds}
        self._write("train", means | rates | {"grad_norm": grad_norm, "lr": self.lr})
        bar.update(n)
        bar.set_postfix_str(f"loss {means['loss/train']:.4g}, {rates['tokens_per_second']:,.0f} tokens/s", refresh=False)

    def _write(self, split: str, values: dict) -> None:
        where = {"examples": self.counters.examples, "step": self.counters.steps, "split": split}
        counters = {"counters/examples": self.counters.examples, "counters/updates": self.counters.steps}
        self.log.write(where | values | counters)

    def _crossed(self, every: int, n: int) -> bool:
        """Whether the last `n` examples reached a multiple of `every`."""
        return self.counters.examples // every > (self.counters.examples - n) // every

    def _stop_at_non_finite(self, examples, losses) -> None:
        bad = [int(e) for e, finite in zip(examples, torch.isfinite(losses).tolist()) if not finite]
        what = "loss" if bad else "gradient"
        names = [self.data["train"].describe(e) for e in (bad or [int(e) for e in examples])[:8]]
        self.optimizer.zero_grad(set_to_none=True)
        self.loader.load_state_dict(self._loader_state_before(examples))
        self.save()
        saved = "no checkpoint was written (debug=true)" if self.config.debug else f"the last good weights are in {self.run_dir / 'LATEST'}"
        raise NonFiniteLoss(
            f"the {what} of step {self.counters.steps + 1} is not finite, from {', '.join(names)}; {saved}; "
            f"try a smaller lr or max_grad_norm, or look at these examples"
        )

    def _loader_state_before(self, examples) -> dict:
        n, seen = len(self.loader.groups), self.loader.examples - len(examples)
        return {"epoch": seen // n, "cursor": seen % n}

    # ------------------------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Held-out losses, and samples if asked for: a row of metrics.jsonl and rows of samples.jsonl."""
        config = self.config
        values = evaluate_loss(
            self.loss, self.policy, self.reference, self.data["test"],
            n=config.n_eval_examples, batch_size=config.eval_batch_size, pad_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        if self.reward is not None and (config.sample_during_eval or config.function == "eval"):
            rows, means = sample_and_measure(
                self.policy, self.reference, self.tokenizer, self.data["test"], self.reward, config.reward.name,
                n=config.n_eval_examples if config.function == "eval" else config.n_eval_model_samples,
                max_prompt_length=config.max_prompt_length,
                max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
                temperature=config.temperature, top_p=config.topp, seed=config.seed, batch_size=config.eval_batch_size,
            )  # fmt: skip
            append_samples(self.run_dir / "samples.jsonl", rows, self.counters.examples)
            values |= means
        self._write("eval", values)
        self.last_eval = {"examples": self.counters.examples, **values}

    def summarize(self) -> dict:
        """Write summary.json: the last evaluation and the run's speed."""
        values, counters = self.last_eval, self.counters
        rate = counters.examples / counters.train_seconds if counters.train_seconds else None
        summary = {"finished": True, "function": self.config.function, "loss": self.loss.name, "reward": self.config.reward.name}
        for name in ("policy_reward", "policy_reward_se", "reference_reward", "reference_reward_se", "reward_gain", "reward_gain_se"):
            summary[name] = values.get(f"samples_eval/{name}")
        for name in ("kl", "kl_se", "kl_k1", "kl_k3"):
            summary[name] = values.get(f"samples_eval/{name}")
        summary |= {"eval_accuracy": values.get("rewards_eval/accuracies"), "eval_loss": values.get("loss/eval")}
        summary |= {"pairs_per_second": rate, "examples": counters.examples, "steps": counters.steps, "seconds": counters.seconds}
        summary |= {"seed": self.config.seed, "temperature": self.config.temperature, "top_p": self.config.topp}
        with atomic_write(self.run_dir / "summary.json") as f:
            json.dump(summary, f, indent=1)
        self.log.finish()
        return summary

    # ------------------------------------------------------------------------------------------ saving and resuming

    def _prepare_training(self) -> None:
        config, model = self.config, self.policy.model
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()  # transformers recomputes in training mode only; dropout is off for good
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = getattr(torch.optim, config.optimizer)(self.parameters, lr=config.lr)
        self.loader = Loader(
            self.data["train"].groups,
            batch_size=config.batch_size, seed=config.seed, n_epochs=config.n_epochs, n_examples=config.n_examples,
        )  # fmt: skip

    def save(self) -> None:
        if not self.config.debug:
            save_checkpoint(self.run_dir, self.counters.steps, self._fill_checkpoint, keep=self.config.keep_checkpoints)

    def _fill_checkpoint(self, folder: Path) -> None:
        model = full_model(self.policy)
        metrics = {key: value for key, value in (self.last_eval or {}).items() if value is not None}
        torch.save({"step_idx": self.counters.steps, "state": archive_state(model), "metrics": metrics}, folder / "policy.pt")
        model.save_pretrained(folder / "hf")
        self.tokenizer.save_pretrained(folder / "hf")
        training = {
            "optimizer": self.optimizer.state_dict(),
            "loader": self.loader.state_dict(),
            "counters": vars(self.counters),
            "random": random_state(),
            "last_eval": self.last_eval,
        }
        if model is not self.policy.model:  # policy.pt holds the adapter folded in; training goes on from the adapter
            training["adapter"] = {n: p.detach() for n, p in self.policy.model.named_parameters() if p.requires_grad}
        torch.save(training, folder / "training_state.pt")

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run folder, if there is one; else clear what a dead start left."""
        checkpoint = latest_checkpoint(self.run_dir)
        if checkpoint is not None:
            state = torch.load(checkpoint / "training_state.pt", map_location=self.policy.device, weights_only=True)
            if "adapter" in state:
                self.policy.model.load_state_dict(state["adapter"], strict=False)
            else:
                load_archive(self.policy.model, checkpoint)
            self.optimizer.load_state_dict(state["optimizer"])
            self.loader.load_state_dict(state["loader"])
            self.counters = Counters(**state["counters"])
            self.last_eval = state["last_eval"]
            set_random_state({key: value.cpu() if key == "torch" else value for key, value in state["random"].items()})
            print(f"continuing {self.run_dir} from step {self.counters.steps} ({self.counters.examples:,} examples)")
        for name in ("metrics.jsonl", "samples.jsonl"):
            rewind(self.run_dir / name, self.counters.examples if checkpoint is not None else -1)
        (self.run_dir / "summary.json").unlink(missing_ok=True)


TRAINERS = {"BasicTrainer": BasicTrainer}
