"""Small random models for chats: a tokenizer with merges and control tokens, and templates."""

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from genkit.text.language_model import LanguageModel

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>"]
PAIRS = (
    *(("h", "e"), ("t", "he"), ("Ġ", "the"), ("Ċ", "Ċ"), ("i", "n"), ("in", "g"), ("a", "n")),
    *(("Ġ", "Ġ"), (".", "Ċ"), ("u", "s"), ("us", "er"), ("e", "r"), ("Ġ", "a"), ("o", "n")),
)

# As the models of these names have them: ends of turns, system messages and spaces differ
TEMPLATES = {
    "chatml": "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "llama2": "{% set system = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}{% for m in messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate!') }}{% endif %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' "
    "}}{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}",
    "mistral": "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% elif m['role'] == 'assistant' %}"
    "{{ m['content'] + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
    "gemma": "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] | trim + "
    "eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
    "{% endif %}",
}
WITH_SYSTEM = ("chatml", "llama2", "zephyr")


def chat_tokenizer(template: str | None = TEMPLATES["chatml"]) -> PreTrainedTokenizerFast:
    """Bytes as GPT-2 has them, a few merges, and control tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(a + b for a, b in PAIRS)]
    backend = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, list(PAIRS)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=SPECIAL[2:],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def chat_model(
    template: str | None = TEMPLATES["chatml"], context: int = 512, seed: int = 0
) -> LanguageModel:
    """A random Llama with rather peaked predictions, which ends some of its replies."""
    tokenizer = chat_tokenizer(template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
        ends = tokenizer.convert_tokens_to_ids(["</s>", "<|im_end|>", "<end_of_turn>"])
        model.lm_head.weight.mul_(5)
        model.lm_head.weight[ends] *= 1.3
    return LanguageModel(model, tokenizer, "tiny-chat")


def save_chat_model(folder: Path, template: str | None = TEMPLATES["chatml"]) -> None:
    """Save such a model as an ordinary folder."""
    language = chat_model(template)
    language.model.save_pretrained(folder)
    language.tokenizer.save_pretrained(folder)


# What a user asks in three turns each
CONVERSATIONS = [
    ("What is the capital of France?", "And of Italy?", "Which of the two is larger?"),
    ("Name three fruits.", "Now name three vegetables.", "Write one sentence with all six."),
    ("Write a haiku about the sea.", "Now one about a mountain.", "Which one do you prefer?"),
    ("What is 12 times 7?", "Add 16 to it.", "How did you get there?"),
    ("Who wrote Romeo and Juliet?", "When did he live?", "Name another play of his."),
    ("Explain photosynthesis to a child.", "Make it shorter.", "Give it a title."),
    ("Translate 'good morning' into Spanish.", "And into French?", "How do I answer politely?"),
    ("My name is Ada. I like chess.", "What is my name?", "What do I like?"),
    ("Give me a recipe for pancakes.", "I have no eggs.", "How long does it take?"),
    ("Write a Python function that adds two numbers.", "Add a docstring.", "Call it with 2 and 3."),
]
