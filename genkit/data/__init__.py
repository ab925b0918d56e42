"""What goes in: texts, corpora, tokenizers of our own, images, questions, in their order."""
