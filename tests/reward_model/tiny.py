"""Tiny models and rankings for the tests of the reward-model stage."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from pipeline.tokens import EncodedRanking

PAD, BOS, EOS = 0, 1, 2


def config(vocabulary: int = 40) -> LlamaConfig:
    """Llama of two layers and 32 dimensions, with one output as a classifier."""
    made = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.3,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )
    made.num_labels = 1
    return made


def language_model(seed: int = 0, vocabulary: int = 40) -> LlamaForCausalLM:
    """A random language model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(config(vocabulary)).eval()


def reward_model(seed: int = 0, vocabulary: int = 40) -> LlamaForSequenceClassification:
    """A random reward model whose scores spread over several units."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config(vocabulary)).eval()


def random_rankings(count: int, seed: int, sizes: tuple[int, ...] = (2, 3, 4)) -> list[EncodedRanking]:
    """Rankings of uneven lengths and numbers of answers, all ranks different, ratings falling with the rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    rankings = []
    for index in range(count):
        k = sizes[index % len(sizes)]
        prompt = [BOS, *(draw(3, 40) for _ in range(draw(1, 4)))]
        answers = [[*(draw(3, 40) for _ in range(draw(1, 9))), EOS] for _ in range(k)]
        ranks = tuple(float(r) for r in torch.randperm(k, generator=generator))
        rankings.append(EncodedRanking(prompt, answers, ranks, tuple(-r for r in ranks)))
    return rankings
