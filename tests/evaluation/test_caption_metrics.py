"""BLEU, ROUGE-L and METEOR against cases worked out by hand, and against public implementations where one is installed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from support.oracles import oracle

from umed_plugin.evaluation.metrics import captions

SAID = ["the", "cat", "sat", "on", "the", "mat", "near", "the", "red", "door"]
WANTED = ["the", "cat", "was", "on", "the", "mat", "by", "the", "red", "door"]


def test_bleu_by_hand():
    # 1-grams: the x3, cat, on, mat, red, door = 8 of 10. 2-grams: "the cat", "on the", "the mat", "the red", "red door" = 5 of 9.
    counts = captions.bleu_counts(SAID, WANTED)
    assert (counts["ngrams_shared_1"], counts["ngrams_said_1"]) == (8, 10)
    assert (counts["ngrams_shared_2"], counts["ngrams_said_2"]) == (5, 9)
    columns = {name: np.array([value]) for name, value in counts.items()}
    assert captions.bleu(columns, 1) == pytest.approx(0.8)
    assert captions.bleu(columns, 2) == pytest.approx(math.sqrt(0.8 * 5 / 9))
    short = {name: np.array([value]) for name, value in captions.bleu_counts(["the", "cat"], WANTED).items()}
    assert captions.bleu(short, 1) == pytest.approx(math.exp(1 - 10 / 2)), "too short: the brevity penalty"
    assert captions.bleu(short, 3) == 0


def test_rouge_l_and_meteor_by_hand():
    # Longest common subsequence: the cat on the mat the red door = 8; P = R = 0.8.
    assert captions.rouge_l(SAID, WANTED) == pytest.approx(0.8)
    # P = 2/2, R = 2/10, beta 1.2: (1 + 1.44) * 0.2 / (0.2 + 1.44)
    assert captions.rouge_l(["the", "cat"], WANTED) == pytest.approx(2.44 * 0.2 / 1.64)
    # 8 matches in 3 chunks ("the cat", "on the mat", "the red door"): F = 0.8.
    assert captions.meteor(SAID, WANTED) == pytest.approx(0.8 * (1 - 0.5 * (3 / 8) ** 3))
    assert captions.meteor(["a"], ["b"]) == 0 and captions.rouge_l(["a"], ["b"]) == 0
    assert captions.meteor([], ["b"]) == 0 and captions.rouge_l([], ["b"]) == 0


def test_words_are_lower_case_and_without_boxes_tags_and_punctuation():
    text = "<ref>Left lung</ref><box>(12,30),(45,60)</box>: 2.5 cm T1-weighted, [0.10, 0.20, 0.30, 0.40]."
    assert captions.words(text) == ["left", "lung", "2.5", "cm", "t1-weighted"]


def some_captions(count=40):
    generator = np.random.default_rng(5)
    vocabulary = [
        "the",
        "a",
        "left",
        "right",
        "lung",
        "mass",
        "nodule",
        "is",
        "in",
        "of",
        "upper",
        "lobe",
        "small",
        "large",
        "seen",
    ]
    for _ in range(count):
        wanted = list(generator.choice(vocabulary, generator.integers(3, 14)))
        said = [word if generator.random() < 0.7 else str(generator.choice(vocabulary)) for word in wanted]
        yield said[: generator.integers(1, 14)] + list(generator.choice(vocabulary, generator.integers(0, 3))), wanted


def test_bleu_is_sacrebleu_s():
    sacrebleu = oracle("sacrebleu")
    pairs = list(some_captions())
    counts = [captions.bleu_counts(*pair) for pair in pairs]
    columns = {name: np.array([one[name] for one in counts]) for name in counts[0]}
    for order in captions.ORDERS:
        theirs_of = sacrebleu.metrics.BLEU(
            tokenize="none", smooth_method="none", max_ngram_order=order, effective_order=False, force=True
        )
        theirs = theirs_of.corpus_score([" ".join(said) for said, _ in pairs], [[" ".join(w) for _, w in pairs]]).score
        assert captions.bleu(columns, order) == pytest.approx(theirs / 100, abs=1e-9)


def test_rouge_l_is_that_of_the_rouge_score_package():
    scorer = oracle("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for said, wanted in some_captions():
        theirs = scorer.score(" ".join(wanted), " ".join(said))["rougeL"].fmeasure
        assert captions.rouge_l(said, wanted, beta=1.0) == pytest.approx(theirs)


def test_meteor_is_nltk_s_with_equal_words_alone():
    """On captions without repeated words, of which each library aligns which it likes."""
    nltk = oracle("nltk.translate.meteor_score")

    class Same:
        def stem(self, word):
            return word

    class NoSynonyms:
        def synsets(self, word):
            return []

    checked = 0
    for said, wanted in some_captions(200):
        said, wanted = list(dict.fromkeys(said)), list(dict.fromkeys(wanted))
        theirs = nltk.single_meteor_score(wanted, said, stemmer=Same(), wordnet=NoSynonyms())
        assert captions.meteor(said, wanted) == pytest.approx(theirs)
        checked += theirs > 0
    assert checked > 100
