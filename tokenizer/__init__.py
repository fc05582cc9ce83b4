"""Tokenizers: sentencepiece training, conversion to Hugging Face form, and the chat format of any HF folder."""
