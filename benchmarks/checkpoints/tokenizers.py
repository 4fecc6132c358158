"""Tokenizers in the files of the published ones, trained in seconds on the captions of flux-tiny's recipe."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AddedToken, Qwen2Tokenizer, T5TokenizerFast

from models.recipe import tokens

CAPTIONS = 2000
T5_EXTRA_IDS = 100

# ChatML, as Qwen3 writes it when it is told not to think: the reasoning block stands there and is empty.
CHAT_TEMPLATE = """{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN_MARKS = ("<think>", "</think>")


@lru_cache(maxsize=1)
def _captions() -> list[str]:
    return tokens.corpus(CAPTIONS)


def write_clip(folder: Path) -> None:
    """``vocab.json``, ``merges.txt``, and no ``tokenizer.json``, as the FLUX.1 repositories have it."""
    trained = tokens.train_clip(_captions())
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    _write_bpe(folder, model["vocab"], model["merges"])
    special = {"bos_token": "<|startoftext|>"} | dict.fromkeys(("eos_token", "pad_token", "unk_token"), "<|endoftext|>")
    _write_json(folder / "special_tokens_map.json", special)
    config = {"add_prefix_space": False, "do_lower_case": True, "model_max_length": tokens.CLIP_LENGTH}
    _write_json(folder / "tokenizer_config.json", config | special | {"tokenizer_class": "CLIPTokenizer"})


def write_t5(folder: Path) -> None:
    """``spiece.model`` with T5's special tokens, and the ``tokenizer.json`` made of it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_captions()),
        model_writer=model,
        model_type="unigram",
        vocab_size=320,
        hard_vocab_limit=False,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        required_chars="".join(tokens.letters()),
        num_threads=1,
        minloglevel=2,
    )
    (folder / "spiece.model").write_bytes(model.getvalue())
    extra = [f"<extra_id_{number}>" for number in range(T5_EXTRA_IDS)]
    special: dict[str, Any] = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    config = special | {"extra_ids": T5_EXTRA_IDS, "model_max_length": 512, "tokenizer_class": "T5Tokenizer"}
    _write_json(folder / "tokenizer_config.json", config)
    T5TokenizerFast.from_pretrained(folder).backend_tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(folder / "special_tokens_map.json", special | {"additional_special_tokens": extra})


def write_qwen(folder: Path) -> None:
    """Byte-level BPE with Qwen's own splitting and the chat template that `Flux2KleinPipeline` applies."""
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = BpeTrainer(
        vocab_size=1024,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(_captions(), trainer)
    model = json.loads(backend.to_str())["model"]
    vocab = {token: number for token, number in model["vocab"].items() if token not in QWEN_SPECIALS}
    vocab = {token: number for number, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=merges, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(QWEN_SPECIALS)})
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in QWEN_MARKS])
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.model_max_length = 131072
    tokenizer.save_pretrained(folder)
    _write_bpe(folder, vocab, merges)
    added = {token: tokenizer.convert_tokens_to_ids(token) for token in (*QWEN_SPECIALS, *QWEN_MARKS)}
    _write_json(folder / "added_tokens.json", added)
    special = {"additional_special_tokens": list(QWEN_SPECIALS[1:]), "eos_token": "<|im_end|>"}
    _write_json(folder / "special_tokens_map.json", special | {"pad_token": "<|endoftext|>"})


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "CLIPTokenizer": write_clip,
    "T5TokenizerFast": write_t5,
    "Qwen2TokenizerFast": write_qwen,
}
"""By the class that ``model_index.json`` names; each writes into an existing folder."""


def _write_bpe(folder: Path, vocab: Mapping[str, int], merges: Any) -> None:
    _write_json(folder / "vocab.json", dict(sorted(vocab.items(), key=lambda item: item[1])), indent=None)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
