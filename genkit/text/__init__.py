"""What a language model does: generate, explain, score, correct."""
