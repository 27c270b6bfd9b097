"""The ids of a whole example, written out for three kinds of tokenizer and for SmolLM2: any change of them shows here.

A change of ids means that cached tokenisations are stale: raise PROMPT_VERSION with it.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lift_lightning.collate import pad_batch
from lift_lightning.prompts import PREAMBLE, adds_bos, choose_pad_id, encode_example, encode_prompt, render_prompt

# An example in the manner of MATH-10K: a letter and a sign beyond ASCII, digits, a comma between them, a line break.
INSTRUCTION = "Zoë pays 1,250 € for 5 chairs.\nHow much is one chair?"
INPUT = "Prices are in euro, 20% tax included."
TARGET = "1,250 / 5 = 250.\nThe answer is 250."

# What the tokenizers are trained on: most words of the prompts, no digits, nothing beyond ASCII.
CORPUS = [PREAMBLE, "### Instruction:", "### Input:", "### Response:", "How much is one chair?", "The answer is."] * 4
CORPUS += ["Prices are in euro, tax included.", "The chairs and the price of a chair, which is in the answer."] * 2
BYTES = [f"<0x{i:02X}>" for i in range(256)]


def like_gpt2() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as of GPT-2 and SmolLM2: one special token, which ends, pads, and never begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    names = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|end|>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def like_llama2() -> PreTrainedTokenizerFast:
    """BPE with a mark for the space, bytes for letters that it does not know, a BOS in front, padded with <unk>."""
    split = pre_tokenizers.Metaspace(prepend_scheme="first")
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = split
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    learned = json.loads(trained.to_str())["model"]
    # Anew, because the bytes are no special tokens.
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = sentencepiece_decoder()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def like_t5() -> PreTrainedTokenizerFast:
    """Unigram pieces, a pad token of its own, no BOS, and an EOS that is put behind every text."""
    words = dict.fromkeys(word for text in CORPUS for word in text.split())
    pieces = [(f"▁{word}", -1.0) for word in words] + [("▁", -3.0)]
    pieces += [(letter, -4.0) for letter in dict.fromkeys("".join(words))]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((byte, 0.0) for byte in BYTES), *pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.decoder = sentencepiece_decoder()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")


def smollm2() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(os.environ["LIFT_SMOLLM2_DIR"], local_files_only=True)


def sentencepiece_decoder() -> decoders.Decoder:
    return decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )


# ---------------------------------------------------------------- ids


@dataclass(frozen=True)
class Ids:
    """Of the prompt without and with an input, and of the target with its EOS; apart by spaces."""

    bare: str
    with_input: str
    target: str

    def prompt(self, with_input: bool) -> list[int]:
        return [int(word) for word in (self.with_input if with_input else self.bare).split()]

    def answer(self) -> list[int]:
        return [int(word) for word in self.target.split()]


GPT2 = Ids(
    bare="""
    337 266 296 327 290 324 338 257 336 14 323 318 257 332 290 326 335 329 328 339 285 333 320 84 14 199 199
    270 330 26 199 58 79 128 105 221 80 65 89 83 221 17 12 18 21 16 221 159 225 106 221 70 79 82 221 21 287 83
    14 199 302 325 72 266 321 69 287 31 199 199 270 322 26 199
    """,
    with_input="""
    337 266 296 327 290 324 338 257 336 14 323 318 257 332 290 326 335 329 328 339 285 333 320 84 14 199 199
    270 330 26 199 58 79 128 105 221 80 65 89 83 221 17 12 18 21 16 221 159 225 106 221 70 79 82 221 21 287 83
    14 199 302 325 72 266 321 69 287 31 199 199 270 331 319 26 199 48 264 67 258 257 82 69 298 221 69 85 294
    12 221 18 16 5 299 88 298 67 76 85 68 69 68 14 199 199 270 322 26 199
    """,
    target="""
    17 12 18 21 16 221 15 221 21 221 29 221 18 21 16 14 199 291 300 266 221 18 21 16 14 0
    """,
)
LLAMA2 = Ids(
    bare="""
    1 293 264 309 312 303 335 297 327 328 293 274 295 273 301 272 295 294 338 287 279 261 293 270 301 288 275
    294 319 326 328 294 284 284 332 331 271 288 309 292 306 283 281 284 280 275 288 295 323 319 275 285 289
    295 288 261 13 13 296 259 318 327 262 13 93 283 198 174 293 284 271 292 287 293 52 260 53 56 51 293 229
    133 175 293 276 283 286 293 56 325 287 261 13 265 312 293 281 305 277 303 293 304 275 325 263 13 13 296
    259 293 268 326 262 13
    """,
    with_input="""
    1 293 264 309 312 303 335 297 327 328 293 274 295 273 301 272 295 294 338 287 279 261 293 270 301 288 275
    294 319 326 328 294 284 284 332 331 271 288 309 292 306 283 281 284 280 275 288 295 323 319 275 285 289
    295 288 261 13 13 296 259 318 327 262 13 93 283 198 174 293 284 271 292 287 293 52 260 53 56 51 293 229
    133 175 293 276 283 286 293 56 325 287 261 13 265 312 293 281 305 277 303 293 304 275 325 263 13 13 296
    259 318 282 284 289 288 262 13 267 301 273 295 294 286 275 337 293 275 289 332 260 293 53 51 40 338 291
    337 273 280 289 274 275 274 261 13 13 296 259 293 268 326 262 13
    """,
    target="""
    293 52 260 53 56 51 293 50 293 56 293 64 293 53 56 51 261 13 329 339 303 293 53 56 51 261 2
    """,
)
T5 = Ids(
    bare="""
    259 260 261 262 263 264 265 266 267 265 268 263 269 270 271 272 13 13 321 321 321 274 13 93 301 198 174
    297 317 305 318 304 297 52 329 53 56 51 297 229 133 175 297 331 301 308 297 56 290 315 13 325 301 302 278
    260 279 280 13 13 321 321 321 276 13
    """,
    with_input="""
    259 260 261 262 263 264 265 266 267 265 268 263 269 270 271 272 13 13 321 321 321 274 13 93 301 198 174
    297 317 305 318 304 297 52 329 53 56 51 297 229 133 175 297 331 301 308 297 56 290 315 13 325 301 302 278
    260 279 280 13 13 321 321 321 275 13 328 308 303 310 299 304 285 286 287 297 53 51 40 288 289 13 13 321
    321 321 276 13
    """,
    target="""
    297 52 329 53 56 51 297 50 297 56 297 64 297 53 56 51 315 13 327 311 299 282 260 297 53 56 51 315 1
    """,
)
SMOLLM2 = Ids(
    bare="""
    19798 314 354 5785 338 6601 253 3856 30 9517 253 2426 338 13674 32873 260 3116 30 198 198 3757 20880 42
    198 74 95 26547 16826 216 33 28 34 37 32 24927 327 216 37 21601 30 198 2020 1083 314 582 9192 47 198 198
    3757 14212 42 198
    """,
    with_input="""
    19798 314 354 5785 338 6601 253 3856 30 9517 253 2426 338 13674 32873 260 3116 30 198 198 3757 20880 42
    198 74 95 26547 16826 216 33 28 34 37 32 24927 327 216 37 21601 30 198 2020 1083 314 582 9192 47 198 198
    3757 18100 42 198 64 12855 359 281 22989 28 216 34 32 21 3024 3249 30 198 198 3757 14212 42 198
    """,
    target="""
    33 28 34 37 32 2272 216 37 446 216 34 37 32 30 198 504 2988 314 216 34 37 32 30 2
    """,
)

KINDS = pytest.mark.parametrize(
    ("make", "ids", "bos"),
    [
        pytest.param(like_gpt2, GPT2, None, id="gpt2"),
        pytest.param(like_llama2, LLAMA2, 1, id="llama2"),
        pytest.param(like_t5, T5, None, id="t5"),
        pytest.param(
            smollm2,
            SMOLLM2,
            None,
            id="smollm2",
            marks=[
                pytest.mark.realdata,
                pytest.mark.skipif("LIFT_SMOLLM2_DIR" not in os.environ, reason="LIFT_SMOLLM2_DIR is not set"),
            ],
        ),
    ],
)


@KINDS
@pytest.mark.parametrize("with_input", [False, True], ids=["bare", "input"])
def test_the_ids_of_a_whole_example(make, ids: Ids, bos: int | None, with_input: bool):
    tokenizer = make()
    prompt = render_prompt(INSTRUCTION, INPUT if with_input else "")
    head, tail = ids.prompt(with_input), ids.answer()
    assert encode_prompt(tokenizer, prompt) == head  # as generation sees it
    example = encode_example(tokenizer, prompt, TARGET, max_length=512)
    assert example.input_ids == head + tail
    assert example.labels == [-100] * len(head) + tail
    assert (example.prompt_length, example.label_length, example.truncated) == (len(head), len(tail), False)
    # BOS in front and nowhere else, where the tokenizer puts one; EOS once, last, with a label.
    assert adds_bos(tokenizer) == (bos is not None)
    eos = tokenizer.eos_token_id
    assert [i for i, token in enumerate(example.input_ids) if token == eos] == [len(head) + len(tail) - 1]
    assert example.labels[-1] == eos
    if bos is None:
        assert tokenizer.bos_token_id not in example.input_ids[:-1]
    else:
        assert tokenizer.bos_token_id == bos
        assert [i for i, token in enumerate(example.input_ids) if token == bos] == [0]


@KINDS
@pytest.mark.parametrize("with_input", [False, True], ids=["bare", "input"])
def test_the_ids_say_the_text(make, ids: Ids, bos: int | None, with_input: bool):
    tokenizer = make()
    prompt = render_prompt(INSTRUCTION, INPUT if with_input else "")
    head, tail = ids.prompt(with_input), ids.answer()
    assert tokenizer.decode(head, skip_special_tokens=True) == prompt
    assert tokenizer.decode(tail, skip_special_tokens=True) == TARGET
    # A tokenizer in the manner of SentencePiece begins every text with a space. As prompt and target are tokenised
    # apart, one stands between them. It does when the model answers, too, and is no part of the answer that is read.
    space = " " if make in (like_llama2, like_t5) else ""
    assert tokenizer.decode(head + tail, skip_special_tokens=True) == prompt + space + TARGET


@KINDS
@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_leaves_every_real_token(make, ids: Ids, bos: int | None, side):
    # With pad = EOS a mask that is made by comparing ids with the pad token hides the EOS that ends the answer.
    tokenizer = make()
    texts = [render_prompt(INSTRUCTION), render_prompt(INSTRUCTION, INPUT)]
    examples = [vars(encode_example(tokenizer, text, TARGET, max_length=512)) for text in texts]
    pad = choose_pad_id(tokenizer)
    assert pad == tokenizer.pad_token_id
    assert (pad == tokenizer.eos_token_id) == (make in (like_gpt2, smollm2))
    batch = pad_batch(examples, pad, side=side)
    width = len(ids.with_input.split()) + len(ids.answer())
    assert batch["input_ids"].shape == (2, width)
    for i, with_input in enumerate([False, True]):
        head, tail = ids.prompt(with_input), ids.answer()
        short = width - len(head) - len(tail)
        rows = {
            "input_ids": (head + tail, pad),
            "attention_mask": ([1] * len(head + tail), 0),
            "labels": ([-100] * len(head) + tail, -100),
        }
        for name, (row, fill) in rows.items():
            padded = row + [fill] * short if side == "right" else [fill] * short + row
            assert batch[name][i].tolist() == padded, name
    assert (batch["labels"] == tokenizer.eos_token_id).sum(dim=1).tolist() == [1, 1]
    assert batch["attention_mask"][batch["labels"] == tokenizer.eos_token_id].tolist() == [1, 1]
