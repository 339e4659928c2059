"""The training loop. No loss has a name here, and a trainer differs from another only in where its
models live."""

import gc
import json
import math
import sys
import tempfile
import time
from concurrent.futures import Future
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import Loader, evaluation_order
from preflab.batching.microbatches import microbatch_tokens, split_step
from preflab.batching.packing import Batch
from preflab.distributed.process_group import ALONE, World
from preflab.distributed.signals import Stopped, StopSignals
from preflab.evaluation.held_out import evaluate_loss
from preflab.evaluation.samples import Sampling, sample_and_measure
from preflab.evaluation.worklist import (
    Checkpoint,
    draws_samples,
    finish_evaluation,
    temperatures,
)
from preflab.modeling.blocks import find_blocks
from preflab.modeling.fsdp import reshard, shard
from preflab.modeling.layout_choice import choose_layout
from preflab.modeling.loading import build_policy, build_reference, skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.placed_weights import bytes_here, clip_grad_norm, full_weights
from preflab.modeling.reference_cache import attach_reference, plan_reference
from preflab.modeling.tensor_parallel import devices_for, split
from preflab.modeling.weights_io import archive_state
from preflab.objective.registry import BoundLoss
from preflab.rewards.registry import build_rewards
from preflab.training.checkpoints import (
    Counters,
    Saving,
    latest_checkpoint,
    load_optimizer,
    random_state,
    save_checkpoint,
    save_optimizer,
    set_random_state,
)
from preflab.training.compute_loss import compute_loss
from preflab.training.learner import NonFiniteLoss, make_optimizer
from preflab.training.metrics import MetricLog, Sums, rewind
from preflab.training.profiling import HostMemory, Profiler, peak_memory
from utils import append_rows, atomic_write, seed_everything

MEASURED = [
    f"samples_eval/{name}"
    for name in ("policy_length", "reference_length", "policy_ended", "entropy", "repetition")
]  # also in summary.json


SHARD = "2GB"  # of the hf folder: a shard is in memory while it is written


