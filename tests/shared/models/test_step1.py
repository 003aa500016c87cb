"""Step1 against the official implementation and against itself: whole sequences, packing, cache, static decode."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.profiler import ProfilerActivity, profile

from shared.models import step1_attention
from shared.models.step1 import Step1, Step1Config
from shared.models.step1_attention import CachedDecode, KVCache, SqrtAlibi, alibi_slopes

GOLDEN = Path(__file__).parents[2] / "data" / "golden" / "step1_small"


@pytest.fixture(scope="module")
def model() -> Step1:
    step1 = Step1(Step1Config.from_dict(json.loads((GOLDEN / "config.json").read_text())))
    step1.load_state_dict(load_file(GOLDEN / "model.safetensors"), strict=True)
    return step1.eval()


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "io.safetensors")


def dense_bias(heads: int, length: int) -> torch.Tensor:
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    bias = -alibi_slopes(heads)[:, None, None] * distance.clamp(min=0).sqrt()
    return bias.masked_fill(distance < 0, -torch.inf)


def test_whole_sequences_equal_the_official_implementation(model: Step1, golden: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        hidden, logits = model(golden["input_ids"])
    torch.testing.assert_close(hidden, golden["hidden_states"], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits, golden["logits"], atol=2e-4, rtol=0)


def test_slopes_of_48_heads_are_32_powers_then_16_odd_ones() -> None:
    slopes = alibi_slopes(48)
    assert slopes.shape == (48,)
    assert slopes[31].item() == pytest.approx(2.0**-8)
    assert slopes[32].item() == pytest.approx(2.0 ** (-4 / 32))
    assert slopes[47].item() == pytest.approx(2.0 ** (-4 * 31 / 32))


@pytest.mark.parametrize(("start", "count"), [(0, 7), (5, 3), (1500, 1), (900, 200)])
def test_the_strided_view_is_the_dense_bias_with_queries_reversed(start: int, count: int) -> None:
    view = SqrtAlibi(6).reversed_block(start, count, torch.device("cpu"))
    torch.testing.assert_close(view[0].flip(1), dense_bias(6, start + count)[:, start:])


def test_prefill_and_decode_reproduce_the_golden_logits(model: Step1, golden: dict[str, torch.Tensor]) -> None:
    ids = golden["input_ids"]
    cache = model.new_cache(slots=3, capacity=200)
    first = [model.prefill(ids[0, :100], cache, 2), model.prefill(ids[1, :37], cache, 0)]
    torch.testing.assert_close(model.lm_head(first[0]), golden["logits"][0, 99], atol=2e-4, rtol=0)
    torch.testing.assert_close(model.lm_head(first[1]), golden["logits"][1, 36], atol=2e-4, rtol=0)
    for step in range(60):
        hidden = model.decode(torch.stack([ids[0, 100 + step], ids[1, 37 + step]]), cache, [2, 0], rows=4)
        logits = model.lm_head(hidden)
        torch.testing.assert_close(logits[0], golden["logits"][0, 100 + step], atol=2e-4, rtol=0)
        torch.testing.assert_close(logits[1], golden["logits"][1, 37 + step], atol=2e-4, rtol=0)


def test_slots_of_one_length_attend_together_and_get_what_they_get_alone(
    model: Step1, golden: dict[str, torch.Tensor]
) -> None:
    ids, lengths = golden["input_ids"][0], {5: 40, 1: 40, 3: 40, 0: 40, 6: 17, 2: 40}

    def filled() -> KVCache:
        cache = model.new_cache(slots=7, capacity=64)
        for slot, length in lengths.items():
            model.prefill(ids[slot : slot + length], cache, slot)
        return cache

    slots, cache = list(lengths), filled()
    parts = CachedDecode(cache, slots, model.alibi).parts
    assert [range(7)[part[1]] for part in parts] == [range(6, 7), range(4), range(5, 6)]
    tokens = ids[100 : 100 + len(slots)]
    together = torch.stack([model.decode(tokens, cache, slots, rows=8) for _ in range(3)])
    for row, slot in enumerate(slots):
        alone = filled()
        steps = [model.decode(tokens[row : row + 1], alone, [slot], rows=8)[0] for _ in range(3)]
        assert torch.equal(torch.stack(steps), together[:, row])


def test_a_prompt_longer_than_a_chunk_equals_the_whole_sequence(model: Step1) -> None:
    ids = torch.randint(0, 512, (1, 700), generator=torch.Generator().manual_seed(1))
    cache = model.new_cache(slots=1, capacity=700)
    last = model.prefill(ids[0], cache, 0)
    with torch.no_grad():
        hidden, _ = model(ids)
    torch.testing.assert_close(last, hidden[0, -1], atol=1e-4, rtol=0)


def most_bytes(work: Callable[[], object]) -> int:
    """The most memory that a piece of work holds at a time on top of what is there before it, as torch allocates it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as measured:
        work()
    events = measured.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


def test_prefill_stays_under_its_memory_bound_however_long_the_prompt() -> None:
    config = Step1Config(hidden_size=96, intermediate_size=256, num_attention_heads=6, num_attention_groups=2,
                         num_hidden_layers=2, vocab_size=64)  # fmt: skip
    model = Step1(config)
    model.initialise()
    prompt, cache = torch.randint(0, 64, (1536,)), model.new_cache(slots=2, capacity=1536)
    model.prefill(prompt, cache, 0)  # the bias grows once and stays
    bound = model.chunk * (3 * 256 + 6 * 96) * 4
    assert most_bytes(lambda: model.prefill(prompt, cache, 1)) <= bound < 6 * 1536 * 1536 * 4 / 8
    cache.lengths = [1535, 1535]
    assert most_bytes(lambda: model.decode(torch.tensor([1, 2]), cache, [0, 1])) < 6 * 1536 * 4


