"""All tensors of a request count, of both prompts and of every source."""

from __future__ import annotations

import torch

from app.messages.conditioning import Conditioning, PromptEmbeddings, SourceImage, TokenCount


def test_memory_and_tokens_are_of_all_that_a_request_brings() -> None:
    prompt = PromptEmbeddings(torch.zeros(8, 4), torch.zeros(3), TokenCount(5, 5))
    negative = PromptEmbeddings(torch.zeros(8, 4), None, TokenCount(9, 8))
    source = SourceImage(torch.zeros(16, 4), 32, 32, torch.zeros(4, 4, dtype=torch.bool))
    alone = Conditioning(prompt)
    assert alone.nbytes == 4 * (32 + 3)
    assert alone.token_counts == (TokenCount(5, 5),)
    whole = Conditioning(prompt, negative, (source, source))
    assert whole.nbytes == alone.nbytes + 4 * 32 + 2 * (4 * 64 + 16)
    assert whole.token_counts == (TokenCount(5, 5), TokenCount(9, 8))
