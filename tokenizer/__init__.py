"""Tokenizers: sentencepiece training, conversion to Hugging Face form, the chat format of any folder."""
