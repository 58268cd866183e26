"""What each measure of a comparison is: its title, its unit, which way is better, how it was found."""

from __future__ import annotations

from typing import NamedTuple


class Note(NamedTuple):
    """One measure: `better` is higher, lower, or None where neither is."""

    title: str
    unit: str
    better: str | None
    explains: str


PER_PROMPT = {"score": "score", "kl_per_sequence": "kl", "length": "tokens", "eos_rate": "finished"}
"""Measures that are means over samples, by the column of the samples; they have intervals over prompts and seeds."""
NOTES = {
    "score": Note(
        "reward score (trained on)",
        "",
        None,
        "PPO's score before clip and penalties. PPO maximises it, so it says nothing for PPO over other methods.",
    ),
    "kl_per_sequence": Note(
        "KL to SFT per response",
        "nats",
        None,
        "Mean over the policy's own samples of sum_t (log p - log p_SFT) (k1, unbiased), at the sampling temperature.",
    ),
    "kl_per_token": Note("KL to SFT per token", "nats", None, "The same sums over all samples / all response tokens."),
    "length": Note("response length", "tokens", None, "EOS included."),
    "eos_rate": Note("ends with EOS", "share", "higher", "Responses that ended by themselves within the token limit."),
    "truncation_rate": Note("cut off at the limit", "share", "lower", "1 - the above."),
    "distinct_1": Note("distinct-1", "share", "higher", "Different tokens / all, EOS included (Li et al. 2016)."),
    "distinct_2": Note("distinct-2", "share", "higher", "The same of pairs of tokens."),
    "self_bleu": Note(
        "self-BLEU", "0 to 100", "lower", "BLEU of a response with other responses as references (Zhu et al. 2018)."
    ),
    "entropy": Note("entropy", "nats per token", None, "Of the whole next-token distribution, along its own samples."),
    "likelihood_length_spearman": Note(
        "likelihood and length",
        "Spearman's rho",
        None,
        "Rank correlation of held-out answers' mean log-probability and their length.",
    ),
    "reward_accuracy": Note(
        "implicit reward accuracy",
        "share",
        "higher",
        "Held-out pairs whose better answer has the higher log (p / p_SFT), DPO's implicit reward.",
    ),
    "ranking_accuracy": Note(
        "ranking accuracy by likelihood",
        "share",
        "higher",
        "Held-out pairs whose better answer has the higher mean log-probability.",
    ),
    "reward_likelihood_agreement": Note(
        "agreement of the two", "share", None, "Held-out pairs that implicit reward and likelihood order alike."
    ),
    "sft_perplexity": Note(
        "perplexity on SFT data (alignment tax)",
        "",
        "lower",
        "exp of the mean negative log-probability per token of the held-out demonstrations.",
    ),
    "trained_tokens": Note("tokens trained on", "tokens", None, "Through forward and backward, padding left out."),
    "generated_tokens": Note("tokens generated to train", "tokens", None, "Rollouts of PPO."),
    "optimizer_steps": Note("optimiser steps", "steps", None, "Of the policy."),
    "models_in_memory": Note(
        "models in memory",
        "models",
        "lower",
        "While it trains. A direct method's reference is its own start, whose log-probabilities are computed before.",
    ),
}


def notes(judges: dict[str, str], present: set[str]) -> dict[str, dict[str, str | None]]:
    """The notes of the measures that are `present`; `judges` says what each judge is."""
    found = {name: Note(name, "", "higher", about) for name, about in judges.items()} | NOTES
    return {name: found[name]._asdict() for name in found if name in present}
