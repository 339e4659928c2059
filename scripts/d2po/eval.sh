#!/usr/bin/env bash
# Samples of one or several checkpoints and their gold reward, with the sampling settings of D2PO.
#   GREWARD=bagofwords BASEMODEL=facebook/opt-125m MLEN=50 bash scripts/d2po/eval.sh model.archive='RUN/step-*' datasets=[pairs.jsonl]
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
overrides=(function=eval temperature=0.9 topp=0.9 n_eval_examples=200)
takes_model
takes GREWARD reward
takes SEED seed
takes MLEN max_new_tokens
takes BSIZE samples_per_prompt
takes GBSIZE eval_batch_size
takes GBATCH eval_batch_size
takes TOP n_eval_examples
accepts BOTTOM 0
takes_list DSET datasets
runs
