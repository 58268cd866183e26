"""The mutants that `scripts.mutants` tries: one line of a pure module each, and the tests that must turn red."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """One line changed: `old`, which stands once in `file`, becomes `new`; `tests`, separated by spaces, must fail."""

    file: str
    old: str
    new: str
    tests: str


def of(file: str, tests: str, *changes: tuple[str, str]) -> tuple[Mutant, ...]:
    return tuple(Mutant(file, old, new, tests) for old, new in changes)


TENSORS = of(
    "policy/tensors.py",
    "tests/policy/test_tensors.py",
    ("return torch.where(mask, x, 0.0).sum()", "return x.sum()"),
    ("/ mask.sum().clamp(min=1)", "/ mask.numel()"),
    ("/ mask.sum().clamp(min=1)", "/ mask.sum()"),
    ("return masked_sum(x, mask) / denominator", "return masked_sum(x, mask)"),
    ("(n - 1 if unbiased else n).clamp(min=1)", "n.clamp(min=1)"),
    ("(n - 1 if unbiased else n).clamp(min=1)", "(n - 1 if unbiased else n)"),
    ("masked_var(x, mask, unbiased) + eps", "masked_var(x, mask, unbiased)"),
    ("masked_var(x, mask, unbiased) + eps", "masked_var(x, mask) + eps"),
    ("    if not shift_mean:", "    if shift_mean:"),
    ("return torch.where(mask, whitened, 0.0)", "return whitened"),
    ("    x = torch.where(mask, x, 0.0)\n", ""),
    ("sum(-1) / counts.clamp(min=1)", "mean(-1)"),
    ("return masked_mean(per_sequence, counts > 0,", "return masked_mean(per_sequence, counts >= 0,"),
    ("mask.int().argmax(1, keepdim=True)", "torch.zeros_like(counts)[:, None]"),
    (".clamp(max=ids.shape[1] - 1)", ""),
    ("width - len(row) if left else 0", "0 if left else width - len(row)"),
    ("at_least_float32(logits) / temperature", "at_least_float32(logits) * temperature"),
    ("scaled = at_least_float32(logits)", "scaled = logits"),
    ("slope = -grad_logprobs[rows, None] * p", "slope = grad_logprobs[rows, None] * p"),
    ("slope -= grad_entropy", "slope += grad_entropy"),
    ("p_logp - p * p_logp.sum(-1, keepdim=True)", "p_logp"),
    ("            slope /= temperature\n", ""),
    ("d_weight += (slope", "d_weight = (slope"),
    ("d_bias += slope.sum(0)", "d_bias = slope.sum(0)"),
    ("return torch.where(p == 0, 0.0, p * logp)", "return p * logp"),
    ("entropy[rows] = -_p_logp", "entropy[rows] = _p_logp"),
    ("dtype = torch.get_autocast_dtype(device)", "pass"),
    ("range(0, n, size)]", "range(0, n, n)]"),
    ("(prompt_lengths[:, None] - 1 + columns)", "(prompt_lengths[:, None] + columns)"),
    (".clamp(max=hidden.shape[1] - 1)", ""),
)
PPO = of(
    "policy/ppo/maths.py",
    "tests/policy/ppo/test_maths.py",
    ("    d = logprobs - ref_logprobs\n", "    d = ref_logprobs - logprobs\n"),
    ("return 0.5 * d.square()", "return d.square()"),
    ("torch.expm1(-d) + d", "torch.expm1(d) - d"),
    (".clamp(max=K3_LIMIT)", ""),
    ("        d = d.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)\n        return (", "        return -("),
    ("return scores - penalty * response_mask.sum(-1)", "return scores + penalty * response_mask.sum(-1)"),
    ("return scores - penalty * response_mask.sum(-1)", "return scores - penalty * response_mask.shape[-1]"),
    ("torch.where(finished, scores, scores - penalty)", "torch.where(finished, scores - penalty, scores)"),
    ("torch.where(finished, scores, scores - penalty)", "torch.where(finished, scores, scores + penalty)"),
    ("kl_estimate(logprobs, ref_logprobs, kind), 0.0)", 'kl_estimate(logprobs, ref_logprobs, "k1"), 0.0)'),
    ("rewards = -kl_coef * kl", "rewards = kl_coef * kl"),
    ("torch.where(response_mask.any(-1), scores, 0.0)", "scores"),
    (".cumsum(-1).argmax(-1, keepdim=True)", ".argmin(-1, keepdim=True)"),
    ("    rewards = torch.where(response_mask, rewards, 0.0)\n", ""),
    ("    values = torch.where(response_mask, values, 0.0)\n    advantages", "    advantages"),
    ("+ gamma * next_value -", "+ next_value -"),
    ("+ gamma * next_value -", "+ gamma * lam * next_value -"),
    ("delta + gamma * lam * next_advantage", "delta + lam * next_advantage"),
    ("delta + gamma * lam * next_advantage", "delta + gamma * next_advantage"),
    ("return advantages, advantages + values", "return advantages, advantages - values"),
    ("torch.where(response_mask, logprobs - old_logprobs, 0.0)", "logprobs - old_logprobs"),
    ("torch.where(response_mask, logprobs - old_logprobs,", "torch.where(response_mask, old_logprobs - logprobs,"),
    ("log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()", "log_ratio.exp()"),
    ("losses = torch.maximum(plain, clipped)\n    if", "losses = torch.minimum(plain, clipped)\n    if"),
    ("losses = torch.maximum(plain, clipped)\n    if", "losses = plain\n    if"),
    ("plain = -advantages * ratio", "plain = advantages * ratio"),
    ("1 - options.cliprange, 1 + high", "1 - high, 1 + high"),
    ("1 - options.cliprange, 1 + high", "1 - options.cliprange, 1 + options.cliprange"),
    ("torch.minimum(losses, -options.dual_clip", "torch.maximum(losses, -options.dual_clip"),
    ("torch.where(advantages < 0, bounded, losses)", "bounded"),
    ("(clipped > plain).to(losses.dtype)", "(clipped < plain).to(losses.dtype)"),
    ("masked_mean(0.5 * log_ratio.square()", "masked_mean(log_ratio.square()"),
    ("response_mask, options.reduction, per_loss)", "response_mask, options.reduction)"),
    ("denominator.divisor(reduction), denominator.tokens", "denominator.divisor(reduction), denominator.sequences"),
    ('"token_mean": self.tokens', '"token_mean": self.sequences'),
    ('"sequence_mean": self.sequences', '"sequence_mean": self.tokens'),
    ("self.sequences * self.length", "self.sequences"),
    ("losses = losses * weights", "losses = losses / weights"),
    ("old_logprobs - rollout_logprobs, 0.0)", "rollout_logprobs - old_logprobs, 0.0)"),
    ("torch.where(response_mask, old_logprobs - rollout_logprobs, 0.0)", "old_logprobs - rollout_logprobs"),
    ('options.level == "sequence"', 'options.level == "token"'),
    ("log_weights.sum(-1, keepdim=True)", "log_weights.mean(-1, keepdim=True)"),
    ("weights.clamp(options.low, options.high)", "weights.clamp(max=options.high)"),
    ("(weights >= options.low) & (", "("),
    ("& (weights <= options.high)", ""),
    ("return torch.where(response_mask, weights, 0.0)", "return weights"),
    ("log_weights.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)", "log_weights"),
    ("    logprobs = torch.where(response_mask, logprobs, ref_logprobs)\n", ""),
    ('estimate = kl_estimate(logprobs, ref_logprobs, "k2")', 'estimate = kl_estimate(logprobs, ref_logprobs, "k3")'),
    ('"k3") - estimate).detach()', '"k3") - estimate)'),
    (
        "masked_reduce(estimate, response_mask, reduction, per_loss)",
        "masked_reduce(estimate, response_mask, reduction)",
    ),
    ("    values = torch.where(response_mask, values, 0.0)\n    plain", "    plain"),
    ("torch.maximum(plain, clipped), (clipped", "torch.minimum(plain, clipped), (clipped"),
    ("torch.clamp(values, old_values - cliprange_value,", "torch.clamp(values, -cliprange_value + returns,"),
    ("masked_reduce(0.5 * losses", "masked_reduce(losses"),
    ("masked_var(returns - values, mask)", "masked_var(values, mask)"),
    ("1 - unexplained / variance", "unexplained / variance"),
)
CONTROLLERS = of(
    "policy/ppo/controllers.py",
    "tests/policy/ppo/test_controllers.py",
    ("max(-0.2, min(0.2,", "max(-0.2, min(0.3,"),
    ("max(-0.2, min(0.2,", "max(-0.3, min(0.2,"),
    ("kl_per_sequence / self.target - 1", "1 - kl_per_sequence / self.target"),
    ("error * n_sequences / self.horizon", "error / self.horizon"),
    ("self._squares / self._count)", "self._squares / (self._count - 1))"),
    (" + shift**2 * self._count * count / total", ""),
    ("shift**2 * self._count * count / total", "shift**2 * count / total"),
    ("self._mean += shift * count / total", "self._mean += shift / total"),
    ("if self._squares > 0 else 1.0", "if self._squares > 0 else 0.0"),
    ("return scores / self.std", "return (scores - self._mean) / self.std"),
)
REWARD_MODEL = of(
    "reward_model/losses.py",
    "tests/reward_model/test_losses.py",
    ("difference = chosen - rejected", "difference = rejected - chosen"),
    ("is None else difference - margin)", "is None else difference + margin)"),
    ("centering * (chosen + rejected).square()", "centering * (chosen - rejected).square()"),
    ("(difference > 0).to(", "(difference >= 0).to("),
    ("ranks[better] < ranks[worse]", "ranks[better] <= ranks[worse]"),
    ("torch.argsort(ranks, stable=True)", "torch.argsort(ranks, stable=True, descending=True)"),
    ("(ranks.unsqueeze(2) < ranks.unsqueeze(1)) & both", "ranks.unsqueeze(2) < ranks.unsqueeze(1)"),
    ("(ranks.unsqueeze(2) < ranks.unsqueeze(1)) & both", "(ranks.unsqueeze(2) > ranks.unsqueeze(1)) & both"),
    ("return better, tied.triu(diagonal=1)", "return better, tied"),
    ("/ better.sum((1, 2)).clamp(min=1)", "/ better.shape[1]"),
    ("(margins.unsqueeze(2) - margins.unsqueeze(1))", "(margins.unsqueeze(1) - margins.unsqueeze(2))"),
    ("~(better | itself), -torch.inf)", "~better, -torch.inf)"),
    ("~(better | itself), -torch.inf)", "~(better | tied | itself), -torch.inf)"),
    ("    per_prompt = (below.logsumexp(-1) - scores)", "    per_prompt = (below.amax(-1) - scores)"),
    ("return total / counted.sum().clamp(min=1)", "return total / len(counted)"),
    ("    return total / denominator", "    return total"),
)
ROLLOUT = of(
    "rollout/batch.py",
    "tests/rollout/test_batch.py",
    ("left_pad(prompts, pad_id)", "right_pad(prompts, pad_id)"),
    ("stop = max(1, int(response_mask.sum(1).max()))", "stop = max(1, int(response_mask.sum(1).min()))"),
    ("response_mask.sum(1).max()))", "response_mask.shape[1]))"),
    ("first = self.prompt_ids.shape[1] - int(prompt_mask.sum(1).max())", "first = 0"),
    ("finished=self.finished[rows]", "finished=self.finished[: len(rows)]"),
    ("torch.cat([self.prompt_mask, self.response_mask], dim=1)", "self.input_ids != 0"),
    ("if not self.prompt_mask[:, -1].all():", "if not self.prompt_mask[:, -1].any():"),
    ("self.prompt_mask[:, :-1] & ~self.prompt_mask[:, 1:]", "~self.prompt_mask[:, :-1] & self.prompt_mask[:, 1:]"),
    ("(~self.response_mask[:, :-1] & self", "(self.response_mask[:, :-1] & ~self"),
    ("int((self.lengths == 0).sum())", "int((self.lengths > 0).sum())"),
    ("if tuple(tensor.shape) != shape:", "if tensor.ndim != len(shape):"),
)
REWARDS = of(
    "policy/ppo/rewards.py",
    "tests/policy/ppo/test_rewards.py::test_the_score_is_the_weighted_sum_of_functions "
    "tests/policy/ppo/test_rewards.py::test_a_model_is_normalised_a_function_is_not "
    "tests/policy/ppo/test_rewards.py::test_another_tokenizer_reads_the_same_text_in_its_own_tokens "
    "tests/policy/ppo/test_rewards.py::test_a_critic_from_a_weighted_reward_model_predicts_its_term "
    "tests/policy/ppo/test_held_out.py::test_more_tokens_than_the_reward_model_has_positions_are_refused",
    ("[self.weights[name] * scores for", "[scores for"),
    ("torch.stack(weighted).sum(0)", "torch.stack(weighted).mean(0)"),
    ("return self.normalisation.apply(raw)", "return -self.normalisation.apply(raw)"),
    ("return self.normalisation.apply(raw)", "return raw"),
    ("done or len(ids) == 1 else ids[:-1]", "done else ids[:-1]"),
    ("ids if done or len(ids) == 1 else ids[:-1]", "ids"),
    (
        "Prompt(self.policy.decode(ids)) if isinstance(prompt.content, str) else prompt",
        "Prompt(self.policy.decode(ids))",
    ),
    ("len(prompt) + len(response) > positions", "len(prompt) + len(response) >= positions"),
    ("len(prompt) + len(response) > positions", "len(response) > positions"),
)
CRITIC = of(
    "policy/ppo/critic.py",
    "tests/policy/ppo/test_rewards.py",
    ("source.normalisation.std / rewards.weights[name]", "source.normalisation.std * rewards.weights[name]"),
    ("source.normalisation.std / rewards.weights[name]", "source.normalisation.std"),
)
HEALTH = of(
    "policy/ppo/health.py",
    "tests/policy/ppo/test_health.py::test_a_verdict_begins_at_its_threshold "
    "tests/policy/ppo/test_health.py::test_a_kl_target_sets_what_explodes "
    "tests/policy/ppo/test_health.py::test_no_clipping_is_right_where_no_step_is_off_policy_or_the_schedule_ends "
    "tests/policy/ppo/test_health.py::test_the_end_tells_whether_anything_was_learnt "
    "tests/policy/ppo/test_health.py::test_too_many_skipped_steps_stop_the_run_every_time",
    ("skipped <= ppo.max_skipped_steps", "skipped < ppo.max_skipped_steps"),
    ("abs(ratio - 1.0) <=", "ratio - 1.0 <="),
    ("<= RATIO_TOLERANCE and approx_kl", "<= RATIO_TOLERANCE or approx_kl"),
    ("gap <= PROBABILITY_GAP", "gap >= PROBABILITY_GAP"),
    ("kl < -max(NEGATIVE_KL_ERRORS", "kl < -min(NEGATIVE_KL_ERRORS"),
    ("kl < -max(NEGATIVE_KL_ERRORS", "kl < max(NEGATIVE_KL_ERRORS"),
    ('KL_PER_TOKEN * history.lately("response/length")', "KL_PER_TOKEN"),
    ("else KL_TARGETS * target\n", "else target\n"),
    ('row["policy/clipfrac_avg"] > CLIPFRAC_HIGH', 'row["policy/clipfrac_avg"] < CLIPFRAC_HIGH'),
    ("< CLIPFRAC_LOW, WINDOW)", "< CLIPFRAC_LOW)"),
    ('history.now("lr/policy") >= 0.5 * ppo.learning_rate', "True"),
    ('row["val/explained_variance"] < 0.0', 'row["val/explained_variance"] > 0.0'),
    ("history.updates < WARM_UP + UNEXPLAINED", "history.updates < UNEXPLAINED"),
    ('row["response/eos_rate"] <= EOS_RATE', 'row["response/eos_rate"] < EOS_RATE'),
    ('<= EMPTY_LENGTH and row["response/eos_rate"] >= ENDED_RATE', "<= EMPTY_LENGTH"),
    ('history.lately("policy/entropy_avg")\n', 'history.lately("objective/scores")\n'),
    ("length[1] > LENGTH_FACTOR * length[0] and", "length[1] > LENGTH_FACTOR * length[0] or"),
    ("> VALUE_CLIPS * clip", "> clip"),
    ('1.0 - row["val/explained_variance"]) ** 0.5', '1.0 - row["val/explained_variance"])'),
    ("if not kl < IDENTICAL_KL", "if not kl > IDENTICAL_KL"),
    ("[*self.first, row][:PATIENCE]", "[*self.first, row][-PATIENCE:]"),
)
PTX = of(
    "policy/ppo/ptx.py",
    "tests/policy/ppo/test_ptx.py::test_loss_and_gradient_are_those_of_cross_entropy_whatever_the_micro_batches "
    "tests/policy/ppo/test_ptx.py::test_each_pass_uses_every_example_once_and_a_step_is_the_same_for_whoever_asks",
    ("starts = [max(1, example.response_start)", "starts = [1"),
    ("loss = -masked_mean(", "loss = masked_mean("),
    ("part.response_mask, tokens)", "part.response_mask)"),
    ("(self.coef * loss).backward()", "loss.backward()"),
    ("total = total + loss.detach()", "total = loss.detach()"),
    ("part, TEMPERATURE, with_entropy", "part, roles.temperature, with_entropy"),
    ("self.size, step, self.seed)", "self.size, step, 0)"),
    ("self.size, step, self.seed)", "self.size, 1, self.seed)"),
)
STOP = of(
    "rollout/stop.py",
    "tests/rollout/test_stop.py",
    ("if ids == [encoder.eos_token_id]:", "if ids == encoder.eos_token_id:"),
    ("if len(ids) == 1 and encoder", "if encoder"),
    ("encoder.decode(ids, special=True) == stop", "encoder.decode(ids) == stop"),
    ("return any(stop in text", "return all(stop in text"),
    ("return any(stop in text for stop in stops)", "return any(text.endswith(stop) for stop in stops)"),
    ("size = 1 + bisect_left(", "size = bisect_left("),
    ("completion.logprobs[:size], finished=True)", "completion.logprobs[:size], completion.finished)"),
    ("[cut_at_stop(completion, self.decode, self.stops) for completion in completions]", "completions"),
)
_SHARING = "tests/policy/ppo/test_sharing.py::test_"
ON_TRUNK = f"{_SHARING}a_critic_on_the_policys_trunk_adds_value_coef_times_its_loss"
REUSED = f"{_SHARING}reusing_the_first_forward_changes_nothing"
SWITCHED = f"{_SHARING}switching_adapters_leaves_the_others_and_the_base_alone"
CRITICS = "tests/policy/test_critics.py"
SHARED = f"{_SHARING}all_roles_over_one_base {_SHARING}scores_of_a_shared_and_a_plain_reward_model_agree"
UPDATE = of(
    "policy/ppo/update.py",
    f"tests/policy/ppo/test_update.py {ON_TRUNK} {REUSED} tests/policy/ppo/test_ptx.py",
    ("float(minibatch.response_mask.sum())", "float(minibatch.response_mask.numel())"),
    ("float(minibatch.response_mask.any(1).sum())", "1.0"),
    ("loss + ppo.value_coef * critic_loss if", "loss + critic_loss if"),
    ("loss = loss - ppo.entropy_coef *", "loss = loss + ppo.entropy_coef *"),
    ("loss = loss + ppo.kl_loss_coef *", "loss = loss - ppo.kl_loss_coef *"),
    ("> ppo.target_kl:", "> 2 * ppo.target_kl:"),
    ("            experience = replace(experience, passes=())\n", ""),
    ("    if options.train_policy:\n        learner.policy_optimizer.step()", "    learner.policy_optimizer.step()"),
    ("if options.ptx is not None and options.train_policy:", "if options.ptx is not None:"),
    ("size = ppo.rollout_batch_size // ppo.num_minibatches", "size = ppo.rollout_batch_size"),
    ("    for _ in range(epochs):\n", "    for _ in range(1):\n"),
    ("1.0 - update / updates if linear", "1.0 - update / (2 * updates) if linear"),
    ("clip_grad_norm_(roles.trainable(), ppo.max_grad_norm)", "clip_grad_norm_(roles.trainable(), 1e9)"),
    ("for key in MUST_BE_FINITE):", "for key in PPO_LOSSES):"),
    ("learner.skipped_rows.append([] if only_ptx else", "learner.skipped_rows.append("),
    ("experience.values[one.rows, : values.shape[1]]", "experience.returns[one.rows, : values.shape[1]]"),
    ("experience.old_logprobs[rows, :width]", "experience.ref_logprobs[rows, :width]"),
    ("            experience.ref_logprobs[rows, :width]", "            experience.old_logprobs[rows, :width]"),
)
EXPERIENCE = of(
    "policy/ppo/experience.py",
    f"tests/policy/ppo/test_experience.py tests/policy/ppo/test_update.py {REUSED} {SWITCHED}",
    ("advantages=masked_whiten(advantages, mask)", "advantages=advantages"),
    ("scores = missing_eos_penalty(scores, batch.finished, ppo.missing_eos_penalty)", "pass"),
    ("scores.clamp(-ppo.score_clip, ppo.score_clip)", "scores.clamp(max=ppo.score_clip)"),
    ("reuse=ppo.num_minibatches == 1", "reuse=True"),
    ("reuse and graphs * most_padded_tokens(batch, roles.max_tokens, roles.ranks) <= roles.max_tokens", "reuse"),
    ("graphs = 1 if roles.critic.on_policy else 2", "graphs = 1"),
    (
        "with roles.acting_as_reference():\n        return policy_logprobs(roles, roles.reference,",
        "if True:\n        return policy_logprobs(roles, roles.policy,",
    ),
    ("and not gap < recipe.rollout.logprob_tolerance", "and gap > recipe.rollout.logprob_tolerance"),
    ("/ (rows * (rows - 1))).sqrt()", "/ (rows * rows)).sqrt()"),
    ("return (~sound).nonzero().flatten().tolist() or sorted(rows)", "return sorted(rows)"),
    ("    roles.policy.train(on)\n", "    roles.policy.train(not on)\n"),
)
MODELS_AND_CRITICS = (
    *of(
        "policy/models.py",
        "tests/policy/test_models.py tests/policy/ppo/test_update.py",
        ("            module.p = 0.0\n", "            pass\n"),
        ('            vars(module)["attention_dropout"] = 0.0', "            pass"),
        ("batch.prompt_mask.sum(1), batch", "batch.prompt_mask.sum(1) + 1, batch"),
        ("        temperature=temperature,\n        with_entropy", "        with_entropy"),
        ("    if not torch.allclose(wanted", "    if torch.allclose(wanted"),
    ),
    *of(
        "policy/critics.py",
        f"tests/policy/test_models.py {ON_TRUNK} {CRITICS}",
        ("torch.float32))) * batch.response_mask", "torch.float32)))"),
        ("return self.affine.apply(values", "return (values"),
        ("        _zero_head(model)\n        affine = PLAIN", "        _zero_head(model)"),
        ("nullcontext() if self.adapter is None else using(self.trunk, self.adapter)", "nullcontext()"),
        (
            "merged_weights(self.trunk.base_model, self.adapter or POLICY)",
            "merged_weights(self.trunk.base_model, POLICY)",
        ),
    ),
    *of(
        "pipeline/adapters.py",
        f"{SWITCHED} {CRITICS} {SHARED}",
        ("tensor = tensor + layer.get_delta_weight(name)", "tensor = tensor - layer.get_delta_weight(name)"),
        ("_switch(layers, None if before[1] else before[0])", "_switch(layers, before[0])"),
        ("    load_adapter_state(model, name, adapter_state(model, source))\n", ""),
        ('key.replace(".base_layer", "")', "key"),
    ),
)
MUTANTS = TENSORS + PPO + CONTROLLERS + REWARD_MODEL + ROLLOUT + REWARDS + HEALTH + PTX + STOP
MUTANTS += CRITIC + UPDATE + EXPERIENCE + MODELS_AND_CRITICS
