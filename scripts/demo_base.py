"""Trains the demo's small base model from scratch: tokenizer and a 2.56 M parameter Llama.

`python -m scripts.demo_base OUT_DIR` reads the `lm` documents of `scripts.demo_data`, trains on
one thread with fixed seeds and writes a directory that loads with `from_pretrained`. The weights
are stored as float16 to keep it small; the configuration says float32, which is what they load as.
The same package versions on the same kind of processor give the same weights (sha256 in the card).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from scripts.demo_data import (
    Review,
    demonstrations,
    load_reviews,
    order_key,
    sentences,
    simple_sentences,
    unique_prompts,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

CARD = Path(__file__).resolve().parent.parent / "assets" / "cards" / "demo-base.md"
SEED = 20140601
VOCAB_SIZE = 4096
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
CONTEXT = 512
STEP_TOKENS = 1024
LEARNING_RATE = 3e-3
WARMUP_STEPS = 100
EPOCHS = 2.5
GENERAL_PER_EPOCH = 4_400_000
"""Tokens of passages read first, per epoch over the simple sentences."""
PASSAGE_WORDS = (64, 32)
"""The reviews are read once for each entry, in passages of at most so many words."""
BUCKET_BATCHES = 50
"""Rows are sorted by length within chunks of this many batches."""
SAMPLE_PROMPTS = 256
NEW_TOKENS = 24
SHOWN_SAMPLES = 10


@dataclass(frozen=True, slots=True)
class Training:
    """What one run did: steps, tokens predicted and CPU seconds."""

    steps: int
    tokens: int
    cpu_seconds: float


def train_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `VOCAB_SIZE` tokens that lower-cases its input and puts BOS in front.

    Ids: 0 pad, 1 bos, 2 eos. A word and its leading space are one unit, so a text cut before a
    space has the same tokens as its two pieces.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: d=192, 4 layers, 4 heads, ff 512, tied embeddings, float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        dtype="float32",
        architectures=["LlamaForCausalLM"],
    )
    return LlamaForCausalLM(config)


def passages(reviews: Iterable[Review], words: int) -> list[str]:
    """The `lm` documents as runs of whole sentences, each of at most `words` words, shuffled by hash.

    Longer sentences are left out. Several sentences together show the model that a mood lasts.
    """
    found: list[str] = []
    for review in (r for r in reviews if r.part == "lm"):
        passage: list[str] = []
        for sentence in sentences(review.text):
            one = sentence.split()
            if len(passage) + len(one) > words:
                found.append(" ".join(passage))
                passage = []
            if len(one) <= words:
                passage += one
        found.append(" ".join(passage))
    return sorted(filter(None, set(found)), key=order_key)


def encode(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text as one row: bos, text, eos."""
    return [[*ids, EOS_ID] for ids in tokenizer(list(texts))["input_ids"]]


def batches(rows: Sequence[list[int]], seed: int) -> list[list[list[int]]]:
    """One epoch in shuffled batches of rows of similar length, about `STEP_TOKENS` with padding."""
    shuffle = random.Random(seed)
    order = list(rows)
    shuffle.shuffle(order)
    mean = sum(map(len, order)) / len(order)
    chunk = max(1, int(BUCKET_BATCHES * STEP_TOKENS / mean))
    made: list[list[list[int]]] = []
    for start in range(0, len(order), chunk):
        batch: list[list[int]] = []
        for row in sorted(order[start : start + chunk], key=len):
            if batch and (len(batch) + 1) * len(row) > STEP_TOKENS:
                made.append(batch)
                batch = []
            batch.append(row)
        made.append(batch)
    shuffle.shuffle(made)
    return made


def collate(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-padded ids [B, T] and attention mask [B, T]."""
    import torch

    width = max(map(len, rows))
    ids = torch.tensor([row + [PAD_ID] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(width) < lengths[:, None]).long()


def next_token_loss(model: LlamaForCausalLM, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy in nats of every token after bos, eos included, and their number."""
    import torch

    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    total = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum"
    )
    return total, int(mask[:, 1:].sum())


def curriculum(
    general: Iterable[Sequence[list[int]]], simple: Sequence[list[int]], epochs: float
) -> list[list[list[int]]]:
    """All batches in order: one pass after another of general rows, then the simple ones.

    The general rows stop after `GENERAL_PER_EPOCH` tokens for each epoch over the simple ones.
    """
    budget = round(GENERAL_PER_EPOCH * epochs)
    made: list[list[list[int]]] = []
    for number, rows in enumerate(general):
        chosen: list[list[int]] = []
        for row in rows:
            if budget <= 0:
                break
            chosen.append(row)
            budget -= len(row)
        if chosen:
            made += batches(chosen, SEED - number)
    for epoch in range(math.ceil(epochs)):
        one = batches(simple, SEED + 1 + epoch)
        made += one[: max(1, round(min(1.0, epochs - epoch) * len(one)))]
    return made


