"""A checkpoint of the reader with its real tower before a language model of one random layer and few words."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.reader.assembling import assemble
from benchmarks.reader.books import PAGE_KINDS, book
from benchmarks.reader.words import CITIES, COLOURS, FILLERS, JOBS, NAMES, TITLES

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
FRAMES = ["The access code of Oslo is 1234.", "Emma is a doctor.", "The color of", "The picture of", "Report 1:\n"]


def word_tokenizer():
    """A byte-level tokenizer as SmolLM2's, to which every word of the pages is one token and every digit another."""
    tokenizer = Tokenizer(models.BPE())
    digits, pieces = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pieces])
    tokenizer.decoder = decoders.ByteLevel()
    words = [*CITIES, *NAMES, *JOBS, *COLOURS, *FILLERS, *TITLES, *FRAMES]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=6000, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([f" {word}" for word in words] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_language_model(vocab_size):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=576,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


def write_checkpoint(folder):
    """Writes it, and gives the language model as it was."""
    tokenizer = word_tokenizer()
    language_model = random_language_model(len(tokenizer))
    assemble(language_model, tokenizer, folder)
    return language_model


def one_of_each(seed=3):
    tokenizer = word_tokenizer()
    return tokenizer, [book(kind, seed, tokenizer) for kind in PAGE_KINDS]
