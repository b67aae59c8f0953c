"""Small random models, built from configs: nothing is downloaded."""

import tokenizers
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY, HIDDEN, WIDTH, LAYERS = 97, 32, 72, 3

LLAMA_LIKE = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**LLAMA_LIKE | changes))


def llama_bias():
    return llama(mlp_bias=True, attention_bias=True)


def llama_gelu():
    return llama(hidden_act="gelu_pytorch_tanh")


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**LLAMA_LIKE))


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=HIDDEN,
            n_inner=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=128,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def gpt_neo():
    return GPTNeoForCausalLM(
        GPTNeoConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            num_layers=LAYERS,
            num_heads=4,
            max_position_embeddings=128,
            bos_token_id=0,
            eos_token_id=0,
            attention_types=[[["global", "local", "global"], 1]],
        )
    )


FAMILIES = {f.__name__: f for f in (llama, llama_bias, llama_gelu, qwen2, gpt2, gpt_neo)}


def build(name, dtype=torch.float32, seed=0):
    """A model in eval mode with weights, biases included, large enough for every neuron to matter."""
    torch.manual_seed(seed)
    model = FAMILIES[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("bias"):
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def batch(samples=4, tokens=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, tokens), generator=generator)


def tokenizer():
    """A tokenizer of 97 tokens: three special ones and the printable ASCII characters that come first."""
    symbols = ["<pad>", "<s>", "</s>", *map(chr, range(32, 32 + VOCABULARY - 3))]
    model = tokenizers.models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="?")
    fast = tokenizers.Tokenizer(model)
    fast.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    fast.decoder = tokenizers.decoders.Fuse()
    fast.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="?"
    )
