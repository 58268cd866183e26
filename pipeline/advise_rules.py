"""The advice's rule table: on which facts a published finding speaks for or against a method, and how much.

Every rule names its source and says no more than the source does. Weights are ours: papers compare methods on their own
data, disagree with each other, and none saw yours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from pipeline.advise_facts import HEAVY_IMBALANCE, Facts

Weight = Literal["decisive", "strong", "some", "slight"]
POINTS: dict[Weight, int] = {"decisive": 8, "strong": 4, "some": 2, "slight": 1}
CHEAPEST = ("sft", "contrast", "ift", "simpo", "orpo", "dpo", "ipo", "kto", "ppo")
"""Methods by what a step costs: one model in memory, two, four and sampling. Ties go to the cheaper method."""

INSTRUCTGPT = "Ouyang et al. 2022 (InstructGPT), arXiv:2203.02155, section 3.5"
DPO = "Rafailov et al. 2023 (DPO), arXiv:2305.18290"
IVISON = "Ivison et al. 2024, Unpacking DPO and PPO, arXiv:2406.09279, abstract"
XU = "Xu et al. 2024, Is DPO Superior to PPO, arXiv:2404.10719, abstract"
TANG = "Tang et al. 2024, online and offline alignment, arXiv:2405.08448, abstract"
WU = "Wu et al. 2023, Fine-Grained RLHF, arXiv:2306.01693, abstract"
LLAMA2 = "Touvron et al. 2023 (Llama 2), arXiv:2307.09288, section 3.2.2"
KTO = "Ethayarajh et al. 2024 (KTO), arXiv:2402.01306"
IPO = "Azar et al. 2023 (IPO), arXiv:2310.12036, sections 4.2 and 5"
RDPO = "Chowdhury et al. 2024 (robust DPO), arXiv:2403.00409, abstract"
SIMPO = "Meng et al. 2024 (SimPO), arXiv:2405.14734"
PARK = "Park et al. 2024, Disentangling Length from Quality in DPO, arXiv:2403.19159, abstract"
ORPO = "Hong et al. 2024 (ORPO), arXiv:2403.07691, abstract"
IFT = "Hua et al. 2024 (IFT), arXiv:2405.11870"
COUNTED = "counted: weights, gradients and Adam moments in model.dtype"


@dataclass(frozen=True)
class Rule:
    """One finding: where `when` holds it speaks `for` or `against` `method`, with `text` filled from the facts."""

    method: str
    speaks: Literal["for", "against"]
    weight: Weight
    when: Callable[[Facts], bool]
    text: str
    """A format string in which `f` stands for the facts."""
    source: str

    @property
    def points(self) -> int:
        return POINTS[self.weight] * (1 if self.speaks == "for" else -1)

    def says(self, facts: Facts) -> str:
        """The text for these facts."""
        return self.text.format(f=facts, memory=_memory(self.method, facts))


def _memory(method: str, facts: Facts) -> str:
    wanted = facts.weights_gib(method)
    return "" if wanted is None else f"{wanted:.1f} GiB"


def ranked(f: Facts) -> bool:
    """Whether answers were compared with each other."""
    return f.feedback in ("pairs", "rankings")


def memory_bound(f: Facts) -> bool:
    """Whether a frozen reference beside the policy is too much for the GPUs."""
    return not f.fits("dpo")


def _from_base(f: Facts) -> bool:
    return ranked(f) and f.start == "base" and f.demonstrations == 0


RULES: tuple[Rule, ...] = (
    Rule(
        "ppo",
        "for",
        "strong",
        lambda f: f.feedback == "rankings",
        "The {f.rows:,} rankings hold up to {f.most_answers} answers. A reward model learns from all comparisons of a "
        "prompt at once; shuffled into single pairs they made it overfit within one pass.",
        INSTRUCTGPT,
    ),
    Rule(
        "ppo",
        "for",
        "some",
        lambda f: ranked(f) and f.rated_share >= 0.5,
        "{f.rated_share:.0%} of the comparisons say by how much one answer is better (ratings). A margin from such "
        "ratings in the reward model's loss raised its accuracy, most on clearly different answers; `rm.margin` uses "
        "it. No loss of the direct methods here takes ratings.",
        LLAMA2,
    ),
    Rule(
        "ppo",
        "for",
        "strong",
        lambda f: f.reward_sources > 1,
        "`ppo.rewards` adds up {f.reward_sources} sources. Training on several reward models of different kinds of "
        "feedback improved results over a single holistic one, and their mix steers the behaviour.",
        WU,
    ),
    Rule(
        "ppo",
        "for",
        "strong",
        lambda f: f.reward_functions > 0,
        "{f.reward_functions} of the reward sources is a function of your own: only PPO learns from scores of its own "
        "samples.",
        "this recipe: ppo.rewards",
    ),
    Rule(
        "ppo",
        "for",
        "slight",
        ranked,
        "PPO beat DPO by up to 2.5 points in mathematics and 1.2 in general domains on the same data, though better "
        "data mattered more than the method.",
        IVISON,
    ),
    Rule(
        "ppo",
        "for",
        "slight",
        ranked,
        "A well-tuned PPO surpassed the other methods on every test bed, from dialogue to code. The DPO paper found it "
        "equal or better on sentiment, summaries and dialogue: the evidence conflicts, and much hangs on tuning.",
        f"{XU}; {DPO}, section 6",
    ),
    Rule(
        "ppo",
        "for",
        "slight",
        lambda f: ranked(f) and f.own_rollout_prompts,
        "`data.prompts` gives {f.rollout_prompts:,} prompts to explore: methods that sample while they learn had a "
        "clear advantage over offline ones, which neither coverage nor quality of offline data explained.",
        TANG,
    ),
    Rule(
        "ppo",
        "against",
        "decisive",
        lambda f: f.small_budget,
        "The budget is small: PPO trains a reward model first, keeps four models and samples at every step. DPO was "
        "made to spare both.",
        f"{DPO}, abstract",
    ),
    Rule(
        "ppo",
        "against",
        "slight",
        lambda f: f.gpus == 1 and not f.small_model and not f.small_budget,
        "One GPU has to hold policy, critic, reference and reward model, and to sample; `ppo.sharing: lora` lets them "
        "share one base.",
        INSTRUCTGPT,
    ),
    Rule(
        "ppo",
        "against",
        "decisive",
        lambda f: not f.fits("ppo"),
        "PPO's four models need at least {memory}, which leaves no room on the GPU memory given; `ppo.sharing: lora` "
        "needs a fraction.",
        COUNTED,
    ),
    Rule(
        "dpo",
        "for",
        "strong",
        lambda f: f.feedback == "pairs",
        "The {f.rows:,} pairs are what DPO reads: one classification loss, stable and cheap, without a reward model or "
        "sampling.",
        f"{DPO}, abstract",
    ),
    Rule(
        "dpo",
        "for",
        "some",
        lambda f: f.feedback == "rankings",
        "DPO reads the rankings as {f.comparisons:,} pairs. Its form for whole rankings (Plackett-Luce) is not built "
        "here.",
        f"{DPO}, appendix A.3",
    ),
    Rule(
        "dpo",
        "for",
        "slight",
        lambda f: f.label_pairs > 0,
        "{f.label_pairs:,} prompts have a good and a bad answer, which make pairs; the other labels are lost.",
        f"{DPO}, section 4",
    ),
    Rule(
        "dpo",
        "for",
        "some",
        lambda f: ranked(f) and f.small_budget,
        "The budget is small, and DPO is light: it samples nothing in training and needs little tuning.",
        f"{DPO}, abstract",
    ),
    Rule(
        "dpo",
        "for",
        "some",
        lambda f: ranked(f) and f.noisy,
        "About {f.flip_rate:.0%} of the verdicts look flipped. The robust loss removes the bias of random flips and "
        "held up better than plain DPO and other heuristics on sentiment and dialogue: set `dpo.variant: robust` and "
        "`dpo.label_smoothing: {f.flip_rate:.2f}`.",
        RDPO,
    ),
    Rule(
        "dpo",
        "against",
        "some",
        lambda f: ranked(f) and f.length_biased,
        "In {f.longer_chosen_share:.0%} of the comparisons the better answer is the longer one ({f.length_gap:+.0%} "
        "characters on average). DPO exploits that and writes much longer answers than its data.",
        PARK,
    ),
    Rule(
        "dpo",
        "against",
        "decisive",
        memory_bound,
        "Policy and reference need at least {memory}, which leaves no room on the GPU memory given; `dpo.lora: true` "
        "needs a fraction.",
        COUNTED,
    ),
    Rule(
        "dpo",
        "against",
        "slight",
        _from_base,
        "There is no demonstration to make a reference of; the paper then first trains one on the preferred answers, "
        "a stage more.",
        f"{DPO}, section 4",
    ),
    Rule(
        "simpo",
        "for",
        "slight",
        ranked,
        "SimPO beat DPO by up to 6.4 points on AlpacaEval 2 and 7.5 on Arena-Hard in its authors' comparison. It is "
        "sensitive to the learning rate, and nothing holds it near the reference.",
        f"{SIMPO}, abstract; its repository's notes on tuning",
    ),
    Rule(
        "simpo",
        "for",
        "strong",
        lambda f: ranked(f) and f.length_biased,
        "The better answers are longer ({f.length_gap:+.0%} characters). SimPO's reward is a mean over tokens, and "
        "without that its ablations wrote longer, worse answers; in some settings it is still longer than DPO.",
        f"{SIMPO}, section 4 and appendix E",
    ),
    Rule(
        "simpo",
        "for",
        "strong",
        lambda f: ranked(f) and memory_bound(f),
        "Memory is short: SimPO needs no reference model, at least {memory} in all.",
        f"{SIMPO}, abstract; {COUNTED}",
    ),
    Rule(
        "simpo",
        "for",
        "slight",
        lambda f: ranked(f) and f.small_budget,
        "The budget is small: SimPO takes less time and memory than DPO, having no reference.",
        f"{SIMPO}, abstract",
    ),
    Rule(
        "simpo",
        "against",
        "slight",
        lambda f: ranked(f) and f.noisy,
        "The labels look noisy and SimPO has no reference to stay near to; watch how far it drifts.",
        f"{SIMPO}, equation 6 (no KL term)",
    ),
    Rule(
        "ipo",
        "for",
        "some",
        lambda f: ranked(f) and f.noisy,
        "The labels look noisy ({f.contradicting} of {f.repeated} repeated comparisons decided both ways, "
        "{f.scores_against_ranks} against their own scores). IPO stays bound to the reference where DPO fits every "
        "label to the end; it was shown on small examples, and chat benchmarks put it behind DPO.",
        f"{IPO}; {SIMPO}, table 4",
    ),
    Rule(
        "ipo",
        "for",
        "slight",
        lambda f: ranked(f) and f.comparisons < 1000,
        "Only {f.comparisons:,} comparisons: DPO overfits where each is seen once and won by one side, IPO's "
        "regularisation does not fade.",
        IPO,
    ),
    Rule(
        "kto",
        "for",
        "decisive",
        lambda f: f.feedback == "labels",
        "The data are {f.rows:,} labels ({f.desirable:,} desirable, {f.undesirable:,} not), not comparisons: KTO "
        "learns from just that, and matched or exceeded methods on pairs from 1B to 30B parameters.",
        f"{KTO}, abstract",
    ),
    Rule(
        "kto",
        "for",
        "some",
        lambda f: f.feedback == "labels" and f.label_ratio >= HEAVY_IMBALANCE,
        "The labels are uneven ({f.label_ratio:.0f} to 1). KTO still beat DPO with up to 90% of the desirable answers "
        "left out; its two weights balance the kinds, here by default.",
        f"{KTO}, section 4 (data imbalance)",
    ),
    Rule(
        "kto",
        "for",
        "slight",
        lambda f: ranked(f) and f.noisy,
        "With enough noise and contradiction among labellers KTO's worst case is the better one; on clean pairs it may "
        "underfit and DPO does better.",
        f"{KTO}, discussion of KTO against DPO",
    ),
    Rule(
        "orpo",
        "for",
        "strong",
        _from_base,
        "The model looks like a base model and there are no demonstrations: ORPO trains on the preferred answers and "
        "against the others in one stage, without SFT or a reference (`orpo.policy`). Behind an SFT stage others did "
        "better.",
        f"{ORPO}; {SIMPO}, table 4",
    ),
    Rule(
        "orpo",
        "for",
        "some",
        lambda f: ranked(f) and memory_bound(f),
        "Memory is short: ORPO needs no reference model, at least {memory} in all.",
        f"{ORPO}; {COUNTED}",
    ),
    Rule(
        "ift",
        "for",
        "strong",
        lambda f: f.feedback == "demonstrations",
        "{f.demonstrations:,} demonstrations and no preferences: IFT learns from what SFT learns from and did as well "
        "as or better than SFT and some preference methods, most in tasks of generation and reasoning. Only its "
        "authors have reported it.",
        f"{IFT}, abstract",
    ),
    Rule(
        "ift",
        "for",
        "some",
        lambda f: f.feedback == "labels",
        "The {f.desirable:,} desirable answers alone are data for IFT; the undesirable ones are lost.",
        f"{IFT}, abstract",
    ),
    Rule(
        "ift",
        "for",
        "slight",
        _from_base,
        "From a base model and preferred answers alone, IFT stood above SFT, DPO and ORPO on the Open-LLM tasks, but "
        "below SimPO on AlpacaEval 2.",
        f"{IFT}, results on UltraFeedback",
    ),
    Rule(
        "sft",
        "for",
        "some",
        lambda f: f.feedback == "demonstrations",
        "Plain SFT is the first stage of RLHF, the cheapest to train and what all else is measured against.",
        INSTRUCTGPT,
    ),
    Rule(
        "contrast",
        "for",
        "slight",
        lambda f: ranked(f) and (f.small_budget or memory_bound(f)),
        "Contrast SFT trains like SFT with one model in memory. No paper compares it; its nearest kin, SFT on control "
        "tokens, stayed behind DPO in large models.",
        f"{KTO}, section 3 (CSFT)",
    ),
)
