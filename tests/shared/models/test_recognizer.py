"""The recogniser on codes: what it reads of a text, its loss, and that it learns."""

import pytest
import torch

from shared.codes import LINGUISTIC_PAD
from shared.models.recognizer import BLANK, LETTERS, WORST_LOSS, Recognizer, RecognizerConfig, letters

TINY = RecognizerConfig(size=32, num_blocks=1, attention_heads=2, linear_units=48)


@pytest.fixture
def model() -> Recognizer:
    torch.manual_seed(0)
    return Recognizer(TINY).eval()


def pairs(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random codes of these lengths (B, T, 2), and the lengths."""
    found = torch.zeros(len(lengths), max(lengths), 2, dtype=torch.long)
    for row, length in enumerate(lengths):
        drawn = torch.Generator().manual_seed(length)
        found[row, :length, 0] = torch.randint(LINGUISTIC_PAD, (length,), generator=drawn)
        found[row, :length, 1] = LINGUISTIC_PAD + 1 + torch.randint(4096, (length,), generator=drawn)
    return found, torch.tensor(lengths)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("Well, [Laughter] it’s 3 o'clock!", "well it's o'clock"),
        ("[Sigh]", ""),
        ("1984", ""),
        ("他说 hello", ""),
        ("déjà vu", ""),
        ("", ""),
    ],
)
def test_letters_of_a_text(text: str, read: str) -> None:
    assert "".join(LETTERS[letter - 1] for letter in letters(text)) == read


def test_a_row_of_a_batch_reads_as_it_does_alone(model: Recognizer) -> None:
    codes, lengths = pairs(40, 17, 29)
    together = model(codes, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(*pairs(length))
        torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-4, atol=1e-4)


def test_the_loss_is_per_letter_and_bounded_where_the_text_does_not_fit(model: Recognizer) -> None:
    codes, lengths = pairs(40, 6)
    texts = [letters("so it was"), letters("far too much to say")]
    losses = model.loss(codes, lengths, texts)
    by_hand = torch.nn.functional.ctc_loss(
        model(codes, lengths).transpose(0, 1)[:, 0], torch.tensor(texts[0]), torch.tensor(40),
        torch.tensor(len(texts[0])), reduction="sum",
    )  # fmt: skip
    assert losses[0].item() == pytest.approx(by_hand.item() / len(texts[0]), rel=1e-4)
    assert losses[1].item() == WORST_LOSS


def test_it_learns_which_codes_say_what(model: Recognizer) -> None:
    codes, lengths = pairs(24, 25, 26)
    texts = [letters(text) for text in ("one two", "three four", "five")]
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(codes, lengths, texts).mean().backward()
        optimizer.step()
    with torch.inference_mode():
        right = model.loss(codes, lengths, texts)
        wrong = model.loss(codes, lengths, [*texts[1:], texts[0]])
    assert (right < wrong).all()


def test_a_reading_is_the_likeliest_letters_without_blanks_and_repetitions(model: Recognizer) -> None:
    both, lengths = pairs(30, 12)
    alone = [model.read(both[row : row + 1, :length], lengths[row : row + 1])[0] for row, length in enumerate((30, 12))]
    assert model.read(both, lengths) == alone
    likeliest = model(both[1:, :12], lengths[1:])[0].argmax(-1).tolist()
    letters_said = [
        now for before, now in zip([BLANK, *likeliest], likeliest, strict=False) if now not in (before, BLANK)
    ]
    assert alone[1] == "".join(LETTERS[letter - 1] for letter in letters_said).strip()