class BasicTrainer:
    """Trains in one process: on a CPU, on a GPU, or with the model's layers spread over several.

    Every rank of a distributed trainer runs this same loop on its share of each batch; a subclass
    says where models live.
    """

    def __init__(
        self,
        config,
        run_dir: Path,
        loss: BoundLoss,
        tokenizer,
        data: dict[str, PreferenceData],
        *,
        world: World = ALONE,
        wandb_run=None,
        stop: StopSignals | None = None,
    ):
        seed_everything(config.seed)
        self.config, self.run_dir, self.loss, self.tokenizer, self.data, self.world = (
            config,
            run_dir,
            loss,
            tokenizer,
            data,
            world,
        )
        self.log = MetricLog(
            run_dir, wandb_run, config.minimum_log_interval_secs, writes=world.rank == 0
        )
        self.counters = Counters()
        self.last_eval: dict | None = None
        self.best_accuracy = -1.0
        self.reference_samples: dict = {}  # it does not change, so its samples are drawn once
        self.stop = stop or StopSignals()
        self.saving: Saving | None = None
        self.save_peaks: list[int | None] = []
        self.state_bytes: dict[str, int] = {}
        self.training = config.function in ("train", "online")
        self.loader = self._make_loader() if self.training else None
        self.checkpoint = world.agree(self._find_checkpoint) if self.training else None
        self.build_models()

    def _make_loader(self) -> Loader:
        config = self.config
        return Loader(
            self.data["train"].groups,
            batch_size=config.batch_size,
            seed=config.seed,
            n_epochs=config.n_epochs,
            n_examples=config.n_examples,
            order=config.order,
        )

    def _find_checkpoint(self) -> Path | None:
        return latest_checkpoint(self.run_dir)

    def build_models(self) -> None:
        self.scalar = "scalar_head" in self.loss.reads  # such a model has no text to sample
        self.rewards = build_rewards(self.config) if draws_samples(self.config, self.loss) else {}
        self.policy = self._build_policy(self.config.model)
        self.layout, why = choose_layout(
            self.config,
            self.policy,
            self.world,
            pad_id=self.tokenizer.pad_token_id,
            last_tokens=self.scalar,
        )
        reshard(self.policy.model)
        print(f"layout: {self.layout.name}" + (f" ({why})" if why else ""))
        plan = plan_reference(
            self.loss.reads,
            loss_name=self.loss.name,
            function=self.config.function,
            cache=self.config.reference.cache,
            from_scratch=self.config.model.from_scratch,
            draws_samples=draws_samples(self.config, self.loss),
        )
        self.reference = self._build_reference() if plan.built else None
        if plan.not_cached_because:
            print(f"reference: runs in every step ({plan.not_cached_because})")
        if plan.cached:
            needed = {
                "train": self.loader.first_epoch(),
                "test": evaluation_order(self.data["test"].groups)[: self.config.n_eval_examples],
            }
            attach_reference(
                self.data,
                needed,
                cache_dir=self.config.cache_dir,
                model=self.config.model,
                sharded=self.config.trainer == "FSDPTrainer",
                build_scorer=self._like_reference,
                layout=self.layout,
                microbatch_tokens=self._microbatch_tokens(),
                world=self.world,
            )
            reshard(self.policy.model)  # it may have stood in for the reference
            # or the reference is not needed any more, and some models hold on to themselves
            gc.collect()

    def _build_policy(self, model) -> Scorer:
        return build_policy(
            model,
            scalar_head=self.scalar,
            trainable=self.training,
            checkpoint=self.checkpoint,
            place=self.place,
        )

    def _build_reference(self) -> Scorer:
        return build_reference(
            self.config.model, self.policy, training=self.training, place=self.place
        )

    def _like_reference(self) -> Scorer:
        """The reference, or what equals it: the policy of a run that starts, with the adapter off
        if it has one."""
        model = self.config.model
        starts = (
            self.checkpoint is None
            and not model.reference_archive
            and model.policy_dtype == model.reference_dtype
        )
        if self.reference is None and starts and not model.lora.r:
            return self.policy
        return self.reference or self._build_reference()

    def _microbatch_tokens(self) -> int:
        return microbatch_tokens(self.config, self.loss, self.policy.device.type)

    place = None  # where models go: a method (scorer, dtype) of the other trainers

    # ------------------------------------------------------------------------------------- the loop

    def train(self) -> dict:
        """Train to the end of the data, evaluating and saving on the way; returns the summary."""
        self._prepare_training()
        self.resume()
        started = time.perf_counter() - self.counters.seconds
        if self.counters.steps == 0 and self.last_eval is None and self.config.do_first_eval:
            self.evaluate()
        bar = self._progress_bar()
        for examples, microbatches in self.loader.ahead(self._collate):
            self.train_step(examples, microbatches, bar)
            bar.update(len(examples))
            if (
                self._crossed(self.config.eval_every, len(examples))
                or self.counters.examples == self.loader.total
            ):
                self.evaluate()
            self.counters.seconds = time.perf_counter() - started
            if self._crossed(self.config.save_every or self.config.eval_every, len(examples)):
                self.save()
            self._stop_if_asked()
        bar.close()
        self.profiler.stop()
        self.save()
        self.finish_saving()
        return self.summarize()

    def _stop_if_asked(self) -> None:
        """Save, and raise Stopped, where a signal asked the run to stop."""
        if signum := self._asked_to_stop():
            self.save()
            self.finish_saving()
            self.log.finish()
            raise Stopped(signum)

    def _asked_to_stop(self) -> int:
        """The signal that any rank received, on all ranks; 0 for none."""
        return int(self.world.max([self.stop.received or 0])[0])

    def _progress_bar(self) -> tqdm:
        interval = self.config.minimum_log_interval_secs
        if not sys.stderr.isatty():  # a log file keeps every line
            interval = max(interval, 10.0)
        unit = f" {self.loss.examples}"
        return tqdm(
            total=self.loader.total,
            initial=self.counters.examples,
            unit=unit,
            desc="train",
            mininterval=interval,
            disable=self.world.rank > 0,
        )

    def _collate(self, examples) -> list[tuple[Batch, int]]:
        """This rank's microbatches of a step, and how many examples of each count: a rank with
        nothing left gets a stand-in."""
        config, data = self.config, self.data["train"]
        budget = None if self.loss.couples_batch else self._microbatch_tokens()
        [parts] = self.world.share(
            split_step(
                data,
                examples,
                self.layout,
                ranks=self.world.data_ranks,
                at_least=config.gradient_accumulation_steps,
                tokens=budget,
                grouping=config.length_grouping,
            )
        )
        return [
            (collate(data, part if len(part) else examples[:1], self.layout), len(part))
            for part in parts
        ]

    def train_step(self, examples, microbatches: list[tuple[Batch, int]], bar: tqdm) -> None:
        """One optimizer step: the gradient of the mean loss over `examples`, however they are split
        over ranks and microbatches."""
        begun = time.perf_counter()
        sums, n_tokens, losses, seen = Sums(), 0, [], []
        self._set_learning_rate()
        for batch, n_real in microbatches:
            batch = batch.to(self.policy.device)
            output, metrics = compute_loss(
                self.loss, self.policy, self.reference, batch, self.data["train"], "train"
            )
            # Gradients come back as means over the data ranks; what is wanted is the mean over the
            # examples of all of them.
            (output.losses[:n_real].sum() * (self.world.data_ranks / len(examples))).backward()
            sums.add(metrics, n_real)
            losses.append(output.losses[:n_real].detach())
            seen += batch.examples[:n_real]
            n_tokens += batch.n_tokens if n_real else 0
        grad_norm = clip_grad_norm(self.parameters, self.config.max_grad_norm)
        if self._any_not_finite(grad_norm, torch.cat(losses)):
            self._stop_at_non_finite(examples, seen, torch.cat(losses))
        self.optimizer.step()
        self.loss.keep(
            output
        )  # running means of losses that couple a batch, which is then one microbatch
        self.state_bytes = self.state_bytes or self._measure_state()
        self.optimizer.zero_grad(set_to_none=True)
        self.counters.steps += 1
        self.counters.examples += len(examples)
        self._log_step(sums, begun, len(examples), n_tokens, grad_norm, bar)
        self.profiler.step()

    def _measure_state(self) -> dict[str, int]:
        """Bytes of weights, gradients and optimizer state of a device, on the rank that has most of
        each."""
        held = [p for name, p in self.policy.model.named_parameters() if self.on_first_device(name)]
        slots = (
            value
            for p in held
            for value in self.optimizer.state.get(p, {}).values()
            if isinstance(value, torch.Tensor)
        )
        kinds = {
            "weights": held,
            "gradients": (p.grad for p in held if p.grad is not None),
            "optimizer": slots,
        }
        return dict(
            zip(
                kinds,
                map(
                    int, self.world.max([float(bytes_here(tensors)) for tensors in kinds.values()])
                ),
            )
        )

    def on_first_device(self, name: str) -> bool:
        """Whether the parameter of this name lives on the first of this process's devices."""
        return True

    def _any_not_finite(self, grad_norm: float, losses) -> bool:
        bad = not math.isfinite(grad_norm) or not bool(torch.isfinite(losses).all())
        return bool(self.world.max([float(bad)])[0])

    def _set_learning_rate(self) -> None:
        """Linear warm-up, then constant: a function of the step, so there is no scheduler state to
        lose."""
        self.lr = self.config.lr * min(
            1.0, (self.counters.steps + 1) / (self.config.warmup_steps + 1)
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr

    def _log_step(
        self, sums: Sums, begun: float, n: int, n_tokens: int, grad_norm: float, bar: tqdm
    ) -> None:
        means = sums.flush(
            self.world
        )  # the one read-back of a step: from here on its time is known
        seconds = time.perf_counter() - begun
        n_tokens = self.world.sum([n_tokens])[0]
        self.counters.train_seconds += seconds
        rates = {"examples_per_second": n / seconds, "tokens_per_second": n_tokens / seconds}
        self._write("train", means | rates | {"grad_norm": grad_norm, "lr": self.lr})
        bar.set_postfix_str(
            f"loss {means['loss/train']:.4g}, {rates['tokens_per_second']:,.0f} tokens/s",
            refresh=False,
        )

    def _write(self, split: str, values: dict) -> None:
        where = {"examples": self.counters.examples, "step": self.counters.steps, "split": split}
        counters = {
            "counters/examples": self.counters.examples,
            "counters/updates": self.counters.steps,
        }
        self.log.write(where | values | counters)

    def _crossed(self, every: int, n: int) -> bool:
        """Whether the last `n` examples reached a multiple of `every`."""
        return self.counters.examples // every > (self.counters.examples - n) // every

    def _stop_at_non_finite(self, examples, seen: list[int], losses) -> None:
        finite = self.world.gather(list(zip(seen, torch.isfinite(losses).tolist())))
        bad = sorted(e for e, good in finite if not good)
        what = "loss" if bad else "gradient"
        names = [self.data["train"].describe(e) for e in (bad or [int(e) for e in examples])[:8]]
        self.optimizer.zero_grad(set_to_none=True)
        self._step_back(len(examples))
        self.save()
        self.finish_saving()
        saved = (
            "no checkpoint was written (debug=true)"
            if self.config.debug
            else f"the last good weights are in {self.run_dir / 'LATEST'}"
        )
        raise NonFiniteLoss(
            f"the {what} of step {self.counters.steps + 1} is not finite, from {', '.join(names)};"
            f" {saved}; try a smaller lr or max_grad_norm, or look at these examples"
        )

    def _step_back(self, n: int) -> None:
        """Forget that the last `n` examples were handed out."""
        epoch, cursor = divmod(self.loader.examples - n, len(self.loader.groups))
        self.loader.load_state_dict({"epoch": epoch, "cursor": cursor})

    # ----------------------------------------------------------------------------------- evaluation

    def evaluate(self) -> None:
        """Held-out losses, and samples if asked for: a row of metrics.jsonl and rows of
        samples.jsonl."""
        config = self.config
        values = self._held_out_losses()
        if draws_samples(config, self.loss):
            rows, means = self._sample(config.n_eval_model_samples, config.temperature)
            if self.world.rank == 0:
                append_rows(self.run_dir / "samples.jsonl", rows, examples=self.counters.examples)
            values |= means
        self._write("eval", values)
        self.last_eval = {"examples": self.counters.examples, **values}

    def evaluate_checkpoints(self, pending: list[tuple[Checkpoint, list[float]]]) -> None:
        """Every checkpoint at every temperature: a row of eval.jsonl for each, and samples.
        `pending` has what is still to do."""
        config = self.config
        bar = tqdm(
            total=sum(len(wanted) for _, wanted in pending),
            desc="evaluations",
            disable=True if len(pending) < 2 else self.world.no_bar,
        )
        for number, (checkpoint, wanted) in enumerate(pending):
            if number:  # the first was built with the trainer
                self.policy = None  # two of them need not be in memory at once
                gc.collect()  # some models hold on to themselves
                self.policy = self._build_policy(
                    OmegaConf.merge(config.model, {"archive": checkpoint.source})
                )
            losses = self._held_out_losses()
            for temperature in wanted:
                rows, means = (
                    self._sample(config.n_eval_examples, temperature)
                    if draws_samples(config, self.loss)
                    else ([], {})
                )
                self.last_eval = {"examples": 0, **losses, **means}
                if self.world.rank == 0:
                    drawn = {
                        "temperature": temperature,
                        "top_p": config.topp,
                        "samples_per_prompt": config.samples_per_prompt,
                        "eval_seed": config.seed,
                    }
                    finish_evaluation(self.run_dir, checkpoint, rows, drawn | losses | means)
                self._write(
                    "eval",
                    losses | means | {"checkpoint": checkpoint.path, "temperature": temperature},
                )
                bar.update()
                if signum := self._asked_to_stop():
                    self.log.finish()
                    raise Stopped(signum)  # the same command goes on after this row

    def _held_out_losses(self) -> dict[str, float]:
        if self.data["test"].kind == "prompts":
            return {}
        return evaluate_loss(
            self.loss,
            self.policy,
            self.reference,
            self.data["test"],
            n=self.config.n_eval_examples,
            batch_size=self.config.eval_batch_size,
            layout=self.layout,
            world=self.world,
        )

    def _sample(self, n: int, temperature: float) -> tuple[list[dict], dict[str, float]]:
        config = self.config
        how = Sampling(
            n=n,
            k=config.samples_per_prompt,
            max_prompt_length=config.max_prompt_length,
            max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
            temperature=temperature,
            top_p=config.topp,
            seed=config.seed,
            batch_size=config.eval_batch_size,
        )
        return sample_and_measure(
            self.policy,
            self.reference,
            self.tokenizer,
            self.data["test"],
            self.rewards,
            how,
            self.layout,
            self.world,
            self.reference_samples,
        )

    def summarize(self, **more) -> dict:
        """Write summary.json: the last evaluation, the run's speed, and `more`."""
        values, counters = self.last_eval, self.counters
        rate = counters.examples / counters.train_seconds if counters.train_seconds else None
        summary = {
            "finished": True,
            "function": self.config.function,
            "loss": self.loss.name,
            "reward": self.config.reward.name,
        }
        for name in (
            "policy_reward",
            "policy_reward_se",
            "reference_reward",
            "reference_reward_se",
            "reward_gain",
            "reward_gain_se",
        ):
            summary[name] = values.get(f"samples_eval/{name}")
        for name in ("kl", "kl_se", "kl_k1", "kl_k3"):
            summary[name] = values.get(f"samples_eval/{name}")
        summary |= {
            "eval_accuracy": values.get("rewards_eval/accuracies"),
            "eval_loss": values.get("loss/eval"),
        }
        summary |= {key.split("/")[1]: values[key] for key in MEASURED if key in values}
        summary |= {
            "pairs_per_second": rate,
            "examples": counters.examples,
            "steps": counters.steps,
            "seconds": counters.seconds,
        }
        summary |= {
            "seed": self.config.seed,
            "temperature": temperatures(self.config)[-1],
            "top_p": self.config.topp,
        }
        peaks = [peak for peak in self.save_peaks if peak is not None]
        summary["peak_memory_bytes"] = int(self.world.max([float(peak_memory())])[0])
        summary |= {
            "trainer": self.config.trainer,
            "ranks": self.world.size,
            "rank_bytes": self.state_bytes,
            **more,
        }
        summary["save_peak_host_mib"] = max(peaks) / 2**20 if peaks else None
        if self.world.rank == 0:
            with atomic_write(self.run_dir / "summary.json") as f:
                json.dump(summary, f, indent=1)
        self.log.finish()
        return summary

    # -------------------------------------------------------------------------- saving and resuming

    def _prepare_training(self) -> None:
        config, model = self.config, self.policy.model
        if config.activation_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
            model.train()  # transformers recomputes in training mode only; dropout is off for good
        if config.compile:
            for block in find_blocks(self.policy.causal_lm, config.model.block_name):
                block.compile(dynamic=True)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.parameters, self.parameter_names = list(trained.values()), list(trained)
        self.optimizer = make_optimizer(config, self.parameters)
        self.profiler = Profiler(
            self.run_dir, config.profile_steps if self.world.rank == 0 else None
        )

    def save(self) -> None:
        """Begin a checkpoint; where the optimizer's state is sharded, it is written while training
        goes on."""
        if self.config.debug:
            return
        self.finish_saving()
        with HostMemory() as memory:
            self.saving = save_checkpoint(
                self.run_dir,
                self.checkpoint_number(),
                self._fill_checkpoint,
                keep=self.config.keep_checkpoints,
                best=self._is_best(),
                world=self.world,
            )
        self.save_peaks.append(memory.peak)

    def checkpoint_number(self) -> int:
        """Names the folder; it grows with what a checkpoint holds."""
        return self.counters.steps

    def _is_best(self) -> bool:
        """Whether a reward model orders more held-out pairs rightly than at any earlier save;
        policies are not ranked by that."""
        last = self.last_eval or {}
        if (
            not self.scalar
            or last.get("examples") != self.counters.examples
            or last["rewards_eval/accuracies"] <= self.best_accuracy
        ):
            return False
        self.best_accuracy = last["rewards_eval/accuracies"]
        return True

    def finish_saving(self) -> None:
        if self.saving is not None:
            self.saving.wait()
            self.saving = None

    def _fill_checkpoint(self, folder: Path) -> Future | None:
        optimizer, future = save_optimizer(
            self.optimizer, self.parameter_names, folder / "optimizer", self._saving_group()
        )
        self._save_weights(folder)
        if self.world.rank == 0:
            training = {
                "optimizer": optimizer,
                **self.progress(),
                "counters": vars(self.counters),
                "random": random_state(),
                "last_eval": self.last_eval,
                "best_accuracy": self.best_accuracy,
            }
            torch.save(training, folder / "training_state.pt")
        return future

    def progress(self) -> dict:
        """Where the data is, in what `torch.load` reads without unpickling anything else."""
        return {"loader": self.loader.state_dict(), "loss": self.loss.state_dict()}

    def go_on_from(self, progress: dict) -> None:
        """The inverse of `progress`."""
        self.loader.load_state_dict(progress["loader"])
        self.loss.load_state_dict(progress["loss"])

    def _saving_group(self):
        """The process group that writes in the background; None writes at once."""
        return None

    def _save_weights(self, folder: Path) -> None:
        """policy.pt and hf/, whole, and with LoRA the adapter: policy.pt has it folded in, and
        training goes on from it."""
        with tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as scratch:
            adapter = hasattr(self.policy.model, "peft_config")
            state = full_weights(
                self.policy, Path(scratch), keep=self.world.rank == 0, alias=not adapter
            )
            if self.world.rank > 0:
                return
            if adapter:
                torch.save(
                    {name: state[name] for name in self.parameter_names}, folder / "adapter.pt"
                )
            model = skeleton(self.config.model, scalar_head=self.scalar)
            model.load_state_dict(state, assign=True)
            model.tie_weights()
            if adapter:
                model.save_pretrained(folder / "adapter")
                model = model.merge_and_unload()
            if not self.scalar:
                model.generation_config = self.policy.causal_lm.generation_config
            metrics = {
                key: value for key, value in (self.last_eval or {}).items() if value is not None
            }
            torch.save(
                {
                    "step_idx": self.counters.steps,
                    "state": archive_state(model),
                    "metrics": metrics,
                },
                folder / "policy.pt",
            )
            model.save_pretrained(folder / "hf", max_shard_size=SHARD)
            self.tokenizer.save_pretrained(folder / "hf")

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run folder, if there is one; else clear what a
        dead start left."""
        if self.checkpoint is not None:
            state = torch.load(
                self.checkpoint / "training_state.pt", map_location="cpu", weights_only=True
            )
            load_optimizer(
                self.optimizer,
                self.parameter_names,
                self.checkpoint / "optimizer",
                state["optimizer"],
                alone=self._saving_group() is None,
            )
            self.go_on_from(state)
            self.counters = Counters(**state["counters"])
            self.last_eval, self.best_accuracy = state["last_eval"], state["best_accuracy"]
            set_random_state(state["random"])
            print(
                f"continuing {self.run_dir} from step {self.counters.steps}"
                f" ({self.counters.examples:,} examples)"
            )
        if self.world.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                rewind(
                    self.run_dir / name,
                    self.counters.examples if self.checkpoint is not None else -1,
                )
            (self.run_dir / "summary.json").unlink(missing_ok=True)


class FSDPTrainer(BasicTrainer):
    """Shards policy, reference, gradients and optimizer state over the ranks, with PyTorch's
    FSDP2."""

    def place(self, scorer: Scorer, dtype: torch.dtype) -> None:
        shard(scorer, self.world, self.config, dtype)

    def _saving_group(self):
        if not hasattr(self, "_group"):
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group


class TensorParallelTrainer(BasicTrainer):
    """One process; every layer of the policy and of the reference is split over several devices."""

    def place(self, scorer: Scorer, dtype: torch.dtype) -> None:
        split(scorer, devices_for(self.config), dtype)

    def on_first_device(self, name: str) -> bool:
        return (
            ".module_shards.0." in name or name.endswith("flat_shards.0") or "_shards." not in name
        )


TRAINERS = {
    trainer.__name__: trainer for trainer in (BasicTrainer, FSDPTrainer, TensorParallelTrainer)
}
