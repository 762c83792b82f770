"""Rejection sampling keeps the target's distribution, whatever the draft's."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chisquare

from runtime.executor.base import Step
from runtime.sampler import Sampler, SamplingParams
from runtime.speculative.choosers import Chooser
from runtime.speculative.draft import Candidate
from runtime.speculative.rejection import RejectionSampler, accepted_or_rest, drawn, uniform
from tests.support.drafting import HashExecutor

VOCAB = 8
DRAWS = 4000
SAMPLING = {"temperature": 0.9, "top_k": 6, "top_p": 0.95, "min_p": 0.02}


def logits(seed, spread=1.5):
    return np.random.default_rng(seed).normal(0, spread, VOCAB).astype(np.float32)


def counts_of(draft_row, target_row):
    """Tokens drawn through drafts from `draft_row` for a target of `target_row`, one a seed."""
    counts = np.zeros(VOCAB)
    for seed in range(DRAWS):
        sampler = RejectionSampler.of(Sampler(SamplingParams(seed=seed, **SAMPLING), VOCAB, [1, 2]))
        if draft_row is None:
            candidate = Candidate(seed % 3, 0.5)
        else:
            chooser = Chooser(sampler, draws=True)
            chooser.follow([1, 2], 0)
            candidate = chooser.choose(draft_row, 2)
        sampler.propose(2, [candidate])
        counts[sampler.sample(target_row, 2).token_id] += 1
    return counts


def check(counts, target_row):
    ids, chances = Sampler(SamplingParams(seed=1, **SAMPLING), VOCAB, [1, 2]).distribution(target_row, 2)
    assert counts.sum() == counts[ids].sum(), "a token that the target never draws"
    assert chisquare(counts[ids], chances * DRAWS).pvalue > 1e-3


@pytest.mark.parametrize("draft_seed", [1, 2, 3])
def test_drafts_of_another_distribution_leave_the_targets_own(draft_seed):
    target = logits(1)
    check(counts_of(logits(draft_seed), target), target)


def test_drafts_without_a_distribution_leave_the_targets_own():
    target = logits(5)
    check(counts_of(None, target), target)


def test_the_check_finds_a_wrong_rule():
    target, draft = logits(1), logits(2)
    sampler = Sampler(SamplingParams(seed=1, **SAMPLING), VOCAB, [1, 2])
    ids, chances = sampler.distribution(target, 2)
    draft_ids, draft_chances = sampler.distribution(draft, 2)
    counts = np.zeros(VOCAB)
    for seed in range(DRAWS):  # always accepts
        counts[draft_ids[drawn(draft_chances, uniform(seed, 2, 1))]] += 1
    shared = counts[ids]
    assert chisquare(shared, chances * shared.sum()).pvalue < 1e-6


def test_equal_distributions_are_always_accepted():
    row = logits(3)
    for seed in range(50):
        sampler = RejectionSampler.of(Sampler(SamplingParams(seed=seed, **SAMPLING), VOCAB, [1]))
        chooser = Chooser(sampler, draws=True)
        chooser.follow([1], 0)
        candidate = chooser.choose(row, 1)
        sampler.propose(1, [candidate])
        assert sampler.sample(row, 1).token_id == candidate.token_id


def test_without_a_proposal_it_is_the_plain_sampler():
    params = SamplingParams(seed=9, **SAMPLING)
    plain, rejecting = Sampler(params, VOCAB, [1]), RejectionSampler.of(Sampler(params, VOCAB, [1]))
    assert rejecting.sample(logits(2), 1) == plain.sample(logits(2), 1)


def test_a_draft_outside_of_what_the_target_draws_is_never_accepted():
    ids, target = np.array([3, 4]), np.array([0.5, 0.5])
    candidate = Candidate(1, 0.9, np.array([1, 3]), np.array([0.9, 0.1]))
    assert {accepted_or_rest(candidate, ids, target, 0.0, rest) for rest in (0.0, 0.3, 0.6, 0.99)} == {3, 4}


def test_choosers_draw_as_the_target_will():
    sampler = Sampler(SamplingParams(seed=12, repetition_penalty=1.3), VOCAB, [1, 2, 3])
    chooser = Chooser(sampler)
    chooser.follow([1, 2, 3], 0)
    row = logits(8)
    assert chooser.choose(row, 3).token_id == sampler.sample(row, 3).token_id
    chooser.follow([1, 2, 3, 5], 3)
    sampler.accept(5)
    assert chooser.choose(row, 4).token_id == sampler.sample(row, 4).token_id


@pytest.mark.parametrize("size", [VOCAB - 2, VOCAB + 3])
def test_choosers_take_vocabularies_of_another_size(size):
    chooser = Chooser(Sampler(SamplingParams(temperature=0), VOCAB, []))
    row = np.zeros(size, np.float32)
    row[-1] = 5.0 if size < VOCAB else 50.0
    assert chooser.choose(row, 0).token_id == (size - 1 if size < VOCAB else 0)


def test_whole_answers_are_as_probable_as_by_plain_decoding():
    """Three tokens of a small vocabulary through passes of two drafts, against the product of the chances."""
    executor, prompt = HashExecutor(4), [1, 2]
    params = SamplingParams(temperature=0.7, top_k=0, top_p=1.0, min_p=0.0, seed=1)

    def chances_behind(tokens):
        row = executor.forward([Step(tokens, executor.new_kv(9))])[0][-1]
        ids, chances = Sampler(params, 4, tokens).distribution(row, len(tokens))
        return dict(zip(ids.tolist(), chances.tolist(), strict=True))

    counts: dict[tuple[int, ...], int] = {}
    draft_model = HashExecutor(4, salt=5)
    for seed in range(DRAWS):
        sampler = RejectionSampler.of(Sampler(replace(params, seed=seed), 4, prompt))
        chooser, tokens = Chooser(sampler, draws=True), list(prompt)
        while len(tokens) < 5:
            chooser.follow(tokens, 2)
            drafted = []
            for _ in range(2):
                behind = [*tokens, *(one.token_id for one in drafted)]
                row = draft_model.forward([Step(behind, draft_model.new_kv(9))])[0][-1]
                drafted.append(chooser.choose(row, len(behind)))
            sampler.propose(len(tokens), drafted)
            for candidate in drafted:
                row = executor.forward([Step(tokens, executor.new_kv(9))])[0][-1]
                token_id = sampler.sample(row, len(tokens)).token_id
                sampler.accept(token_id)
                tokens.append(token_id)
                if token_id != candidate.token_id or len(tokens) == 5:
                    break
        counts[tuple(tokens[2:])] = counts.get(tuple(tokens[2:]), 0) + 1
    expected = {
        (first, second, third): one * two * three
        for first, one in chances_behind(prompt).items()
        for second, two in chances_behind([*prompt, first]).items()
        for third, three in chances_behind([*prompt, first, second]).items()
    }
    likely = [answer for answer, chance in expected.items() if chance * DRAWS >= 8]
    found = [counts.get(answer, 0) for answer in likely]
    wanted = [expected[answer] * DRAWS for answer in likely]
    rest = (DRAWS - sum(found), DRAWS - sum(wanted))
    assert chisquare([*found, rest[0]], [*wanted, rest[1]]).pvalue > 1e-3
