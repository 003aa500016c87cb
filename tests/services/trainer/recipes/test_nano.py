"""The small checkpoint's recipes, as far as they need neither packages from outside nor hours."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from services.trainer.recipes.nano import (
    alignment,
    augment,
    bundle,
    codes,
    corpus,
    flow,
    llm,
    manners,
    perturbed,
    recognizer,
    restore,
    sounds,
    text_tokenizer,
    texts,
)
from services.trainer.recipes.nano.codes import Item
from services.trainer.recipes.nano.quantizer import Codebook
from services.trainer.recipes.nano.run import Run, cosine
from services.trainer.recipes.nano.teacher import MANNERS, SAMPLE_RATE_HZ, shift_formants, whisperise
from shared.codes import LINGUISTIC_PAD
from shared.models.flow import Flow, FlowConfig
from shared.models.recognizer import Recognizer
from shared.models.spectral import SpectralConfig, SpectralVocoder
from shared.models.step1 import Step1
from shared.prompts import TextTokenizer

NANO = Path(__file__).resolve().parents[4] / "models" / "nano"

GLOSS = '00001740 03 n 01 thing 0 000 | a thing; "{0} are seldom far away"; "the {0} of the whole long day"\n'


@pytest.fixture
def wordnet(tmp_path: Path) -> Path:
    for part in ("noun", "verb", "adj", "adv"):
        lines = [GLOSS.format(f"{part}s number {word}") for word in ("one", "two", "three", "four", "five", "six")]
        (tmp_path / f"data.{part}").write_text("".join(lines))
    return tmp_path


def voice(seconds: float = 1.0, pitch: float = 120.0) -> np.ndarray:
    """A buzz with two resonances."""
    time = np.arange(int(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 40))
    return (0.1 * np.asarray(wave)).astype(np.float32)


def test_sentences_are_cleaned_and_split_by_their_text_alone(wordnet: Path) -> None:
    sentences = texts.english(wordnet)
    assert len(sentences) == 48
    assert all(s.text[0].isupper() and s.text[-1] == "." for s in sentences)
    assert all(s.held_out == texts.is_held_out(s.text) for s in sentences)


def test_the_plan_is_the_same_every_time_and_groups_share_voice_and_text(wordnet: Path, tmp_path: Path) -> None:
    hsk = tmp_path / "hsk.json"
    hsk.write_text('[{"chinese": "今天天气很好。"}, {"chinese": "我们去公园散步。"}]', encoding="utf-8")
    found = type("Found", (), {"wordnet": wordnet, "hsk": hsk})()
    first, again = (list(islice(corpus.plan(found), 60)) for _ in range(2))
    assert first == again
    for row in first:
        twin = next(r for r in first if r.group == row.group)
        assert (row.text, row.voice) == (twin.text, twin.voice)
        assert not row.voice.keys() & set(corpus.HELD_OUT_VOICES) or row.held_out


def test_a_whisper_keeps_the_resonances_and_loses_the_pitch() -> None:
    spoken = voice()
    whispered = whisperise(spoken, seed=1)
    assert whispered.shape == spoken.shape

    def periodicity(x: np.ndarray) -> float:
        lag = SAMPLE_RATE_HZ // 120
        return float(np.corrcoef(x[:-lag], x[lag:])[0, 1])

    assert periodicity(spoken) > 0.95
    assert abs(periodicity(whispered)) < 0.3


def test_moving_formants_up_shortens_by_the_same_factor() -> None:
    assert len(shift_formants(voice(), 1.25)) == pytest.approx(SAMPLE_RATE_HZ / 1.25, abs=2)


def test_noise_comes_at_the_ratio_asked_for() -> None:
    rng = np.random.default_rng(0)
    clean = voice()
    noisy = augment.add_noise(clean, augment.colored_noise(len(clean), 1.0, rng), 10.0)
    ratio = 10 * np.log10(np.mean(clean**2) / np.mean((noisy - clean) ** 2))
    assert ratio == pytest.approx(10.0, abs=0.2)


def test_degraded_speech_keeps_its_length_and_its_bounds() -> None:
    clean = voice()[::2].copy()
    for seed in range(12):
        out = augment.degrade(clean, np.random.default_rng(seed), lambda: clean)
        assert out.shape == clean.shape
        assert float(np.abs(out).max()) <= 1.0
        assert np.isfinite(out).all()


def test_pauses_are_put_in_and_nothing_is_taken_out() -> None:
    audio = voice()[::2].copy()
    paused, _ = codes.with_pauses(audio, 2, np.random.default_rng(0))
    assert len(paused) > len(audio) + 2 * 0.35 * 16_000 - 1
    assert np.count_nonzero(paused) == np.count_nonzero(audio)


@pytest.mark.parametrize("cosine_distance", [False, True])
def test_a_codebook_finds_the_clusters_and_passes_gradients_through(cosine_distance: bool) -> None:
    torch.manual_seed(0)
    centres = torch.nn.functional.normalize(torch.randn(6, 5), dim=1) * 4
    data = centres.repeat(40, 1) + 0.01 * torch.randn(240, 5)
    book = Codebook(6, 5, cosine=cosine_distance)
    book.fit(data, rounds=10)
    x = data.clone().requires_grad_()
    quantised, found, commitment = book(x)
    assert len(found.unique()) >= 5
    quantised.sum().backward()
    assert x.grad is not None
    assert float(commitment.detach()) < 1.0


def test_codes_that_nothing_uses_move_to_live_data() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 2, decay=0.5)
    book.centroids.copy_(torch.full((8, 2), 100.0))
    book.centroids[0] = 0.0
    for _ in range(20):
        book(torch.randn(64, 2))
    assert float(book.centroids.abs().max()) < 10.0


def test_the_schedule_warms_up_and_ends_where_it_should() -> None:
    assert cosine(0, 1000, 1.0, 0.1) == pytest.approx(0.01)
    assert cosine(100, 1000, 1.0, 0.1) == pytest.approx(1.0)
    assert cosine(1000, 1000, 1.0, 0.1) == pytest.approx(0.1)


def test_a_stopped_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_DATA", str(tmp_path))

    def trained(stop: int | None) -> torch.Tensor:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 1)
        optimizer = torch.optim.AdamW(layer.parameters(), 0.1)
        run = Run(
            "whole" if stop is None else "halves", {"model": layer, "optimizer": optimizer}, stop or 8, save_every=1
        )
        while run.going:
            x = torch.from_numpy(np.random.default_rng(run.step).standard_normal((4, 3)).astype(np.float32))
            loss = layer(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            run.done_step({"loss": loss.detach()})
        return layer.weight.detach().clone()

    whole = trained(None)
    trained(4)
    assert torch.equal(trained(8), whole)


def test_every_pair_of_manners_is_an_edit() -> None:
    for source in MANNERS:
        for target in MANNERS:
            if source != target:
                edit = llm.edit_between(source, target)
                assert edit.type == (target if target != "neutral" else source).partition("/")[0]


def test_a_result_travels_in_pieces_and_arrives_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_DATA", str(tmp_path / "there"))
    layer = torch.nn.Linear(300, 300)
    run = Run("flow", {"model": layer, "optimizer": torch.optim.AdamW(layer.parameters())}, 1)
    run.done_step({"loss": 1.0}, log_every=1)
    pieces = bundle.pack_result("flow", tmp_path / "flow.tar", megabytes=0.1)
    assert len(pieces) > 1
    assert all(piece.stat().st_size <= 100_000 for piece in pieces)

    monkeypatch.setenv("EDITX_DATA", str(tmp_path / "here"))
    (tmp_path / "here").mkdir()
    bundle.unpack(pieces)
    arrived = torch.nn.Linear(300, 300)
    assert Run("flow", {"model": arrived}, 1).step == 1
    torch.testing.assert_close(arrived.weight, layer.weight, atol=0, rtol=1e-2)


def test_a_bundle_that_leads_out_of_the_data_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDITX_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "bad.tar", "w") as out:
        entry = tarfile.TarInfo("../outside")
        entry.size = 1
        out.addfile(entry, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        bundle.unpack([tmp_path / "bad.tar"])
    assert not (tmp_path / "outside").exists()


def test_a_released_checkpoint_becomes_runs_again_with_its_weights_and_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDITX_DATA", str(tmp_path / "data"))
    root = tmp_path / "released"
    shutil.copytree(NANO, root)
    steps = {"llm": 6, "flow": 5, "heard": 0, "vocoder": 4, "recognizer": 3, "words": 2}
    changes = {"emotion/sad": [-0.1, -0.4, 0.2, -0.5, 0.0]}
    (root / "editx.json").write_text(json.dumps({"name": "nano", "manners": changes, "steps": steps}))
    restore.restore(root)
    model = Step1(llm.config(llm.CPU, TextTokenizer.from_file(text_tokenizer.tokenizer_file()).vocab_size))
    assert Run("llm", {"model": model}, 0).step == 6
    released = load_file(root / "Step-Audio-EditX" / "model.safetensors")
    assert torch.equal(model.lm_head.weight, released["lm_head.weight"].float())
    average = torch.optim.swa_utils.AveragedModel(Flow(FlowConfig.from_dict(flow.SECTION)))
    assert Run("flow", {"average": average}, 0).step == 5
    assert int(average.n_averaged) == 5
    assert [Run(name, {}, 0).step for name in ("words", "heard")] == [2, 0], "what was not trained has no run"
    assert manners.read() == changes
    assert Run("vocoder", {"model": SpectralVocoder(SpectralConfig())}, 0).step == 4
    assert Run("recognizer", {"model": Recognizer(recognizer.config())}, 0).step == 3
    fresh = Recognizer(recognizer.config())
    recognizer.start(fresh)
    known = average.module.state_dict()
    assert torch.equal(fresh.embedding.embedding.weight, known["input_embedding.embedding.weight"])
    assert torch.equal(fresh.encoders[2].norm_ff.weight, known["encoder.encoders.2.norm_ff.weight"])  # type: ignore[union-attr]
    restore.write_run("llm", {}, 99)
    assert Run("llm", {}, 0).step == 6, "a run that is there is left alone"


def test_the_tokenizers_of_a_release_give_codes_and_a_voice() -> None:
    tokenizers = codes.open_tokenizers(str(NANO), 1)
    linguistic, semantic = tokenizers(voice(1.2)[::3].copy())
    assert (len(linguistic), len(semantic)) == (10, 15)  # of 0.6 s
    assert tokenizers.voice(voice(1.2)).shape == (192,)


def test_readings_for_the_recogniser_are_english_and_speakable_and_a_batch_keeps_their_lengths() -> None:
    rng = np.random.default_rng(0)

    def reading(text: str, language: str, groups: int) -> Item:
        made = rng.integers(0, 1024, groups * 2), rng.integers(0, 4096, groups * 3)
        return {"row": {"text": text, "language": language}, "clean": made}

    found = recognizer.readings(
        [reading("Well, it was.", "en", 9), reading("你好", "zh", 9), reading("So.", "en", 5),
         reading("Far too much for so little time.", "en", 2)]
    )  # fmt: skip
    assert [len(one.letters) for one in found] == [2, 11]
    recipe = recognizer.RecognizerRecipe(steps=1, frames=60, replaced=1.0)
    for _ in range(6):
        pairs, lengths, texts = recognizer.draw(found, rng, recipe)
        assert lengths.tolist() in ([15], [15, 27], [27])
        assert len(texts) == len(lengths)
        assert bool((pairs[0, 2::3, 0][: lengths[0] // 3] == LINGUISTIC_PAD).all()), "what fills a pair stays"
        assert bool((pairs[0, : lengths[0], 1] > LINGUISTIC_PAD).all())


def test_replaced_codes_of_an_excerpt_keep_their_kind_and_padding_stays() -> None:
    rng = np.random.default_rng(0)
    linguistic, semantic = rng.integers(1024, size=20), rng.integers(4096, size=30)
    mel, speaker = rng.normal(size=(60, 80)).astype(np.float16), rng.normal(size=192).astype(np.float32)
    cheap = [{"clean": (linguistic, semantic), "mel": mel, "speaker": speaker}]
    recipe = flow.FlowRecipe(steps=1, batch=3, groups=8, cheap=1.0, replaced=1.0)
    pairs, lengths, _, mel_lengths, _ = flow.Batches(None, [], cheap, [], recipe).draw(rng)  # type: ignore[arg-type]
    assert lengths.tolist() == [24] * 3
    assert mel_lengths.tolist() == [48] * 3
    assert (pairs[:, 2::3, 0] == 1024).all()
    spoken = pairs[:, [k for k in range(24) if k % 3 != 2], 0]
    assert int(spoken.max()) < 1024
    assert int(pairs[..., 1].min()) >= 1025
    assert int(pairs[..., 1].max()) < 1025 + 4096
    kept = flow.Batches(None, [], cheap, [], flow.FlowRecipe(steps=1, batch=1, groups=10, cheap=1.0, replaced=0.0))  # type: ignore[arg-type]
    pairs, *_ = kept.draw(rng)
    assert (pairs[0, :, 1].numpy() - 1025).tolist() == semantic.tolist()


def test_a_reading_at_another_speed_is_one_of_another_voice_and_its_mel_is_as_long() -> None:
    row = {"index": 7, "group": 5, "voice_name": "af_sky", "manner": "neutral", "duration_s": 2.2, "frames": [4, 6]}
    faster = perturbed.at_speed(row, 3)
    assert (faster["voice_name"], faster["speed"], faster["duration_s"]) == ("af_sky@1.12", 1.12, 1.9643)
    others = [perturbed.at_speed(row, place) for place in range(len(perturbed.SPEEDS))]
    assert len({5, *(other["group"] for other in others)}) == 5, "its own group, as its voice is its own"
    store = SimpleNamespace(audio=lambda _: voice(2.2))
    coded = SimpleNamespace(store=store, position={7: 0}, items=[])
    batches = flow.Batches(coded, [], [], [], flow.FlowRecipe(steps=1, batch=1))  # type: ignore[arg-type]
    assert [len(batches.mel(which)) for which in (row, faster)] == [110, 98]


def test_readings_with_sounds_keep_their_mels_and_have_their_share_of_the_excerpts(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = (60, 36)
    mels = [rng.normal(size=(length, 80)).astype(np.float16) for length in lengths]
    made = [
        {
            "row": {"index": k},
            "clean": (np.arange(len(m) // 3), np.arange(len(m) // 2)),
            "mel": m,
            "speaker": np.zeros(192),
        }
        for k, m in enumerate(mels)
    ]
    codes.save_items(made, tmp_path / "shard-00000.npz")
    kept = list(codes.load_items(tmp_path / "shard-00000.npz"))
    assert all((item["mel"] == mel).all() for item, mel in zip(kept, mels, strict=True))
    recipe = flow.FlowRecipe(steps=1, batch=1, cheap=1.0, sounding=0.2)
    batches = flow.Batches(None, [], [{"mel": None}], kept, recipe)  # type: ignore[arg-type]
    share = np.mean([batches._item(rng)[1] is not None for _ in range(2000)])
    assert 0.17 < share < 0.23


def reading(voice_name: str, group: int, manner: str = "neutral") -> codes.Item:
    """A reading of one group of codes."""
    row = {"index": group, "group": group, "voice_name": voice_name, "manner": manner, "text": "Yes."}
    return {"row": row, "clean": (np.arange(2), np.arange(3))}


@pytest.fixture
def drawing(monkeypatch: pytest.MonkeyPatch) -> Callable[..., llm.Examples]:
    """Makes the language model's examples from the teacher's readings given and virtual ones."""
    monkeypatch.setattr(llm.plain, "items", lambda: [reading("virtual", k // 2) for k in range(400)])
    monkeypatch.setattr(llm.perturbed, "items", lambda: [])
    monkeypatch.setattr(llm.texts, "english", lambda _: [])
    monkeypatch.setattr(llm.assets, "prepare", lambda: SimpleNamespace(wordnet=None))
    monkeypatch.setattr(llm.text_tokenizer, "tokenizer_file", lambda: NANO / "Step-Audio-EditX" / "tokenizer.model")
    tokenizer = TextTokenizer.from_file(NANO / "Step-Audio-EditX" / "tokenizer.model")

    def draw(items: list[codes.Item], sounding: Sequence[codes.Item] = (), **recipe: Any) -> llm.Examples:
        monkeypatch.setattr(llm.sounds, "items", lambda: sounding)
        settings = llm.LlmRecipe(steps=1, tokens=64, **recipe)
        return llm.Examples(SimpleNamespace(items=items), tokenizer, settings)  # type: ignore[arg-type]

    return draw


def test_the_teachers_readings_have_their_share_of_the_sequences(drawing: Callable[..., llm.Examples]) -> None:
    teachers = [reading("af_sky", k // 2, manner) for k in range(4) for manner in ("neutral", "emotion/sad")]
    pool = llm.Pool(teachers)
    rng = np.random.default_rng(0)
    for _ in range(20):  # a sentence that was read twice in one manner is no pair
        assert {item["row"]["manner"] for item in pool.same_words(rng)} == {"neutral", "emotion/sad"}
    first, second = pool.same_voice(rng)
    assert first is not second
    assert first["clean_mixed"].tolist() == [0, 1, 1024, 1025, 1026]
    examples = drawing(teachers, teachers=0.3)
    drawn = [examples.pool(rng) is examples.pools["teacher"] for _ in range(2000)]
    assert 0.27 < float(np.mean(drawn)) < 0.33


def test_what_is_left_without_pauses_is_copied_from_an_exact_source(drawing: Callable[..., llm.Examples]) -> None:
    paused = (np.arange(20) + 3, np.arange(30) + 7)
    plain = reading("af_sky", 0)
    varied = plain | {"noisy": plain["clean"], "paused": paused, "pauses": [(0.29, 0.38)]}
    said = {"phonemes": [43, 44], "frames": [1, 1, 1, 1], "duration_s": 1.2}  # speech from 0.3 to 0.9 s of ten groups
    readings = [r | {"row": r["row"] | said, "clean": paused} for r in (varied, reading("af_sky", 1))]
    examples = drawing(readings, teachers=1.0)
    rng = np.random.default_rng(0)
    drawn = [examples.vad(rng) for _ in range(60)]
    lengths, sources = set(), set()
    for example in drawn:
        shown = np.flatnonzero(example.source[:, 0] >= 0)
        lengths.add(len(shown) // 5)
        sources.add((int((example.ids >= examples.tokenizer.audio_offset).sum()) - len(shown)) // 5)
        assert (example.ids[example.source[shown, 0]] == example.ids[shown + 1]).all()
        assert (example.source[:, 1:] == -1).all()
        assert example.exact[example.source[shown, 0]].all()
        assert not example.exact[example.learned].any()
    assert lengths == {10 - 4, 20 - 4}  # pauses put in; the silence from 0.95 to 1.45 s and longer between two readings
    assert {10, 20, 20 + llm.LONGEST_SILENCE} <= sources <= {10, *range(20, 21 + llm.LONGEST_SILENCE)}


def test_a_sound_is_put_in_where_its_tag_stands() -> None:
    rate = sounds.RATE_HZ
    audio = np.concatenate([np.full(round(0.8 * rate), 0.1), np.full(round(0.8 * rate), 0.2)]).astype(np.float32)
    audio[round(0.79 * rate) : round(0.81 * rate)] = 0
    row = {
        "text": "Ab cd.",
        "language": "en",
        "phonemes": [43, 44, 16, 46, 47, 4],
        "frames": [2] * 8,
        "duration_s": 1.6,
    }
    record, made = sounds.with_sound(row, audio, np.full(round(0.4 * rate), 0.5, np.float32), "Sigh", 1)
    assert record["text"] == "Ab [Sigh] cd."
    assert record["duration_s"] == pytest.approx(2.0)
    assert record["at_s"] == pytest.approx(0.8, abs=0.01)
    assert (made[round(0.81 * rate) : round(1.19 * rate)] == 0.5).all()
    starts = alignment.char_starts(record)
    assert starts[[3, 10]] == pytest.approx([0.8, 1.2])
    assert alignment.words(row | {"text": "Ab"}) is None


def test_a_sound_is_learned_from_a_reading_and_itself_with_it(drawing: Callable[..., llm.Examples]) -> None:
    source = reading("af_sky", 0) | {"clean": (np.arange(8) + 3, np.arange(12) + 7)}
    source["row"] |= {"index": 4, "text": "Ab cd.", "phonemes": [43, 44, 16, 46, 47, 4], "frames": [1] * 8}
    source["row"] |= {"duration_s": 0.48, "language": "en"}
    changes = {
        "text": "Ab [Sigh] cd.",
        "phonemes": [43, 44, 16, -1, 16, 46, 47, 4],
        "frames": [1] * 4 + [4, 0] + [1] * 4,
    }
    row = source["row"] | changes | {"duration_s": 0.72, "at_s": 0.24, "put_in_s": 0.24}
    target = {"row": row, "clean": (np.arange(12) + 30, np.arange(18) + 70)}
    examples = drawing([source, reading("af_sky", 1)], sounding=[target])
    example = examples.sound(np.random.default_rng(0))
    first = len(example.ids) - 1 - 30
    seen = example.source[first - 1 : first + 29, 1] >= 0
    assert seen[:10].all()
    assert not seen[10:20].any()
    assert seen[20:].all()
    assert (example.text[first - 1 : first + 29] >= 0).any(1).all()
