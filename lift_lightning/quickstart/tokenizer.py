"""The bundled model's tokenizer: byte-level BPE with single digits, learned on its own documents."""

from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lift_lightning.prompts import PREAMBLE
from lift_lightning.quickstart.text import documents

VOCAB_SIZE = 1536
END = "<|end|>"
PAD = "<|pad|>"
# The fixed parts of the prompt are one token each, as turn markers are in chat models: most of a short example would be
# spent on them otherwise.
TEMPLATE = (f"{PREAMBLE}\n\n### Instruction:\n", "\n\n### Input:\n", "\n\n### Response:\n")


def train_tokenizer(samples: int = 20_000) -> PreTrainedTokenizerFast:
    """Learn the merges on so many documents."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d| ?\p{L}+| ?[^\s\p{L}\d]+|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    markers = [AddedToken(part, normalized=False) for part in TEMPLATE]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(markers),
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        document.text if not document.prompt else _spoken(document.prompt) + document.text
        for document in documents(seed=0, count=samples)
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(markers)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=256,
        padding_side="right",
    )


def _spoken(prompt: str) -> str:
    for part in TEMPLATE:
        prompt = prompt.replace(part, "")
    return prompt
