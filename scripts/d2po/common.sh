# shellcheck shell=bash
# Sourced by the scripts in this folder. It translates the environment variables of D2PO's scripts into a command line of
# train.py. docs/online.md has a table of the variables and their keys.
#
# A script names the variables that it takes; each is printed with its overrides. A variable that is set and not taken is
# refused: none is ignored silently. Arguments of the script are overrides of train.py and take precedence. DRYRUN=1 prints
# the command and does not run it.
set -euo pipefail
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd)

known="APBSIZE ATYPE BASEMODEL BETA BOTTOM BSIZE CFG CRATIO DPOBASEAPI DPOBATCHSIZE DSET EVFIRST EXTRAEVAL GBATCH GBSIZE GREWARD KEEPLONG
    LR LTYPE MBSIZE MLEN NOLORA ONLYOLDUPDATES PPOUPDATES REINIT RELABELS SAMPN SEED SFREQ STEPS SUPDATES TOP UEPOCHS ULR USEDPO"
overrides=() # of train.py
problems=()
arguments=("$@")

# ------------------------------------------------------------------------------------- the vocabulary of the scripts

# settles VARIABLE KEY=VALUE...: the variable becomes these overrides; without any, it asks for the behaviour that is the
# only one here.
settles() {
    local override
    echo "$1=${!1} -> ${*:2}$([ $# -gt 1 ] || echo "nothing to set: this is the behaviour here")"
    for override in "${@:2}"; do sets "$override"; done
    unset "$1"
}

# sets KEY=VALUE: replaces an earlier override of the key.
sets() {
    local override others=()
    for override in "${overrides[@]}"; do
        if [ "${override%%=*}" != "${1%%=*}" ]; then others+=("$override"); fi
    done
    overrides=("${others[@]}" "$1")
}

is_set() { [ -n "${!1:-}" ]; }

# takes VARIABLE KEY...: its value is that of these keys.
takes() {
    is_set "$1" || return 0
    local value key settled=()
    value=$(quoted "${!1}")
    for key in "${@:2}"; do settled+=("$key=$value"); done
    settles "$1" "${settled[@]}"
}

# takes_list VARIABLE KEY: the key is a list, of this value alone.
takes_list() {
    if is_set "$1"; then settles "$1" "$2=[$(quoted "${!1}")]"; fi
}

# takes_times VARIABLE N KEY: the key gets N times its value.
takes_times() {
    if is_set "$1" && is_whole "$1"; then settles "$1" "$3=$(($2 * ${!1}))"; fi
}

# accepts VARIABLE VALUE...: these values ask for the behaviour that is the only one here; others are refused later.
accepts() {
    local value
    for value in "${@:2}"; do
        if [ "${!1:-}" = "$value" ]; then settles "$1"; fi
    done
}

# takes_switch VARIABLE IF_TRUE IF_FALSE: overrides for either, several with spaces between them.
takes_switch() {
    is_set "$1" || return 0
    # shellcheck disable=SC2086  # several words are meant
    case ${!1} in
        [Tt]rue | 1) settles "$1" $2 ;;
        [Ff]alse | 0) settles "$1" $3 ;;
        *) refuse "$1" "is neither True nor False (or 1 nor 0)" ;;
    esac
}

# takes_model: BASEMODEL, a folder, a hub name, or a file of config/model/. An argument model= replaces it.
takes_model() {
    is_set BASEMODEL || return 0
    local argument
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in
            model=* | model.name_or_path=*)
                echo "BASEMODEL=$BASEMODEL -> replaced by the argument $argument"
                unset BASEMODEL
                return
                ;;
        esac
    done
    if [ -f "$root/config/model/$BASEMODEL.yaml" ]; then
        settles BASEMODEL "model=$BASEMODEL"
    else
        settles BASEMODEL model=blank_model "model.name_or_path=$(quoted "$BASEMODEL")"
    fi
}

# takes_rounds: the variables of online learning, for opo.sh and d2po.sh.
takes_rounds() {
    takes_model
    takes GREWARD reward
    takes BETA loss.beta
    takes LR lr
    takes SEED seed
    takes MLEN online.max_new_tokens max_new_tokens
    takes STEPS online.rounds
    takes DPOBATCHSIZE online.prompts_per_round # texts on each of two processes, two per prompt
    takes MBSIZE batch_size # the same
    takes PPOUPDATES online.updates_per_round
    takes GBSIZE eval_batch_size
    takes SFREQ online.save_every
    takes SUPDATES online.stop_labels
    takes_switch NOLORA model.lora.r=0 model.lora.r=16
    takes_switch EVFIRST do_first_eval=true do_first_eval=false
}