def test_static_decode_equals_decode_and_ignores_idle_slots(model: Step1, golden: dict[str, torch.Tensor]) -> None:
    ids = golden["input_ids"]
    cache = model.new_cache(slots=4, capacity=128, zeroed=True)
    model.prefill(ids[0, :50], cache, 1)
    model.prefill(ids[1, :20], cache, 3)
    tokens = torch.tensor([0, ids[0, 50], 0, ids[1, 20]])
    logits = model.lm_head(model.decode_static(tokens, torch.tensor([0, 50, 0, 20]), cache, span=64))
    torch.testing.assert_close(logits[1], golden["logits"][0, 50], atol=2e-4, rtol=0)
    torch.testing.assert_close(logits[3], golden["logits"][1, 20], atol=2e-4, rtol=0)


def test_packed_documents_give_what_each_gives_alone_and_the_same_gradients(model: Step1) -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [torch.randint(0, 512, (n,), generator=generator) for n in (30, 11, 23)]
    packed = torch.cat(parts)[None]
    documents = torch.repeat_interleave(torch.tensor([4, 9, 4]), torch.tensor([30, 11, 23]))[None]

    def gradient(logits: list[torch.Tensor]) -> torch.Tensor:
        model.zero_grad()
        sum(x.square().mean(-1).sum() for x in logits).backward()
        return model.model.layers[0].self_attn.k_proj.weight.grad.clone()

    _, together = model(packed, document_ids=documents)
    alone = [model(part[None])[1] for part in parts]
    torch.testing.assert_close(together[0], torch.cat([x[0] for x in alone]), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient([together]), gradient(alone), atol=1e-3, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_sees_the_same_bias_and_documents(model: Step1, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step1_attention, "_compiled_flex", lambda: (flex_attention, create_block_mask))
    ids = torch.randint(0, 512, (2, 128), generator=torch.Generator().manual_seed(3))
    documents = torch.repeat_interleave(torch.tensor([0, 1, 2]), torch.tensor([50, 70, 8])).repeat(2, 1)
    logits = {}
    for kind in ("dense", "flex"):
        monkeypatch.setattr(model, "attention", kind)
        with torch.no_grad():
            logits[kind] = model(ids, document_ids=documents)[1]
    torch.testing.assert_close(logits["flex"], logits["dense"], atol=1e-4, rtol=0)


def test_right_padding_leaves_earlier_logits_alone(model: Step1, golden: dict[str, torch.Tensor]) -> None:
    padded = golden["input_ids"].clone()
    padded[:, 90:] = 0
    with torch.no_grad():
        _, logits = model(padded)
    torch.testing.assert_close(logits[:, :90], golden["logits"][:, :90], atol=2e-4, rtol=0)


def test_gradient_checkpointing_changes_no_gradient(model: Step1, golden: dict[str, torch.Tensor]) -> None:
    grads = []
    for flag in (False, True):
        model.gradient_checkpointing = flag
        model.zero_grad()
        model(golden["input_ids"][:, :40])[1].square().mean().backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    model.gradient_checkpointing = False
    torch.testing.assert_close(grads[0], grads[1])


def test_bfloat16_stays_near_float32(golden: dict[str, torch.Tensor], model: Step1) -> None:
    half = Step1(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    with torch.no_grad():
        _, logits = half(golden["input_ids"])
    relative = (logits.float() - golden["logits"]).norm() / golden["logits"].norm()
    assert relative < 0.03


@pytest.mark.parametrize("lengths", [[60], [130], [100, 97, 3]])
def test_training_in_bfloat16_on_a_cpu_has_the_gradients_of_float32(model: Step1, lengths: list[int]) -> None:
    ids = torch.randint(0, 512, (2, sum(lengths)), generator=torch.Generator().manual_seed(0))
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
    gradients = []
    for enabled in (False, True):
        fresh = Step1(model.config)
        fresh.initialise(seed=1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = fresh.hidden_states(ids, document_ids=documents).float().square()[..., :8].mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in fresh.parameters() if p.grad is not None]))
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_a_model_that_generated_can_be_trained_afterwards(golden: dict[str, torch.Tensor], model: Step1) -> None:
    fresh = Step1(model.config)
    with torch.inference_mode():
        fresh.prefill(golden["input_ids"][0, :20], fresh.new_cache(slots=1, capacity=20), 0)
    fresh(golden["input_ids"][:, :20])[1].sum().backward()
    assert fresh.lm_head.weight.grad is not None


def test_a_full_slot_says_what_to_do(model: Step1) -> None:
    cache = model.new_cache(slots=1, capacity=8)
    with pytest.raises(ValueError, match=r"9 more do not fit.*raise the cache capacity"):
        model.prefill(torch.zeros(9, dtype=torch.long), cache, 0)


def test_a_config_without_a_size_names_it() -> None:
    with pytest.raises(ValueError, match="vocab_size"):
        Step1Config.from_dict({"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2,
                               "num_attention_groups": 1, "num_hidden_layers": 1})  # fmt: skip
