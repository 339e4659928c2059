#!/usr/bin/env bash
# A reward model from pairs, as D2PO trains them; RUN/BEST is the checkpoint with the highest held-out accuracy.
#   LR=1e-4 BASEMODEL=facebook/opt-125m bash scripts/d2po/train_rm.sh datasets=[pairs.jsonl] exp_name=rm
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
overrides=(loss=bradley_terry model.lora.r=32 model.lora.alpha=32 optimizer=AdamW lr=1e-4 warmup_steps=0 n_epochs=5 batch_size=8)
takes_model
takes LR lr
takes SEED seed
takes_times BSIZE 4 batch_size # on each of two processes, two accumulated
takes_switch NOLORA model.lora.r=0 model.lora.r=32
takes_switch REINIT model.from_scratch=true model.from_scratch=false
takes_switch EVFIRST do_first_eval=true do_first_eval=false
if [ "${LTYPE:-}" = mag ]; then settles LTYPE loss.margin=magnitude; fi
runs