def train(model: LlamaForCausalLM, schedule: Sequence[list[list[int]]]) -> Training:
    """AdamW over the batches: warm-up, then a learning rate that falls linearly to 0."""
    import torch

    steps = len(schedule)
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    decay = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    model.train()
    tokens, losses, started = 0, [], time.process_time()
    for step, batch in enumerate(schedule):
        factor = min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * factor
        total, count = next_token_loss(model, *collate(batch))
        loss = total / count
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        tokens += count
        losses.append(float(loss.detach()))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            recent = sum(losses[-200:]) / len(losses[-200:])
            sys.stderr.write(
                f"step {step + 1}/{steps}  loss {recent:.3f}  {tokens:,} tokens  "
                f"{time.process_time() - started:.0f} CPU-s\n"
            )
    return Training(steps, tokens, time.process_time() - started)


def perplexity(model: LlamaForCausalLM, rows: Sequence[list[int]]) -> float:
    """exp of the mean next-token loss in nats over all rows."""
    import torch

    total = count = 0.0
    model.eval()
    with torch.no_grad():
        for batch in batches(rows, SEED):
            loss, n = next_token_loss(model, *collate(batch))
            total += float(loss)
            count += n
    return math.exp(total / count)


def sample(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]
) -> list[tuple[str, str, int, bool]]:
    """(prompt, response, its tokens with eos, whether it ended) of each prompt.

    Plain sampling at temperature 1, `NEW_TOKENS` at most.
    """
    import torch

    torch.manual_seed(SEED)
    inputs = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    model.eval()
    with torch.no_grad():
        generate: Any = model.generate  # pyright: ignore[reportAttributeAccessIssue]
        ids = generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=True,
            top_k=0,
            max_new_tokens=NEW_TOKENS,
        )
    answers = ids[:, inputs["input_ids"].shape[1] :]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    lengths = (answers != PAD_ID).sum(1).tolist()
    ended = (answers == EOS_ID).any(1).tolist()
    return list(zip(prompts, texts, lengths, ended, strict=True))


def weights_sha256(state: dict[str, torch.Tensor]) -> str:
    """sha256 over names, shapes and bytes of all tensors in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def half_state(model: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """The weights as float16, the tied output matrix left out."""
    return {n: t.half() for n, t in model.state_dict().items() if n != "lm_head.weight"}


def save(out_dir: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str) -> None:
    """Write the files beside `out_dir` and move them there; an older model's are replaced."""
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    partial = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.backend_tokenizer.no_padding()
    tokenizer.save_pretrained(partial)
    model.config.save_pretrained(partial)
    GenerationConfig(pad_token_id=PAD_ID, bos_token_id=BOS_ID, eos_token_id=EOS_ID).save_pretrained(partial)
    save_file(half_state(model), partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "README.md").write_text(card, encoding="utf-8")
    out_dir.mkdir(parents=True, exist_ok=True)
    for path in sorted(partial.iterdir()):
        path.chmod(0o644)
        os.replace(path, out_dir / path.name)
    partial.rmdir()


def run(out_dir: Path, epochs: float) -> dict[str, Any]:
    """Train, measure and save; returns the figures of the card."""
    import tokenizers
    import torch
    import transformers

    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    reviews = load_reviews()
    by_part = simple_sentences(reviews)
    held_out = [r for r in demonstrations(reviews, by_part) if r["split"] == "eval"]
    prompts = [r["prompt"] for r in unique_prompts(held_out)][:SAMPLE_PROMPTS]
    tokenizer = train_tokenizer([r.text for r in reviews if r.part == "lm"])
    model = build_model(tokenizer)
    general = [encode(tokenizer, passages(reviews, words)) for words in PASSAGE_WORDS]
    done = train(model, curriculum(general, encode(tokenizer, by_part["lm"]), epochs))
    eval_rows = encode(tokenizer, by_part["eval"])
    exact = perplexity(model, eval_rows)
    model.load_state_dict({n: t.half().float() for n, t in model.state_dict().items()})
    samples = sample(model, tokenizer, prompts)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "context": CONTEXT,
        "vocab": len(tokenizer),
        "documents": sum(r.part == "lm" for r in reviews),
        "sentences": len(by_part["lm"]),
        "epochs": epochs,
        "general": min(round(GENERAL_PER_EPOCH * epochs), sum(len(row) for rows in general for row in rows)),
        "passage_words": " and ".join(map(str, PASSAGE_WORDS)),
        "steps": done.steps,
        "step_tokens": STEP_TOKENS,
        "tokens": done.tokens,
        "cpu_minutes": done.cpu_seconds / 60,
        "perplexity": exact,
        "perplexity_stored": perplexity(model, eval_rows),
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS,
        "ended": sum(ended for *_, ended in samples) / len(samples),
        "length": sum(length for _, _, length, _ in samples) / len(samples),
        "sha256": weights_sha256(half_state(model)),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
        "samples": "\n".join(f"- `{p}` |{r}" for p, r, _, _ in samples[:SHOWN_SAMPLES]),
    }
    save(out_dir, model, tokenizer, CARD.read_text(encoding="utf-8").format(**facts))
    return facts


def main(argv: list[str] | None = None) -> int:
    """Train the demo's base model and write it as a model directory."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("out_dir", type=Path)
    parser.add_argument("--epochs", type=float, default=EPOCHS, help=f"default {EPOCHS:g}")
    arguments = parser.parse_args(argv)
    if not arguments.epochs > 0:
        parser.error("--epochs must be greater than 0")
    try:
        facts = run(arguments.out_dir, arguments.epochs)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(json.dumps(facts, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
