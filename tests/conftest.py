"""What several folders of tests need: a tiny tokenizer that merges as the real ones do, and the published traces if they are at hand."""

import os
from pathlib import Path

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from reasonscope.data.progress import Work, listening

# No deadline: on a busy machine it fails at random, and a mutant would seem to be noticed.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")
# Ray's workers yield to everything else, by minutes where other tests keep the cores busy.
os.environ.update(RAY_worker_niceness="0", HF_HUB_OFFLINE="1")
os.environ.pop("COLUMNS", None)  # Rich folds what it says at the width of whoever runs the tests

# The pattern of Qwen2: digits one by one, newlines kept whole and merged with the punctuation before them.
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "Okay, so I need to add 3 and 4.\n\nWait, let me check that: 3 + 4 = 7.\n\nAlternatively, I can count.\n\nThe answer is 7.",
    "<think>\nHmm.\n</think>\n\nThe final answer is \\boxed{7}.\n\n",
    "Question: what is 3 + 4?\n\nIs it 7? Wait, is it 7?\n\n Wait, 7. Yes.\nFirst step (one)\n\nSecond step\n\n\nThird: x = y * 2.\n",
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """Byte-level BPE with the pre-tokenizer of Qwen2 and the think tags as (non-special) added tokens."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS * 4, trainer)
    tok.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    return tok


@pytest.fixture(scope="module")
def model():
    """The organism; most files of tests have another model by this name."""
    from reasonscope.probes.models.model import load_model  # here, so that tests of data do not wait for torch

    return load_model("organism", dtype="float32")


@pytest.fixture
def engine(model):
    """A stand-in for vLLM that serves the organism."""
    from fake_vllm import Engine

    from reasonscope.probes.models.loading import locate

    return Engine(model.hf, model.tokenizer, str(locate("organism")))


@pytest.fixture
def address(engine):
    """Where that stand-in answers."""
    from fake_vllm import serving

    with serving(engine) as url:
        yield url


class Heard:
    """A listener that keeps all work and all lines in the order in which they came."""

    def __init__(self):
        self.works: list[Work] = []
        self.lines: list[str] = []

    def __iter__(self):
        return iter(self.works)

    def begin(self, work):
        self.works.append(work)

    def end(self, work):
        pass

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def heard():
    """What the test's work said about itself."""
    listener = Heard()
    with listening(listener):
        yield listener


@pytest.fixture(scope="session")
def real_traces() -> Path:
    """Published Thought Anchors traces beside the checkout; skips where there are none."""
    path = Path(__file__).parents[2] / "shared" / "data" / "thought_anchors"
    if not path.is_dir():
        pytest.skip(f"no published traces in {path}")
    return path
