"""Both tokenizers, trained on the captions: a T5 unigram and a CLIP byte-level BPE; caption words are one token."""

import json

import numpy as np
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer, UnigramTrainer
from transformers import CLIPTokenizer, T5Tokenizer

from . import loop, scenes

T5_LENGTH = 32  # What is served; the pipeline pads to it without a mask, so training does too.
CLIP_LENGTH = 77


def corpus(count: int = 8000) -> list[str]:
    rng = np.random.default_rng([loop.SEED, 10])
    return [scenes.caption(scenes.sample(rng, held_out=False), rng) for _ in range(count)]


def letters() -> list[str]:
    return [chr(code) for code in range(33, 127)]


def train_t5(captions: list[str]) -> T5Tokenizer:
    """<pad> 0, </s> 1, <unk> 2, as in T5; single characters stay in the vocabulary, so that any prompt has tokens."""
    backend = T5Tokenizer(extra_ids=0).backend_tokenizer
    specials = ["<pad>", "</s>", "<unk>"]
    trainer = UnigramTrainer(
        vocab_size=320, special_tokens=specials, unk_token="<unk>", initial_alphabet=letters(), show_progress=False
    )
    backend.train_from_iterator(captions, trainer)
    vocabulary = json.loads(backend.to_str())["model"]["vocab"]
    # The trainer's threads add up scores in any order; rounding and sorting keep the ids nearly the same in every run.
    learned = sorted(
        ((piece, round(score, 2)) for piece, score in vocabulary[len(specials) :]), key=lambda item: (-item[1], item[0])
    )
    present = {piece for piece, _ in learned}
    floor = min(score for _, score in learned) - 2
    # Whole words win over any split; words the trainer split nevertheless are added at the score of the best.
    words = {f"▁{word}" for text in captions for word in text.split()}
    top = -1.0
    learned = [(piece, top if piece in words else score) for piece, score in learned]
    learned += [(word, top) for word in sorted(words - present)]
    learned += [(letter, floor) for letter in letters() if letter not in present]
    return T5Tokenizer(vocab=[*((token, 0.0) for token in specials), *learned], extra_ids=0, model_max_length=512)


def train_clip(captions: list[str]) -> CLIPTokenizer:
    """The two special tokens come last, as in CLIP; padding is the end token."""
    backend = CLIPTokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=1024,
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(captions, trainer)
    model = json.loads(backend.to_str())["model"]
    words = [token for token, _ in sorted(model["vocab"].items(), key=lambda item: item[1]) if "<|" not in token]
    words += [f"{letter}</w>" for letter in pre_tokenizers.ByteLevel.alphabet() if f"{letter}</w>" not in words]
    vocab = {token: index for index, token in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=CLIP_LENGTH)
