"""The claims of the papers, and the criterion by which each holds here. The criteria were written
before the runs; experiments/README.md repeats both texts."""

from typing import NamedTuple


class Claim(NamedTuple):
    claim: str  # of the paper
    criterion: str  # ours


CLAIMS = {
    "frontier": Claim(
        "DPO traces a frontier of reward against KL above the model it starts from,"
        " and a smaller beta goes further along it.",
        "In every seed: the reward at the end exceeds the start's by two standard errors at each"
        " beta, and both KL and reward at the end are larger for beta 0.1 than 0.5, and for 0.5"
        " than 2.",
    ),
    "offset": Claim(
        "ODPO reaches more reward than DPO at equal KL when score gaps differ in size,"
        " and what it gains comes from the sizes.",
        "Envelope of ODPO minus that of DPO, mean over KL 0.5, 1 and 1.5: with gaps of two sizes"
        " positive in every seed; with the smooth gold (the control) within two standard errors of"
        " zero, or below. Also shown: DPO on the large gaps only, and soft labels.",
    ),
    "sequential_kl": Claim(
        "TDPO2 holds the sequential KL along the data's responses down, and TDPO1 does not.",
        "In every seed, on held-out pairs at the end, beta 0.1: KL along chosen responses TDPO1 >"
        " DPO > TDPO2, along rejected ones DPO > TDPO1 > TDPO2.",
    ),
    "calibration": Claim(
        "Cal-DPO keeps the log-ratio of chosen responses from falling,"
        " when its target 1/(2 beta) is within reach.",
        "In every seed, on the training pairs over the last epoch: at beta 0.1 the chosen log-ratio"
        " is above zero for Cal-DPO and below zero for DPO, with random pairs and with pairs that"
        " differ in one word. Shown with it: beta 0.01, and the reward at equal KL.",
    ),
    "temperature": Claim(
        "What preference training gains holds at every sampling temperature.",
        "In every seed, the win rate against the SFT model's samples by the gold reward is above"
        " 1/2 at temperatures 0, 0.25, 0.5 and 1, for DPO and for ODPO (beta 0.1, gaps of two"
        " sizes).",
    ),
    "d2po": Claim(
        "With the same number of gold labels, a discriminator that learns from labels of the"
        " policy's own rollouts (D2PO) takes the policy further than a reward model that learnt"
        " from all of them beforehand and stays as it is.",
        "With 240 and with 600 labels, in every seed: the gold reward of samples for held-out"
        " prompts after 240 steps is higher for D2PO (half of the labels up front, the rest over 20"
        " purchases, the closest pairs of the pool) than for the static reward model. Shown with"
        " it: D2PO with pairs drawn at random, and the gold itself labelling every pair, in 20"
        " rounds with one and with four passes.",
    ),
    "labels": Claim(
        "Labels that are selected by uncertainty, predicted gap or design (delta_ucb,"
        " double_thompson, d_optimal, sharpe; conf) are worth more than labels of random pairs.",
        "Some selection reaches with at most half of the labels the reward that random pairs reach:"
        " in at least 4 of 5 seeds, the gold reward of best of 16 by a discriminator is with 120"
        " labels of that selection at least what it is with 240 labels of random pairs.",
    ),
    "real": Claim(
        "Preference training controls the sentiment of a real language model's reviews (ODPO's"
        " first experiment, here with SmolLM2-135M-Instruct and VADER).",
        "For DPO and for ODPO, at each beta (0.1, 0.5) and in every seed that was run: the mean"
        " reward of samples for 128 held-out prompts at the end exceeds that of the model it starts"
        " from, on the same random numbers, by more than two standard errors over prompts.",
    ),
    "real_chat": Claim(
        "DPO on conversations teaches a chat model to answer shorter, and to end its turn.",
        "In every seed that was run, on 64 held-out questions with at most 48 new tokens: the share"
        " of answers that end with the template's end of turn is higher than before, and the mean"
        " length in words is lower by more than two standard errors over prompts.",
    ),
    "real_turns": Claim(
        "DPO on pairs of a chat model's own answers teaches it where a turn ends.",
        "In every seed that was run, of one sampled answer of at most 48 tokens to each of 128"
        " requests for one sentence about topics that were held out: the share that ends with the"
        " template's end of turn rises by more than two standard errors, and the mean number of"
        " tokens falls by more than two standard errors; both over prompts, of the differences to"
        " the model it starts from on the same random numbers. Of the four answers to a training"
        " prompt the one of fewest tokens is chosen and the longest rejected, where one that does"
        " not end counts as the longest.",
    ),
}

LEAST_RHO = 0.6

# They need the runs of a study: experiments/atlas_distance.py.
OF_STUDIES = {
    "atlas_distance": Claim(
        "The atlas says before any training which losses will end far apart: the distances between"
        " their updates at the start rank those between the policies that they train.",
        "In the study of 46 losses, in each of its three cases: Spearman's rho between 1 - cosine"
        " of the updates at the start (64 training pairs) and 1 - cosine of the displacements of"
        " the log-probs of the responses of 400 held-out pairs at the end, over all pairs of"
        f" losses, each at the middle of its grid, is at least {LEAST_RHO}, as a mean over the"
        " seeds.",
    ),
}

# They need a model folder, and about an hour.
WITH_MODEL = ("real", "real_chat", "real_turns")
