"""Tiny random text encoders with real tokenizers, as the keyword arguments of pipelines."""

from __future__ import annotations

from typing import Any, Final

import transformers
from tokenizers.pre_tokenizers import ByteLevel

from rollout.tiny.vocabulary import build_tokenizer

LETTERS: Final = [*"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;!?'\"()->\n"]
THIN: Final = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
"""Sizes beside the width, which is what a transformer sees of its text encoder."""

CHAT: Final = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip(width: int = 16, length: int = 14) -> dict[str, Any]:
    """Build a CLIP."""
    tokenizer = build_tokenizer(length)
    config = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=length, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return {"text_encoder": transformers.CLIPTextModel(config), "tokenizer": tokenizer}


def _unigram() -> transformers.T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *(letter for letter in LETTERS if not letter.isspace())]
    return transformers.T5Tokenizer(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0)


def t5(suffix: str, width: int = 16) -> dict[str, Any]:
    """Build a T5, under names that end in ``suffix``."""
    tokenizer = _unigram()
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {f"text_encoder{suffix}": transformers.T5EncoderModel(config), f"tokenizer{suffix}": tokenizer}


def umt5(width: int = 16) -> dict[str, Any]:
    """Build a UMT5."""
    tokenizer = _unigram()
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return {"text_encoder": transformers.UMT5EncoderModel(config), "tokenizer": tokenizer}


def gemma(width: int = 16) -> dict[str, Any]:
    """Build a Gemma 2."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *LETTERS]
    tokenizer = transformers.GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)})
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), head_dim=8, num_hidden_layers=1, hidden_size=width, **THIN
    )
    return {"text_encoder": transformers.Gemma2Model(config), "tokenizer": tokenizer}


def _bytes() -> transformers.Qwen2Tokenizer:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    pieces = [*special, *sorted(ByteLevel.alphabet())]
    tokenizer = transformers.Qwen2Tokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    tokenizer.chat_template = CHAT
    return tokenizer


def qwen3(*, layers: int, causal: bool, width: int = 16) -> dict[str, Any]:
    """Build a Qwen3, with or without its language-model head."""
    tokenizer = _bytes()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), head_dim=8, num_hidden_layers=layers, hidden_size=width, **THIN
    )
    kind = transformers.Qwen3ForCausalLM if causal else transformers.Qwen3Model
    return {"text_encoder": kind(config), "tokenizer": tokenizer}


def qwen_vl(width: int = 16) -> dict[str, Any]:
    """Build a Qwen2.5-VL."""
    tokenizer = _bytes()
    text = {
        "vocab_size": len(tokenizer), "num_hidden_layers": 1, **THIN, "hidden_size": width,
        "num_attention_heads": width // 8,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4},
    }  # fmt: skip
    sizes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    vision = {**sizes, "out_hidden_size": width}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    return {
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration(config),
        "tokenizer": tokenizer,
    }


def mistral(*, layers: int, width: int = 16) -> dict[str, Any]:
    """Build a Mistral 3 with its processor."""
    tokenizer = _bytes()
    text = transformers.MistralConfig(
        vocab_size=len(tokenizer), head_dim=8, num_hidden_layers=layers, hidden_size=width, **THIN
    )
    vision = transformers.PixtralVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32
    )
    config = transformers.Mistral3Config(text_config=text, vision_config=vision)
    processor = transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(), tokenizer=tokenizer, chat_template=CHAT
    )
    return {"text_encoder": transformers.Mistral3ForConditionalGeneration(config), "tokenizer": processor}
