"""Makes tests/goldens/qwen3 and qwen2 with transformers and torch, which the tests do not need.

python tests/goldens/make_qwen.py    (made with transformers 5.23.0, torch 2.15.0)

Tiny models with random weights, saved by transformers: Qwen3 untied in three shards with YaRN, Qwen2 tied in one file.
golden.npz holds, per prompt, the logits in float64 and the greedy continuation.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).parent
VOCAB, LENGTHS, NEW = 44, (19, 7, 1), 8
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "use_sliding_window": False,
    "attn_implementation": "eager",
    "eos_token_id": 2,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 8}


def make(name, model, shard):
    folder = HERE / name
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms and biases start at one and zero, which would hide mistakes
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=shard)
    model = model.double().eval()
    golden = {}
    with torch.no_grad():
        for row, length in enumerate(LENGTHS):
            ids = torch.randint(0, VOCAB, (1, length), generator=generator)
            golden[f"ids_{row}"] = ids[0].numpy().astype(np.int32)
            golden[f"logits_{row}"] = model(ids).logits[0].numpy()
            for _ in range(NEW):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            golden[f"greedy_{row}"] = ids[0, length:].numpy().astype(np.int32)
    np.savez_compressed(folder / "golden.npz", **golden)


torch.manual_seed(0)
qwen3 = Qwen3Config(**SHAPE, head_dim=6, tie_word_embeddings=False, rope_parameters=YARN)
make("qwen3", Qwen3ForCausalLM(qwen3), "12KB")
make("qwen2", Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)), "1MB")
