"""Data: texts, corpora, tokenizers, images and questions, and the order of training on them."""
