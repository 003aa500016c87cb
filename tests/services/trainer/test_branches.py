"""Answers that share a prompt are scored as rows of their own would be."""

import numpy as np
import torch

from services.trainer.core.branches import branches, states_before
from services.trainer.core.sampling import Vocabulary, log_probs, log_probs_after, sequences
from tests.services.trainer.conftest import make_row


def test_tokens_of_branches_are_as_likely_as_in_rows_of_their_own_and_teach_the_same(fresh, tokenizer) -> None:
    model = fresh()
    vocabulary = Vocabulary(tokenizer.audio_offset, tokenizer.eos)
    prompt = np.array(tokenizer.encode_chat(make_row(0).turns()))
    answers = [make_row(number).target.mixed[: 5 * (number + 1)] for number in range(3)]
    limits = [3] * 3
    rows = sequences([prompt] * 3, answers, limits, vocabulary, "cpu")
    apart, _ = log_probs(model, rows, vocabulary, 0.5)
    apart.sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    row = branches(prompt, answers, vocabulary, "cpu")
    assert row.prompt == len(prompt)
    before = states_before(model, row)
    together, _ = log_probs_after(model, before, row.wanted, row.mask, torch.tensor(limits), vocabulary, 0.5)
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-4)
    together.sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-3, atol=1e-4, msg=name)
