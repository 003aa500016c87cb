"""A tiny checkpoint of the language model: random weights, a small text tokenizer, the published layout."""

import io
import os

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from shared.checkpoints import Checkpoint
from shared.models.step1 import Step1, Step1Config
from shared.prompts import AUDIO_EDIT_SYSTEM_PROMPT, TextTokenizer, with_audio_pieces

collect_ignore = [] if os.environ.get("EDITX_VLLM_PYTHON") else ["test_vllm_integration.py"]
AUDIO_OFFSET = 64
VOCAB = AUDIO_OFFSET + 5120


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "integration: needs a package that the project's environment does not have")


@pytest.fixture(scope="session")
def tiny() -> Step1:
    """Random and sharp enough that its choices differ from token to token."""
    torch.manual_seed(0)
    model = Step1(
        Step1Config(hidden_size=96, intermediate_size=160, num_attention_heads=6, num_attention_groups=2,
                    num_hidden_layers=2, vocab_size=VOCAB)
    )  # fmt: skip
    model.initialise(std=0.15)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("tiny")
    words = (AUDIO_EDIT_SYSTEM_PROMPT + " system human assistant").split()
    generator = np.random.default_rng(0)
    sentences = [" ".join(generator.choice(words, 12)) for _ in range(200)]
    blob = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=blob, model_type="unigram", vocab_size=440,
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, unk_id=0, bos_id=1,
        eos_id=2, pad_id=-1, control_symbols=["<|EOT|>", "<|BOT|>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(with_audio_pieces(blob.getvalue()))
    vocabulary = TextTokenizer.from_file(folder / "tokenizer.model").vocab_size
    config = Step1Config(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_attention_groups=2,
                         num_hidden_layers=2, vocab_size=vocabulary)  # fmt: skip
    model = Step1(config)
    model.initialise(std=0.15, seed=1)
    (folder / "config.json").write_text(config.to_json())
    save_file(model.state_dict(), folder / "model.safetensors")
    return Checkpoint.resolve(folder)
