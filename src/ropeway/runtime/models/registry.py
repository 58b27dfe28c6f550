"""Architecture names of Hugging Face configurations, and the classes that compute them."""

from __future__ import annotations

from ropeway.runtime.models.deepseek import Deepseek
from ropeway.runtime.models.llama import Llama
from ropeway.runtime.models.mistral import Mistral
from ropeway.runtime.models.mixtral import Mixtral
from ropeway.runtime.models.qwen2 import Qwen2
from ropeway.runtime.models.qwen3 import Qwen3, Qwen3Moe

MODELS: dict[str, type[Llama]] = {
    "LlamaForCausalLM": Llama,
    "MistralForCausalLM": Mistral,
    "Qwen2ForCausalLM": Qwen2,
    "Qwen3ForCausalLM": Qwen3,
    "MixtralForCausalLM": Mixtral,
    "Qwen3MoeForCausalLM": Qwen3Moe,
    "DeepseekV2ForCausalLM": Deepseek,
    "DeepseekV3ForCausalLM": Deepseek,
}
"""Keys equal `ropeway.modelspec.ARCHITECTURES`. Models of other names have specs of other kinds, see `models.build`."""
