"""Small tokenizers of the kinds that models have."""

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

_TEXTS = ["hello there, the end is near the sea"] * 20


def byte_level(special: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """Byte-level BPE, as SmolLM2 and Llama 3 have: a character may be several tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return tokenizer


def sentence_piece(special: tuple[str, ...] = ("<end>",)) -> Tokenizer:
    """As Llama 2, Mistral and Phi-3 have: a blank belongs to the token after it, a text gets one in
    front, and characters that aren't in the vocabulary are tokens of bytes."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocabulary |= {f"<0x{byte:02X}>": byte + 3 for byte in range(256)}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz", "se", "sea", "▁t", "▁th", "▁the"]:
        vocabulary[token] = len(vocabulary)
    merges = [("s", "e"), ("se", "a"), ("▁", "t"), ("▁t", "h"), ("▁th", "e")]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>", *special)]
    )
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT has: blanks follow from the tokens' neighbours."""
    words = ["[UNK]", *"abcdefghijklmnopqrstuvwxyz", "hello", "the", "sea", "##re", "say", ":"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    tokenizer.add_special_tokens(["<end>"])
    return tokenizer