# runs: refuses the variables that remain, prints the command, and replaces this process by it.
runs() {
    local variable line script
    accepts CRATIO 1
    accepts KEEPLONG 0
    accepts LTYPE normal
    accepts ONLYOLDUPDATES False false 0
    accepts REINIT False false 0
    accepts USEDPO False false 0
    for variable in $known; do
        if is_set "$variable"; then refuse "$variable" "$(refusal "$variable")"; fi
    done
    refuse_words
    if [ ${#problems[@]} -gt 0 ]; then
        printf 'error: %s\n' "${problems[@]}" >&2
        exit 2
    fi
    # Relative paths belong to the folder that the script is started from.
    [ "$PWD" = "$root" ] && script=train.py || script=$root/train.py
    line=("$script" "${overrides[@]}" ${arguments[@]+"${arguments[@]}"})
    printf 'python%s\n' "$(printf ' %q' "${line[@]}")"
    if [ "${DRYRUN:-0}" != 0 ]; then exit 0; fi
    exec "${PYTHON:-python}" "${line[@]}"
}

# --------------------------------------------------------------------------------------------------------- refusals

refuse() {
    problems+=("$1=${!1} $2")
    unset "$1"
}

is_whole() {
    [[ ${!1} =~ ^[0-9]+$ ]] && return
    refuse "$1" "is not a whole number"
    return 1
}

refusal() {
    case $1 in
        APBSIZE | ATYPE | RELABELS | SAMPN | UEPOCHS | ULR | USEDPO) echo "is about the discriminator, which only d2po.sh has; unset $1" ;;
        BETA) echo "is about a policy's loss, and no policy is trained here; unset BETA" ;;
        BOTTOM) echo "skips prompts to sample for; eval.sh takes the first TOP of the held-out ones, so set BOTTOM to 0 there, and unset it elsewhere" ;;
        BSIZE) echo "is the batch of train_rm.sh and train_dpo.sh, and in eval.sh the responses to a prompt; DPOBATCHSIZE and MBSIZE are the batches of online learning" ;;
        CFG) echo "is a configuration file of accelerate, which is not used here; unset it, and for two GPUs give trainer=FSDPTrainer world_size=2" ;;
        CRATIO) echo "asks the discriminator to learn at some calls only; here it learns whenever labels were bought, so unset it, or set SAMPN" ;;
        DPOBASEAPI) echo "is a separate reference for the discriminator; here it has the policy's, so unset it, or give model.reference_archive=" ;;
        DSET | GBATCH | TOP) echo "is about the samples of eval.sh; unset $1" ;;
        EXTRAEVAL) echo "is a second set to evaluate on; unset it, and run function=eval on that set afterwards" ;;
        GREWARD) echo "scores samples, and nothing is sampled here: the labels are those of datasets=; unset GREWARD" ;;
        KEEPLONG) echo "takes 20 from the reward of responses that have fewer words; no reward here does so: set it to 0, or write one (reward.module)" ;;
        LR | NOLORA) echo "is about training, and nothing is trained here; unset $1" ;;
        LTYPE) echo "is about reward models, so for train_rm.sh, and normal or mag there: prefoverpref, which compares pairs with pairs, is not implemented" ;;
        ONLYOLDUPDATES) echo "lets the discriminator learn from old pairs instead of the bought ones, which is not implemented; unset it (online.replay= adds older bought ones)" ;;
        REINIT) echo "gives a reward model random weights; elsewhere training starts from BASEMODEL, so unset it or set it to False" ;;
        EVFIRST) echo "is about evaluations while training, and nothing is trained here; unset EVFIRST" ;;
        *) echo "is about online learning (opo.sh, d2po.sh); unset $1" ;;
    esac
}

# D2PO's scripts take positional names; here an argument is KEY=VALUE, or an option of hydra and its value.
refuse_words() {
    local argument before=
    for argument in ${arguments[@]+"${arguments[@]}"}; do
        case $argument in
            -* | *=*) ;;
            *)
                case $before in
                    -*=*) ;;
                    -*) before=$argument && continue ;;
                esac
                problems+=("$argument: arguments are KEY=VALUE here, such as datasets=[FILE] reward=NAME exp_name=NAME online.discriminator_path=RUN")
                ;;
        esac
        before=$argument
    done
}

# A value quoted so that hydra reads it back unchanged.
quoted() {
    local quote="'"
    if [[ $1 =~ ^[A-Za-z0-9_./+-]+$ ]]; then
        printf %s "$1"
    else
        printf "'%s'" "${1//$quote/\\$quote}"
    fi
}
