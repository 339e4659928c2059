"""The words of other tools, and ours for them."""

import difflib

# A key of the Trainer of transformers, of TRL, Lightning or similar, in lower case, and the key of
# config.yaml that does the same.
OUR_KEYS = {
    "learning_rate": "lr",
    "warmup_ratio": "warmup_steps",
    "lr_scheduler": "lr_schedule",
    "lr_scheduler_type": "lr_schedule",
    "scheduler": "lr_schedule",
    "min_lr": "lr_min",
    "num_warmup_steps": "warmup_steps",
    "optim": "optimizer",
    "beta": "loss.beta",
    "label_smoothing": "loss.label_smoothing",
    "loss_type": "loss",
    "loss_weights": "loss",
    "num_train_epochs": "n_epochs",
    "num_epochs": "n_epochs",
    "epochs": "n_epochs",
    "max_epochs": "n_epochs",
    "max_steps": "n_examples",
    "per_device_train_batch_size": "batch_size",
    "per_gpu_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "global_batch_size": "batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "micro_batch_size": "microbatch_tokens",
    "gradient_checkpointing": "activation_checkpointing",
    "torch_compile": "compile",
    "group_by_length": "length_grouping",
    "packing": "layout",
    "padding_free": "layout",
    "gradient_clipping": "max_grad_norm",
    "max_norm": "max_grad_norm",
    "bf16": "model.fsdp_policy_mp",
    "fp16": "model.fsdp_policy_mp",
    "mixed_precision": "model.fsdp_policy_mp",
    "precision": "model.fsdp_policy_mp",
    "dtype": "model.policy_dtype",
    "torch_dtype": "model.policy_dtype",
    "model_name_or_path": "model.name_or_path",
    "model_name": "model.name_or_path",
    "tokenizer_name": "model.tokenizer_name_or_path",
    "tokenizer": "model.tokenizer_name_or_path",
    "ref_model": "model.reference_archive",
    "resume_from_checkpoint": "resume",
    "attn_implementation": "model.attn_implementation",
    "trust_remote_code": "model.trust_remote_code",
    "load_in_4bit": "model.quantization",
    "load_in_8bit": "model.quantization",
    "bnb_4bit_quant_type": "model.quantization_args",
    "use_bnb_nested_quant": "model.quantization_args",
    "use_lora": "model.lora.r",
    "use_peft": "model.lora.r",
    "lora_r": "model.lora.r",
    "lora_rank": "model.lora.r",
    "lora_alpha": "model.lora.alpha",
    "lora_target_modules": "model.lora.target_modules",
    "dataset": "datasets",
    "dataset_name": "datasets",
    "train_file": "datasets",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_target_length": "max_length",
    "max_completion_length": "max_new_tokens",
    "top_p": "topp",
    "num_generations": "samples_per_prompt",
    "eval_steps": "eval_every",
    "evaluation_strategy": "eval_every",
    "eval_strategy": "eval_every",
    "eval_on_start": "do_first_eval",
    "save_steps": "save_every",
    "save_strategy": "save_every",
    "save_total_limit": "keep_checkpoints",
    "logging_steps": "minimum_log_interval_secs",
    "report_to": "wandb.enabled",
    "run_name": "exp_name",
    "wandb_project": "wandb.project",
    "output_dir": "local_run_dir",
    "logging_dir": "local_run_dir",
    "num_processes": "world_size",
    "num_gpus": "world_size",
    "nproc_per_node": "world_size",
    "main_process_port": "fsdp_port",
    "master_port": "fsdp_port",
    "precompute_ref_log_probs": "reference.cache",
    "sync_ref_model": "reference.update",
    "ref_model_mixup_alpha": "reference.rate",
    "ref_model_sync_steps": "reference.every",
    "reward_model_path": "reward.path",
    "deepspeed": "trainer",
    "fsdp": "trainer",
    "do_eval": "function",
    "do_train": "function",
}

# What there is to know of our key, where it is not the same under another name.
NOTES = {
    "batch_size": "it counts the examples of an optimizer step over all workers and microbatches",
    "n_examples": "it counts examples, batch_size of them a step",
    "eval_every": "it counts examples, not steps",
    "save_every": "it counts examples, not steps",
    "warmup_steps": "steps, or below 1 a share of the steps of the run",
    "lr_schedule": "constant, linear, cosine, wsd or inverse_sqrt",
    "minimum_log_interval_secs": "it counts seconds; metrics.jsonl has every step",
    "microbatch_tokens": "it counts tokens; or set gradient_accumulation_steps",
    "model.fsdp_policy_mp": "model.fsdp_policy_mp=bfloat16 is mixed precision",
    "model.lora.r": "a rank above 0 trains an adapter",
    "wandb.enabled": "true or false",
    "trainer": "trainer=FSDPTrainer shards the model; fsdp_cpu_offload moves it to host memory",
    "function": "train or eval",
    "layout": "layout=packed has no padding",
    "reference.cache": "true computes the reference's log-probs once",
    "reference.update": "hard or ema, with reference.every and reference.rate",
    "datasets": "a list in brackets, such as datasets=[hh]",
}

# Words for what cannot be set.
NOT_SETTINGS = {
    "weight_decay": "here it is optimizer_args='{weight_decay: VALUE}'",
    "adam_beta1": "here it is optimizer_args='{betas: [0.9, 0.999]}'",
    "adam_beta2": "here it is optimizer_args='{betas: [0.9, 0.999]}'",
    "adam_epsilon": "here it is optimizer_args='{eps: VALUE}'",
    "momentum": "here it is optimizer_args='{momentum: VALUE}'",
    "load_in_4bit": "there are no quantised weights; model.policy_dtype=bfloat16 halves them",
    "load_in_8bit": "there are no quantised weights; model.policy_dtype=bfloat16 halves them",
    "lora_dropout": "an adapter has no dropout",
    "push_to_hub": "a run uploads nothing; RUN/LATEST/hf is a folder for push_to_hub",
    "config": "a recipe is experiment=NAME; a folder of your own is --config-dir DIR",
}


def translate(key: str, known: set[str], cutoff: float = 1.0) -> str | None:
    """What to type for a word of another tool; None for a word that is none. Only keys of `known`
    are named. cutoff: how similar to their word it must be, from 0 to 1."""
    word = key.rsplit(".", 1)[-1].lower().replace("-", "_")
    theirs = difflib.get_close_matches(word, [*OUR_KEYS, *NOT_SETTINGS], n=1, cutoff=cutoff)
    if not theirs:
        return None
    word = theirs[0]
    if word in NOT_SETTINGS:
        return NOT_SETTINGS[word]
    ours = OUR_KEYS[word]
    if ours not in known:
        return None
    return f"here it is {ours}" + (f" ({NOTES[ours]})" if ours in NOTES else "")
