#!/usr/bin/env bash
# Makes the contents of data/: the tiny model (generated texts, then SFT from random weights) and the preference data (the
# samples of that model for held-out prompts, scored by the lexicon). About five minutes on two cores.
#   bash scripts/make_default.sh WORK_DIR [DATA_DIR]
set -euo pipefail
work=$1 data=${2:-data}
python scripts/make_review_corpus.py --output "$work/corpus" --n 40000 --n_prompts 1600
python scripts/make_tiny_model.py --corpus "$work/corpus" --output "$work/blank"
python train.py loss=sft datasets="[$work/corpus]" model=blank_model model.name_or_path="$work/blank" \
    optimizer=AdamW lr=3e-3 warmup_steps=50 batch_size=64 n_epochs=2 max_length=96 max_prompt_length=32 \
    eval_batch_size=64 n_eval_examples=500 local_run_dir="$work/sft" wandb.enabled=false
mkdir -p "$data/tiny"
cp "$work"/sft/LATEST/hf/* "$data/tiny/"
python scripts/build_preferences.py --prompts "$work/corpus/prompts.jsonl" --output "$data/reviews" --k 4 --n_test 300 \
    model=tiny model.name_or_path="$data/tiny" eval_batch_size=256
