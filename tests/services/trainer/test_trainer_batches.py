"""Loss masks on real chat encodings, and packing against padding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from services.trainer.core.batches import encode, epoch_order, packed, padded, plan_rows, replaced, whole_chat
from shared.checkpoints import Checkpoint
from shared.checkpoints.step1 import load_step1, load_text_tokenizer
from shared.codes import interleave
from shared.prompts import TextTokenizer, clone_turns, edit_turns
from shared.schemas.edit import Edit


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> TextTokenizer:
    return load_text_tokenizer(Checkpoint.resolve(tiny))


def codes(groups: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return interleave(rng.integers(0, 1024, groups * 2), rng.integers(0, 4096, groups * 3))


def chats(tokenizer: TextTokenizer) -> list:
    happy = edit_turns(Edit(type="emotion", detail="happy"), "you know, I just finished", codes(3, 0))
    clone = clone_turns("a reference", codes(2, 1), "a big project")
    return [encode(tokenizer, happy, codes(4, 2)), encode(tokenizer, clone, codes(2, 3)),
            encode(tokenizer, happy, codes(6, 4))]  # fmt: skip


def test_only_the_answers_audio_and_its_end_carry_a_loss(tokenizer: TextTokenizer) -> None:
    turns = edit_turns(Edit(type="emotion", detail="happy"), "you know", codes(3, 0))
    answer = codes(4, 2)
    chat = encode(tokenizer, turns, answer)
    assert chat.ids.tolist() == whole_chat(tokenizer, turns, answer)
    learned = chat.ids[chat.mask() > 0]
    assert learned.tolist() == [*(answer + tokenizer.audio_offset), tokenizer.eos]
    before = chat.ids[chat.mask() == 0]
    assert before.tolist() == tokenizer.encode_chat(turns)  # source audio, text and role line are given
    assert (before >= tokenizer.audio_offset).sum() == 15


def test_a_packed_row_loses_as_its_chats_do_in_padded_rows(tiny: Path, tokenizer: TextTokenizer) -> None:
    model = load_step1(Checkpoint.resolve(tiny), dtype=torch.float32)
    items = chats(tokenizer)

    def losses(batch) -> torch.Tensor:
        with torch.no_grad():
            _, logits = model(batch.ids, document_ids=batch.document_ids)
        used = batch.weights[:, 1:] > 0
        entropy = torch.nn.functional.cross_entropy(logits[:, :-1][used], batch.ids[:, 1:][used], reduction="none")
        return entropy.sort().values

    one_by_one, together = padded(items), packed([items[:2], items[2:]])
    assert one_by_one.answer_tokens == together.answer_tokens == 4 * 5 + 2 * 5 + 6 * 5 + 3
    torch.testing.assert_close(losses(together), losses(one_by_one), rtol=1e-5, atol=1e-5)


def test_the_first_token_of_a_document_is_no_target(tokenizer: TextTokenizer) -> None:
    batch = packed([chats(tokenizer)])
    starts = torch.nonzero(batch.document_ids[0, 1:] != batch.document_ids[0, :-1]).squeeze(-1) + 1
    assert (batch.weights[0, starts] == 0).all()


def test_rows_hold_every_item_once_and_never_overflow() -> None:
    lengths = [5, 9, 3, 3, 8, 1, 10]
    order = epoch_order(len(lengths), seed=3, epoch=0).tolist()
    rows = plan_rows(lengths, order, capacity=10)
    assert sorted(item for row in rows for item in row) == list(range(7))
    assert all(sum(lengths[item] for item in row) <= 10 for row in rows)


def test_an_item_longer_than_a_row_is_named() -> None:
    with pytest.raises(ValueError, match="item 1 has 12 tokens"):
        plan_rows([3, 12], [0, 1], capacity=10)


def test_the_order_of_an_epoch_depends_on_seed_and_epoch_alone() -> None:
    assert epoch_order(50, 7, 2).tolist() == epoch_order(50, 7, 2).tolist()
    assert epoch_order(50, 7, 2).tolist() != epoch_order(50, 7, 3).tolist()


def test_replaced_codes_stay_of_their_kind_and_text_stays() -> None:
    offset = 40
    ids = torch.cat([torch.arange(40), offset + torch.arange(5120)]).repeat(4, 1)
    found = replaced(ids, offset, 0.5, np.random.default_rng(0))
    assert torch.equal(found[:, :40], ids[:, :40])
    code, was = found[:, 40:] - offset, ids[:, 40:] - offset
    assert torch.equal(code < 1024, was < 1024)
    assert code.min() >= 0
    assert code.max() < 5120
    assert 0.47 < float((code != was).float().mean()) < 0.53
    assert torch.equal(replaced(ids, offset, 0.0, np.random.default_rng(0)), ids)
