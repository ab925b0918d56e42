"""Answers from a text: the reader, its windows and spans, and fine-tuning."""
