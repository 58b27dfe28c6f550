"""A Hugging Face checkpoint as a bfloat16 GGUF file, by llama.cpp's own converter.

    python benchmarks/cpu/peers/convert_gguf.py LLAMA_CPP_SOURCES MODEL_DIR OUT.gguf

The converter recognizes published tokenizers by a fingerprint; this answers that question for a byte-level one of our
own. `llama-quantize OUT.gguf OUT-Q8_0.gguf Q8_0` makes the other formats of it.
"""

import argparse
import runpy
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources")
    parser.add_argument("model")
    parser.add_argument("out")
    options = parser.parse_args()
    sys.path[:0] = [options.sources, f"{options.sources}/gguf-py"]
    from conversion.base import TextModel

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
    sys.argv = ["convert", options.model, "--outfile", options.out, "--outtype", "bf16"]
    runpy.run_path(f"{options.sources}/convert_hf_to_gguf.py", run_name="__main__")


if __name__ == "__main__":
    main()
