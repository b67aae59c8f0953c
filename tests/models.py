"""Small random models, built from configs: nothing is downloaded."""

import tokenizers
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY, HIDDEN, WIDTH, LAYERS, EXPERTS = 97, 32, 72, 3, 4

LLAMA_LIKE = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=WIDTH,
    num_hidden_layers=LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
GPT_LIKE = dict(
    vocab_size=VOCABULARY, n_embd=HIDDEN, n_inner=WIDTH, n_layer=LAYERS, n_head=4, n_positions=128,
    bos_token_id=0, eos_token_id=0,
)  # fmt: skip
HEADS = dict(head_dim=8)
MOE = dict(moe_intermediate_size=WIDTH, num_experts=EXPERTS, num_experts_per_tok=2)
LOCAL = dict(num_local_experts=EXPERTS, num_experts_per_tok=2)

# The model_type and what its config needs; a name of our own where one type comes twice.
FAMILIES = {
    "gpt2": ("gpt2", GPT_LIKE),
    "gpt_neo": ("gpt_neo", dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=WIDTH, num_layers=LAYERS, num_heads=4,
        max_position_embeddings=128, bos_token_id=0, eos_token_id=0,
        attention_types=[[["global", "local", "global"], 1]],
    )),
    "gptj": ("gptj", GPT_LIKE | dict(rotary_dim=4, tie_word_embeddings=False)),
    "gpt_neox": ("gpt_neox", LLAMA_LIKE),
    "phi": ("phi", LLAMA_LIKE),
    "opt": ("opt", dict(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, ffn_dim=WIDTH, num_hidden_layers=LAYERS,
        num_attention_heads=4, max_position_embeddings=128, word_embed_proj_dim=HIDDEN,
    )),
    "starcoder2": ("starcoder2", LLAMA_LIKE),
    "bloom": ("bloom", dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, n_layer=LAYERS, n_head=4)),
    "llama": ("llama", LLAMA_LIKE),
    "llama_bias": ("llama", LLAMA_LIKE | dict(mlp_bias=True, attention_bias=True)),
    "llama_gelu": ("llama", LLAMA_LIKE | dict(hidden_act="gelu_pytorch_tanh")),
    "llama_mish": ("llama", LLAMA_LIKE | dict(hidden_act="mish")),
    "smollm3": ("smollm3", LLAMA_LIKE),
    "mistral": ("mistral", LLAMA_LIKE),
    "qwen2": ("qwen2", LLAMA_LIKE),
    "qwen3": ("qwen3", LLAMA_LIKE | HEADS),
    "olmo2": ("olmo2", LLAMA_LIKE),
    "gemma": ("gemma", LLAMA_LIKE | HEADS),
    "gemma2": ("gemma2", LLAMA_LIKE | HEADS | dict(query_pre_attn_scalar=8)),
    "gemma3": ("gemma3_text", LLAMA_LIKE | HEADS | dict(query_pre_attn_scalar=8)),
    "gemma3n": ("gemma3n_text", LLAMA_LIKE | HEADS | dict(
        intermediate_size=[WIDTH] * LAYERS, activation_sparsity_pattern=[0.5, 0.0, 0.0], laurel_rank=8,
        hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY, altup_num_inputs=2,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"], sliding_window=8,
        num_kv_shared_layers=0,
    )),
    "phi3": ("phi3", LLAMA_LIKE),
    "glm4": ("glm4", LLAMA_LIKE | HEADS),
    "lfm2": ("lfm2", LLAMA_LIKE | dict(
        block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention", "conv"],
    )),
    "modernbert_decoder": ("modernbert-decoder", LLAMA_LIKE),
    "mixtral": ("mixtral", LLAMA_LIKE | LOCAL),
    "qwen2_moe": ("qwen2_moe", LLAMA_LIKE | MOE | dict(shared_expert_intermediate_size=40)),
    "qwen3_moe": ("qwen3_moe", LLAMA_LIKE | HEADS | MOE),
    "deepseek_v3": ("deepseek_v3", LLAMA_LIKE | dict(
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, moe_intermediate_size=WIDTH, n_routed_experts=EXPERTS, num_experts_per_tok=2, n_group=2,
        topk_group=1, first_k_dense_replace=1,
    )),
    "gpt_oss": ("gpt_oss", LLAMA_LIKE | HEADS | LOCAL),
    "llama4": ("llama4_text", LLAMA_LIKE | HEADS | LOCAL | dict(intermediate_size_mlp=40, moe_layers=[1, 2])),
    "jetmoe": ("jetmoe", LLAMA_LIKE | LOCAL | dict(kv_channels=8)),
}  # fmt: skip
OF_EXPERTS = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "llama4", "jetmoe")
SMALL = ("llama", "llama_bias", "qwen2", "gpt2", "gpt_neo", "phi3", "mixtral")  # one of each kind


def config(name, **changes):
    model_type, options = FAMILIES[name]
    return AutoConfig.for_model(model_type, **options | changes)


def build(name, dtype=torch.float32, seed=0, **changes):
    """A model in eval mode with weights, biases included, large enough for every neuron to matter."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(name, **changes))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() > 1 or key.endswith("bias"):
                parameter.normal_(std=0.15)
    return model.to(dtype).eval()


def build_double(name):
    """A model in float64, which transformers' grouped products of experts do not have."""
    model = build(name).double()
    if name in OF_EXPERTS[:5]:
        model.set_experts_implementation("eager")
    return model


def randomise(masked, seed=3):
    """Scores around the middle of the gate's range."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for score in masked.scores.values():
            score.copy_(torch.randn(score.shape, generator=generator))


def batch(samples=4, tokens=7, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (samples, tokens), generator=generator)


def learn(model, known, steps):
    """Train a model until it knows a batch by heart; returns it."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        model(**known).loss.backward()
        optimizer.step()
    return model


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


def llama_2_tokenizer():
    """A tokenizer that, like Llama 2's, puts a space before whatever it is given."""
    spaced = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    spaced.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    spaced.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    lines = ["Who is Jo?\nJo bakes bread.", "mail qi7whj, phone 4000348"] * 20
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=special, show_progress=False)
    spaced.train_from_iterator(lines, trainer)
    spaced.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=spaced, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def same(first, second):
    """Whether two mute sets have the same neurons and gains."""
    return first.layers.keys() == second.layers.keys() and all(
        torch.equal(x, y)
        for path in first.layers
        for x, y in zip(first.layers[path], second.layers[path], strict=True)
    )
