"""Prompts are the published ones to the letter, and the fast encoding equals encoding everything as text."""

import io
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import prompts
from shared.errors import MissingComponent, UserError
from shared.prompts import TextTokenizer, Turn, assistant_turn, clone_turns, edit_turns, instruction, with_audio_pieces
from shared.schemas.edit import Edit
from shared.tags import EMOTIONS, FIRST_RELEASE_PARALINGUISTIC, SPEEDS, STYLES, TAGS, check_tag, check_text_tags


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    """A small sentencepiece model in the published layout: control ids 0-4, byte fallback, audio pieces last."""
    words = (prompts.AUDIO_EDIT_SYSTEM_PROMPT + " system human assistant").split()
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words, 12)) for _ in range(200)]
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=blob, model_type="unigram", vocab_size=440,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, control_symbols=["<|EOT|>", "<|BOT|>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(with_audio_pieces(blob.getvalue()))
    return TextTokenizer(processor)


def as_text(mixed: np.ndarray) -> str:
    return "".join(f"<audio_{k}>" for k in mixed)


def test_a_turn_of_one_audio_token_has_the_published_shape(tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode_chat([assistant_turn([1])], generation_prompt=False)
    role = tokenizer.encode("assistant\n")
    assert ids == [1, 4, *role, tokenizer.audio_offset + 1, 3]
    assert len(role) == 2 or tokenizer.decode(role) == "assistant\n"


@settings(max_examples=40, deadline=None)
@given(
    before=st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40),
    after=st.text(st.characters(codec="utf-8", exclude_characters="<>"), max_size=40),
    codes=st.lists(st.integers(0, 5119), min_size=1, max_size=30),
)
def test_joining_arrays_equals_encoding_the_whole_as_text(
    tokenizer: TextTokenizer, before: str, after: str, codes: list[int]
) -> None:
    mixed = np.array(codes, dtype=np.int32)
    fast = tokenizer.encode_chat([Turn("human", (before, mixed, after))])
    slow = [1, 4, *tokenizer.encode("human\n" + before + as_text(mixed) + after), 3, 4]
    assert fast == slow + tokenizer.encode("assistant\n")


def test_an_emotion_edit_reads_as_published(tokenizer: TextTokenizer) -> None:
    mixed = np.array([5, 6, 1030, 1031, 1032])
    system, human = edit_turns(Edit(type="emotion", detail="happy"), " Good day. ", mixed)
    assert (system.role, human.role) == ("system", "human")
    expected = "Make the following audio more happy. The text corresponding to the audio is: Good day.\n\n"
    assert human.content[0] == expected
    whole = tokenizer.encode_chat([system, human])
    text = "human\n" + expected + as_text(mixed) + "\n"
    slow = [1, 4, *tokenizer.encode("system\n" + prompts.AUDIO_EDIT_SYSTEM_PROMPT), 3, 4, *tokenizer.encode(text), 3]
    assert whole == [*slow, 4, *tokenizer.encode("assistant\n")]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (Edit(type="speed", detail="more slower"),
         "Make the following audio more more slower. The text corresponding to the audio is: Hi\n"),
        (Edit(type="style", detail="whisper"),
         "Make the following audio more whisper style. The text corresponding to the audio is: Hi\n"),
        (Edit(type="emotion", detail="remove"),
         "Remove any emotion in the following audio and the reference text is: Hi\n"),
        (Edit(type="style", detail="remove"),
         "Remove any speaking styles in the following audio and the reference text is: Hi\n"),
        (Edit(type="paralinguistic", target_text="Hi [Laughter]"),
         "Add some non-verbal sounds to make the audio more natural, the new text is : Hi [Laughter]\n"
         "  The text corresponding to the audio is: Hi\n"),
    ],
)  # fmt: skip
def test_instructions_read_as_published(edit: Edit, sentence: str) -> None:
    assert instruction(edit, "Hi") == sentence


def test_denoise_and_vad_need_no_text() -> None:
    for kind in ("denoise", "vad"):
        turns = edit_turns(Edit.model_validate({"type": kind}), None, [1, 2, 1024, 1025, 1026])
        assert str(turns[1].content[0]).endswith(" from the audio.\n\n")


def test_a_clone_puts_the_reference_between_the_speaker_marks(tokenizer: TextTokenizer) -> None:
    mixed = np.array([7, 8, 2000, 2001, 2002])
    system, human = clone_turns("What I said.", mixed, "Say this.")
    opening, reference, ending = system.content
    assert opening == (
        "Generate audio with the following timbre, prosody and speaking style\n\n[speaker_start]\n"
        "speaker name: debug\nspeaker prompt text: \nWhat I said.\nspeaker audio tokens: \n"
    )
    assert (list(reference), ending, human.content) == (list(mixed), "\n[speaker_end]\n", ("Say this.",))
    assert tokenizer.encode_chat([system, human])[:2] == [1, 4]


def test_the_tag_tables_have_the_published_sizes() -> None:
    assert len(EMOTIONS) == 14 + 1
    assert len(STYLES) == 32 + 1
    assert len(SPEEDS) == 4
    assert len(FIRST_RELEASE_PARALINGUISTIC) == 10
    assert all(meaning for table in TAGS.values() for meaning in table.values())


def test_an_unknown_tag_is_refused_with_the_nearest_known() -> None:
    with pytest.raises(UserError, match=r"Did you mean happy"):
        check_tag("emotion", "hapy")
    with pytest.raises(UserError, match=r"Known: faster"):
        check_tag("speed", "zzz")
    with pytest.raises(UserError, match=r"Kinds with tags"):
        check_tag("colour", "red")


def test_case_is_forgiven_unless_it_tells_tags_apart() -> None:
    assert check_tag("style", "Whisper") == "whisper"
    assert (check_tag("paralinguistic", "sigh"), check_tag("paralinguistic", "Sigh")) == ("sigh", "Sigh")
    assert check_text_tags("[cantonese] Well [surprise-oh], go") == "[Cantonese] Well [Surprise-oh], go"


def test_markers_of_the_tokenizer_in_a_text_are_refused() -> None:
    for text in ("a<|EOT|>b", "<audio_17>", "</s>"):
        with pytest.raises(UserError, match="reserved marker"):
            clone_turns(text, [], "Hello")
        with pytest.raises(UserError, match="reserved marker"):
            clone_turns("Hello", [], text)


def test_audio_ids_out_of_range_are_named(tokenizer: TextTokenizer) -> None:
    with pytest.raises(UserError, match="token 1 is 5120"):
        tokenizer.audio_ids([0, 5120])


def test_a_missing_or_broken_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingComponent, match=r"tokenizer\.model"):
        TextTokenizer.from_file(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(MissingComponent, match=r"tokenizer\.model"):
        TextTokenizer.from_file(tmp_path / "tokenizer.model")
