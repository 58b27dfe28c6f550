"""Small real vocabularies of the kinds that models have."""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from ropeway.text.tokenizer import HubTokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "naïve café — déjà vu",
    "你好，世界",
    "👩‍👩‍👧 family 🎉🎉",
    "  two  spaces\n",
]


def byte_level() -> HubTokenizer:
    """GPT-2, Llama 3 and Qwen style: byte-level BPE with special and ordinary added tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(CORPUS * 4, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|ünï|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool→>", normalized=False)])
    return HubTokenizer(tokenizer, eos_id=tokenizer.token_to_id("<|end|>"))


def _fallback_vocabulary() -> models.BPE:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *"abcdefghijklmnopqrstuvwxyz.é"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = []
    for left, right in [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁"), ("o", "f")]:
        merges.append((left, right))
        vocab[left + right] = len(vocab)
    return models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


def _with_marks(tokenizer: Tokenizer) -> HubTokenizer:
    tokenizer.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return HubTokenizer(tokenizer, bos_id=1, eos_id=2)


def llama_style() -> HubTokenizer:
    """Llama 2 and Mistral: a normalizer writes spaces as ▁, bytes outside of the vocabulary are tokens."""
    tokenizer = Tokenizer(_fallback_vocabulary())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _with_marks(tokenizer)


def gemma_style() -> HubTokenizer:
    """The same without the space in front."""
    tokenizer = Tokenizer(_fallback_vocabulary())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return _with_marks(tokenizer)


def metaspace_style() -> HubTokenizer:
    """Sentencepiece by pre-tokenizer: the first token's ▁ vanishes."""
    tokenizer = Tokenizer(_fallback_vocabulary())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="always", split=False), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_marks(tokenizer)


def stripped_style() -> HubTokenizer:
    """Each token loses what it may have at its ends."""
    tokenizer = Tokenizer(_fallback_vocabulary())
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Strip("e", 0, 1), decoders.Strip("▁", 2, 0), decoders.ByteFallback(), decoders.Fuse()]
    )
    return _with_marks(tokenizer)


def word_piece() -> HubTokenizer:
    """BERT: pieces within a word are marked, and spaces before marks of punctuation vanish."""
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    signs = [*"abcdefghijklmnopqrstuvwxyz.,!?'", "the", "do", "not", "don"]
    tokens = [*marks, *signs, *(f"##{sign}" for sign in signs)]
    tokenizer = Tokenizer(models.WordPiece({token: i for i, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return HubTokenizer(tokenizer)
