"""A Hugging Face checkpoint as OpenVINO's format; run with a Python that has optimum-intel and nncf.

    python benchmarks/cpu/peers/convert_openvino.py MODEL_DIR OUT_DIR bf16|int8|int4

int8 and int4 compress weights alone; the CPU plugin then quantizes activations by itself. int4 has groups of 64.
"""

import argparse

import openvino
from openvino_tokenizers import convert_tokenizer
from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig
from transformers import AutoTokenizer

QUANTIZED = {
    "int8": OVWeightQuantizationConfig(bits=8, sym=False),
    "int4": OVWeightQuantizationConfig(bits=4, sym=False, group_size=64, ratio=1.0),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("weights", choices=["bf16", *QUANTIZED])
    options = parser.parse_args()
    # Without a word about it, larger models would be compressed to int8.
    how = (
        {"quantization_config": QUANTIZED[options.weights]} if options.weights in QUANTIZED else {"load_in_8bit": False}
    )
    OVModelForCausalLM.from_pretrained(options.model, export=True, compile=False, **how).save_pretrained(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    tokenizer.save_pretrained(options.out)
    encoder, decoder = convert_tokenizer(tokenizer, with_detokenizer=True)
    openvino.save_model(encoder, f"{options.out}/openvino_tokenizer.xml")
    openvino.save_model(decoder, f"{options.out}/openvino_detokenizer.xml")


if __name__ == "__main__":
    main()
